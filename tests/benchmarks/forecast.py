"""How near a forecast of memory comes to what a run takes: `memory/peak_bytes`, measured and forecast.

    python -m tests.benchmarks.forecast FOLDER TEXT [--samples 32] [--length 256] [--only flap] [key=value ...]

FOLDER: a checkpoint; TEXT: a file that windows for calibration and evaluation are drawn from. Every run is a process of
its own; more settings go to all of them. Prints a table as it goes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile

RUNS = {
    "flap": "recipe=flap",
    "flap, streamed": "recipe=flap model.stream=true",
    "flap + least_squares": "recipe=flap compensator=least_squares",
    "flap + least_squares, streamed": "recipe=flap compensator=least_squares model.stream=true",
    "best": "recipe=best search.effort=3 criterion.step=32",
}
CHILD = "import json, sys, pruneexp; print(json.dumps(dict(pruneexp.run(sys.argv[1:]).metrics)))"


def metrics_of(settings: list[str]) -> dict[str, float]:
    """Of a run in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CHILD, *settings], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("text")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--only", help="runs whose names begin so")
    parser.add_argument("settings", nargs="*")
    args = parser.parse_intermixed_args()
    common = ["model=hf", f"model.path={args.folder}", "dataset=text", "evaluator=[perplexity,size]"]
    common += [f"dataset.{split}={args.text}" for split in ("calibration", "evaluation")]
    common += [f"dataset.samples={args.samples}", f"dataset.length={args.length}", "evaluator.perplexity.samples=16"]
    print("| run | forecast | measured | ratio |\n|---|---|---|---|", flush=True)
    for name, run in RUNS.items():
        if not name.startswith(args.only or ""):
            continue
        with tempfile.TemporaryDirectory() as folder:
            settings = [*common, *run.split(), "cache=off", "run.prove=off", f"run.dir={folder}/run", *args.settings]
            expected = metrics_of([*settings, "run.dry=true"])
            measured = metrics_of(settings)["memory/peak_bytes"]
        forecast = expected[f"forecast/memory/{'streamed' if 'model.stream=true' in settings else 'held'}_bytes"]
        sizes = f"{forecast / 2**20:,.0f} MiB | {measured / 2**20:,.0f} MiB"
        print(f"| `{name}` | {sizes} | {forecast / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
