"""Run folders, read back: what is whole and finished, and of everything else why it is left out."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pruneexp.fingerprint import __version__, comparable, config_hash, settings
from pruneexp.progress import progress
from pruneexp.report.statistics import grouped
from pruneexp.tracker import status_of
from pruneexp.types import ConfigError, Plan, one_line

NOT_COMPARED = ("seconds/", "memory/", "proof/")  # not what was computed
NOT_COMPARED += ("dense/latency/", "pruned/latency/", "unquantised/latency/", "sparsity/latency_measured")
SAME = 1e-6  # relative difference up to which two figures are the same result
LOGGED = 1e-5  # and that of a figure from what log.txt has of it, in six digits
SECTIONS = ("model", "dataset", "criterion", "sparsity", "search", "compensator")  # a run may have no evaluator
REDUNDANT = {"sparsity/model": "params", "sparsity/decoder": "params/decoder"}


@dataclass(frozen=True)
class Run:
    """A finished run. `name`: its folder, as short as the folders asked for allow; `hash`: of its config."""

    folder: Path
    name: str
    hash: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    status: Mapping[str, Any]
    metrics: Mapping[str, float]
    plan: Plan

    @cached_property
    def flat(self) -> Mapping[str, Any]:
        """What the config computes, by dotted key."""
        return settings(self.config)


@dataclass(frozen=True)
class Skipped:
    name: str
    reason: str


@dataclass(frozen=True)
class RunsRead:
    """`repeats`: runs whose config and results another run has; `conflicts`: runs by config hash, with what differs."""

    runs: Sequence[Run]
    skipped: Sequence[Skipped]
    repeats: Sequence[Skipped]
    conflicts: Mapping[str, str]


class _Unusable(Exception):
    """Why a folder is left out."""


def find(folders: Sequence[Path], versions: str) -> RunsRead:
    """The runs in `folders`: those themselves, or whatever lies below them. `versions`: "same" leaves out runs of other
    versions of pruneexp, "any" takes them. Raises ConfigError for a folder that is not there."""
    for folder in folders:
        if not folder.is_dir():
            wrong = "is a file" if folder.exists() else "no such folder"
            raise ConfigError(f"FOLDER={str(folder)!r}: {wrong}; expected a run's, a sweep's, or one that holds such")
    runs: list[Run] = []
    skipped: list[Skipped] = []
    for path, name in progress(list(_run_folders(folders)), "read", unit="runs"):
        try:
            runs.append(_read(path, name, versions))
        except _Unusable as reason:
            skipped.append(Skipped(name, one_line(reason)))
    kept, repeats, conflicts = _told_apart(runs)
    return RunsRead(kept, skipped, repeats, conflicts)


def _run_folders(folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Every folder with a run in it, once, with its name; also those that links lead to. A run's own subfolders hold no
    runs."""
    seen: set[Path] = set()
    for top in folders:
        for path, below, _ in os.walk(top, followlinks=True):
            folder = Path(path)
            again, run = folder.resolve() in seen, status_of(folder) != "absent"
            seen.add(folder.resolve())
            below[:] = [] if again or run else sorted(name for name in below if not name.startswith("."))
            if run and not again:
                inside = folder.relative_to(top)
                yield folder, str(inside) if inside.parts and len(folders) == 1 else str(folder)


def _read(folder: Path, name: str, versions: str) -> Run:
    status = _status(folder)
    config, environment = _config(folder), _environment(folder)
    version = environment["versions"].get("pruneexp")
    if versions == "same" and version != __version__:
        raise _Unusable(f"of pruneexp {version}, this is {__version__}; versions=any takes it")
    metrics = _metrics(folder)
    run = Run(folder, name, config_hash(config), config, environment, status, metrics, _plan(folder))
    _check_untouched(run)
    return replace(run, metrics=comparable(metrics, config))


def _status(folder: Path) -> Mapping[str, Any]:
    state = status_of(folder)
    status = _json(folder, "status.json") if (folder / "status.json").is_file() else {}
    if state == "failed":
        raise _Unusable(f"failed: {status.get('reason') or 'no reason given'}")
    if not (folder / "metrics.json").exists():  # where it is, whoever reads it says what is wrong with it
        if state == "running":
            raise _Unusable(f"still running, as process {status.get('pid')} on {status.get('host')}")
        if state == "interrupted":
            raise _Unusable("half finished: its process is gone and it wrote no metrics.json")
    return status


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise _Unusable(f"{name} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _Unusable(f"{name} cannot be read: {error}") from error


def _json(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        data = json.loads(_text(folder, name))
    except ValueError as error:
        raise _Unusable(f"{name} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise _Unusable(f"{name} holds no object")
    return data


def _environment(folder: Path) -> Mapping[str, Any]:
    environment = _json(folder, "environment.json")
    model = environment.get("model")
    files = model.get("files", {}) if isinstance(model, dict) else None
    prints = isinstance(files, dict) and all(isinstance(file, dict) for file in files.values())
    if not isinstance(environment.get("versions"), dict) or not prints:
        raise _Unusable("environment.json: expected versions, and fingerprints of the model's files")
    return environment


def _config(folder: Path) -> Mapping[str, Any]:
    from omegaconf import OmegaConf

    _text(folder, "config.yaml")
    try:
        # OmegaConf's loader, as the run's own: PyYAML's takes 1e-05 for a string.
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except Exception as error:
        raise _Unusable(f"config.yaml is no config: {error}") from error
    absent = [key for key in SECTIONS if not isinstance(config, dict) or not isinstance(config.get(key), dict)]
    if absent or not isinstance(config, dict):
        raise _Unusable(f"config.yaml is no run's config: it has no {', '.join(absent)}")
    ratio = config["sparsity"].get("ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise _Unusable(f"config.yaml: sparsity.ratio={ratio!r}: expected a number")
    return {str(key): value for key, value in config.items()}


def _metrics(folder: Path) -> Mapping[str, float]:
    metrics = _json(folder, "metrics.json")
    for key, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise _Unusable(f"metrics.json: {key}={value!r}: expected a finite number")
        if value <= 0 and re.match("(dense|pruned)/(ppl/|params|bytes|latency/.*_s@[^/]*$)", key):
            raise _Unusable(f"metrics.json: {key}={value!r}: expected a positive number")
    return metrics


def _plan(folder: Path) -> Plan:
    text = _text(folder, "plan.json")
    try:
        return Plan.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Unusable(f"plan.json: {type(error).__name__}: {error}") from error


def _check_untouched(run: Run) -> None:
    """Raises _Unusable where the files of a run contradict each other, as they do when one was edited."""
    folder, metrics = run.folder, run.metrics
    if re.fullmatch(r"[0-9a-f]{12}", folder.name) and folder.name != run.hash:
        raise _Unusable(f"edited: config.yaml has the hash {run.hash}, which is not the folder's name")
    for share, count in REDUNDANT.items():
        dense, pruned = metrics.get(f"dense/{count}"), metrics.get(f"pruned/{count}")
        if share in metrics and dense and pruned is not None and abs(1 - pruned / dense - metrics[share]) > SAME:
            raise _Unusable(f"edited: {share}={metrics[share]:g}, but pruned/{count} leaves {1 - pruned / dense:g}")
    for key, logged in _logged(folder).items():
        if key in metrics and _apart(metrics[key], logged) > LOGGED:
            raise _Unusable(f"edited: metrics.json has {key}={metrics[key]:g}, log.txt {logged:g}")
    for key in ("ratio", "of"):
        configured = run.config["sparsity"].get(key)
        met = run.plan.budget.get(key, configured)
        numbers = isinstance(met, float) and isinstance(configured, float)
        if met != configured and not (numbers and _apart(met, configured) <= SAME):
            raise _Unusable(f"edited: config.yaml has sparsity.{key}={configured}, plan.json met {met}")
    written = hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
    if run.status.get("plan_sha256", written) != written:
        raise _Unusable("edited: plan.json is not the plan whose SHA-256 status.json has")
    delivered = folder / "model" / "plan.json"
    if delivered.is_file() and delivered.read_bytes() != (folder / "plan.json").read_bytes():
        raise _Unusable("edited: plan.json is not the plan of its checkpoint, model/plan.json")


def _logged(folder: Path) -> dict[str, float]:
    """The figures in log.txt, the last of each name."""
    try:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    matches = (re.fullmatch(r"\S+ \S+ INFO (\S+/\S+) = (-?\d[\d.e+-]*)", line) for line in lines)
    return {match[1]: float(match[2]) for match in matches if match}


def _told_apart(runs: Sequence[Run]) -> tuple[list[Run], list[Skipped], dict[str, str]]:
    """Runs of one config: the first stands for those with the same results; with other results, all stay."""
    repeats: dict[int, Skipped] = {}
    conflicts: dict[str, str] = {}
    for hashed, (first, *others) in grouped(runs, lambda run: run.hash).items():
        if differences := [text for other in others if (text := difference(first, other))]:
            conflicts[hashed] = differences[0]
        else:
            repeats |= {id(run): Skipped(run.name, f"the same config and results as {first.name}") for run in others}
    return [run for run in runs if id(run) not in repeats], list(repeats.values()), conflicts


def difference(one: Run, other: Run) -> str:
    """The figure in which two runs differ most, and what else differs; "" where the results are the same."""
    keys = sorted({*one.metrics, *other.metrics})
    apart = {k: _apart(one.metrics.get(k), other.metrics.get(k)) for k in keys if not k.startswith(NOT_COMPARED)}
    worst = max(apart, key=lambda key: apart[key], default="")
    if not worst or apart[worst] <= SAME:
        return ""
    values = " and ".join(f"{run.metrics[worst]:g}" if worst in run.metrics else "none" for run in (one, other))
    parts = ("model", "data", "versions", "git", "platform", "cpu", "cpus", "threads", "gpus")
    also = [part for part in parts if one.environment.get(part) != other.environment.get(part)]
    why = f"differ in {', '.join(also)}" if also else "are the same"
    return f"{worst} is {values}; their environments {why}"


def _apart(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return math.inf
    return abs(one - other) / max(abs(one), abs(other)) if one != other else 0.0
