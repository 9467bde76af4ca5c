"""Commands in processes of their own, started from one that has the imports done: quick, and fit to be killed."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOAD = [
    "pruneexp.cli.build",
    "pruneexp.cli.sweep",
    "pruneexp.cli.report_command",
    "pruneexp.cache",
    "safetensors.torch",
    "filelock",
]
PRELOAD += ["transformers.models.llama.modeling_llama", "PIL.ImageFont", "wandb"]


def forked(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A function in a process of its own, which is started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def started(folder: Path, *argv: str) -> BaseProcess:
    """`pruneexp argv` in `folder`; join it, and read its exit code (-9: killed)."""
    return forked(_command, str(folder), argv)


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
