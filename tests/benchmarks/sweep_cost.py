"""What a sweep costs beside its evaluations: 3 criteria x 4 ratios x 3 compensators on the embedded model.

    python -m tests.benchmarks.sweep_cost OUT [--compensators none,bias,least_squares]

Twice, with perplexity and size and with the default evaluators (latency too). Prints the whole time as a multiple of
all evaluations and one calibration for each criterion (the longest of its jobs: the others found its scores in the
cache), and where the rest goes. Then how long a single run takes from its start to the first step of calibration.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import yaml

CRITERIA = ("flap", "llm_bip", "magnitude")
TARGETS = {"Flap": "flap", "LlmBip": "llm_bip", "Magnitude": "magnitude"}
EVALUATORS = {"perplexity and size": ["evaluator=[perplexity,size]"], "default evaluators": []}
EVALUATED, WORKED = ("evaluate_dense", "evaluate_pruned"), ("load", "search", "save")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--compensators", default="none,bias,least_squares")
    args = parser.parse_args()
    for number, (name, typed) in enumerate(EVALUATORS.items()):
        swept = [f"criterion={','.join(CRITERIA)}", "sparsity.ratio=0.1,0.2,0.3,0.5"]
        swept += ["recipe=flap", f"compensator={args.compensators}", *typed]
        print("\n".join([f"{name}:", *measured(swept, args.out / f"sweep{number}")]), flush=True)
    print(f"a single run, from its start to the first step of calibration: {to_calibration(args.out / 'single'):.1f} s")


def measured(swept: list[str], out: Path) -> list[str]:
    """A sweep in a process of its own, and what its jobs say that they did."""
    start = datetime.now().timestamp()
    run("--multirun", *swept, f"sweep.dir={out / 'jobs'}", f"cache.dir={out / 'cache'}")
    whole, firsts, inside = datetime.now().timestamp() - start, [], 0.0
    spent: dict[str, float] = dict.fromkeys((*EVALUATED, *WORKED, "shrink", "calibrate"), 0.0)
    calibrations: dict[str, float] = dict.fromkeys(CRITERIA, 0.0)
    jobs = [path.parent for path in (out / "jobs").glob("*/metrics.json")]
    for job in jobs:
        seconds = {key: json.loads((job / "metrics.json").read_text())[f"seconds/{key}"] for key in spent}
        spent = {key: value + seconds[key] for key, value in spent.items()}
        target = yaml.safe_load((job / "config.yaml").read_text())["criterion"]["_target_"]
        name = TARGETS[target.rsplit(".", 1)[-1]]
        calibrations[name] = max(calibrations[name], seconds["calibrate"])
        lines = logged(job)
        firsts.append(lines[0][0])
        inside += lines[-1][0] - lines[0][0] - sum(seconds.values())
    evaluations, three = sum(spent[key] for key in EVALUATED), sum(calibrations.values())
    worked = sum(spent[key] for key in WORKED) + spent["calibrate"] - three
    started = min(firsts) - start
    between = whole - started - sum(spent.values()) - inside
    ratio = whole / (evaluations + three)
    return [
        f"  {len(jobs)} jobs: {whole:.1f} s = {ratio:.2f} x "
        f"evaluations ({evaluations:.1f} s) and three calibrations ({three:.1f} s)",
        f"  compensating and shrinking {spent['shrink']:.1f} s; loading, reading scores, search {worked:.1f} s; "
        f"recording {inside:.1f} s; checks between jobs {between:.1f} s; until the first job {started:.1f} s",
    ]


def to_calibration(out: Path) -> float:
    start = datetime.now().timestamp()
    run("recipe=flap", "evaluator=[size]", "cache=off", "run.save=false", f"run.dir={out}")
    return next(when for when, text in logged(out) if "dense/params = " in text) - start  # the last that is said before


def run(*argv: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pruneexp", *argv], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)


def logged(folder: Path) -> list[tuple[float, str]]:
    """The lines of a run's log.txt, with their times."""
    lines = [line.split(" ", 2) for line in (folder / "log.txt").read_text().splitlines()]
    return [(time_of(f"{day} {clock}"), text) for day, clock, text in lines]


def time_of(text: str) -> float:
    return time.mktime(time.strptime(text[:19], "%Y-%m-%d %H:%M:%S")) + int(text[20:]) / 1000


if __name__ == "__main__":
    main()
