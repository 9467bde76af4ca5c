"""summary.csv: a row a job, from the folders alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from pruneexp.summary import write_summary
from pruneexp.tracker.folder import new_status


def job(folder: Path, name: str, ratio: float, status: str, metrics: dict[str, float] | None) -> None:
    (folder / name).mkdir()
    (folder / name / "status.json").write_text(json.dumps({**new_status(), "status": status, "reason": None}))
    config = f"seed: 0\nsparsity:\n  ratio: {ratio}\n  of: decoder\nrun:\n  dir: {name}\n"
    (folder / name / "config.yaml").write_text(config)
    if metrics is not None:
        (folder / name / "metrics.json").write_text(json.dumps(metrics))


def test_differing_settings_and_metrics_are_the_columns(tmp_path: Path) -> None:
    job(tmp_path, "aa", 0.2, "done", {"pruned/ppl/x@8": 3.5})
    job(tmp_path, "bb", 0.3, "failed", None)
    rows = list(csv.DictReader(write_summary(tmp_path).open()))
    assert rows == [
        {"job": "aa", "status": "done", "sparsity.ratio": "0.2", "pruned/ppl/x@8": "3.5"},
        {"job": "bb", "status": "failed", "sparsity.ratio": "0.3", "pruned/ppl/x@8": ""},
    ]


def test_metrics_of_a_job_that_is_not_done_do_not_count(tmp_path: Path) -> None:
    job(tmp_path, "aa", 0.2, "done", {"pruned/ppl/x@8": 3.5})
    job(tmp_path, "bb", 0.3, "failed", {"pruned/ppl/x@8": 9.0})
    assert [row["pruned/ppl/x@8"] for row in csv.DictReader(write_summary(tmp_path).open())] == ["3.5", ""]
