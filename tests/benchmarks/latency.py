"""Budgets in time against budgets in parameters: a share of the decoder's milliseconds by FLAP's scores, and so many
parameters by the same search that the table says the same time.

    python -m tests.benchmarks.latency --model DIR --data DIR [--phase decode prefill] [--search al_am global uniform]

`--data` holds wikitext2/train.txt and wikitext2/test.txt. Prints a row for each plan: the share that the table says,
the share measured (median of five, least and most), decoder parameters, perplexity of the test text's first windows.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from pruneexp.cache import NoCache
from pruneexp.calibrate import Meter
from pruneexp.compensator import Bias
from pruneexp.criterion import Flap
from pruneexp.experiment.latency import conditions_of
from pruneexp.latency import Workload, compare_times, measure_table
from pruneexp.model import Model, ModelSource, sharing
from pruneexp.pruning import Method
from pruneexp.pruning.ask import plan_within_budget
from pruneexp.pruning.budget import whole_budget
from pruneexp.pruning.dense_evidence import Results
from pruneexp.pruning.method import Pruning
from pruneexp.pruning.notes import Notes
from pruneexp.pruning.record import Record
from pruneexp.pruning.steps import _compensate_and_shrink
from pruneexp.search import AlAm, Global, Uniform
from pruneexp.sparsity import OneShot
from pruneexp.types import Plan

BOTH: Any = ["heads", "channels"]
SEARCHES: dict[str, Any] = {
    "al_am": AlAm(),
    "global": Global(1, BOTH, "zscore", 1),
    "uniform": Uniform(1, BOTH, 0.0, 0.0, 1, alike=False, remainder="nearest"),
    "per_parameter": Global(1, BOTH, "per_parameter", 1),
}
STEPS = 12  # of halving until as many parameters leave as take the time


def windows(model: Model, file: Path, count: int, length: int) -> Tensor:
    """The text's first windows, int64 [count, length]."""
    text = file.read_text(encoding="utf-8")[: count * length * 8]
    tokens = model.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    return tokens[: count * length].view(count, length)


def plan_of(model: Model, scores: Mapping[str, Any], search: Any, sparsity: OneShot) -> Plan:
    work = Pruning(model, None, Method(Flap("WIFV", False), sparsity, search, Bias(False)), sparsity.ratio, Record())
    budget = whole_budget(model, search, sparsity, sparsity.ratio)
    return plan_within_budget(work, scores, model.sites(), budget, None)[0]


def foretold(model: Model, plan: Plan) -> float:
    budget = whole_budget(model, AlAm(), OneShot(0.0, "latency", 1, 1, "decode", None), 0.0)
    return sum(budget.freed(plan, site) for site in model.sites()) / budget.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--phase", nargs="+", default=["decode", "prefill"])
    parser.add_argument("--search", nargs="+", default=list(SEARCHES))
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    model = ModelSource("model", args.model, None, args.dtype, "cpu", False, False, 4).load()
    tokens_NT = windows(model, args.data / "wikitext2/train.txt", args.samples, args.length)
    judged_NT = windows(model, args.data / "wikitext2/test.txt", args.windows, args.length)
    criterion, compensator = Flap("WIFV", False), Bias(False)
    results, notes = Results(NoCache(), {}), Notes(None)
    scores, evidence = results.of(model, tokens_NT, criterion, compensator.evidence, (), Meter(), notes)
    print("phase | search | of | ratio | foretold | measured | parameters | perplexity", flush=True)
    for phase in args.phase:
        work = Workload(1, args.context, phase, model)
        timed = OneShot(args.ratio, "latency", args.context, 1, phase, None)
        model.times = measure_table(work, conditions_of(model, timed), 1).times
        for name in args.search:
            search = SEARCHES[name]
            plan = plan_of(model, scores, search, timed)
            share = foretold(model, plan)
            low, high = 0.0, 0.9
            for _ in range(STEPS):
                counted = replace(timed, of="decoder", ratio=(low + high) / 2)
                other = plan_of(model, scores, search, counted)
                low, high = (counted.ratio, high) if foretold(model, other) < share else (low, counted.ratio)
            plans = [("latency", args.ratio, plan)]
            plans += [] if other.sites == plan.sites else [("decoder", counted.ratio, other)]
            for of, ratio, chosen in plans:
                pruned = sharing(model)
                own = Pruning(pruned, tokens_NT, Method(criterion, timed, search, compensator), ratio, Record())
                _compensate_and_shrink(own, chosen, evidence, "shrink")
                times = compare_times(work, pruned)
                shares = [1 - b / a for a, b in zip(times.dense, times.pruned, strict=True)]
                perplexity = pruned.token_losses(judged_NT, 4).mean().exp().item()
                spread = f"{median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})"
                left = 1 - pruned.decoder_params / model.decoder_params
                figures = f"{foretold(model, chosen):.3f} | {spread} | {left:.3f} | {perplexity:.2f}"
                print(f"{phase} | {name} | {of} | {ratio:.3f} | {figures}", flush=True)
            if len(plans) == 1:
                print(f"{phase} | {name} | decoder | {counted.ratio:.3f} | the same plan", flush=True)


if __name__ == "__main__":
    main()
