"""What evaluators of somebody's own give, and where it goes."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from pruneexp.cache import Cache
from pruneexp.cli.build import satisfying
from pruneexp.experiment.measure import dense_figures, measure
from pruneexp.tracker import Trackers
from pruneexp.types import ConfigError, Evaluator, Measured, RunError, filled
from pruneexp.types.defaults import EVALUATOR

MODEL: Any = SimpleNamespace(params=7, decoder_params=5, tokenizer=None, module=SimpleNamespace(generation_config=None))


class Counts:
    """Figures alone; asks for nothing else."""

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
        return {"parameters": float(model.params)}


class Writes:
    """Figures and files, of each model and of both."""

    calls = 0

    def measured_on(self, tokenizer: Any) -> str:
        return "always the same"

    def __call__(self, model: Any, tokenizer: Any) -> Measured:
        self.calls += 1
        return Measured({"words": float(model.params)}, {"txt": f"{model.params} words"}, seen=[model.params])

    def against(self, dense: Measured, pruned: Measured, tokenizer: Any) -> Measured:
        return Measured({"gone": dense.seen[0] - pruned.seen[0]}, {"md": f"{dense.seen} and {pruned.seen}"})


def test_figures_and_files_come_together_and_from_the_cache(tmp_path: Path) -> None:
    evaluators: Any = {name: filled(each(), EVALUATOR) for name, each in (("counts", Counts), ("writes", Writes))}
    pruned = SimpleNamespace(**{**vars(MODEL), "params": 4})

    def kept(evaluator: Any, name: str, compute: Any) -> Measured:
        return dense_figures(Cache(str(tmp_path / "cache"), 1.0), {}, MODEL, evaluator, name, compute)

    for run in ("first", "again"):
        (tmp_path / run).mkdir()
        figures, dense = measure(evaluators, MODEL, tmp_path / run, Trackers(()), "dense", kept)
        assert figures == {"dense/params": 7, "dense/params/decoder": 5, "dense/parameters": 7, "dense/words": 7}
        figures, _ = measure(evaluators, pruned, tmp_path / run, Trackers(()), "pruned", dense=dense)
        assert figures["pruned/words"] == 4 and figures["pruned/gone"] == 3 and figures["pruned/parameters"] == 4
        written = {file.name: file.read_text() for file in (tmp_path / run / "samples").iterdir()}
        assert written == {
            "writes_dense.txt": "7 words", "writes_pruned.txt": "4 words", "writes.md": "[7] and [4]"
        }  # fmt: skip
    assert evaluators["writes"].calls == 3  # the dense model once


def giving(figures: Any, compared: Any = MappingProxyType({})) -> Any:
    """An evaluator that gives anything, as the class `Gives`."""

    class Gives:
        def __call__(self, model: Any, tokenizer: Any) -> Any:
            return figures

        def against(self, dense: Measured, pruned: Measured, tokenizer: Any) -> Any:
            return compared

    return filled(Gives(), EVALUATOR)


WRONG: dict[str, tuple[Any, list[str]]] = {
    "text": ("5.47", ["evaluator.mine: Gives.__call__ gave '5.47'", "expected figures by name"]),
    "nothing": (None, ["Gives.__call__ gave None", "expected figures by name"]),
    "unnamed": ({1: 5.47}, ["Gives.__call__ gave {1: 5.47}", "expected figures by name"]),
    "words": ({"a/x@1": "high"}, ["evaluator.mine: Gives.__call__ gave a/x@1='high'", "a finite number"]),
    "nan": ({"a/x@1": float("nan")}, ["Gives.__call__ gave a/x@1=nan", "a finite number"]),
    "bytes": (Measured({}, {"txt": b"x"}), ["a file 'txt' of bytes", "expected text by the ending"]),  # type: ignore
    "path": (Measured({}, {"../evil": "x"}), ["a file '../evil' of str", "expected text by the ending"]),
}


@pytest.mark.parametrize("method", ["__call__", "against"])
def test_answers_that_are_no_figures_name_the_method(tmp_path: Path, method: str) -> None:
    for answer, phrases in WRONG.values():
        evaluator = giving(answer) if method == "__call__" else giving({}, answer)
        with pytest.raises(RunError) as error:
            measure({"mine": evaluator}, MODEL, tmp_path, Trackers(()), "pruned", dense={"mine": Measured({})})
        assert [each for each in phrases if each.replace("__call__", method) not in str(error.value)] == []
    assert not list(tmp_path.rglob("*")), "nothing is written"


def test_two_figures_of_one_name_are_refused_where_they_differ() -> None:
    same = {"one": giving({"a/x@1": 1.001}), "two": giving({"a/x@1": 1.0})}  # batches round
    assert measure(same, MODEL, None, Trackers(()), "dense")[0]["dense/a/x@1"] == 1.0
    message = "evaluator.two: Gives.__call__ gave a/x@1=2.0, which evaluator.one: Gives.__call__ gave as 1.001"
    with pytest.raises(RunError, match=message):
        measure({**same, "two": giving({"a/x@1": 2.0})}, MODEL, None, Trackers(()), "dense")
    with pytest.raises(RunError, match="Gives.against gave a/x@1=3.0, which evaluator.one"):
        compared = {"one": giving({"a/x@1": 1.0}, {"a/x@1": 3.0})}
        measure(compared, MODEL, None, Trackers(()), "pruned", dense={"one": Measured({})})
    with pytest.raises(RunError, match="params=1, which every run"):
        measure({"one": giving({"params": 1})}, MODEL, None, Trackers(()), "dense")


def test_methods_that_cannot_be_called_are_told_before_a_run() -> None:
    class Short:
        def __call__(self, model: Any) -> dict[str, float]:
            return {}

    class Compares(Counts):
        def against(self, dense: Measured, pruned: Measured) -> Measured:
            return Measured({})

    for part, signature in ((Short(), "Short.__call__(model)"), (Compares(), "Compares.against(dense, pruned)")):
        with pytest.raises(ConfigError, match="expected to take") as error:
            satisfying(part, Evaluator, "evaluator.mine")
        assert signature in str(error.value) and "tokenizer" in str(error.value)
    assert satisfying(Counts(), Evaluator, "evaluator.mine").against(1, 2, 3) == Measured({})
