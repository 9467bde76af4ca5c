"""Text that the dense model writes: drawn as predicted, alike with and without a cache, and among the given windows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pruneexp
from pruneexp.__main__ import main
from pruneexp.calibrate import Meter, NoAugmentation, SelfGenerated
from pruneexp.calibrate import augmentation as module
from pruneexp.dataset.mixed import interleaved
from pruneexp.types import ConfigError, RunError
from tests.cases import each
from tests.conftest import FAMILIES, PARITY
from tests.messages import assert_told
from tests.tiny_families import TINY

WRITES = SelfGenerated(share=1.0, tokens=10_000, temperature=1.0)
DATA = ["dataset=tokens", f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
QUICK = ["model=hf", f"model.path={PARITY}", *DATA, "evaluator=[size]", "run.save=false"]


def chain(shares_VV: Tensor) -> Any:
    """A model whose next token depends on the last one alone."""

    class OfOne:
        def forward(self, tokens_BT: Tensor, past_key_values: Any, use_cache: bool) -> Any:
            assert use_cache and tokens_BT.shape[1] == 1
            return SimpleNamespace(logits=shares_VV.log()[tokens_BT], past_key_values=past_key_values)

        __call__ = forward

    sizes = {"kv_elements": 1, "vocab_size": len(shares_VV), "dtype": torch.float32}
    return SimpleNamespace(module=OfOne(), device=torch.device("cpu"), **sizes)


def written(model: Any, given_NT: Tensor, augmentation: SelfGenerated = WRITES, seed: int = 0) -> Tensor:
    """The windows that joined."""
    joined = augmentation(model, given_NT, Meter(), seed)
    given = {tuple(row) for row in given_NT.tolist()}
    return torch.tensor([row for row in joined.tolist() if tuple(row) not in given])


@pytest.mark.parametrize(("temperature", "power"), [(1.0, 1.0), (0.5, 2.0), (2.0, 0.5)])
def test_tokens_are_drawn_as_they_are_predicted(temperature: float, power: float) -> None:
    shares_VV = torch.tensor([[0.0, 0.3, 0.7], [0.6, 0.1, 0.3], [0.25, 0.75, 0.0]])
    given_NT = torch.zeros(400, 101, dtype=torch.int64)
    text = written(chain(shares_VV), given_NT, SelfGenerated(1.0, 10**6, temperature))
    found_VV = torch.stack([text[:, 1:][text[:, :-1] == token].bincount(minlength=3) for token in range(3)]).double()
    expected_VV = shares_VV.double() ** power
    expected_VV /= expected_VV.sum(-1, keepdim=True)
    assert bool((found_VV[shares_VV == 0] == 0).all()), "what has no share is never drawn"
    torch.testing.assert_close(found_VV / found_VV.sum(-1, keepdim=True), expected_VV, atol=0.02, rtol=0)


@each("family", [*FAMILIES, *TINY])
def test_a_cache_changes_nothing(loaded: Callable[..., Any], family: str) -> None:
    model = loaded(family)
    first_N, drawn_TN = torch.tensor([3, 7, 11]), torch.rand(14, 3, generator=torch.Generator().manual_seed(2))
    text_NT = module._written(model, first_N, drawn_TN, 1.0, iter(range(14)))
    assert text_NT.shape == (3, 15) and text_NT[:, 0].tolist() == first_N.tolist()
    with torch.no_grad():
        sums_NTV = model.module(text_NT[:, :-1]).logits.double().softmax(-1).cumsum(-1)
    above = sums_NTV.gather(-1, text_NT[:, 1:, None])[..., 0]
    below = (sums_NTV - sums_NTV.diff(dim=-1, prepend=torch.zeros(3, 14, 1))).gather(-1, text_NT[:, 1:, None])[..., 0]
    drawn_NT = drawn_TN.T.double()
    assert bool((below - 1e-5 <= drawn_NT).all() and (drawn_NT <= above + 1e-5).all())


def test_windows_begin_as_the_given_ones_do(tiny: Callable[..., Any], tokens_NT: Tensor) -> None:
    model = tiny("llama")
    with_bos = tokens_NT.clone()
    with_bos[:, 0] = 1
    assert written(model, with_bos)[:, 0].tolist() == [1] * 10
    few = tokens_NT % 2 + 40
    assert set(written(model, few)[:, 0].tolist()) == {40, 41}


def test_long_windows_are_several_pieces(
    monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Any], tokens_NT: Tensor
) -> None:
    monkeypatch.setattr(module, "PIECE", 5)
    tokens_NT[:, 0] = 1
    text = written(tiny("llama"), tokens_NT)
    assert text.shape == (10, 24)
    assert bool((text[:, ::5] == 1).all()), "every piece begins with BOS"


def test_what_is_written_at_once_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Any], tokens_NT: Tensor
) -> None:
    model = tiny("llama", dtype="float64")
    whole = WRITES(model, tokens_NT, Meter(), 3)
    room = WRITES.working_bytes(model, 10, 24)
    monkeypatch.setattr(module, "ROOM", room // 3)
    assert WRITES.working_bytes(model, 10, 24) <= room // 3
    assert torch.equal(WRITES(model, tokens_NT, Meter(), 3), whole)
    assert not torch.equal(WRITES(model, tokens_NT, Meter(), 4), whole)


@pytest.mark.parametrize(("windows", "share", "added"), [(32, 1.0, 32), (32, 0.5, 16), (30, 1.0, 30), (16, 2.0, 32)])
def test_windows_alternate(tiny: Callable[..., Any], windows: int, share: float, added: int) -> None:
    """Halves of all windows are halves of either origin, and of each source of a mixture, in any first part."""
    origins = interleaved({"a": windows // 2, "b": windows // 2})
    given_NT = torch.tensor([[ord(name)] * 6 for name in origins]).remainder(90)
    meter = Meter()
    joined = SelfGenerated(share, 10_000, 1.0)(tiny("llama"), given_NT, meter, 0)
    assert meter.forward == pytest.approx(added / (windows + added))
    named = [chr(row[0] + 90) if len(set(row)) == 1 else "written" for row in joined.tolist()]
    kept = [name for name in named if name != "written"]
    assert kept == list(origins), "the given ones keep their order"
    assert named.count("written") == added
    for stride, place in ((2, 0), (2, 1), (4, 1)):
        part = named[place::stride]
        for name, count in (("a", windows // 2), ("b", windows // 2), ("written", added)):
            assert abs(part.count(name) - count / stride) <= 2
    half = named[: len(named) // 2]
    assert abs(half.count("written") - added / 2) <= 4


def test_how_many_join() -> None:
    assert NoAugmentation().added(8, 16) == 0
    assert [SelfGenerated(share, 1000, 1.0).added(8, 16) for share in (0.01, 0.5, 1.0, 3.0)] == [1, 4, 8, 24]
    assert SelfGenerated(1.0, 1000, 1.0).added(128, 128) == 7, "1,000 tokens at most"
    assert SelfGenerated(1.0, 1000, 1.0).added(2, 2048) == 1, "one at least"


def test_predictions_that_are_not_finite(tiny: Callable[..., Any], tokens_NT: Tensor) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.module.lm_head.weight[5] = float("nan")
    with pytest.raises(RunError, match="not finite; expected augmentation=none"):
        WRITES(model, tokens_NT, Meter(), 0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("share=0", "augmentation.share=0.0"),
        ("share=inf", "augmentation.share=inf"),
        ("tokens=1", "augmentation.tokens=1"),
        ("temperature=0", "augmentation.temperature=0.0"),
    ],
)
def test_settings_that_cannot_work(build_from: Callable[..., Any], setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_from("augmentation=self_generated", f"augmentation.{setting}")
    assert_told(f"{error.value}\n", message)


def test_a_streamed_model_writes_nothing(build_from: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as error:
        build_from(*QUICK, "augmentation=self_generated", "model.stream=true")
    assert_told(f"{error.value}\n", "model.stream=True", "model.stream=false", "augmentation=none")


def test_a_run_is_calibrated_on_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded as they are, foretold, the same from the cache, and other text for another seed."""
    monkeypatch.chdir(tmp_path)
    typed = [*QUICK, "augmentation=self_generated", "augmentation.share=0.5"]

    def run(name: str, *settings: str, typed: list[str] = typed) -> tuple[dict[str, Any], dict[str, float]]:
        assert main([*typed, f"run.dir={name}", *settings]) == 0
        record = json.loads(Path(name, "environment.json").read_text())
        return record["data"], json.loads(Path(name, "metrics.json").read_text())

    data, metrics = run("first")
    monkeypatch.setattr(module, "_written", lambda *_: pytest.fail("it was in the cache"))
    assert run("again")[0] == data
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    other, _ = run("other", "seed=1", "cache=off")
    given, _ = run("given", typed=QUICK)
    windows, length = given["calibration_windows"]
    assert data["calibration_windows"] == other["calibration_windows"] == [windows + windows // 2, length]
    assert data["calibration_tokens_sha256"] != other["calibration_tokens_sha256"]
    again = json.loads(Path("again", "metrics.json").read_text())
    assert again["passes/forward"] == metrics["passes/forward"]
    foretold = pruneexp.run([*typed, "run.dry=true"]).metrics
    assert foretold["forecast/passes/forward"] == pytest.approx(metrics["passes/forward"])


def test_written_windows_count_where_some_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["recipe=best", "run.dry=true", "evaluator=[]"]
    pruneexp.run([*typed, "dataset.samples=4"])
    for settings, there in (
        (["dataset.samples=3"], "dataset.samples=3 and 3 that the model writes, 3 of them"),
        (["dataset.samples=4", "augmentation=none"], "dataset.samples=4, 2 of them"),
    ):
        with pytest.raises(pruneexp.ConfigError, match=f"^{there} held out by search.held_out=0.5: . calibration"):
            pruneexp.run([*typed, *settings])
