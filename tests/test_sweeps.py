"""Ready sweeps, scaled down to the embedded model: what they compose also runs."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from pruneexp import progress, report
from pruneexp.__main__ import main

# All that is large: model, data, steps; and two of the jobs are enough.
SMALL = ["model=embedded", "dataset=embedded", "dataset.samples=4", "dataset.length=32", "evaluator=[size]"]
CHOSEN = {
    "policy_gradient_paper": ["search.steps=3", "sparsity.ratio=0.3", "search.initial=random"],
    "policy_gradient_heads": ["search.steps=3", "sparsity.ratio=0.1"],
    "policy_gradient_layers": ["search.steps=3", "sparsity.ratio=0.3"],
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_sweep_runs_small(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(progress, "BAR_AFTER", 3600.0)
    monkeypatch.setattr(report, "structure_figure", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main([f"+sweep={name}", *SMALL, *CHOSEN[name], "sweep.dir=swept"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    folders = [path for path in Path("swept").iterdir() if path.is_dir()]
    assert len(folders) == 2
    kinds = {"policy_gradient_heads": "attention", "policy_gradient_layers": "block"}
    for folder in folders:
        plan = json.loads((folder / "plan.json").read_text())
        assert json.loads((folder / "status.json").read_text())["status"] == "done"
        lost = {site["kind"] for site in plan["sites"].values() if len(site["kept"]) < site["units"]}
        assert lost == {kinds[name]} if name in kinds else "mlp" in lost
