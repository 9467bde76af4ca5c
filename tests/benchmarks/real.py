"""A real model's table, recipes x ratios: in and out of the domain, tasks, seconds, passes, memory.

    python -m tests.benchmarks.real MODEL DATA OUT [--recipes flap best ...] [--ratios 0.2 0.3 0.5] [--items 1000]
        [--device cuda] [key=value ...]

MODEL: a checkpoint. DATA: a folder with wikitext2/{train,test}.txt, ptb/ptb.test.txt, c4_sample/*.jsonl (2,000
documents) and tasks/ as `evaluator.zeroshot.data` has it. Calibration: WikiText-2's training text and the first 1,334
documents of C4, as many windows of each. Judged by: WikiText-2's test text, PTB's, the other documents of C4 (the first
windows of each), the KL divergence from the dense model on the same windows, seven tasks.

Every pruning is a process of its own without a cache, and so are its seconds, passes and peak memory. What is judged is
the saved checkpoint in plain transformers, in another process; it is removed then (--keep). OUT/jobs is a sweep: what
is finished is not run again, also after a kill. `key=value` goes to every recipe. Writes OUT/table.md and table.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pruneexp.files import write_atomic
from tests.benchmarks.methods import METHODS, pruning_seconds

DOMAINS = {"wikitext2": "WikiText-2", "ptb": "PTB", "c4": "C4"}


@dataclass(frozen=True)
class Cell:
    """What a run's metrics and the judgement of its checkpoint say. `acc`: each item's score, by task."""

    recipe: str
    ratio: float
    metrics: Mapping[str, float]
    ppl: Mapping[str, float]
    kl: Mapping[str, float]
    acc: Mapping[str, Sequence[float]]


def settings_of(args: argparse.Namespace, recipe: str, ratio: float) -> list[str]:
    """What is typed to prune."""
    data, quoted = args.data.resolve(), json.dumps
    c4 = quoted([str(file) for file in sorted((data / "c4_sample").glob("*.jsonl"))])
    sources = {
        "wikitext2": f"calibration: {quoted(str(data / 'wikitext2/train.txt'))}, "
        f"evaluation: {quoted(str(data / 'wikitext2/test.txt'))}",
        "c4": f"calibration: {c4}, calibration_documents: '0:1334', evaluation: {c4}, evaluation_documents: '1334:'",
        "ptb": f"weight: 0, evaluation: {quoted(str(data / 'ptb/ptb.test.txt'))}",
    }
    return [
        *METHODS.get(recipe, [f"recipe={recipe}"]),
        f"sparsity.ratio={ratio}",
        "model=hf",
        f"model.path={args.model.resolve()}",
        f"model.dtype={args.dtype}",
        f"model.device={args.device}",
        "dataset=mixed",
        f"dataset.sources={{{', '.join(f'{name}: {{{source}}}' for name, source in sources.items())}}}",
        f"dataset.samples={args.samples}",
        f"dataset.length={args.calibration_length}",
        "evaluator=[size]",
        *args.settings,
    ]


def protocol_of(args: argparse.Namespace) -> list[str]:
    """What is typed to judge."""
    windows = [f"evaluator.perplexity.length={args.length}", f"evaluator.perplexity.samples={args.windows}"]
    if not args.items:
        return ["evaluator=[perplexity]", *windows]
    tasks = [f"evaluator.zeroshot.data={args.data.resolve() / 'tasks'}", f"evaluator.zeroshot.limit={args.items}"]
    return ["evaluator=[perplexity,zeroshot]", *windows, *tasks]


def judge(job: Mapping[str, Any]) -> dict[str, Any]:
    """Perplexities, KL divergences and scores of the checkpoint in `job["folder"]`, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pruneexp.cli.build import build
    from pruneexp.cli.compose import compose
    from pruneexp.dataset import evaluation_parts
    from pruneexp.model.half import widened

    def load(folder: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=folder != job["model"])
        return model.to(job["device"]).eval()

    dtype = getattr(torch, job["dtype"])
    evaluators = build(compose([*job["settings"], *job["protocol"]])).evaluators
    windows: Any = evaluators["perplexity"]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    dense = load(job["model"])
    model = dense if job["folder"] == job["model"] else load(job["folder"])
    figures: dict[str, Any] = {"protocol": job["protocol"], "ppl": {}, "kl": {}, "acc": {}}
    parts = evaluation_parts(windows.dataset, tokenizer, windows.length, windows.bos)
    with widened(dtype):
        for name, (_, windows_NT) in parts.items():
            figures["ppl"][name], figures["kl"][name] = compare(model, dense, windows_NT[: windows.samples])
        del dense
        if "zeroshot" in evaluators:
            asks: Any = evaluators["zeroshot"]
            devices = tuple(torch.device(name) for name in [job["device"]] if name != "cpu")
            held = SimpleNamespace(module=model, tokenizer=tokenizer, devices=devices, streamed=False)
            tasks = json.loads(asks(held, tokenizer).files["json"])["tasks"]
            figures["acc"] = {name: task["scores"]["acc"] for name, task in tasks.items()}
    return figures


def compare(model: Any, dense: Any, windows_NT: Any) -> tuple[float, float]:
    """Perplexity, and nats of KL(dense || model), over all tokens that have one in front of them."""
    import torch

    nats = divergence = 0.0
    with torch.no_grad():
        for tokens_1T in windows_NT.to(model.device).split(1):
            own_TV = model(tokens_1T).logits[0, :-1].float().log_softmax(-1)
            nats -= float(own_TV.gather(1, tokens_1T[0, 1:, None]).double().sum())
            if model is not dense:
                other_TV = dense(tokens_1T).logits[0, :-1].float().log_softmax(-1)
                divergence += float((other_TV.exp() * (other_TV - own_TV)).sum(-1).double().sum())
    scored = windows_NT[:, 1:].numel()
    return math.exp(nats / scored), divergence / scored


def job_folder(out: Path, settings: Sequence[str]) -> Path:
    """Where the sweep in `out` has the job."""
    from pruneexp.cli.compose import compose
    from pruneexp.fingerprint import config_hash

    return out / "jobs" / config_hash(compose(settings).config)


def judged(folder: Path, protocol: Sequence[str]) -> dict[str, Any] | None:
    """What is there already, if it was asked for in the same way."""
    path = folder / "judged.json"
    figures = json.loads(path.read_text()) if path.exists() else None
    return figures if figures and figures["protocol"] == list(protocol) else None


def run_cell(args: argparse.Namespace, recipe: str, ratio: float) -> Cell | None:
    """Prunes and judges, as far as that is not done; None where either fails, which the next start tries again."""
    settings, protocol = settings_of(args, recipe, ratio), protocol_of(args)
    folder = job_folder(args.out, settings)
    figures = judged(folder, protocol)
    if figures is None:
        where = [f"sweep.dir={args.out / 'jobs'}", "run.save=true", "cache=off"]
        command = [sys.executable, "-m", "pruneexp", "--multirun", *settings, *where]
        try:
            if subprocess.run(command, timeout=60 * args.minutes).returncode:
                return None
        except subprocess.TimeoutExpired:
            print(f"{recipe} at {ratio}: not done in --minutes={args.minutes:g}, left out", file=sys.stderr)
            return None
        figures = judge_apart(args, settings, folder, folder / "model")
    if figures is not None and not args.keep:
        shutil.rmtree(folder / "model", ignore_errors=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    return figures and Cell(recipe, ratio, metrics, figures["ppl"], figures["kl"], figures["acc"])


def judge_apart(
    args: argparse.Namespace, settings: Sequence[str], folder: Path, checkpoint: Path
) -> dict[str, Any] | None:
    """`judge` in a process of its own, kept in `folder`."""
    model = str(args.model.resolve())
    job = {"settings": settings, "protocol": protocol_of(args), "model": model, "folder": str(checkpoint)}
    job |= {"dtype": args.dtype, "device": args.device}
    command = [sys.executable, "-m", "tests.benchmarks.real", "--judge", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return None
    figures = json.loads(done.stdout.splitlines()[-1])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "judged.json", json.dumps(figures) + "\n")
    return figures


def dense_cell(args: argparse.Namespace) -> Cell:
    settings, folder = settings_of(args, "magnitude", 0.2), args.out / "dense"
    figures = judged(folder, protocol_of(args)) or judge_apart(args, settings, folder, args.model.resolve())
    if figures is None:
        sys.exit("the dense model could not be judged")
    return Cell("dense", 0.0, {}, figures["ppl"], figures["kl"], figures["acc"])


def mean7(acc: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """The tasks' mean and its standard error, from each item's score (or difference of scores)."""
    if not acc:
        return math.nan, math.nan
    means = {task: math.fsum(scores) / len(scores) for task, scores in acc.items()}
    errors = [
        math.fsum((score - means[task]) ** 2 for score in scores) / (len(scores) - 1) / len(scores)
        for task, scores in acc.items()
    ]
    return math.fsum(means.values()) / len(acc), math.sqrt(math.fsum(errors)) / len(acc)


def share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def line_of(cell: Cell, dense: Cell, flap: Cell | None) -> dict[str, Any]:
    """A cell's figures beside the dense model's and those of `flap` at the same ratio."""
    acc, error = mean7(cell.acc)
    line = {"recipe": cell.recipe, "ratio": cell.ratio, "removed": cell.metrics.get("sparsity/decoder", 0.0)}
    line |= {f"ppl/{name}": cell.ppl[name] for name in DOMAINS} | {f"kl/{name}": cell.kl[name] for name in DOMAINS}
    line |= {"acc/mean7": acc, "acc/mean7/error": error, "items": sum(map(len, cell.acc.values()))}
    if cell.metrics:
        line["seconds"] = pruning_seconds(cell.metrics)
        line["passes"] = cell.metrics["passes/forward"] + cell.metrics["passes/backward"]
        line["peak_bytes"] = cell.metrics["memory/peak_bytes"]
    if flap is None:
        return line
    for name in DOMAINS:
        excess = math.log(flap.ppl[name] / dense.ppl[name])
        line[f"share/{name}"] = share(math.log(cell.ppl[name] / dense.ppl[name]), excess)
    lost = mean7(dense.acc)[0] - mean7(flap.acc)[0]
    pairs = {task: [a - b for a, b in zip(scores, flap.acc[task], strict=True)] for task, scores in cell.acc.items()}
    line["lost/share"] = share(mean7(dense.acc)[0] - acc, lost)
    line["lost/share/error"] = share(mean7(pairs)[1], abs(lost))  # of the difference from flap, item by item
    return line


HEAD = [
    *("recipe", "removed", *(f"{name} (share)" for name in DOMAINS.values()), "KL: " + ", ".join(DOMAINS.values())),
    *("mean of 7 (items)", "share of lost points", "seconds", "passes", "peak MiB"),
]


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown. Shares: of flap's excess log perplexity, of the points that it lost (with the paired error). Items: of
    all tasks together."""

    def ppl(line: Mapping[str, Any], name: str) -> str:
        known = f" ({line[f'share/{name}']:.2f})" if f"share/{name}" in line else ""
        return f"{line[f'ppl/{name}']:.2f}{known}"

    rows = [HEAD, ["---"] * len(HEAD)]
    for line in lines:
        row = [line["recipe"], f"{line['removed']:.1%}", *(ppl(line, name) for name in DOMAINS)]
        row.append(", ".join(f"{line[f'kl/{name}']:.3f}" for name in DOMAINS))
        mean, error, items = line["acc/mean7"], line["acc/mean7/error"], line["items"]
        row.append(f"{mean:.2%} ± {error:.2%} ({items:,})" if items else "")
        lost = line["items"] and "lost/share" in line
        row.append(f"{line['lost/share']:.2f} ± {line['lost/share/error']:.2f}" if lost else "")
        spent = ["", "", ""]
        if "seconds" in line:
            spent = [f"{line['seconds']:.0f}", f"{line['passes']:.1f}", f"{line['peak_bytes'] / 2**20:,.0f}"]
        rows.append([*row, *spent])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument(
        "--recipes", nargs="+", default=list(METHODS), help="of tests.benchmarks.methods, or recipe=..."
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.3, 0.5])
    parser.add_argument("--windows", type=int, default=60, help="that are judged, of each text")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--items", type=int, default=1000, help="of each task; 0: no tasks")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=60, help="that pruning by one recipe, at one ratio, may take")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", action="store_true", help="the pruned checkpoints")
    parser.add_argument("settings", nargs="*")
    return parser.parse_intermixed_args(argv)


def main() -> None:
    if sys.argv[1:2] == ["--judge"]:
        print(json.dumps(judge(json.loads(sys.argv[2]))))
        return
    args = parsed(sys.argv[1:])
    dense = dense_cell(args)
    cells = []
    for ratio, recipe in product(args.ratios, sorted(args.recipes, key=lambda name: name != "flap")):
        cell = run_cell(args, recipe, ratio)
        if cell is None:
            print(f"failed: {recipe} at {ratio}", file=sys.stderr)
            continue
        cells.append(cell)
        flaps = {each.ratio: each for each in cells if each.recipe == "flap"}
        lines = [line_of(each, dense, flaps.get(each.ratio)) for each in [dense, *cells]]
        write_atomic(args.out / "table.json", json.dumps(lines, indent=1) + "\n")
        write_atomic(args.out / "table.md", table(lines))
        print(table(lines[-1:]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
