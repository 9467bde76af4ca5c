"""Run folders as runs leave them, written by hand: few files, real configs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import pruneexp
from pruneexp.cli.compose import compose
from pruneexp.fingerprint import config_hash
from pruneexp.types import Plan, SitePlan

PPL = "ppl/embedded@128"
HEADS, CHANNELS, LAYERS = 4, 10, 3


@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return compose(list(overrides)).config


def config(*overrides: str, **settings: Any) -> dict[str, Any]:
    """A composed config, with dotted keys set afterwards: config("recipe=flap", **{"sparsity.ratio": 0.3})."""
    composed = deepcopy(_composed(overrides))
    for key, value in settings.items():
        node = composed
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        assert last in node, key
        node[last] = value
    return composed


def plan(kept: Mapping[str, Sequence[int]] | None = None) -> Plan:
    """`kept`: units kept in each layer, by kind; without it everything."""
    counts = {"attention": [HEADS] * LAYERS, "mlp": [CHANNELS] * LAYERS, **(kept or {})}
    names = {"attention": "self_attn", "mlp": "mlp"}
    units = {"attention": HEADS, "mlp": CHANNELS}
    return Plan(
        {
            f"model.layers.{layer}.{names[kind]}": SitePlan(kind, units[kind], tuple(range(count)))
            for kind, of_kind in counts.items()
            for layer, count in enumerate(of_kind)
        }
    )


def metrics(ppl: float = 4.0, share: float = 0.2, **more: float) -> dict[str, float]:
    params = 1_000_000
    left = round(params * (1 - share))
    figures = {
        "dense/params": params,
        "pruned/params": left,
        "dense/params/decoder": params,
        "pruned/params/decoder": left,
        "sparsity/model": 1 - left / params,
        "sparsity/decoder": 1 - left / params,
        f"dense/{PPL}": 3.0,
        f"pruned/{PPL}": ppl,
        "passes/forward": 1.0,
        "seconds/calibrate": 1.5,
        "memory/peak_bytes": 2**30,
    }
    return figures | more


def environment(**more: Any) -> dict[str, Any]:
    facts = {
        "versions": {"pruneexp": pruneexp.__version__, "torch": "2.13", "lm_eval": "0.4.13"},
        "platform": "Linux",
        "cpus": 2,
        "threads": 1,
        "gpus": [],
        "git": {"commit": "0" * 40, "dirty": False},
        "model": {"files": {"model.safetensors": {"sha256": "a" * 64}}},
        "data": {},
    }
    return facts | more


def write_run(
    folder: Path,
    composed: Mapping[str, Any],
    measured: Mapping[str, float] | None = None,
    *,
    kept: Plan | None = None,
    around: Mapping[str, Any] | None = None,
    status: str = "done",
    reason: str | None = None,
) -> Path:
    """A run's folder; in a sweep's, named by its hash where `folder` ends in HASH."""
    if folder.name == "HASH":
        folder = folder.with_name(config_hash(composed))
    folder.mkdir(parents=True)
    measured = metrics() if measured is None else measured
    kept = replace(kept or plan(), budget={key: composed["sparsity"][key] for key in ("ratio", "of")})
    state = {"status": status, "reason": reason, "ended": "2026-01-02T03:04:05+00:00", "pid": 1, "host": "elsewhere"}
    (folder / "status.json").write_text(json.dumps(state))
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(composed), sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(environment() if around is None else around))
    if status == "done":
        (folder / "plan.json").write_text(kept.to_json() + "\n")
        logged = [
            f"2026-01-02 03:04:05,678 INFO {key} = {value:.6g}"
            for key, value in measured.items()
            if key.startswith(("dense/", "pruned/"))
        ]
        (folder / "log.txt").write_text("\n".join(logged) + "\n")
        (folder / "metrics.json").write_text(json.dumps(measured))
    return folder
