"""What every recipe gives on the embedded models: plans, metrics, and composed configs of the sweeps.

`python -m tests.golden FOLDER` writes them to FOLDER; without FOLDER, where the tests read them: only when an answer is
meant to change. Two commits on one machine give the same metrics, bit for bit, where two such folders are the same.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "data" / "golden"
MODELS = ("embedded", "embedded_opt", "embedded_bloom")
QUICK = (
    "dataset.samples=16",
    "dataset.length=64",
    "evaluator=[perplexity,size]",
    "evaluator.perplexity.samples=32",
    "cache=off",
    "run.save=false",
)
SHORTER = {
    "best": ("search.effort=8",),
    "best_tuned": ("search.effort=8", "recovery.epochs=1"),
    "ifso": ("model.dtype=float64",),  # in float32 its finite differences depend on how a processor rounds
    "policy_gradient": ("search.steps=20",),
}
VARYING = ("seconds/", "memory/")


def recipes() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "recipe").glob("*.yaml"))


def sweeps() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parents[1] / "sweeps").glob("*.yaml"))


def command(argv: list[str]) -> str:
    """What the command prints. Raises AssertionError where it fails."""
    from hydra.core.global_hydra import GlobalHydra

    from pruneexp.__main__ import main

    GlobalHydra.instance().clear()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(argv)
    assert code == 0, f"{' '.join(argv)}: exit code {code}"
    return out.getvalue()


def run(model: str, recipe: str, folder: Path) -> dict[str, Any]:
    """Plan and metrics of one run in `folder`, an absolute path."""
    command([f"model={model}", f"recipe={recipe}", f"run.dir={folder}", *QUICK, *SHORTER.get(recipe, ())])
    metrics = json.loads((folder / "metrics.json").read_text())
    lasting = {key: value for key, value in metrics.items() if not key.startswith(VARYING)}
    return {"plan": json.loads((folder / "plan.json").read_text()), "metrics": lasting}


def runs_of(model: str, scratch: Path) -> dict[str, Any]:
    """Every recipe on a model, by recipe."""
    return {recipe: run(model, recipe, scratch / f"{model}-{recipe}") for recipe in recipes()}


def config_of(sweep: str) -> str:
    """The config that the sweep starts from, as `--cfg job` prints it."""
    return command([f"+sweep={sweep}", "--cfg", "job"])


def write(folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    configs = {name: config_of(name) for name in sweeps()}
    (folder / "configs.json").write_text(json.dumps(configs, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        here = os.getcwd()
        os.chdir(scratch)
        try:
            for model in MODELS:
                found = runs_of(model, Path(scratch))
                (folder / f"{model}.json").write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")
        finally:
            os.chdir(here)


if __name__ == "__main__":
    write(Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else FOLDER)
