"""The embedded language's probabilities are exact, and the committed models know the language."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest

from pruneexp.embedded import FOLDER as ROOT
from pruneexp.embedded import language, lexicon
from pruneexp.embedded.language import CALIBRATION, EVALUATION, KINDS, TRAINING, Process, piece
from tests import embedded_process
from tests.embedded_process import Story, split, stories, text

MEGABYTES = {"llama": 4, "opt": 3, "bloom": 3}
# seeds that neither training nor its own evaluation used
WINDOWS, QUESTIONS = EVALUATION[100], EVALUATION[101]


@pytest.fixture(scope="module")
def sample() -> list[Story]:
    return list(itertools.islice(stories(CALIBRATION[5]), 1500))


@pytest.fixture(scope="module", params=sorted(MEGABYTES))
def checkpoint(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / request.param
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return request.param, model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "llama", local_files_only=True)


@pytest.mark.slow
def test_importing_stays_light() -> None:
    code = "import sys; from pruneexp.embedded.language import texts; next(texts(1))"
    code += "; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_seed_ranges_do_not_overlap() -> None:
    ends = [(r.start, r.stop) for r in (TRAINING, CALIBRATION, EVALUATION)]
    assert all(low[1] <= high[0] for low, high in itertools.pairwise(ends))
    for folder in MEGABYTES:
        record = json.loads((ROOT / folder / "training.json").read_text())
        assert record["training_seeds"][1] in TRAINING
        assert all(seed in EVALUATION for seed in record["evaluation"]["seeds"])


def test_a_word_has_one_class() -> None:
    classes = [
        value if isinstance(value, list) else list(value)
        for name, value in vars(lexicon).items()
        if name.isupper() and isinstance(value, (list, dict)) and name not in ("PRONOUN", "VERBS")
    ]
    assert max(Counter(itertools.chain(*classes)).values()) == 1


def test_deterministic() -> None:
    assert text(7, 3) == text(7, 3) != text(8, 3)
    assert language.questions(EVALUATION[3], 12) == language.questions(EVALUATION[3], 12)
    assert text(7, 3) == "".join(s.text for s in itertools.islice(stories(7), 3))


def test_the_stream_is_the_same_everywhere() -> None:
    assert text(EVALUATION[0], 1).startswith(
        "Rosa Page put the blue doll in the broad field. Yesterday the small bears near the goats were happy."
    )


def test_text_alone_gives_the_probabilities(sample: list[Story]) -> None:
    """A state replayed from the bare text finds every word's nats; every distribution sums to 1."""
    process = Process()
    for story in sample[:200]:
        words = split(story.text)
        assert words == list(story.words)
        for i, (word, nats) in enumerate(zip(words, story.nats, strict=True)):
            assert math.isclose(math.fsum(process.step.probs.values()), 1, abs_tol=1e-12)
            assert math.isclose(-math.log(process.step.probs[word]), nats, abs_tol=1e-12)
            assert process.advance(word) == (i == len(words) - 1)


def test_process_refuses_what_cannot_come() -> None:
    with pytest.raises(ValueError, match="cannot come here"):
        Process().advance("barn")


def test_information_averages_to_the_entropy(sample: list[Story]) -> None:
    """mean(-ln p(word)) and mean(entropy of the distribution) have the same expectation."""
    process, gaps = Process(), []
    for story in sample[:600]:
        entropy = 0.0
        for word in story.words:
            entropy -= sum(p * math.log(p) for p in process.step.probs.values())
            process.advance(word)
        gaps.append(sum(story.nats) - entropy)
    standard_error = np.std(gaps) / math.sqrt(len(gaps))
    assert abs(np.mean(gaps)) < 4 * standard_error


def test_frequencies_agree_with_probabilities(sample: list[Story]) -> None:
    """Counted apart from the sampler: how often each word comes against the sum of its probabilities."""
    process = Process()
    count: dict[str, float] = defaultdict(float)
    expected: dict[str, float] = defaultdict(float)
    variance: dict[str, float] = defaultdict(float)
    for story in sample:
        for word in split(story.text):
            count[word] += 1
            for other, p in process.step.probs.items():
                expected[other] += p
                variance[other] += p * (1 - p)
            process.advance(word)
    assert set(count) <= set(expected)
    z = [(count[w] - expected[w]) / math.sqrt(variance[w]) for w in expected if variance[w] > 10]
    assert len(z) > 200 and max(map(abs, z)) < 5 and 0.8 < np.std(z) < 1.2


def test_facts_come_back_often(sample: list[Story]) -> None:
    """A model that cannot recall loses: recall, agreement and sums are a real share, and certain."""
    kinds = Counter(kind for story in sample for kind in story.kinds)
    certain = kinds["recall"] + kinds["agreement"] + kinds["count"]
    assert certain / kinds.total() > 0.12
    assert all(n == 0 for s in sample for n, kind in zip(s.nats, s.kinds, strict=True) if kind != "choice")


def test_windows(tokenizer: Any) -> None:
    tokens, nats = embedded_process.windows(tokenizer, CALIBRATION[0], 6, 200)
    assert tokens.dtype == np.int64 and nats.dtype == np.float64 and tokens.shape == nats.shape == (6, 200)
    again, _ = embedded_process.windows(tokenizer, CALIBRATION[0], 6, 200)
    assert (tokens == again).all()
    process = Process()
    first = next(stories(CALIBRATION[0]))
    assert tokenizer.decode(tokens[0]).startswith(first.text[:100])
    for row, information in zip(tokens, nats, strict=True):
        process = Process()
        for token, expected in zip(row, information, strict=True):
            word = tokenizer.decode([token]).strip(" ")
            assert math.isclose(-math.log(process.step.probs[word]), expected, abs_tol=1e-12)
            process.advance(word)


class _Letters:
    """A tokenizer with one token a character."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) for letter in text]


def test_nats_of_a_word_in_several_tokens() -> None:
    """They sum to the word's, and each is the token's own conditional probability."""
    story = next(stories(CALIBRATION[9]))
    length = len(story.text)
    tokens, nats = embedded_process.windows(_Letters(), CALIBRATION[9], 1, length)
    assert "".join(map(chr, tokens[0])) == story.text
    assert math.isclose(nats.sum(), sum(story.nats), rel_tol=1e-9)
    first = Process().step.probs
    same = sum(p for word, p in first.items() if word[0] == story.text[0])
    assert math.isclose(nats[0, 0], -math.log(same), rel_tol=1e-9)


def test_a_tokenizer_that_joins_words_is_refused() -> None:
    class Joined:
        def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
            return [len(text)]

    with pytest.raises(ValueError, match="no exact nats"):
        embedded_process.windows(Joined(), CALIBRATION[0], 1, 32)


def test_tokenizer(tokenizer: Any, sample: list[Story]) -> None:
    """Lossless, one token a word, no special token added, specials at 0, 1, 2."""
    vocabulary = {piece(word, i == 0) for story in sample for i, word in enumerate(story.words)}
    assert all(len(tokenizer.encode(word)) == 1 for word in vocabulary)
    text = sample[0].text + sample[1].text
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("Something else, naïve 7!\n")) == "Something else, naïve 7!\n"
    assert len(tokenizer.encode(text)) == len(sample[0].words) + len(sample[1].words)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert 300 <= len(tokenizer) <= 1000


def test_questions() -> None:
    """The context is a story's prefix, the right choice its only continuation; kinds and answers balance."""
    questions = language.questions(QUESTIONS, 400)
    assert set(Counter(q.answer for q in questions).values()) == {100}
    assert Counter(q.kind for q in questions) == dict.fromkeys(KINDS, 40)
    assert max(Counter((q.kind, q.answer) for q in questions).values()) == 10
    for question in questions:
        assert len(set(question.choices)) == 4 and len({len(c.split()) for c in question.choices}) == 1
        possible = []
        for choice in question.choices:
            process = Process()
            try:
                for word in split(f"{question.context} {choice}"):
                    process.advance(word)
            except ValueError:
                continue
            possible.append(choice)
        assert possible == [question.choices[question.answer]]


def test_wrong_choices_are_near() -> None:
    """Names, foods and numbers of the same story, or half of the right answer."""
    questions = [q for q in language.questions(QUESTIONS, 200) if q.kind not in ("agreement", "pronoun", "count")]
    for question in questions:
        words = set(question.choices[question.answer].split())
        wrong = [choice for i, choice in enumerate(question.choices) if i != question.answer]
        if question.kind in ("thing", "place", "visit", "object"):
            assert sum(bool(words & set(choice.split())) for choice in wrong) == 2
    owners = [q for q in questions if q.kind == "owner"]
    assert sum(sum(choice in q.context for choice in q.choices) == 2 for q in owners) > len(owners) / 5


def test_committed_files(checkpoint: tuple[str, Any, Any]) -> None:
    family, model, _ = checkpoint
    files = sorted(path.name for path in (ROOT / family).iterdir())
    assert sum((ROOT / family / name).stat().st_size for name in files) <= MEGABYTES[family] * 1e6
    expected = "config generation_config tokenizer tokenizer_config training".split()
    assert files == sorted([*(f"{name}.json" for name in expected), "model.safetensors"])
    config = (ROOT / family / "config.json").read_text()
    assert "_name_or_path" not in config and "/" not in config
    assert 1e6 <= model.num_parameters() <= 3e6


@pytest.mark.slow
def test_perplexity_is_near_the_process(checkpoint: tuple[str, Any, Any]) -> None:
    _, model, tokenizer = checkpoint
    tokens, nats = embedded_process.windows(tokenizer, WINDOWS, 80, 128)
    best, perplexity = embedded_process.best_perplexity(nats), embedded_process.perplexity(model, tokens)
    assert 0.97 * best < perplexity < 1.10 * best


@pytest.mark.slow
def test_questions_are_answered(checkpoint: tuple[str, Any, Any]) -> None:
    _, model, tokenizer = checkpoint
    assert embedded_process.accuracy(model, tokenizer, language.questions(QUESTIONS, 120, limit=90)) > 0.85
