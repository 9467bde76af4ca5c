"""What pruning costs, against one plain forward pass of the decoder layers over the same tokens.

    python -m tests.benchmarks.pruning_cost [--layers 12] [--windows 32] [--repeats 5] [--threads 2]

Prints, for a randomly initialised LLaMA (170 M parameters by default), the time of calibrate + score + search +
compensate + shrink for the forward-only methods as a ratio to the plain pass, timed in turns in one process, and the
peak resident memory in memory and streamed, each in a process of its own. Nothing is asserted: timings are noisy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH = 128
METHODS = {
    "magnitude": ["recipe=magnitude"],
    "flap": ["recipe=flap"],
    "wanda_sp (dense scores)": ["recipe=wanda_sp", "criterion.sequential=false"],
    "wanda_sp (sequential: a second pass)": ["recipe=wanda_sp"],
    "flap + sequential bias (a second pass)": ["recipe=flap", "compensator.sequential=true"],
    "flap_official": ["recipe=flap_official"],
}


def write_model(folder: Path, layers: int, hidden: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def experiment_of(folder: Path, overrides: list[str]) -> Any:
    from pruneexp.cli.build import build
    from pruneexp.cli.compose import compose

    return build(compose(["model=hf", f"model.path={folder}", *overrides]))


def plain_pass(model: Any, tokens_NT: Tensor) -> float:
    """Seconds of the decoder layers alone, on entered hidden states."""
    entered = [model.enter(batch) for batch in tokens_NT.split(model.batch_size)]
    start = time.perf_counter()
    for hidden, calls in entered:
        for index, layer in enumerate(model.layers):
            hidden = model.run_layer(layer, hidden, calls[index])
        float(hidden.flatten()[0])  # waits for a GPU
    return time.perf_counter() - start


def prune(experiment: Any, model: Any, tokens_NT: Tensor) -> tuple[float, float]:
    """Seconds of pruning, and forward passes it made."""
    from pruneexp.calibrate import Meter
    from pruneexp.pruning import Method, prune_
    from pruneexp.pruning.record import Record

    meter = Meter()
    method = Method(experiment.criterion, experiment.sparsity, experiment.search, experiment.compensator)
    start = time.perf_counter()
    prune_(model, tokens_NT, method, experiment.sparsity.ratio, Record(meter=meter))
    return time.perf_counter() - start, meter.forward


def time_methods(folder: Path, tokens_NT: Tensor, repeats: int) -> None:
    print(f"{'method':40} {'passes':>6} {'ratio: median':>14} {'min':>6} {'max':>6}")
    for name, overrides in METHODS.items():
        ratios, passes = [], 0.0
        for repeat in range(repeats + 1):
            experiment = experiment_of(folder, overrides)
            model = experiment.model.load()
            plain = plain_pass(model, tokens_NT)
            spent, passes = prune(experiment, model, tokens_NT)
            if repeat:  # the first is a warm-up
                ratios.append(spent / plain)
        print(f"{name:40} {passes:6.2f} {statistics.median(ratios):14.3f} {min(ratios):6.3f} {max(ratios):6.3f}")


def memory(field: str) -> int:
    """Bytes of this process, from /proc: VmRSS resident now, VmHWM at most so far. (getrusage's peak would include the
    parent's: a child starts as its copy.)"""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def peak_memory(folder: Path, windows: int, stream: bool, layers: int) -> None:
    """In a process of its own: resident memory that pruning adds to what is resident before the model is loaded."""
    overrides = ["recipe=flap", f"model.stream={str(stream).lower()}"]
    experiment = experiment_of(folder, overrides)
    with tempfile.TemporaryDirectory() as scratch:  # once in small: the code's own pages are not the model's
        write_model(Path(scratch), layers=1, hidden=64)
        small = experiment_of(Path(scratch), overrides)
        prune(small, small.model.load(), torch.zeros(2, 16, dtype=torch.int64))
    tokens_NT = torch.randint(3, 8192, (windows, LENGTH), generator=torch.Generator().manual_seed(0))
    before = memory("VmRSS")
    model = experiment.model.load()
    block = max(sum(p.numel() for p in layer.parameters()) for layer in model.layers) * 4
    total = sum(p.numel() for p in model.module.parameters()) * 4
    hidden = tokens_NT.numel() * model.config.hidden_size * 4
    with tempfile.TemporaryDirectory() as scratch:
        if stream:
            from pruneexp.surgery import BlockProof, StreamedSave

            saver = StreamedSave(model, Path(scratch, "model"), BlockProof(model, tokens_NT[:1, :16]))
            prune_streamed(experiment, model, tokens_NT, saver)
        else:
            prune(experiment, model, tokens_NT)
    peak = memory("VmHWM") - before
    outside = total - layers * block
    bound = (2 * block + outside + hidden) if stream else (total + block + hidden)
    print(
        json.dumps({"peak": peak, "bound_without_activations": bound, "model": total, "block": block, "hidden": hidden})
    )


def prune_streamed(experiment: Any, model: Any, tokens_NT: Tensor, saver: Any) -> None:
    from pruneexp.pruning import Method, prune_
    from pruneexp.pruning.record import Record

    method = Method(experiment.criterion, experiment.sparsity, experiment.search, experiment.compensator)
    rng = torch.Generator()
    prune_(model, tokens_NT, method, 0.2, Record(rng=rng, shrunk=saver.layer))
    saver.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", nargs=2, metavar=("FOLDER", "held|streamed"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        peak_memory(Path(args.memory_of[0]), args.windows, args.memory_of[1] == "streamed", args.layers)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        write_model(folder, args.layers, args.hidden)
        tokens_NT = torch.randint(3, 8192, (args.windows, LENGTH), generator=torch.Generator().manual_seed(0))
        model = experiment_of(folder, []).model.load()
        params = sum(p.numel() for p in model.module.parameters())
        print(f"LLaMA, {params / 1e6:.0f} M parameters, {tokens_NT.numel()} tokens, {torch.get_num_threads()} threads")
        del model
        time_methods(folder, tokens_NT, args.repeats)
        for how in ("held", "streamed"):
            sizes = ["--layers", str(args.layers), "--windows", str(args.windows), "--threads", str(args.threads)]
            command = [sys.executable, "-m", "tests.benchmarks.pruning_cost", "--memory-of", str(folder), how, *sizes]
            peaks = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            mib = {key: f"{value / 2**20:.0f} MiB" for key, value in peaks.items()}
            print(f"peak resident memory added, {how}: {mib}")


if __name__ == "__main__":
    main()
