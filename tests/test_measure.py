"""What evaluators of somebody's own give, and where it goes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pruneexp.cache import Cache
from pruneexp.experiment.measure import dense_figures, measured
from pruneexp.tracker import Trackers
from pruneexp.types import Measured, filled
from pruneexp.types.defaults import EVALUATOR

MODEL: Any = SimpleNamespace(params=7, decoder_params=5, tokenizer=None, module=SimpleNamespace(generation_config=None))


class Counts:
    """Figures alone; asks for nothing else."""

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
        return {"parameters": float(model.params)}


class Writes:
    """Figures and files, of each model and of both."""

    asked = 0

    def measured_on(self, tokenizer: Any) -> str:
        return "always the same"

    def __call__(self, model: Any, tokenizer: Any) -> Measured:
        self.asked += 1
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
        figures, found = measured(evaluators, MODEL, tmp_path / run, Trackers(()), "dense", kept)
        assert figures == {"dense/params": 7, "dense/params/decoder": 5, "dense/parameters": 7, "dense/words": 7}
        figures, _ = measured(evaluators, pruned, tmp_path / run, Trackers(()), "pruned", dense=found)
        assert figures["pruned/words"] == 4 and figures["pruned/gone"] == 3 and figures["pruned/parameters"] == 4
        written = {file.name: file.read_text() for file in (tmp_path / run / "samples").iterdir()}
        assert written == {
            "writes_dense.txt": "7 words", "writes_pruned.txt": "4 words", "writes.md": "[7] and [4]"
        }  # fmt: skip
    assert evaluators["writes"].asked == 3  # the dense model once
