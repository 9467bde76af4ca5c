"""What every recipe gives on the embedded models: plans, metrics, and composed configs of the sweeps.

    python -m tests.golden             adds recipes and sweeps that are new; what is there already stays
    python -m tests.golden NAME ...    makes these anew: only when an answer is meant to change
    python -m tests.golden --to FOLDER writes all of them to FOLDER, and leaves those that the tests read

Two commits on one machine give the same metrics, bit for bit, where two such folders are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pruneexp.files import write_atomic

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


def runs_of(model: str, scratch: Path, names: Sequence[str]) -> dict[str, Any]:
    """The named recipes on a model, by recipe."""
    return {recipe: run(model, recipe, scratch / f"{model}-{recipe}") for recipe in names}


def config_of(sweep: str) -> str:
    """The config that the sweep starts from, as `--cfg job` prints it."""
    return command([f"+sweep={sweep}", "--cfg", "job"])


def frozen(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """A file of answers, by recipe or sweep; empty where there is none."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(folder: Path, anew: Sequence[str] = ()) -> None:
    """Adds to `folder` what has no answer there, makes those in `anew` once more, and drops what is gone."""
    import torch

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: text for name, text in frozen("configs", folder).items() if name in sweeps() and name not in anew}
    configs = {name: kept.get(name) or config_of(name) for name in sweeps()}
    write_atomic(folder / "configs.json", json.dumps(configs, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        here = os.getcwd()
        os.chdir(scratch)
        try:
            for model in MODELS:
                before = frozen(model, folder).items()
                kept = {name: answer for name, answer in before if name in recipes() and name not in anew}
                missing = [name for name in recipes() if name not in kept]
                answers = kept | runs_of(model, Path(scratch), missing)
                write_atomic(
                    folder / f"{model}.json", json.dumps(answers, separators=(",", ":"), sort_keys=True) + "\n"
                )
                print(f"{model}: made {', '.join(missing) or 'nothing'}", file=sys.stderr)
        finally:
            os.chdir(here)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.golden")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a recipe or a sweep, to be made anew")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where all are made anew, in place of the tests' own")
    args = parser.parse_args()
    everything = [*recipes(), *sweeps()]
    if unknown := set(args.names) - set(everything):
        parser.error(f"{', '.join(sorted(unknown))}: expected of {', '.join(everything)}")
    if args.to is None:
        write(FOLDER, args.names)
    else:
        write(args.to.absolute(), everything)
