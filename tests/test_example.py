"""The finished sweep in outputs/example: what users look at first is what the code makes and reads."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

from pruneexp.files import files_in
from pruneexp.report.folders import find

OUTPUTS = Path(__file__).parents[1] / "outputs"
EXAMPLE = OUTPUTS / "example"


def commands() -> list[list[str]]:
    """What outputs/README.md says to type."""
    lines = (OUTPUTS / "README.md").read_text().partition("\n## The example\n")[2].splitlines()
    return [shlex.split(line) for line in lines if line.startswith("    pruneexp")]


def test_every_run_of_the_example_is_read() -> None:
    runs_read = find([EXAMPLE], "same")
    assert len(runs_read.runs) == 9 and not runs_read.skipped and not runs_read.repeats and not runs_read.conflicts


def test_it_is_what_the_commands_make() -> None:
    sweep, report = commands()
    assert report == ["pruneexp-report", "outputs/example", "out=outputs/example/report"]
    runs = find([EXAMPLE], "same").runs
    assert all(run.environment["command"] == sweep for run in runs)
    listed = json.loads((EXAMPLE / "report" / "report.json").read_text())
    assert sorted(listed.pop("files")) == files_in(EXAMPLE / "report")
    assert listed == {"runs": {run.name: run.hash for run in runs}, "left_out": {}, "conflicts": {}}
    shown = {row["run"]: row for row in csv.DictReader((EXAMPLE / "report" / "tables" / "metrics.csv").open())}
    for run in runs:
        assert {key: float(shown[run.name][key]) for key in run.metrics} == run.metrics


def test_it_is_small_and_says_nothing_of_the_machine_it_was_made_on() -> None:
    files = [path for path in EXAMPLE.rglob("*") if path.is_file() and path.name != "multirun.yaml"]
    assert sum(path.stat().st_size for path in files) < 3 * 2**19
    assert not [path for path in files if path.parent.name == "model"]
    texts = {path: path.read_text() for path in files if path.suffix not in (".png", ".safetensors")}
    folder = re.compile(r"(?<![\w./])/(home|root|tmp|work|Users|mnt|data)/")
    assert [str(path) for path, text in texts.items() if folder.search(text) or '"host"' in text] == []
