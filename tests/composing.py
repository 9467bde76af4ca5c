"""Configs of many command lines, one after the other."""

from __future__ import annotations

from functools import cache

from pruneexp.cli.compose import open_hydra
from pruneexp.cli.sweep_jobs import JobComposer, whole


@cache
def composer() -> JobComposer:
    """Composes what one command line after the other asks for in a third of the time that `compose` needs."""
    hydra = open_hydra()
    return JobComposer(hydra, whole(hydra, ["hydra.mode=MULTIRUN"])[1])
