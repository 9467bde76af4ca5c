"""Commands in processes of their own, started from one that has the imports done: quick, and fit to be killed."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOAD = [
    "pruneexp.cli.build",
    "pruneexp.cli.sweep",
    "pruneexp.cli.report_command",
    "pruneexp.cache",
    "safetensors.torch",
    "filelock",
]
PRELOAD += ["transformers.models.llama.modeling_llama", "PIL.ImageFont", "wandb"]


def started(folder: Path, *argv: str) -> BaseProcess:
    """`pruneexp argv` in `folder`; join it, and read its exit code (-9: killed)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_command, args=(str(folder), argv))
    process.start()
    return process


def _command(folder: str, argv: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    sys.path.append(folder)
    with open("out.txt", "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        from pruneexp.__main__ import main

        sys.exit(main(list(argv)))
