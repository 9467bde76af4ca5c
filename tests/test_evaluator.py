"""Figures against closed forms and brute force on models of a few hundred parameters."""

from __future__ import annotations

import inspect
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from pruneexp.dataset import text, tokens
from pruneexp.evaluator import Latency, Perplexity, Questions, Size
from pruneexp.model import Model
from pruneexp.model.modeling_pruned import LLAMA
from pruneexp.types import ConfigError, RunError
from tests.cases import each

CONF = Path(__file__).parents[1] / "conf"
V = 97


@dataclass
class Loaded:
    """What evaluators use of a model, around any module that maps ids to logits."""

    module: Any
    layers: Any = ()
    streamed: bool = False
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    vocab_size: int = V
    max_length: int | None = 64
    kv_elements: int = 0
    stored_bytes: ClassVar[dict[str, int]] = {}
    params, decoder_params, bytes = Model.params, Model.decoder_params, Model.bytes
    family: Any = LLAMA

    def broken_layer(self, tokens_BT: Tensor) -> str | None:
        return None

    def token_losses(self, tokens_NT: Tensor, batch_size: int, stage: str = "") -> Tensor:
        with torch.no_grad():
            logits = torch.cat([self.module(batch).logits for batch in tokens_NT.split(batch_size)])
        return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens_NT[:, 1:], reduction="none")


class Bytes:
    """One token a byte, up to the vocabulary."""

    bos_token_id: int | None = 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [byte % V for byte in text.encode()]


class Logits:
    """A module that answers with what `of(ids)` gives, [B, T, V]."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __call__(self, ids: Tensor) -> Any:
        return type("Output", (), {"logits": self.of(ids)})


def tiny_llama(**changes: Any) -> Loaded:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": V, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**(shape | changes))
    module = LlamaForCausalLM(config).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)  # far from uniform, so that protocols differ
    return Loaded(module, module.model.layers, kv_elements=2 * 2 * 2 * 4)


@pytest.fixture(scope="module")
def llama() -> Loaded:
    return tiny_llama()


@pytest.fixture
def stream(tmp_path: Path) -> Any:
    """A text dataset of 29 tokens: three windows of 8."""
    path = tmp_path / "story.txt"
    path.write_bytes(bytes(range(40, 69)))
    return text(str(path), str(path), None, samples=2, length=8, seed=0, sampling="random", bos=False)


def a_perplexity(dataset: Any, **changes: Any) -> Perplexity:
    fields = {"length": 8, "stride": None, "batch_size": 3, "bos": False, "samples": None}
    return Perplexity(dataset=dataset, **(fields | changes))


# perplexity


@pytest.mark.parametrize("changes", [{}, {"stride": 3}, {"bos": True}, {"stride": 3, "bos": True}, {"samples": 2}])
def test_uniform_logits_give_the_vocabulary(stream, changes):
    uniform = Loaded(Logits(lambda ids: torch.zeros(*ids.shape, V, dtype=torch.float64)))
    (value,) = a_perplexity(stream, **changes)(uniform, Bytes()).values()
    assert value == pytest.approx(V, rel=1e-12)


def test_a_model_that_knows_gives_one(stream):
    next_token = Loaded(Logits(lambda ids: 100.0 * nn.functional.one_hot((ids + 1) % V, V).double()))
    (value,) = a_perplexity(stream)(next_token, Bytes()).values()
    assert value == pytest.approx(1.0, rel=1e-12)


def brute_force(model: Loaded, ids: list[int], length: int, stride: int, bos: bool) -> float:
    """Token by token, each with its own context spelled out; a beginning-of-sequence token is one of `length`."""
    nats, start, scored_to, length = [], 0, 0, length - bos
    stride = min(stride, length)
    while start + length <= len(ids):
        for position in range(max(start, scored_to), start + length):
            context = [1] * bos + ids[start:position]
            if context:
                with torch.no_grad():
                    logits = model.module(torch.tensor([context])).logits[0, -1]
                nats.append(-float(logits.double().log_softmax(0)[ids[position]]))
        scored_to, start = start + length, start + stride
    return math.exp(sum(nats) / len(nats))


@each(
    "bos, stride, name",
    [(b, s, n) for b in (False, True) for s, n in ((None, "@8"), (8, "@8"), (3, "@8s3"), (1, "@8s1"))],
)
def test_protocols_against_brute_force(llama, stream, stride, bos, name):
    ids = Bytes().encode(bytes(range(40, 68 if bos else 64)).decode())  # no partial window
    measured = a_perplexity(stream, stride=stride, bos=bos)(llama, Bytes())
    expected = brute_force(llama, ids, 8, stride or 8, bos)
    assert measured == {f"ppl/story{name}{'+bos' if bos else ''}": pytest.approx(expected, rel=1e-5)}


def test_batches_do_not_matter(llama, stream):
    values = [a_perplexity(stream, batch_size=b)(llama, Bytes())["ppl/story@8"] for b in (1, 3, 100)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_a_subset_says_how_many(llama, stream):
    assert list(a_perplexity(stream, samples=2)(llama, Bytes())) == ["ppl/story@8[2]"]
    assert list(a_perplexity(stream, samples=99, stride=2, bos=True)(llama, Bytes())) == ["ppl/story@8s2+bos[11]"]


def test_token_windows_keep_their_width(llama, tmp_path):
    np.save(tmp_path / "windows.npy", np.arange(40).reshape(2, 20))
    dataset = tokens(None, str(tmp_path / "windows.npy"), None, None, False)
    whole = a_perplexity(dataset, length=None)(llama, None)
    assert list(whole) == ["ppl/windows@20"]
    losses = llama.token_losses(torch.arange(40).reshape(2, 20), 2)
    assert whole["ppl/windows@20"] == pytest.approx(float(losses.mean().exp()), rel=1e-6)
    assert list(a_perplexity(dataset, length=10)(llama, None)) == ["ppl/windows@10"]


def test_windows_are_made_once_per_tokenizer(llama, stream):
    evaluator, tokenizer = a_perplexity(stream), Bytes()
    first = evaluator.windows(tokenizer)
    assert evaluator.windows(tokenizer) is first and evaluator.windows(Bytes()) is not first


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"length": 1}, "length=1: expected an integer >= 2, or null"),
        ({"stride": 0}, "stride=0: expected null or an int from 1 to length=8"),
        ({"stride": 9}, "stride=9: expected null or an int from 1 to length=8"),
        ({"length": None, "stride": 4}, "stride=4: expected null or an int from 1 to length=None"),
        ({"batch_size": 0}, "batch_size=0: expected an integer >= 1"),
        ({"samples": 0}, "samples=0: expected an integer >= 1, or null"),
    ],
)
def test_perplexity_config_errors(stream, changes, expected):
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        a_perplexity(stream, **changes)


def test_stride_needs_one_text(tmp_path):
    with pytest.raises(ConfigError, match="^stride=4: dataset 'x' has separate windows"):
        a_perplexity(tokens(None, str(tmp_path / "x.npy"), None, None, False), stride=4)


def test_perplexity_errors_before_weights(stream, tmp_path):
    with pytest.raises(ConfigError, match=r"dataset\.evaluation=.*missing: no such file"):
        a_perplexity(replace(stream, evaluation_file=str(tmp_path / "missing"))).check()
    with pytest.raises(ConfigError, match="29 tokens found; expected at least 30"):
        a_perplexity(stream, length=30).prepare(Bytes(), V)
    with pytest.raises(ConfigError, match=r"token id 40 at window 0, position 0 is out of .* \(40\)"):
        a_perplexity(stream).prepare(Bytes(), 40)
    tokenizer = Bytes()
    tokenizer.bos_token_id = None
    with pytest.raises(ConfigError, match=r"bos=true, or auto .*: the tokenizer has no beginning-of-sequence token"):
        a_perplexity(stream, bos=True).prepare(tokenizer, V)


def test_losses_that_are_no_numbers(stream):
    def broken(ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, V)
        logits[2, 3] = math.nan
        return logits

    with pytest.raises(RunError, match="^ppl/story@8: .* not finite in 1 of 3 windows, first in window 2$"):
        a_perplexity(stream, batch_size=100)(Loaded(Logits(broken)), Bytes())
    hopeless = Loaded(Logits(lambda ids: 1e4 * nn.functional.one_hot(ids, V).double()))
    with pytest.raises(RunError, match="no finite perplexity"):
        a_perplexity(stream)(hopeless, Bytes())


def test_windows_longer_than_the_model(llama, stream, caplog):
    caplog.set_level(logging.WARNING)
    a_perplexity(stream)(replace(llama, max_length=7), Bytes())
    assert "ppl/story@8: windows of 8 tokens, more than the model's 7" in caplog.text


# size


@pytest.mark.parametrize("tied", [False, True])
def test_size_of_a_llama_by_hand(tied):
    model = tiny_llama(tie_word_embeddings=tied)
    attention, mlp = 16 * 16 * 2 + 2 * 8 * 16, 3 * 16 * 24  # q and o, k and v of two groups; gate, up, down
    decoder = 2 * (attention + mlp + 2 * 16)
    params = decoder + (1 if tied else 2) * V * 16 + 16
    assert Size()(model, None) == {
        "params": params,
        "params/decoder": decoder,
        "bytes": 4 * params,
        "macs/token": 2 * (attention + mlp) + V * 16,
        "kv_bytes/token": 32 * 4,
    }


def test_size_of_an_opt_by_hand():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=V,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=30,
    )
    module = OPTForCausalLM(config).half()
    model = Loaded(module, module.model.decoder.layers, dtype=torch.float16, kv_elements=3 * 2 * 16)
    matrices = 4 * 16 * 16 + 2 * 16 * 24
    decoder = 3 * (matrices + 4 * 16 + 24 + 16 + 2 * 2 * 16)  # biases of q, k, v, o, fc1, fc2; two norms
    params = decoder + V * 16 + (30 + 2) * 16 + 2 * 16  # the output projection is tied; positions have an offset of 2
    assert Size()(model, None) == {
        "params": params,
        "params/decoder": decoder,
        "bytes": 2 * params,
        "macs/token": 3 * matrices + V * 16,
        "kv_bytes/token": 96 * 2,
    }


def test_size_of_a_bloom_on_the_meta_device():
    from transformers import BloomConfig, BloomForCausalLM

    with torch.device("meta"):
        module = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=4))
    matrices = 4 * 16 * 16 + 2 * 16 * 64
    decoder = 2 * (matrices + 4 * 16 + 64 + 16 + 2 * 2 * 16)
    measured = Size()(Loaded(module, module.transformer.h, streamed=True), None)
    assert measured["params"] == decoder + V * 16 + 2 * 2 * 16  # norms behind the embeddings and at the end
    assert (measured["params/decoder"], measured["macs/token"]) == (decoder, 2 * matrices + V * 16)


# latency


def test_latency_figures_and_names(llama):
    evaluator = Latency(prompt=5, new_tokens=3, batch_sizes=[1, 2], repeats=3, warmup=1, bos=False)
    figures = evaluator(llama, None)
    kinds = [f"{kind}_tok_s@b{b}x5{new}" for b in (1, 2) for kind, new in (("prefill", ""), ("decode", "+3"))]
    assert set(figures) == {f"latency/{k}{end}" for k in kinds for end in ("", "/iqr")}
    assert all(figures[f"latency/{kind}"] > 0 and figures[f"latency/{kind}/iqr"] >= 0 for kind in kinds)


def test_latency_decodes_on_the_cache(llama, monkeypatch):
    """The steps see one token each and end where plain greedy decoding ends."""
    seen: list[Tensor] = []
    forward = llama.module.forward

    def spy(input_ids: Tensor, **options: Any) -> Any:
        seen.append(input_ids)
        return forward(input_ids, **options)

    # Latency asks the signature for `logits_to_keep`.
    spy.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(llama.module, "forward", spy)
    Latency(prompt=5, new_tokens=3, batch_sizes=[2], repeats=1, warmup=0, bos=False)(llama, None)
    assert [tuple(ids.shape) for ids in seen] == [(2, 5), (2, 1), (2, 1), (2, 1)]
    ids = seen[0]
    with torch.no_grad():
        for step in seen[1:]:
            ids = torch.cat([ids, forward(ids).logits[:, -1:].argmax(-1)], dim=1)
            assert torch.equal(ids[:, -1:], step)


@each(
    "changes, expected",
    [
        ({"prompt": 0}, "prompt=0: expected an integer >= 1"),
        ({"new_tokens": 0}, "new_tokens=0: expected an integer >= 1"),
        ({"repeats": 0}, "repeats=0: expected an integer >= 1"),
        ({"warmup": -1}, "warmup=-1: expected an integer >= 0"),
        ({"batch_sizes": []}, r"batch_sizes=\[\]: expected ints >= 1"),
        ({"batch_sizes": [2, 0]}, r"batch_sizes=\[2, 0\]: expected ints >= 1"),
    ],
)
def test_latency_config_errors(changes, expected):
    fields = {"prompt": 4, "new_tokens": 2, "batch_sizes": [1], "repeats": 1, "warmup": 0, "bos": False}
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        Latency(**(fields | changes))


def test_latency_refuses_what_it_cannot_measure(llama):
    evaluator = Latency(prompt=60, new_tokens=5, batch_sizes=[1], repeats=1, warmup=0, bos=False)
    assert evaluator.longest(None) == 65  # which the runner compares with the model's limit
    assert not Latency.streams and Perplexity.streams and Size.streams and Questions.streams


# questions


class Knows:
    """Gives every token of the right (or of each wrong) choice a likelihood that tells them apart."""

    def __init__(self, samples: int, right: bool) -> None:
        from pruneexp.embedded.language import EVALUATION, questions

        examples = questions(EVALUATION[1], samples)
        self.rows = [Bytes().encode(f"{q.context} {c}") for q in examples for c in q.choices]
        self.good = [(i == q.answer) == right for q in examples for i in range(4)]
        self.contexts = [len(Bytes().encode(q.context)) for q in examples for _ in range(4)]

    def token_losses(self, tokens_NT: Tensor, batch_size: int, stage: str = "") -> Tensor:
        losses = torch.full((tokens_NT.shape[0], tokens_NT.shape[1] - 1), 1e3)
        for i, (row, good, context) in enumerate(zip(self.rows, self.good, self.contexts, strict=True)):
            assert tokens_NT[i, : len(row)].tolist() == row
            losses[i, context - 1 : len(row) - 1] = (0.0 if good else 1.0) / len(row)
            losses[i, len(row) - 1 :] = math.nan if i % 2 else -1e6  # padding, which must not count
        return losses


@pytest.mark.parametrize("right", [True, False])
def test_questions_count_the_choice_alone(right):
    model = Loaded(None, max_length=None)
    model.token_losses = Knows(12, right).token_losses  # type: ignore[method-assign]
    assert Questions(samples=12, batch_size=5, bos=False)(model, Bytes()) == {
        "acc/embedded_questions[12]": float(right)
    }


def test_questions_against_one_row_at_a_time():
    from pruneexp.embedded.language import EVALUATION, questions

    model = replace(tiny_llama(max_position_embeddings=4096), max_length=4096)
    right, examples = 0, questions(EVALUATION[1], 3)
    for question in examples:
        nats = []
        for choice in question.choices:
            ids = torch.tensor([Bytes().encode(f"{question.context} {choice}")])
            nats.append(float(model.token_losses(ids, 1)[0, len(Bytes().encode(question.context)) - 1 :].sum()))
        right += nats.index(min(nats)) == question.answer
    measured = Questions(samples=3, batch_size=4, bos=False)(model, Bytes())
    assert measured == {"acc/embedded_questions[3]": pytest.approx(right / 3)}


def test_questions_keep_the_newest_context():
    rows, scored, _ = Questions(samples=2, batch_size=4, bos=False)._rows(Bytes(), 20)
    assert rows.shape == (8, 20) and scored.any(dim=1).all()


def test_questions_say_what_the_dense_models_answers_depend_on():
    class Upper(Bytes):
        def encode(self, text, **more):
            return super().encode(text.upper(), **more)

    cases = [(3, Bytes()), (4, Bytes()), (3, Upper())]
    prints = [Questions(samples=n, batch_size=4, bos=False).measured_on(tokenizer) for n, tokenizer in cases]
    assert len(set(prints)) == 3 and prints[0] == Questions(samples=3, batch_size=8, bos=False).measured_on(Bytes())


def test_questions_config_errors():
    with pytest.raises(ConfigError, match="^samples=0: expected an integer >= 1$"):
        Questions(samples=0, batch_size=1, bos=False)
    with pytest.raises(ConfigError, match="^batch_size=0: expected an integer >= 1$"):
        Questions(samples=1, batch_size=0, bos=False)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        Questions(samples=1, batch_size=1, bos=False).prepare(None, V)


# configs


@each("choice", sorted(path.stem for path in (CONF / "evaluator").glob("*.yaml")))
def test_every_option_composes_and_builds(choice):
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(overrides=["+seed=7", "+dataset=embedded", f"+evaluator=[size,{choice}]"])
    assert set(config.evaluator) == {"size", choice}
    evaluator = instantiate(config.evaluator[choice], _convert_="all")
    evaluator.check()
    assert isinstance(evaluator.streams, bool) and callable(evaluator.prepare)


def test_perplexity_takes_the_runs_dataset_and_others_their_own():
    with initialize_config_dir(str(CONF), version_base=None):
        overrides = ["+seed=7", "+dataset=embedded", "dataset.length=32", "+evaluator=[perplexity,wikitext2,ptb]"]
        config = compose(overrides=overrides)
    built = {name: instantiate(node, _convert_="all") for name, node in config.evaluator.items()}
    assert (built["perplexity"].dataset.name, built["perplexity"].length) == ("embedded", 32)
    assert (built["wikitext2"].dataset.name, built["wikitext2"].length) == ("wikitext2", 2048)
    assert built["ptb"].dataset.evaluation_split == "validation"
