"""Run folders, read back: what is whole and finished, and of everything else why it is left out."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pruneexp.fingerprint import __version__, comparable, config_hash, settings
from pruneexp.progress import progress
from pruneexp.tracker import status_of
from pruneexp.types import ConfigError, Plan

NOT_COMPARED = ("seconds/", "memory/", "proof/", "dense/latency/", "pruned/latency/")  # not what was computed
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
class Found:
    """`repeats`: runs whose config and results another run has; `conflicts`: runs by config hash, with what differs."""

    runs: tuple[Run, ...]
    skipped: tuple[Skipped, ...]
    repeats: tuple[Skipped, ...]
    conflicts: Mapping[str, str]


class _Unusable(Exception):
    """Why a folder is left out."""


def find(folders: Sequence[Path], versions: str) -> Found:
    """The runs in `folders`: those themselves, or whatever lies below them. `versions`: "same" leaves out runs of other
    versions of pruneexp, "any" takes them. Raises ConfigError for a folder that is not there."""
    for folder in folders:
        if not folder.is_dir():
            found = "is a file" if folder.exists() else "no such folder"
            raise ConfigError(f"FOLDER={str(folder)!r}: {found}; expected a run's, a sweep's, or one that holds such")
    runs: list[Run] = []
    skipped: list[Skipped] = []
    for path, name in progress(list(_run_folders(folders)), "read", unit="runs"):
        try:
            runs.append(_read(path, name, versions))
        except _Unusable as reason:
            skipped.append(Skipped(name, " ".join(str(reason).split())))
    kept, repeats, conflicts = _told_apart(runs)
    return Found(tuple(kept), tuple(skipped), tuple(repeats), conflicts)


def _run_folders(folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Every folder with a run in it, once, with its name; also those that links lead to. A run's own subfolders hold no
    runs."""
    seen: set[Path] = set()
    for top in folders:
        for path, below, _ in os.walk(top, followlinks=True):
            folder = Path(path)
            if folder.resolve() in seen:
                below.clear()
                continue
            seen.add(folder.resolve())
            if status_of(folder) == "absent":
                below[:] = sorted(name for name in below if not name.startswith("."))
                continue
            below.clear()
            inside = folder.relative_to(top)
            yield folder, str(inside) if inside.parts and len(folders) == 1 else str(folder)


def _read(folder: Path, name: str, versions: str) -> Run:
    status = _status(folder)
    config, environment = _config(folder), _environment(folder)
    version = environment["versions"].get("pruneexp")
    if versions == "same" and version != __version__:
        raise _Unusable(f"of pruneexp {version}, this is {__version__}; versions=any takes it")
    metrics = _metrics(_json(folder, "metrics.json"))
    hashed = config_hash(config)
    plan = _plan(folder)
    _check_untouched(folder, hashed, config, metrics, plan, status)
    return Run(folder, name, hashed, config, environment, status, comparable(metrics, config), plan)


def _status(folder: Path) -> Mapping[str, Any]:
    state = status_of(folder)
    status = _json(folder, "status.json") if (folder / "status.json").is_file() else {}
    if state == "failed":
        raise _Unusable(f"failed: {status.get('reason') or 'no reason given'}")
    if (folder / "metrics.json").exists():
        return status  # finished; whoever reads it says what is wrong with it
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
    found = _json(folder, "environment.json")
    model = found.get("model")
    files = model.get("files", {}) if isinstance(model, dict) else None
    prints = isinstance(files, dict) and all(isinstance(file, dict) for file in files.values())
    if not isinstance(found.get("versions"), dict) or not prints:
        raise _Unusable("environment.json: expected versions, and fingerprints of the model's files")
    return found


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


def _metrics(data: Mapping[str, Any]) -> Mapping[str, float]:
    for key, value in data.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise _Unusable(f"metrics.json: {key}={value!r}: expected a finite number")
        if value <= 0 and re.match("(dense|pruned)/(ppl/|params|bytes|latency/.*_s@[^/]*$)", key):
            raise _Unusable(f"metrics.json: {key}={value!r}: expected a positive number")
    return data


def _plan(folder: Path) -> Plan:
    text = _text(folder, "plan.json")
    try:
        plan = Plan.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Unusable(f"plan.json: {type(error).__name__}: {error}") from error
    if not isinstance(plan.budget, dict):
        raise _Unusable("plan.json: budget: expected an object")
    return plan


def _check_untouched(
    folder: Path,
    hashed: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
    plan: Plan,
    status: Mapping[str, Any],
) -> None:
    """Raises _Unusable where the files of a run contradict each other, as they do when one was edited."""
    if re.fullmatch(r"[0-9a-f]{12}", folder.name) and folder.name != hashed:
        raise _Unusable(f"edited: config.yaml has the hash {hashed}, which is not the folder's name")
    for share, count in REDUNDANT.items():
        dense, pruned = metrics.get(f"dense/{count}"), metrics.get(f"pruned/{count}")
        if share in metrics and dense and pruned is not None and abs(1 - pruned / dense - metrics[share]) > SAME:
            raise _Unusable(f"edited: {share}={metrics[share]:g}, but pruned/{count} leaves {1 - pruned / dense:g}")
    for key, logged in _logged(folder).items():
        if key in metrics and _apart(metrics[key], logged) > LOGGED:
            raise _Unusable(f"edited: metrics.json has {key}={metrics[key]:g}, log.txt {logged:g}")
    for key in ("ratio", "of"):
        asked = config["sparsity"].get(key)
        met = plan.budget.get(key, asked)
        numbers = isinstance(met, float) and isinstance(asked, float)
        if met != asked and not (numbers and _apart(met, asked) <= SAME):
            raise _Unusable(f"edited: config.yaml has sparsity.{key}={asked}, plan.json met {met}")
    written = hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
    if status.get("plan_sha256", written) != written:
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
    found = (re.fullmatch(r"\S+ \S+ INFO (\S+/\S+) = (-?\d[\d.e+-]*)", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def _told_apart(runs: Sequence[Run]) -> tuple[list[Run], list[Skipped], dict[str, str]]:
    """Runs of one config: the first stands for those with the same results; with other results, all stay."""
    by_hash: dict[str, list[Run]] = {}
    for run in runs:
        by_hash.setdefault(run.hash, []).append(run)
    kept: list[Run] = []
    repeats: list[Skipped] = []
    conflicts: dict[str, str] = {}
    for hashed, same in by_hash.items():
        differences = [difference(same[0], other) for other in same[1:]]
        if any(differences):
            kept += same
            conflicts[hashed] = next(text for text in differences if text)
        else:
            kept.append(same[0])
            repeats += [Skipped(run.name, f"the same config and results as {same[0].name}") for run in same[1:]]
    order = {id(run): index for index, run in enumerate(runs)}
    return sorted(kept, key=lambda run: order[id(run)]), repeats, conflicts


def difference(one: Run, other: Run) -> str:
    """The figure in which two runs differ most, and what else differs; "" where the results are the same."""
    keys = sorted(set(one.metrics) | set(other.metrics))
    keys = [key for key in keys if not key.startswith(NOT_COMPARED)]
    apart = {key: _apart(one.metrics.get(key), other.metrics.get(key)) for key in keys}
    worst = max(apart, key=lambda key: apart[key], default="")
    if not worst or apart[worst] <= SAME:
        return ""
    values = " and ".join(f"{run.metrics[worst]:g}" if worst in run.metrics else "none" for run in (one, other))
    parts = ("model", "data", "versions", "git", "platform", "cpu", "cpus", "threads", "gpus")
    also = [part for part in parts if one.environment.get(part) != other.environment.get(part)]
    why = f"; their environments differ in {', '.join(also)}" if also else "; their environments are the same"
    return f"{worst} is {values}{why}"


def _apart(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return math.inf
    return abs(one - other) / max(abs(one), abs(other)) if one != other else 0.0
