"""One plain forward pass of the decoder blocks, streamed from a checkpoint: what streamed pruning is measured against.

    python -m tests.benchmarks.streamed_pass FOLDER [--batch-size 8] [--threads 2] [--cold] [--without-read-ahead]

FOLDER as `tests.benchmarks.big_checkpoint` writes it. Prints the seconds of the pass over its calibration.npy, and this
process' peak of resident memory. --cold: the system first forgets what it holds of the files.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from pruneexp.model.half import widened
from tests.benchmarks.pruning_cost import experiment_of, memory


def forget(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--without-read-ahead", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cold:
        forget(args.folder)
    settings = ["model.stream=true", f"model.batch_size={args.batch_size}", "evaluator=[size]"]
    model = experiment_of(args.folder, settings).model.load()
    tokens_NT = torch.from_numpy(np.load(args.folder / "calibration.npy"))
    entered = [model.enter(batch) for batch in tokens_NT.split(args.batch_size)]
    hidden, calls = [h for h, _ in entered], [c for _, c in entered]
    start, waited = time.perf_counter(), 0.0
    for index in range(len(model.layers)):
        opened = time.perf_counter()
        with model.loaded(index, None if args.without_read_ahead else index + 1) as layer, widened(model.dtype):
            waited += time.perf_counter() - opened
            hidden = [model.run_layer(layer, h, c[index]) for h, c in zip(hidden, calls, strict=True)]
    spent = time.perf_counter() - start
    finite = all(torch.isfinite(h).all() for h in hidden)
    print(f"{tokens_NT.numel()} tokens, {len(model.layers)} layers, {model.dtype}, finite: {finite}")
    print(f"{spent:.1f} s, of which {waited:.1f} s until a layer was at hand; peak {memory('VmHWM') / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
