"""A sweep's jobs as one table, read from their folders alone."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pruneexp.bos import ASKED, comparable
from pruneexp.config_files import YamlLoader
from pruneexp.new_keys import value_before
from pruneexp.tracker import status_of, write_atomic

LEFT_OUT = ("run", "sweep", "cache", "tracker", ASKED)  # where a job runs and reports, not what it computes


def sweep_table(folder: Path) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: a row for every job in `folder`, with its status, why it failed and the recipe (where any job
    failed, or not all have the same), the settings in which the jobs differ, and its metrics. A job that is not done
    has none; what a job lacks is ""."""
    jobs = sorted(path.parent for path in folder.glob("*/status.json"))
    configs = [_object(job / "config.yaml") for job in jobs]
    found = [settings(config) for config in configs]
    keys = differing(found)
    metrics = [comparable(_metrics(job), config) for job, config in zip(jobs, configs, strict=True)]
    figures = sorted({key for measured in metrics for key in measured})
    told = {"reason": [str(_object(job / "status.json").get("reason") or "") for job in jobs]}
    if any(key.endswith("._target_") for key in keys):
        told["recipe"] = _recipes(configs)
    told = {name: values for name, values in told.items() if len(set(values)) > 1 or (name == "reason" and any(values))}
    rows = [
        [
            job.name,
            status_of(job),
            *(values[index] for values in told.values()),
            *(found[index].get(key, "") for key in keys),
            *(metrics[index].get(key, "") for key in figures),
        ]
        for index, job in enumerate(jobs)
    ]
    return ["job", "status", *told, *keys, *figures], rows


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
        found = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _recipes(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The recipe whose parts each job has; "" where none has them, or its config is not there."""
    from pruneexp.pages.methods import choices_of

    return [(choices_of(config)[0] or "") if config else "" for config in configs]


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config computes, flat: {"sparsity.ratio": 0.2}; lists as they are typed where they hold plain words,
    "[heads,channels]", and as JSON otherwise."""
    return dict(_flat({key: value for key, value in config.items() if key not in LEFT_OUT}))


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _typed(value) if isinstance(value, list) else value


def _typed(values: list[Any]) -> str:
    plain = all(isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w.-]*", value) for value in values)
    return f"[{','.join(values)}]" if plain else json.dumps(values)


def differing(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose value is not the same in all settings that are not empty. A key that came later is as good as there
    where it is absent, with the value that means what was done before."""
    known = [setting for setting in found if setting]
    keys = dict.fromkeys(key for setting in known for key in setting)
    return [key for key in keys if len({str(setting.get(key, value_before(key))) for setting in known}) > 1]


def _metrics(job: Path) -> dict[str, Any]:
    if status_of(job) != "done":
        return {}
    return json.loads((job / "metrics.json").read_text(encoding="utf-8"))
