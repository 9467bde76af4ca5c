"""Beginning-of-sequence tokens: where they stand, what they count as, and what a run's hash and record say of them."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from pruneexp.cli.build import build
from pruneexp.cli.compose import Composed, compose
from pruneexp.dataset import Embedded, HubText, bos, evaluation_windows, text, windows_of
from pruneexp.dataset.bos import resolved
from pruneexp.evaluator import Generation, Latency, Perplexity, Questions
from pruneexp.experiment.bos_probe import begun, worth_of
from pruneexp.experiment.run import run_experiment
from pruneexp.fingerprint import comparable, config_hash
from pruneexp.model.modeling_pruned import FAMILIES
from pruneexp.report.folders import find
from pruneexp.report.sweep_table import sweep_table
from pruneexp.types import ConfigError
from tests.report_samples import metrics, write_run
from tests.tiny_families import TINY, random_model

BOS = 256
TEXT = "".join(chr(97 + (i * i) % 26) for i in range(400))
NEED = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text"}


def byte_tokenizer(begins: bool) -> Any:
    """One token a byte, and "<s>", which it puts in front of a text by itself or not."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {character: byte for byte, character in bytes_to_unicode().items()} | {"<s>": BOS}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = "<s> $A" if begins else "$A"
    backend.post_processor = processors.TemplateProcessing(single, special_tokens=[("<s>", BOS)] if begins else [])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with that tokenizer, by family."""
    made = {}
    for name in ("gemma", "gemma2", "gemma3", "llama_multi_query"):
        prefix, values = TINY[name]
        made[name] = tmp_path_factory.mktemp(name)
        ids = {"vocab_size": 257, "bos_token_id": BOS, "eos_token_id": BOS, "pad_token_id": None}
        random_model(prefix, {**values, **ids}).save_pretrained(made[name])
        byte_tokenizer(begins=True).save_pretrained(made[name])
    return made


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)


OWN_TEXT = ("dataset=text", "dataset.calibration=text.txt", "dataset.evaluation=text.txt")
SMALL = ("dataset.samples=6", "dataset.length=16", "sparsity.ratio=0.3", "run.prove=off", "cache=off")


def of(folder: Path | str, *overrides: str) -> dict[str, Any]:
    return compose(["model=hf", f"model.path={folder}", *OWN_TEXT, *overrides]).config


def run(folder: Path, name: str, *overrides: str) -> dict[str, float]:
    given = ["model=hf", f"model.path={folder}", *OWN_TEXT, *SMALL, f"run.dir={name}", *overrides]
    return run_experiment(build(compose(given))).metrics


# windows


def a_hub(rows: list[str], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> HubText:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"t": r} for r in rows]))
    given = {"name": "x", "path": "x", "config": None, "revision": None, "data_files": None, "streaming": False}
    given |= {"fields": ["t"], "calibration_split": "train", "evaluation_split": "test", "calibration_join": " "}
    given |= {"evaluation_join": " ", "evaluation_windows": None, "special_tokens": True, "samples": 5, "length": 8}
    return HubText(**{**given, "seed": 0, "sampling": "random", "bos": True, **changes})


def datasets_with_bos(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, str]]:
    """Every dataset that takes the token, and the text that its windows are cut from."""
    rows = ["abcdefghijkl", "mnopqrstuvwxyz", "0123456789"]
    file = "text.txt"
    yield text(file, file, None, samples=5, length=8, seed=1, sampling="random", bos=True), TEXT
    yield text(file, file, None, samples=5, length=8, seed=1, sampling="consecutive", bos=True), TEXT
    for special in (True, False):
        for join in (" ", None):
            changes = {"special_tokens": special, "calibration_join": join, "samples": 3}
            yield a_hub(rows, monkeypatch, **changes), " ".join(rows)


@pytest.mark.parametrize("begins", [True, False])
def test_every_window_is_the_token_and_text(begins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """T tokens, the first of them BOS and no other, whatever the tokenizer adds; the text goes on without a gap."""
    tokenizer = byte_tokenizer(begins)
    for dataset, whole in datasets_with_bos(monkeypatch):
        calibration_NT, evaluation_NT = dataset.calibration(tokenizer), dataset.evaluation(tokenizer, 10)
        assert calibration_NT.shape == (dataset.samples, 8) and evaluation_NT.shape[1] == 10
        for windows_NT in (calibration_NT, evaluation_NT):
            assert windows_NT[:, 0].tolist() == [BOS] * len(windows_NT) and not (windows_NT[:, 1:] == BOS).any()
            assert all(bytes(row).decode() in whole for row in windows_NT[:, 1:].tolist())
        assert bytes(evaluation_NT[:, 1:].flatten().tolist()).decode() == whole[: 9 * (len(whole) // 9)]


def test_stories_begin_with_the_token() -> None:
    tokenizer = byte_tokenizer(False)
    plain, begun = (Embedded(3, n, 0, 2, bos).calibration(tokenizer) for n, bos in ((8, False), (9, True)))
    assert torch.equal(begun[:, 1:], plain) and begun[:, 0].tolist() == [BOS] * 3


def test_nothing_changes_without_it() -> None:
    seen = []
    windows_of(torch.tensor([BOS, 1, 2]), 2, None, lambda stream_M, width: seen.append((stream_M, width)) or stream_M)
    assert seen[0][0].tolist() == [BOS, 1, 2] and seen[0][1] == 2


def test_an_evaluators_own_decides(tmp_path: Path) -> None:
    file = str(tmp_path / "text.txt")
    tokenizer = byte_tokenizer(True)
    for dataset_s, own in ((True, False), (False, True)):
        dataset = text(file, file, None, samples=2, length=8, seed=0, sampling="random", bos=dataset_s)
        assert (evaluation_windows(dataset, tokenizer, 8, own)[:, 0] == BOS).all() == own
        evaluator = Perplexity(dataset=dataset, length=8, stride=None, batch_size=2, bos=own, samples=None)
        assert (evaluator.windows(tokenizer)[:, 0] == BOS).all() == own
        assert (dataset.calibration(tokenizer)[:, 0] == BOS).all() == dataset_s


@pytest.mark.slow
def test_token_windows_are_used_as_they_are(folders: dict[str, Path]) -> None:
    np.save("w.npy", np.arange(24).reshape(3, 8))
    mine = ["dataset=tokens", "dataset.calibration=w.npy", "dataset.evaluation=w.npy"]
    config = compose(["model=hf", f"model.path={folders['gemma']}", *mine]).config
    assert config["dataset"]["bos"] is False and config["evaluator"]["perplexity"]["bos"] is False
    assert config["evaluator"]["latency"]["bos"] is True
    with pytest.raises(ConfigError, match=r"^dataset\.bos=True: token windows are used exactly as they are; expected"):
        build(compose([*mine, "dataset.bos=true"]))
    with pytest.raises(
        ConfigError, match=r"^evaluator\.perplexity\.bos=True: the windows of dataset 'w' are used exact"
    ):
        build(compose([*mine, "evaluator.perplexity.bos=true"]))
    with pytest.raises(
        ConfigError, match=r"^evaluator\.generation\.bos=True: the windows of dataset 'w' are used exact"
    ):
        build(compose([*mine, "evaluator=[generation]", "evaluator.generation.bos=true"]))


# figures


def plain_perplexity(folder: Path, width: int) -> float:
    """By transformers alone: BOS in front of each `width` bytes of the text, all of which are scored."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    nats: list[float] = []
    for start in range(0, len(TEXT) - width + 1, width):
        ids = torch.tensor([[BOS, *TEXT[start : start + width].encode()]])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1)
        nats += [-float(scores[t, token]) for t, token in enumerate(ids[0, 1:])]
    return math.exp(sum(nats) / len(nats))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_a_gemma_is_measured_as_transformers_reads_it(folders: dict[str, Path], name: str) -> None:
    figures = run(folders[name], "r", "evaluator=[perplexity]", "run.save=false", "model.dtype=float64")
    assert figures["dense/ppl/text@16+bos"] == pytest.approx(plain_perplexity(folders[name], 15), rel=1e-9)
    record = json.loads(Path("r/environment.json").read_text())["data"]
    assert record["bos"] is True and record["calibration_windows"] == [6, 16]


class Heard:
    """What a model was shown."""

    streamed = False
    device, dtype, vocab_size, max_length = torch.device("cpu"), torch.float32, 257, 64

    def __init__(self) -> None:
        self.shown: list[Tensor] = []
        self.module = self

    training, config = False, type("Config", (), {"bos_token_id": 5})

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def forward(self, ids: Tensor) -> None: ...

    def __call__(self, ids: Tensor, **_: Any) -> Any:
        self.shown.append(ids)
        return type("Output", (), {"logits": torch.zeros(*ids.shape, 257), "past_key_values": None})

    def token_losses(self, ids: Tensor, batch_size: int, stage: str = "") -> Tensor:
        self.shown.append(ids)
        return torch.zeros(len(ids), ids.shape[1] - 1)


@pytest.mark.parametrize("own", [True, False])
def test_prompts_begin_with_the_token(own: bool) -> None:
    Path("prompts.txt").write_text("ab\ncde\n")
    dataset = text("text.txt", "text.txt", None, samples=2, length=8, seed=0, sampling="random", bos=False)
    common = {"dataset": dataset, "prompt_tokens": 4, "samples": 2, "new_tokens": 4, "temperature": 0.0, "seed": 0}
    for begins in (True, False):
        heard = Heard()
        lines = Generation(prompts="prompts.txt", batch_size=2, bos=own, **common)  # type: ignore[arg-type]
        named = lines(heard, byte_tokenizer(begins))
        first = [BOS] if own or begins else []  # a tokenizer's own is there without it, too
        prompts = [row.tolist() for ids in heard.shown for row in ids if ids.shape[1] > 1]
        assert prompts == [[*first, *b"ab"], [*first, *b"cde"]]
        assert f"distinct_1/prompts@+4{'+bos' if own else ''}[2]" in named.figures
    heard = Heard()
    named = Generation(prompts=None, batch_size=2, bos=own, **common)(heard, byte_tokenizer(True))  # type: ignore[arg-type]
    assert heard.shown[0].shape == (2, 4) and (heard.shown[0][:, 0] == BOS).all() == own
    assert f"distinct_1/text@4+4{'+bos' if own else ''}[2]" in named.figures


def test_questions_begin_with_the_token() -> None:
    tokenizer = byte_tokenizer(True)
    plain, with_it = (Questions(samples=3, batch_size=4, bos=each) for each in (False, True))
    rows, scored, _ = plain._rows(tokenizer, None)
    begun_rows, begun_scored, _ = with_it._rows(tokenizer, None)
    assert torch.equal(begun_rows[:, 1:], rows) and (begun_rows[:, 0] == BOS).all()
    assert torch.equal(begun_scored[:, 1:], scored)
    cut_rows, cut_scored, _ = with_it._rows(tokenizer, 40)  # the oldest leaves, BOS stays
    assert cut_rows.shape[1] == 40 and (cut_rows[:, 0] == BOS).all()
    assert torch.equal(cut_scored.sum(1), scored.sum(1))
    assert plain.measured_on(tokenizer) != with_it.measured_on(tokenizer)
    assert list(with_it(Heard(), tokenizer)) == ["acc/embedded_questions+bos[3]"]


def test_latency_reads_the_token_first() -> None:
    for own, tokenizer, first in ((True, byte_tokenizer(True), BOS), (True, None, 5), (False, None, None)):
        heard = Heard()
        Latency(prompt=6, new_tokens=1, batch_sizes=[2], repeats=1, warmup=0, bos=own)(heard, tokenizer)
        assert heard.shown[0].shape == (2, 6)
        assert first is None or heard.shown[0][:, 0].tolist() == [first, first]


@pytest.mark.parametrize("begins", [True, False])
def test_zero_shot_prompts_begin_with_the_token_once(
    begins: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts and whole texts, as the harness hands them to the model; without it, what the tokenizer adds."""
    import lm_eval.evaluator
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from pruneexp.evaluator.harness import Loaded, answer
    from pruneexp.model import ModelSource

    model = ModelSource("x", str(folders["gemma"]), None, "auto", "cpu", False, False, 4).load(byte_tokenizer(begins))
    shown: list[list[int]] = []
    passed: list[Any] = []
    inner = HFLM._model_call
    monkeypatch.setattr(
        HFLM, "_model_call", lambda self, ids, *a, **k: (shown.extend(ids.tolist()), inner(self, ids))[1]
    )

    def evaluate(lm: Any, **_: Any) -> None:
        passed.append(lm.add_bos_token)
        for kind, arguments in (("loglikelihood", ("ab", " c")), ("loglikelihood_rolling", ("abc",))):
            getattr(lm, kind)([Instance(kind, {}, arguments, 0)], disable_tqdm=True)

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", evaluate)
    for own in (True, False):
        shown.clear()
        answer(model, Loaded("none", {}, {}, {}), 0, None, 1, own)
        first = [BOS] if own or begins else []
        assert shown[0] == [*first, *b"ab "]
        assert shown[1] == ([BOS, *b"ab"] if own else [BOS, *first, *b"ab"])
    assert passed == [True, None]
    assert model.tokenizer("a").input_ids == ([BOS] if begins else []) + [97]  # the model's own is left as it was


# what a run is asked, and its hash


def test_the_table_says_which_families_need_it() -> None:
    assert {name for name, family in FAMILIES.items() if family.needs_bos} == set(NEED)


ALL = "evaluator=[perplexity,wikitext2,ptb_128,c4,zeroshot,generation,latency,questions,size]"


@pytest.mark.slow
def test_auto_is_what_it_becomes(folders: dict[str, Path]) -> None:
    keys = ["dataset", *(f"evaluator.{n}" for n in ALL[11:-1].split(",") if n != "size")]
    llama, gemma = folders["llama_multi_query"], folders["gemma"]
    for folder, value in ((llama, False), (gemma, True)):
        config, explicit = of(folder, ALL), of(folder, ALL, *(f"{key}.bos={str(value).lower()}" for key in keys))
        assert config["asked"] == {f"{key}.bos": "auto" for key in keys}
        assert explicit["asked"] == {f"{key}.bos": value for key in keys}
        assert {config["dataset"]["bos"], *(n["bos"] for k, n in config["evaluator"].items() if k != "size")} == {value}
        assert config_hash(config) == config_hash(explicit)
    others = [config_hash(of(gemma, ALL, f"{key}.bos=false")) for key in keys]
    assert len({*others, config_hash(of(gemma, ALL))}) == len(keys) + 1  # each counts


def without_bos(node: Any) -> Any:
    """A config as it was before there was the key: perplexities alone had it."""
    if not isinstance(node, dict):
        return node
    old = node.get("_target_") == "pruneexp.evaluator.Perplexity"
    return {k: without_bos(v) for k, v in node.items() if k != "asked" and (k != "bos" or old)}


def test_hashes_of_runs_without_it_are_what_they_were(folders: dict[str, Path]) -> None:
    for config in (of(folders["llama_multi_query"], ALL), of("nobody/has-it", ALL), of("gone", ALL)):
        before = without_bos(config)
        assert before["evaluator"]["ptb_128"]["bos"] is False and "bos" not in before["dataset"]
        assert config_hash(config) == config_hash(before)


def test_the_bos_of_an_evaluators_dataset_decides_nothing(folders: dict[str, Path]) -> None:
    plain = of(folders["gemma"], "evaluator=[ptb]")
    assert config_hash(of(folders["gemma"], "evaluator=[ptb]", "evaluator.ptb.dataset.bos=false")) == config_hash(plain)


def test_windows_that_were_longer_have_another_hash(folders: dict[str, Path]) -> None:
    config = of(folders["llama_multi_query"], "evaluator=[perplexity]", "evaluator.perplexity.bos=true")
    old = without_bos(config)
    assert old["evaluator"]["perplexity"]["bos"] is True and config_hash(old) != config_hash(config)


def test_a_config_that_comes_back_says_the_same(folders: dict[str, Path]) -> None:
    first = of(folders["gemma"])
    assert resolved(first) == first and config_hash(resolved(first)) == config_hash(first)
    run(folders["gemma"], "first", "evaluator=[perplexity]", "run.save=false")
    config = yaml.safe_load(Path("first/config.yaml").read_text())
    assert config["asked"] == {"dataset.bos": "auto", "evaluator.perplexity.bos": "auto"}
    assert config["dataset"]["bos"] is True
    config["run"]["dir"] = "second"
    composed = compose([])
    run_experiment(build(Composed(config, composed.job, composed.folders)))
    again = yaml.safe_load(Path("second/config.yaml").read_text())
    assert {**again, "run": None} == {**config, "run": None}
    assert Path("first/plan.json").read_bytes() == Path("second/plan.json").read_bytes()


def test_a_config_of_before_still_runs(folders: dict[str, Path]) -> None:
    composed = compose(["model=hf", f"model.path={folders['gemma']}", *OWN_TEXT, ALL])
    experiment = build(Composed(without_bos(composed.config), composed.job, composed.folders))
    assert experiment.dataset.bos is False and experiment.evaluators["generation"].bos is False  # type: ignore
    assert "bos" not in experiment.config["dataset"]


def test_a_mistyped_value() -> None:
    with pytest.raises(ConfigError, match=r"^dataset\.bos='maybe': expected auto, true or false$"):
        build(compose(["dataset.bos=maybe"]))


class Mine:
    """Somebody's own data, which knows nothing of the token."""

    name, contiguous = "mine", False

    def __init__(self, samples: int, length: int) -> None: ...

    def check(self, calibration: bool = True, evaluation: bool = True) -> None: ...

    def calibration(self, tokenizer: Any) -> Tensor:
        return torch.zeros(2, 4, dtype=torch.int64)

    def evaluation(self, tokenizer: Any, length: int | None) -> Tensor:
        return torch.zeros(2, 4, dtype=torch.int64)

    def key(self, part: str) -> str:
        return "dataset=mine"

    def description(self) -> dict[str, Any]:
        return {}


def test_sweeps_of_papers_say_no_for_whatever_is_chosen_instead(folders: dict[str, Path]) -> None:
    Path("mine/dataset").mkdir(parents=True)
    Path("mine/dataset/mine.yaml").write_text(f"_target_: {__name__}.Mine\nsamples: 1\nlength: 4\n")
    typed = ["+sweep=flap_perplexity", "model=hf", f"model.path={folders['gemma']}", "hydra.mode=RUN"]
    config = compose([*typed, "evaluator=[perplexity,size]"]).config
    assert set(config["evaluator"]) == {"perplexity", "size"}
    assert config["dataset"]["bos"] is False and compose(typed).config["evaluator"]["wikitext2_128"]["bos"] is False
    build(compose([*typed, "dataset=mine"], config_dir="mine"))


def test_where_auto_cannot_be_told_it_is_false(folders: dict[str, Path], tmp_path: Path) -> None:
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    for path in ("broken", "nobody/has-it", "gone", "a b\0c", "text.txt"):
        assert resolved({"model": {"path": path}, "dataset": {"_target_": "x", "bos": "auto"}})["dataset"] == {
            "_target_": "x",
            "bos": False,
        }


def test_a_model_in_the_hubs_cache_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls = []

    def cached(path: str, name: str, revision: str | None) -> str:
        calls.append((path, name, revision))
        Path("c.json").write_text(json.dumps({"model_type": "gemma2"}))
        return "c.json"

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    bos._on_hub.cache_clear()
    try:
        values = [of("some/gemma", f"sparsity.ratio=0.{n}", "model.revision=v1")["dataset"]["bos"] for n in (1, 2, 3)]
    finally:
        bos._on_hub.cache_clear()
    assert values == [True] * 3 and calls == [("some/gemma", "config.json", "v1")]


@pytest.mark.slow
def test_a_gguf_file_names_its_family() -> None:
    def string(value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value

    for name, needs in ((b"gemma3", True), (b"gemma", True), (b"llama", False)):
        header = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")  # no tensors, one value
        Path("m.gguf").write_bytes(
            header + string(b"general.architecture") + (8).to_bytes(4, "little") + string(name) + bytes(99)
        )
        assert of("m.gguf")["dataset"]["bos"] is needs


@pytest.mark.slow
def test_it_is_told_without_loading_transformers(folders: dict[str, Path]) -> None:
    code = "import sys; from pruneexp.cli.compose import compose; "
    code += f"c = compose(['model=hf', 'model.path={folders['gemma']}'])"
    code += "; assert c.config['dataset']['bos']; assert not {'transformers', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# what is told


@pytest.mark.slow
def test_a_tokenizer_without_the_token_is_refused_before_weights_load(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from pruneexp.model import ModelSource

    bare = {name: tmp_path / name for name in ("llama_multi_query", "gemma")}
    for name, folder in bare.items():
        shutil.copytree(folders[name], folder)
        tokenizer = byte_tokenizer(False)
        tokenizer.bos_token = None
        tokenizer.save_pretrained(folder)
    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("a weight was loaded"))
    for key in ("dataset", "evaluator.perplexity", "evaluator.latency"):
        asked = rf"{key}\.bos=true, or auto where the model needs one"
        expected = rf"^{asked}: the tokenizer has no beginning-of-sequence token; expected false$"
        with pytest.raises(ConfigError, match=expected):
            run(bare["llama_multi_query"], "r", f"{key}.bos=true")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    figures = run(bare["gemma"], "g", "evaluator=[perplexity]", "run.save=false")  # its config knows the token
    assert "dense/ppl/text@16+bos" in figures


def lines_about(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "beginning-of-sequence" in record.getMessage()]


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("pruneexp"), "propagate", True)
    return caplog


def test_a_family_that_needs_it_and_goes_without(folders: dict[str, Path], heard: Any) -> None:
    common = ("evaluator=[perplexity]", "run.save=false")
    run(folders["gemma"], "with", *common)
    assert lines_about(heard) == []
    run(folders["gemma"], "without", *common, "dataset.bos=false", "evaluator.perplexity.bos=false")
    (line,) = lines_about(heard)
    assert line.startswith("Gemma models need a beginning-of-sequence token, id 256, in front of every window, which")
    assert line.endswith(": dataset.bos=true evaluator.perplexity.bos=true")
    assert line in Path("without/log.txt").read_text()


@pytest.mark.slow
def test_token_windows_that_lack_it_and_that_have_it(folders: dict[str, Path], heard: Any) -> None:
    mine = ["dataset=tokens", "dataset.calibration=w.npy", "dataset.evaluation=w.npy", "sparsity.ratio=0.3"]
    mine += ["model=hf", f"model.path={folders['gemma']}", "evaluator=[perplexity]", "run.save=false", "cache=off"]
    for first, expected in ((BOS, 0), (7, 1)):
        windows = np.random.default_rng(0).integers(0, 256, (4, 12))
        windows[:, 0] = first
        np.save("w.npy", windows)
        heard.clear()
        run_experiment(build(compose([*mine, f"run.dir=r{first}"])))
        assert len(lines_about(heard)) == expected
    assert "(in the windows of dataset themselves)" in lines_about(heard)[0]


def loss_without(folder: Path, target: Path) -> None:
    """A copy of a tiny LLaMA whose first token takes all attention: without BOS there, the text's first does."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    head = weights["lm_head.weight"]
    embedding = weights["model.embed_tokens.weight"]
    for name in weights:
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros_like(weights[name])  # what follows is set by hand
    # Attention is uniform; its value is the share of BOS in the context, and sharpens the next letter's logits.
    weights["model.layers.0.self_attn.v_proj.weight"][0, 0] = 1.0
    weights["model.layers.0.self_attn.o_proj.weight"][1, 0] = 40.0
    embedding[:, :2] = 0.0
    embedding[BOS, 0] = 4.0
    head.zero_()
    head[97:123, 1] = 10.0  # letters, where BOS is in sight
    save_file(weights, target / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
def test_what_it_is_worth_is_told_where_it_is_worth_much(folders: dict[str, Path], heard: Any, tmp_path: Path) -> None:
    loss_without(folders["llama_multi_query"], tmp_path / "crafted")
    common = ("evaluator=[perplexity]", "run.save=false")
    torch.manual_seed(3)
    run(folders["llama_multi_query"], "plain", *common)
    assert lines_about(heard) == []  # a random model makes nothing of it
    figures = run(tmp_path / "crafted", "crafted-run", *common)
    (line,) = lines_about(heard)
    assert "is worth " in line and line.endswith(": dataset.bos=true evaluator.perplexity.bos=true")
    heard.clear()
    both = run(tmp_path / "crafted", "both", *common, "dataset.bos=true", "evaluator.perplexity.bos=true")
    assert lines_about(heard) == []
    said = float(line.partition("is worth ")[2].partition(" ")[0])
    gained = math.log(figures["dense/ppl/text@16"] / both["dense/ppl/text@16+bos"])
    assert said > 0.2 and said == pytest.approx(gained, rel=0.5)
    heard.clear()
    run(tmp_path / "crafted", "half", *common, "dataset.bos=true")
    assert lines_about(heard)[0].endswith(": evaluator.perplexity.bos=true")


def test_what_it_is_worth_is_a_difference_over_the_same_tokens() -> None:
    class Model(Heard):
        batch_size = 2

        def token_losses(self, ids: Tensor, batch_size: int, stage: str = "") -> Tensor:
            return ids[:, 1:].double() + (ids[:, :1] != BOS)  # a token's loss is its id, and one more without BOS

    windows_NT = torch.tensor([[BOS, 1, 2, 3, 4], [5, 6, 7, 8, 9]])  # the first has it already
    begun_NT = begun(windows_NT, BOS, 64)
    assert begun_NT.tolist() == [[BOS, 1, 2, 3, 4], [BOS, 5, 6, 7, 8]]
    assert worth_of(Model(), begun_NT) == 1.0  # type: ignore[arg-type]
    assert begun(windows_NT, BOS, 3).tolist() == [[BOS, 1, 2], [BOS, 5, 6]]
    assert worth_of(Model(), begun(windows_NT[:, :2], BOS, 64)) == 0.0  # type: ignore[arg-type]


def test_the_probe_changes_nothing(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("evaluator=[perplexity]", "run.save=false", "criterion=random")
    probed = run(folders["llama_multi_query"], "probed", *common)
    monkeypatch.setattr("pruneexp.experiment.run.tell_of_bos", lambda *_: None)
    plain = run(folders["llama_multi_query"], "plain", *common)
    lasting = [{k: v for k, v in each.items() if not k.startswith(("seconds/", "memory/"))} for each in (probed, plain)]
    assert lasting[0] == lasting[1] and Path("probed/plan.json").read_text() == Path("plain/plan.json").read_text()


# reports


def test_longer_windows_of_before_keep_apart(folders: dict[str, Path]) -> None:
    """What was T+1 tokens with BOS is T+1 tokens now, and shares its name with nothing else."""
    new = of(folders["llama_multi_query"], "evaluator=[perplexity]", "evaluator.perplexity.bos=true")
    measured = metrics()
    measured |= {f"{side}/ppl/text@16s4+bos[3]": 2.0 for side in ("dense", "pruned")}
    write_run(Path("jobs/HASH"), new, measured)
    write_run(Path("jobs/HASH"), without_bos(new), measured)
    runs_read = find([Path("jobs")], "same")
    assert not runs_read.skipped and len(runs_read.runs) == 2
    names = [{key for key in one.metrics if "+bos" in key} for one in runs_read.runs if "asked" not in one.config]
    assert names == [{"dense/ppl/text@17s4+bos[3]", "pruned/ppl/text@17s4+bos[3]"}]
    header, rows = sweep_table(Path("jobs"))
    assert {"dense/ppl/text@16s4+bos[3]", "dense/ppl/text@17s4+bos[3]"} <= set(header)
    filled = [[row[header.index(f"dense/ppl/text@{n}s4+bos[3]")] for row in rows] for n in (16, 17)]
    assert sorted(map(str, filled[0])) == sorted(map(str, filled[1])) == ["", "2.0"]
    assert comparable({"dense/ppl/a@b@8+bos": 1.0, "x": 2.0}, {}) == {"dense/ppl/a@b@9+bos": 1.0, "x": 2.0}


def test_old_and_new_folders_differ_in_nothing(folders: dict[str, Path]) -> None:
    new = of(folders["llama_multi_query"], ALL)
    write_run(Path("old/a"), without_bos(new))
    write_run(Path("new/b"), new)
    runs_read = find([Path("old"), Path("new")], "same")
    assert len(runs_read.runs) == 1 and runs_read.repeats[0].reason.startswith("the same config and results as")
    for name, config in (("a", new), ("b", without_bos(new))):
        write_run(Path("jobs") / name, config, metrics(ppl=4.0 if name == "a" else 5.0))
    header, _ = sweep_table(Path("jobs"))
    assert not [key for key in header if key.endswith("bos")]
