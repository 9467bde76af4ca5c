"""What every recipe costs on a device: minutes, peak memory, and the time against one plain pass over the same tokens.

    python -m tests.benchmarks.device_cost FOLDER [--text FILE] [--device cuda] [--recipes flap best ...] [--ratio 0.2]
        [--samples 128] [--length 512] [key=value ...]

FOLDER: a checkpoint. Calibration: windows of FILE, or FOLDER's calibration.npy, as `tests.benchmarks.big_checkpoint`
writes it. Prints a Markdown table as it goes; every recipe is a process of its own. Pruning is timed from calibration
to the last layer's shrinking, without loading, saving and evaluation; the plain pass is through the decoder layers,
after one that warms up. Memory is the GPU's peak while pruning, on a CPU the process' own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.methods import METHODS


def cost(settings: list[str]) -> dict[str, float]:
    """Of one pruning, in this process."""
    import torch

    from pruneexp.cli.build import build
    from pruneexp.cli.compose import compose
    from pruneexp.pruning import Method
    from pruneexp.pruning.record import Record
    from pruneexp.pruning.rounds import prune_in_rounds_
    from pruneexp.tracker import memory_metrics, reset_peak_memory
    from tests.benchmarks.pruning_cost import plain_pass

    experiment = build(compose(settings))
    described = experiment.model.describe()
    tokens_NT = experiment.dataset.calibration(described.tokenizer)
    model = experiment.model.load(described.tokenizer)
    decoder = model.decoder_params
    plain_pass(model, tokens_NT)
    plain = plain_pass(model, tokens_NT)
    method = Method(experiment.criterion, experiment.sparsity, experiment.search, experiment.compensator)
    record = Record(rng=torch.Generator().manual_seed(experiment.seed))
    reset_peak_memory()
    start = time.perf_counter()
    prune_in_rounds_(model, tokens_NT, method, record)
    for device in {parameter.device for parameter in model.module.parameters()}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peaks = memory_metrics(model.devices)
    whole = peaks.pop("memory/peak_bytes")
    return {
        "removed": 1 - model.decoder_params / decoder,
        "seconds": seconds,
        "ratio": seconds / plain,
        "passes": record.meter.forward + record.meter.backward,
        "peak": sum(peaks.values()) or whole,
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


def row(recipe: str, found: dict[str, Any]) -> str:
    return (
        f"| `{recipe}` | {found['removed']:.1%} | {found['seconds'] / 60:.2f} | {found['peak'] / 2**30:.2f} "
        f"| {found['ratio']:.2f} | {found['passes']:.1f} |"
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
