"""The benchmark of a real model: shares, errors, the table, and what is not run again (tests/benchmarks/real.py)."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from pruneexp.cli.compose import compose, open_hydra
from pruneexp.cli.sweep import as_job
from pruneexp.cli.sweep_jobs import whole
from tests.benchmarks import figures, real
from tests.benchmarks.real import Cell, line_of, mean7, table
from tests.composing import job_configs

METRICS = {
    "sparsity/decoder": 0.2,
    "passes/forward": 3.0,
    "passes/backward": 0.5,
    "memory/peak_bytes": 2.0**30,
    **{f"seconds/{stage}": 10.0 for stage in ("load", "calibrate", "search", "save", "evaluate_dense")},
}


def cell(recipe: str, ppl: float, scores: list[float]) -> Cell:
    domains = dict.fromkeys(real.DOMAINS, ppl)
    acc = {"piqa": scores, "boolq": [1.0, 0.0]}
    return Cell(recipe, 0.2, {} if recipe == "dense" else METRICS, domains, dict.fromkeys(real.DOMAINS, 0.25), acc)


DENSE, FLAP = cell("dense", 10.0, [1.0, 1.0, 1.0, 0.0]), cell("flap", 40.0, [1.0, 0.0, 0.0, 0.0])


def test_the_mean_is_over_tasks_and_its_error_over_their_items() -> None:
    mean, error = mean7({"a": [1.0, 0.0, 1.0, 0.0], "b": [1.0, 1.0, 1.0, 1.0]})
    assert mean == 0.75
    assert error == pytest.approx(math.sqrt(1 / 3 / 4) / 2)
    assert all(math.isnan(value) for value in mean7({}))


def test_a_line_has_the_shares_of_what_flap_lost() -> None:
    line = line_of(cell("best", 20.0, [1.0, 1.0, 0.0, 0.0]), DENSE, FLAP)
    assert line["share/c4"] == pytest.approx(0.5)  # log 2 of log 4
    assert line["lost/share"] == pytest.approx(0.5)  # a quarter of piqa of two quarters
    # One of piqa's four items differs from flap's, none of boolq's.
    assert line["lost/share/error"] == pytest.approx(math.sqrt(3 / 16 / 3) / 2 / 0.25)
    assert (line["seconds"], line["passes"], line["items"]) == (20.0, 3.5, 6)
    assert line_of(FLAP, DENSE, FLAP)["share/ptb"] == pytest.approx(1.0)


def test_the_table_has_a_row_a_cell() -> None:
    best = cell("best", 20.0, [1.0, 1.0, 0.0, 0.0])
    lines = table([line_of(DENSE, DENSE, None), line_of(best, DENSE, FLAP)]).splitlines()
    assert lines[2].startswith("| dense | 0.0% | 10.00 | 10.00 | 10.00 |")
    assert "| best | 20.0% | 20.00 (0.50) |" in lines[3]
    assert "| 50.00% ± 28.87% (6) | 0.50 ± 0.50 | 20 | 3.5 | 1,024 |" in lines[3]
    assert {line.count("|") for line in lines} == {12}


def parse_args(tmp_path: Path, *more: str) -> Any:
    folders = [str(tmp_path / name) for name in ("a model", "data", "out")]
    return real.parsed([*folders, "--items", "5", *more])


def test_the_folder_is_the_one_that_the_sweep_gives_its_job(tmp_path: Path) -> None:
    args = parse_args(tmp_path, "seed=3")
    settings = real.settings_of(args, "wanda_sp", 0.3)
    hydra = open_hydra(None)
    _, config = whole(hydra, [*settings, "hydra.mode=MULTIRUN"])
    (job,) = job_configs(hydra, config)
    assert as_job(job, args.out / "jobs").config["run"]["dir"] == str(real.job_folder(args.out, settings))
    assert compose(settings).config["dataset"]["sources"]["ptb"]["weight"] == 0


def test_what_is_finished_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args, ran = parse_args(tmp_path), []
    folder = real.job_folder(args.out, real.settings_of(args, "flap", 0.2))
    answer = {"protocol": real.protocol_of(args), "ppl": {}, "kl": {}, "acc": {}}

    def run(command: list[str], **_: Any) -> Any:
        ran.append(command[2])
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(METRICS))
        broken = ran == ["pruneexp", "tests.benchmarks.real"]  # the first judgement is killed
        return SimpleNamespace(returncode=broken, stdout=json.dumps(answer))

    monkeypatch.setattr(subprocess, "run", run)
    assert real.run_cell(args, "flap", 0.2) is None
    assert (folder / "model").is_dir()  # for the next start, which the sweep then has nothing to do for
    flap = real.run_cell(args, "flap", 0.2)
    assert flap is not None and flap.metrics == METRICS
    assert not (folder / "model").exists()
    assert real.run_cell(args, "flap", 0.2) == flap and len(ran) == 4
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=subprocess.TimeoutExpired("pruneexp", 60)))
    assert real.run_cell(parse_args(tmp_path, "--minutes", "1"), "blockpruner", 0.2) is None
    assert "blockpruner at 0.2: not done in --minutes=1, left out" in capsys.readouterr().err
    other = parse_args(tmp_path, "--windows", "3")
    assert real.judged(folder, real.protocol_of(other)) is None  # judged in another way: once more


def drawn(svg: str) -> tuple[list[str], list[float]]:
    """The words of a figure, and where its marks stand, in points."""
    places = re.findall(r'<use [^>]*?x="([\d.]+)" y="([\d.]+)"', svg)
    return re.findall(r">([^<>]+)</text>", svg), [float(number) for place in places for number in place]


def test_the_figures_are_of_the_measured_numbers() -> None:
    measured = json.loads((figures.HERE / "measured.json").read_text())
    for name, draw in (("effort", figures.effort_figure), ("ridge", figures.ridge_figure)):
        words, places = drawn(draw(measured[name]))
        kept_words, kept_places = drawn((figures.HERE / f"{name}.svg").read_text())
        assert words == kept_words and len(places) > 10
        assert places == pytest.approx(kept_places, abs=0.5)
    page = (figures.HERE / "README.md").read_text()
    for point in measured["effort"]["points"]:
        name = "`best`" if point["effort"] == 20 else f"`best`, `search.effort={point['effort']}`"
        row = next(line for line in page.splitlines() if line.startswith(f"| | | {name} |"))
        assert re.findall(r"\((0\.\d+)\)", row) == [f"{point[text]:.2f}" for text in ("wikitext2", "c4")]
