"""A sweep's jobs as one table, read from their folders alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pruneexp.conf_files import YamlLoader
from pruneexp.files import read_object, write_atomic
from pruneexp.fingerprint import comparable, differing, settings
from pruneexp.tracker import status_of


def sweep_table(folder: Path) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: a row for every job in `folder`. It has the job's status, why it failed (where any job did), its
    recipe (where not all have the same), the settings in which the jobs differ, and its metrics, once it is done. What
    a job lacks is ""."""
    jobs = sorted(path.parent for path in folder.glob("*/status.json"))
    configs = [_object(job / "config.yaml") for job in jobs]
    flat = [settings(config) for config in configs]
    keys = differing(flat)
    states = [status_of(job) for job in jobs]
    metrics = [
        comparable(read_object(job / "metrics.json") or {}, config) if state == "done" else {}
        for job, state, config in zip(jobs, states, configs, strict=True)
    ]
    columns: dict[str, list[Any]] = {"job": [job.name for job in jobs], "status": states}
    reasons = [str(_object(job / "status.json").get("reason") or "") for job in jobs]
    if any(reasons):
        columns["reason"] = reasons
    if any(key.endswith("._target_") for key in keys):
        recipes = [_recipe(job, config) for job, config in zip(jobs, configs, strict=True)]
        columns |= {"recipe": recipes} if len(set(recipes)) > 1 else {}
    columns |= {key: [of_job.get(key, "") for of_job in flat] for key in keys}
    columns |= {key: [of_job.get(key, "") for of_job in metrics] for key in sorted(set().union(*metrics))}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def write_summary(folder: Path) -> Path:
    """Writes the sweep's table as summary.csv."""
    header, rows = sweep_table(folder)
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    path = folder / "summary.csv"
    write_atomic(path, text.getvalue())
    return path


def _object(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file holds; empty where it is missing, damaged, or no object."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _recipe(job: Path, config: Mapping[str, Any]) -> str:
    """The recipe whose parts the job has; "" where none has them, or its config is not there."""
    from pruneexp.report.methods import choices_of

    recorded = _object(job / "environment.json").get("choices")
    return (choices_of(config, recorded)[0] or "") if config else ""
