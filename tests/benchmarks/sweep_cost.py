"""What a sweep costs beside its evaluations: 3 criteria x 4 ratios x 3 compensators on the embedded model.

    python -m tests.benchmarks.sweep_cost OUT

Prints the whole time, that of all evaluations, that of one calibration for each criterion (the longest of its jobs,
the others found its scores in the cache), and the first as a multiple of the other two together.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import yaml

CRITERIA = ("flap", "llm_bip", "magnitude")
SWEPT = ["sparsity.ratio=0.1,0.2,0.3,0.5", "compensator=none,bias,least_squares"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    from pruneexp.__main__ import main as pruneexp

    typed = ["--multirun", "recipe=flap", f"criterion={','.join(CRITERIA)}", *SWEPT, "evaluator=[perplexity,size]"]
    start = time.perf_counter()
    code = pruneexp([*typed, f"sweep.dir={args.out / 'sweep'}", f"cache.dir={args.out / 'cache'}"])
    whole = time.perf_counter() - start
    if code:
        sys.exit(code)
    evaluations, shrinking, calibrations = 0.0, 0.0, dict.fromkeys(CRITERIA, 0.0)
    for folder in (path.parent for path in (args.out / "sweep").glob("*/metrics.json")):
        found = json.loads((folder / "metrics.json").read_text())
        target = yaml.safe_load((folder / "config.yaml").read_text())["criterion"]["_target_"]
        name = {"Flap": "flap", "LlmBip": "llm_bip", "Magnitude": "magnitude"}[target.rsplit(".", 1)[-1]]
        evaluations += found["seconds/evaluate_dense"] + found["seconds/evaluate_pruned"]
        shrinking += found["seconds/shrink"]
        calibrations[name] = max(calibrations[name], found["seconds/calibrate"])
    three = sum(calibrations.values())
    print(f"36 jobs: {whole:.1f} s; evaluations {evaluations:.1f} s, three calibrations {three:.1f} s")
    print(f"compensating and shrinking, which each job does for itself: {shrinking:.1f} s")
    print(f"whole time / (evaluations + three calibrations): {whole / (evaluations + three):.2f}")


if __name__ == "__main__":
    main()
