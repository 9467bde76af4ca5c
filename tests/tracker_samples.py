"""A run small enough to be looked at whole, for the tests of the trackers."""

from pathlib import Path

import torch

from pruneexp.tracker import LocalRun
from pruneexp.types import Cost, Plan, RemovalPath, RunRecord, Site, SitePlan

CONFIG = {"criterion": {"_target_": "x.Y", "metric": "WIFV", "ridge": "1e-5"}, "seed": 0, "list": [1, None]}
METRICS = {"sparsity/decoder": 0.25, "dense/params": 100, "pruned/ppl/stories@128": 6.5}
ATTENTION = Site("model.layers.0.self_attn", "attention", 0, 4, 2, Cost(80, 80, 4))
MLP = Site("model.layers.0.mlp", "mlp", 0, 6, 1, Cost(24, 24, 0))
SITES = (ATTENTION, MLP)
PLAN = Plan(
    {ATTENTION.name: SitePlan("attention", 4, (0, 2)), MLP.name: SitePlan("mlp", 6, tuple(range(6)))}, {"ratio": 0.25}
)
SCORES = {
    ATTENTION.name: torch.arange(8, dtype=torch.float64)[::2],
    MLP.name: RemovalPath(torch.tensor([5, 4, 3, 2, 1, 0]), torch.arange(6.0)),
}


def record(folder: Path, group: str | None = None, name: str | None = None) -> RunRecord:
    return RunRecord(folder, CONFIG, group, name, "run")


def finished(folder: Path, overwrite: bool = False) -> None:
    run = LocalRun(overwrite)
    run.start(record(folder))
    run.artifacts(PLAN, SCORES, SITES)
    run.finish(METRICS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
