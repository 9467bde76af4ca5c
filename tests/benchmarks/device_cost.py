"""What every recipe costs on a device: minutes, peak memory, and the time against one plain pass over the same tokens.

    python -m tests.benchmarks.device_cost FOLDER [--text FILE] [--device cuda] [--recipes flap best ...] [--ratio 0.2]
        [--samples 128] [--length 512] [key=value ...]

FOLDER: a checkpoint. Calibration: windows of FILE, or FOLDER's calibration.npy, as `tests.benchmarks.big_checkpoint`
writes it. Prints a Markdown table as it goes; every recipe is a process of its own. Timed are the stages of a run, with
the text that a model writes itself and recovery, without loading, saving and evaluation; the plain pass is through the
decoder layers, over the given windows, after one that warms up. Memory is the peak of the GPUs, on a CPU the process'
own, from loading to the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.methods import METHODS, prune, pruning_seconds


def cost(settings: list[str]) -> dict[str, float]:
    """Of one pruning, in this process."""
    from pruneexp.cli.build import build
    from pruneexp.cli.compose import compose
    from pruneexp.model.half import widened
    from tests.benchmarks.pruning_cost import plain_pass

    experiment = build(compose(settings))
    described = experiment.model.describe()
    tokens_NT = experiment.dataset.calibration(described.tokenizer)
    model = experiment.model.load(described.tokenizer)
    with widened(model.dtype):
        plain_pass(model, tokens_NT)
        plain = plain_pass(model, tokens_NT)
    del model  # its memory is not the run's
    metrics = prune(experiment, tokens_NT).metrics
    seconds = pruning_seconds(metrics)
    gpus = [value for key, value in metrics.items() if key.startswith("memory/cuda")]
    return {
        "removed": metrics["sparsity/decoder"],
        "seconds": seconds,
        "ratio": seconds / plain,
        "passes": metrics["passes/forward"] + metrics["passes/backward"],
        "peak": sum(gpus) or metrics["memory/peak_bytes"],
    }


def settings_of(args: argparse.Namespace, recipe: str) -> list[str]:
    given = args.folder / "calibration.npy"
    kind, text = ("tokens", given) if args.text is None else ("text", args.text)
    drawn = [f"dataset.samples={args.samples}", f"dataset.length={args.length}"]
    return [
        *METHODS.get(recipe, [f"recipe={recipe}"]),
        f"sparsity.ratio={args.ratio}",
        "model=hf",
        f"model.path={args.folder}",
        f"model.device={args.device}",
        f"dataset={kind}",
        f"dataset.calibration={text}",
        f"dataset.evaluation={text}",
        *(drawn if kind == "text" else []),
        "evaluator=[size]",
        "cache=off",
        *args.settings,
    ]


def row(recipe: str, figures: dict[str, Any]) -> str:
    return (
        f"| `{recipe}` | {figures['removed']:.1%} | {figures['seconds'] / 60:.2f} | {figures['peak'] / 2**30:.2f} "
        f"| {figures['ratio']:.2f} | {figures['passes']:.1f} |"
    )


def main() -> None:
    if sys.argv[1:2] == ["--cost"]:
        print(json.dumps(cost(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--recipes", nargs="+", default=list(METHODS))
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("settings", nargs="*")
    args = parser.parse_intermixed_args()
    print(
        "| recipe | removed | minutes | peak GiB | plain passes | passes made |\n|---|---|---|---|---|---|", flush=True
    )
    for recipe in args.recipes:
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.device_cost",
            "--cost",
            json.dumps(settings_of(args, recipe)),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"| `{recipe}` | failed | | | | |", flush=True)
        else:
            print(row(recipe, json.loads(done.stdout.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
