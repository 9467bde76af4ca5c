"""Datasets of one's own, with no more than their protocol asks for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import pruneexp
from tests.furnished import EMBEDDED

QUICK = ["evaluator=[perplexity,size]", "evaluator.perplexity.length=null", "run.dir=run", "run.save=false"]
QUICK += ["run.prove=off", "cache=off"]


class Counted:
    """What a dataset has to have."""

    name = "counted"

    def calibration(self, tokenizer: Any) -> Tensor:
        return torch.arange(8 * 24).view(8, 24) % 97

    def evaluation(self, tokenizer: Any, length: int | None) -> Tensor:
        return torch.arange(4 * 24).view(4, 24) % 89


@dataclass
class Drawn(Counted):
    """One that draws as many windows as it is asked for, and takes a token in front of them."""

    samples: int
    bos: bool

    def calibration(self, tokenizer: Any) -> Tensor:
        return super().calibration(tokenizer)[: self.samples]

    def evaluation(self, tokenizer: Any, length: int | None) -> Tensor:
        windows_NT = super().evaluation(tokenizer, length)
        windows_NT[:, 0] = 1 if self.bos else 2
        return windows_NT


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine/dataset").mkdir(parents=True)
    Path("mine/dataset/counted.yaml").write_text(f"_target_: {__name__}.Counted\n")
    Path("mine/dataset/drawn.yaml").write_text(f"_target_: {__name__}.Drawn\nsamples: 8\nbos: false\n")


def described() -> Any:
    return json.loads(Path("run/environment.json").read_text())["data"]


def test_a_run_on_ones_own_dataset() -> None:
    result = pruneexp.run([*QUICK, "dataset=counted"], "mine")
    assert result.metrics["pruned/ppl/counted@24"] > 0
    assert described()["kind"] == "own" and described()["calibration_windows"] == [8, 24]


def test_its_bos_is_the_evaluators() -> None:
    typed = [*QUICK, "run.overwrite=true", "dataset=drawn"]
    without = pruneexp.run(typed, "mine").metrics
    begun = pruneexp.run([*typed, "evaluator.perplexity.bos=true"], "mine").metrics
    assert begun["dense/ppl/counted@24+bos"] != without["dense/ppl/counted@24"]
    with pytest.raises(pruneexp.ConfigError, match=r"evaluator.perplexity.bos=True: .*'counted'"):
        pruneexp.run([*typed, "dataset=counted", "evaluator.perplexity.bos=true"], "mine")


def test_it_is_a_source_among_others() -> None:
    typed = ["dataset=mixed", "dataset.sources=[counted,drawn,embedded]", "dataset.samples=9", "dataset.length=24"]
    metrics = pruneexp.run([*QUICK, *typed], "mine").metrics
    assert {f"pruned/ppl/{name}@24" for name in ("counted", "drawn", "embedded")} <= set(metrics)
    assert described()["sources"]["counted"]["samples"] == 3


def test_an_evaluator_reads_it() -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED).eval()
    own = f"{{_target_: {__name__}.Counted}}"
    typed = ["evaluator=[perplexity]", "~evaluator.perplexity.dataset", f"+evaluator.perplexity.dataset={own}"]
    assert pruneexp.prune(model, None, Counted().calibration(None), overrides=typed).metrics["pruned/ppl/counted@24"]


def test_its_errors_say_which_part() -> None:
    with pytest.raises(pruneexp.ConfigError, match=r"^dataset \(calibration\): windows of 24 tokens; expected"):
        typed = ["dataset=mixed", "dataset.sources=[counted,embedded]", "dataset.samples=8", "dataset.length=32"]
        pruneexp.run([*QUICK, *typed], "mine")
