"""What memory this machine has free, and what this process holds of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from pruneexp.model.placement import free_bytes

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory(*devices: torch.device) -> int:
    """Bytes that this process may still take: of the GPUs together, or of the machine's memory within the limits of its
    control groups."""
    if devices[0].type == "cuda":
        return sum(free_bytes(device) for device in devices)
    return min([psutil.virtual_memory().available, *_free_in_groups()])


def resident_memory() -> int:
    """Bytes of memory that this process holds."""
    return psutil.Process().memory_info().rss


def _free_in_groups() -> Iterator[int]:
    """What the limits of this process' control groups leave; files that are merely cached can be let go."""
    try:
        own = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in own:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used, cached = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(base))):
            try:
                most = (folder / limit).read_text().strip()
                if most == "max":
                    continue
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield max(0, int(most) - int((folder / used).read_text()) + int(stat.get(cached, 0)))
            except (OSError, ValueError):
                continue  # the root group has no limit, a container may not see those above its own


def out_of_memory(error: BaseException) -> str:
    """ "out of memory", with the GPU where it was one's; "" for errors of any other kind."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in text:
        gpu = re.search(r"GPU (\d+)", text)
        return f"out of memory on {f'cuda:{gpu[1]}' if gpu else 'the GPU'}"
    return "out of memory" if isinstance(error, MemoryError) or "can't allocate memory" in text else ""
