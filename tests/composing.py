"""Configs of many command lines, one after the other."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml

from pruneexp.cli.compose import open_hydra
from pruneexp.cli.sweep_jobs import JobComposer, whole
from pruneexp.conf_files import conf_folder, inherited

# Options that only make sense with a partner: whole layers.
PARTNERS = {"blocks": "criterion=random", "greedy": "criterion=random"}
PARTNERS |= {name: "search=blocks" for name in ("block_influence", "block_influence_angular", "loss_drop")}


@cache
def composer() -> JobComposer:
    """Composes what one command line after the other asks for in a third of the time that `compose` needs."""
    hydra = open_hydra()
    return JobComposer(hydra, whole(hydra, ["hydra.mode=MULTIRUN"])[1])


def mandatory(group: str, option: str, value: int) -> list[str]:
    """Overrides that give every missing value of a choice this one."""
    prefix = f"{group}.{option}" if group == "evaluator" else group
    keys: dict[str, Any] = {}
    for path in inherited(conf_folder() / group / f"{option}.yaml"):
        keys = {**(yaml.safe_load(path.read_text()) or {}), **keys}
    return [f"{prefix}.{key}={value}" for key, missing in keys.items() if missing == "???"]
