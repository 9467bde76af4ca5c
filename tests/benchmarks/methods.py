"""Every method at every ratio on given models: perplexity, parameters, seconds, peak memory (Linux).

    python -m tests.benchmarks.methods OUT --models ../shared/models/wikitext2-* --text ../shared/data/wikitext2 \
        [--methods flap best ...] [--ratios 0.2 0.3 0.5] [--windows 1000] [--match flap] \
        [--override search.effort=5 --label @5]

OUT/cells.jsonl gets a line a cell; cells that are there are not run again, so that a killed table goes on where it
stopped. `--match METHOD` asks every other method for the share of decoder parameters that METHOD really removed at the
same ratio: FLAP's thresholds overshoot. OUT/table.md has ppl as a share of FLAP's excess log-perplexity beside it. Each
cell runs in a process of its own; memory is the peak from before the model is loaded to the end of the pruning. A cell
is what a run is, with the text that a model writes itself and its recovery.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pruneexp.experiment.run import Outcome
    from pruneexp.experiment.settings import Experiment

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "recipe").glob("*.yaml"))
METHODS: dict[str, list[str]] = {
    "random": ["recipe=wanda_sp", "criterion=random", "search=uniform"],
    "magnitude+uniform": ["recipe=magnitude", "search=uniform"],
    "wanda_sp+uniform": ["recipe=wanda_sp", "search=uniform"],
    "mini_llm_exact": ["recipe=mini_llm", "criterion=mini_llm_exact"],
    "flap+least_squares": ["recipe=flap", "compensator=least_squares"],
    **{recipe: [f"recipe={recipe}"] for recipe in RECIPES},  # as they are typed
}
NOT_PRUNING = ("load", "save", "evaluate_dense", "evaluate_pruned")  # stages of a run


def prune(experiment: Experiment, tokens_NT: Tensor) -> Outcome:
    """What a run does on these windows, from loading the model to the end of its recovery. Nothing is evaluated,
    nothing is written, and nothing comes from the cache."""
    from pruneexp.cache import NoCache
    from pruneexp.dataset.given import GivenTokens
    from pruneexp.experiment.run import run_experiment

    settings = replace(experiment.run, save=False)
    bare = replace(experiment, dataset=GivenTokens(tokens_NT), evaluators={}, cache=NoCache(), run=settings)
    return run_experiment(bare, recorded=False)


def pruning_seconds(metrics: Mapping[str, float]) -> float:
    """Of all stages of a run that are its method's: text that the model writes and recovery among them."""
    stages = {key.removeprefix("seconds/"): value for key, value in metrics.items() if key.startswith("seconds/")}
    return math.fsum(value for stage, value in stages.items() if stage not in NOT_PRUNING)


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Prunes and measures in this process."""
    import torch

    from pruneexp.cli.build import build
    from pruneexp.cli.compose import compose
    from pruneexp.model.half import widened

    torch.set_num_threads(cell["threads"])
    experiment = build(compose(cell["overrides"]))
    described = experiment.model.describe()
    if cell["method"] == "dense":
        model = experiment.model.load(described.tokenizer)
        figures: dict[str, Any] = {"dense/params": model.params, "dense/params/decoder": model.decoder_params}
    else:
        tokens_NT = experiment.dataset.calibration(described.tokenizer)
        before = resident()  # tokenising leaves much behind that is no business of the method's
        outcome = prune(experiment, tokens_NT)
        model = outcome.model
        assert model is not None
        figures = {"memory/added_bytes": resident("VmHWM") - before, "seconds": pruning_seconds(outcome.metrics)}
        figures |= {key.removeprefix("pruned/"): value for key, value in outcome.metrics.items()}
    evaluator: Any = experiment.evaluators["perplexity"]
    with widened(model.dtype):
        return figures | evaluator(model, model.tokenizer)


def resident(what: str = "VmRSS") -> int:
    """Bytes resident now, after the peak was set back to that; VmHWM: at the peak since."""
    if what == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def overrides(args: argparse.Namespace, folder: Path, method: str, ratio: float, seed: int) -> list[str]:
    text, windows = args.text, "null" if args.windows is None else str(args.windows)
    return [
        *METHODS.get(method, [f"recipe={'flap' if method == 'dense' else method}"]),
        f"sparsity.ratio={ratio!r}",
        f"seed={seed}",
        "model=hf",
        f"model.path={folder}",
        "dataset=text",
        f"dataset.calibration={text / 'train.txt'}",
        f"dataset.evaluation={text / 'test.txt'}",
        f"dataset.samples={args.samples}",
        "dataset.length=128",
        "evaluator=[perplexity]",
        f"evaluator.perplexity.samples={windows}",
        *args.override,
    ]


def main() -> None:
    if sys.argv[1:2] == ["--cell"]:
        print(json.dumps(run_cell(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--seeds", type=int, default=1, help="of criterion=random")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--windows", type=int, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--match", default=None, help="method whose real share the others are asked for")
    parser.add_argument("--override", nargs="*", default=[], help="settings for every method, such as search.effort=5")
    parser.add_argument("--label", default="", help="added to the methods' names, to tell overrides apart")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "cells.jsonl"
    cells = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def cell_of(model: str, method: str, ratio: float, seed: int) -> dict[str, Any] | None:
        key = (model, method, ratio, seed)
        return next((c for c in cells if (c["model"], c["method"], c["asked"], c["seed"]) == key), None)

    for folder in args.models:
        for method in ["dense", *args.methods]:
            for target in [0.0] if method == "dense" else args.ratios:
                for seed in range(args.seeds if method == "random" else 1):
                    name = method if method == "dense" else method + args.label
                    if cell_of(folder.name, name, target, seed):
                        continue
                    ratio = target
                    if args.match and method not in ("dense", args.match):
                        like = cell_of(folder.name, args.match, target, 0)
                        ratio = like["sparsity/decoder"] if like else target
                    cell = {"model": folder.name, "method": name, "asked": target, "ratio": ratio, "seed": seed}
                    cell |= {"threads": args.threads, "overrides": overrides(args, folder, method, ratio, seed)}
                    command = [sys.executable, "-m", "tests.benchmarks.methods", "--cell"]
                    done = subprocess.run(
                        [*command, json.dumps({**cell, "method": method})], stdout=subprocess.PIPE, text=True
                    )
                    if done.returncode:
                        print(f"failed: {cell}", file=sys.stderr)
                        continue
                    cells.append(cell | json.loads(done.stdout.splitlines()[-1]))
                    with path.open("a") as lines:
                        lines.write(json.dumps(cells[-1]) + "\n")
                    print(row(cells[-1], cells), flush=True)
    table = "\n".join([HEAD, *(row(cell, cells) for cell in cells)])
    (args.out / "table.md").write_text(table + "\n")


HEAD = (
    "| model | method | ratio | seed | removed | ppl | of FLAP's excess | decoder params | passes | seconds "
    "| peak MiB added |"
    "\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(cell: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    ppl = perplexity(cell)
    like = {c["method"]: c for c in cells if c["model"] == cell["model"] and c["asked"] in (0.0, cell["asked"])}
    share = ""
    if "dense" in like and "flap" in like and cell["method"] != "dense":
        dense, flap = perplexity(like["dense"]), perplexity(like["flap"])
        share = f"{math.log(ppl / dense) / math.log(flap / dense):.3f}"
    if cell["method"] == "dense":
        return f"| {cell['model']} | dense | | | | {ppl:.3f} | | {cell['dense/params/decoder']:,} | | | |"
    return (
        f"| {cell['model']} | {cell['method']} | {cell['asked']} | {cell['seed']} | {cell['sparsity/decoder']:.4f} "
        f"| {ppl:.3f} | {share} | {cell['params/decoder']:,} | {cell['passes/forward']:.1f} | {cell['seconds']:.1f} "
        f"| {cell.get('memory/added_bytes', 0) / 2**20:.0f} |"
    )


def perplexity(cell: dict[str, Any]) -> float:
    return next(value for key, value in cell.items() if key.startswith("ppl/"))


if __name__ == "__main__":
    main()
