"""The benchmarks of methods: a row that is called like a recipe is that recipe, measured as a run does it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

import pruneexp
from tests.benchmarks import device_cost, figures, methods
from tests.golden import recipes

QUICK = ["model=embedded", "dataset=embedded", "dataset.samples=8", "dataset.length=32", "cache=off"]
QUICK += ["evaluator=[perplexity]", "evaluator.perplexity.samples=8", "search.effort=1", "recovery.epochs=1"]


def test_a_row_that_is_called_like_a_recipe_is_the_recipe_as_it_is_typed() -> None:
    typed = {name: f"recipe={name}" for name in recipes()}
    assert {name: " ".join(settings) for name, settings in methods.METHODS.items() if name in typed} == typed


@pytest.mark.parametrize(
    ("method", "chosen"), [("dense", "recipe=flap"), ("sleb", "recipe=sleb"), ("new", "recipe=new")]
)
def test_a_method_that_is_not_in_the_table_is_a_recipe(method: str, chosen: str) -> None:
    args = argparse.Namespace(text=Path("text"), windows=None, samples=8, override=[])
    assert methods.overrides(args, Path("model"), method, 0.2, 0)[0] == chosen


@pytest.mark.slow
def test_a_cell_is_the_run(tmp_path: Path) -> None:
    """With text that the model writes itself, and with recovery."""
    typed = ["recipe=best_tuned", *QUICK]
    run = pruneexp.run([*typed, "run.save=false", f"run.dir={tmp_path / 'run'}"]).metrics
    assert run["passes/backward"] and run["seconds/augment"]
    cell = methods.run_cell({"threads": torch.get_num_threads(), "method": "best_tuned", "overrides": typed})
    same = {key: value for key, value in run.items() if key.startswith(("passes/", "sparsity/decoder"))}
    same |= {key.removeprefix("pruned/"): value for key, value in run.items() if key.startswith("pruned/p")}
    assert {key: cell[key] for key in same} == same
    cost, passes = device_cost.cost(typed), run["passes/forward"] + run["passes/backward"]
    assert (cost["removed"], cost["passes"]) == (run["sparsity/decoder"], passes)
    assert 0 < cost["ratio"] and methods.pruning_seconds(run) > run["seconds/augment"] + run["seconds/recover"]


def test_the_figures_are_asked_for_help_and_for_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(*given: object) -> None:
        raise AssertionError("drawn, though only help was asked for")

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(figures, "write_atomic", drawn)
        figures.main(["--help"])
    assert ended.value.code == 0 and "--out" in capsys.readouterr().out
    figures.main(["--out", str(tmp_path / "new")])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["effort.svg", "ridge.svg"]
