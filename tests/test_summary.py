"""summary.csv: a row a job, from the folders alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from pruneexp.report.sweep_table import settings, write_summary
from pruneexp.tracker.folder import new_status
from tests.report_samples import config, write_run


def job(folder: Path, name: str, ratio: float, status: str, metrics: dict[str, float] | None) -> None:
    (folder / name).mkdir()
    reason = 'too, "much"' if status == "failed" else None
    (folder / name / "status.json").write_text(json.dumps({**new_status(), "status": status, "reason": reason}))
    config = f"seed: 0\nsparsity:\n  ratio: {ratio}\n  of: decoder\nrun:\n  dir: {name}\n"
    (folder / name / "config.yaml").write_text(config)
    if metrics is not None:
        (folder / name / "metrics.json").write_text(json.dumps(metrics))


def test_differing_settings_and_metrics_are_the_columns(tmp_path: Path) -> None:
    job(tmp_path, "aa", 0.2, "done", {"pruned/ppl/x@8": 3.5})
    job(tmp_path, "bb", 0.3, "failed", None)
    rows = list(csv.DictReader(write_summary(tmp_path).open()))
    assert rows == [
        {"job": "aa", "status": "done", "reason": "", "sparsity.ratio": "0.2", "pruned/ppl/x@8": "3.5"},
        {"job": "bb", "status": "failed", "reason": 'too, "much"', "sparsity.ratio": "0.3", "pruned/ppl/x@8": ""},
    ]


def test_jobs_are_told_apart_by_recipe_where_that_differs(tmp_path: Path) -> None:
    for name, recipe in (("aa", "magnitude"), ("bb", "flap")):
        write_run(tmp_path / name, config(f"recipe={recipe}"))
    write_run(tmp_path / "cc", config("recipe=flap", "search=greedy"))
    rows = list(csv.DictReader(write_summary(tmp_path).open()))
    assert [row["recipe"] for row in rows] == ["magnitude", "flap", ""]
    (tmp_path / "aa" / "status.json").unlink()
    (tmp_path / "cc" / "status.json").unlink()
    header = write_summary(tmp_path).read_text().splitlines()[0].split(",")
    assert header[:2] == ["job", "status"] and not {"recipe", "reason"} & set(header)


def test_lists_are_told_as_they_are_typed() -> None:
    config = {"search": {"granularity": ["heads", "channels"], "widths": [1, 2]}, "tasks": ["a b", "c"], "none": []}
    assert settings(config) == {
        "search.granularity": "[heads,channels]",
        "search.widths": "[1, 2]",
        "tasks": '["a b", "c"]',
        "none": "[]",
    }


def test_metrics_of_a_job_that_is_not_done_do_not_count(tmp_path: Path) -> None:
    job(tmp_path, "aa", 0.2, "done", {"pruned/ppl/x@8": 3.5})
    job(tmp_path, "bb", 0.3, "failed", {"pruned/ppl/x@8": 9.0})
    assert [row["pruned/ppl/x@8"] for row in csv.DictReader(write_summary(tmp_path).open())] == ["3.5", ""]


def test_a_damaged_job_costs_its_own_cells_and_no_others(tmp_path: Path) -> None:
    for name, ratio in (("aa", 0.2), ("bb", 0.3), ("cc", 0.4)):
        job(tmp_path, name, ratio, "done", {"pruned/ppl/x@8": 3.5})
    (tmp_path / "bb" / "config.yaml").write_bytes(b"\xda\xff")
    (tmp_path / "cc" / "config.yaml").write_text("not a config")
    (tmp_path / "cc" / "metrics.json").write_text('{"pruned')
    rows = list(csv.DictReader(write_summary(tmp_path).open()))
    assert [row["pruned/ppl/x@8"] for row in rows] == ["3.5", "3.5", ""]
    assert [row["status"] for row in rows][:2] == ["done", "done"] and rows[2]["status"] != "done"
