"""The manual's examples: what it tells users to type and to write works as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hydra.types import RunMode

from pruneexp.__main__ import main
from pruneexp.cli import report_command
from pruneexp.cli.build import build
from pruneexp.cli.compose import check_dataset, compose_raw, composed, open_hydra
from pruneexp.cli.sweep_jobs import whole
from pruneexp.export import request
from tests import manual
from tests.composing import job_configs
from tests.conftest import PARITY

README = manual.text("README.md")


def block(file: str, language: str, about: str) -> str:
    """The one block of the language that holds the text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", manual.text(file), flags=re.DOTALL)
    (snippet,) = (text for text in blocks if about in text)
    return snippet


def pruneexp_commands() -> list[list[str]]:
    commands = [command for file in manual.FILES for command in manual.commands(file, "pruneexp")]
    assert len(commands) >= 30
    return commands


def swept(command: list[str]) -> bool:
    return "--multirun" in command or any(text.startswith("+sweep=") for text in command)


def written_part(module: str, kind: str, option: str, chosen: str) -> list[str]:
    """Writes a class that the manual shows, and its YAML, to the working directory; gives the command that the manual
    has for it."""
    Path(module).write_text(block("pruneexp/README.md", "python", f"class {kind}"))
    yaml = Path("my_conf", option)
    yaml.parent.mkdir(parents=True)
    yaml.write_text(block("pruneexp/README.md", "yaml", kind))
    (command,) = (each for each in pruneexp_commands() if chosen in each)
    return command


def test_a_criterion_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = written_part("my_criteria.py", "Energy", "criterion/energy.yaml", "criterion=energy")
    assert command[:2] == ["--config-dir", "my_conf"]
    data = [f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
    ours = ["model=hf", f"model.path={PARITY}", "dataset=tokens", "dataset.length=64", *data]
    assert main([*command, *ours, "run.dir=run", "run.prove=off"]) == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["sparsity/decoder"] == pytest.approx(0.2, abs=2e-3)
    assert "my_criteria.Energy" in Path("run/config.yaml").read_text()


def test_a_recipe_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written_part("my_criteria.py", "Energy", "criterion/energy.yaml", "criterion=energy")
    (tmp_path / "my_conf" / "recipe").mkdir()
    (tmp_path / "my_conf" / "recipe" / "mine.yaml").write_text(
        block("pruneexp/README.md", "yaml", "/criterion: energy")
    )
    (command,) = (each for each in pruneexp_commands() if "recipe=mine,flap" in each)
    assert main([*command, "dataset.samples=4", "evaluator=[size]"]) == 0
    configs = [file.read_text() for file in Path("outputs/sweeps/mine+flap").glob("*/config.yaml")]
    assert len(configs) == 4 and sum("my_criteria.Energy" in config for config in configs) == 2


def test_an_evaluator_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = written_part("my_evaluators.py", "Top1", "evaluator/top1.yaml", "evaluator=[perplexity,top1]")
    assert main([*command, "dataset.samples=4", "evaluator.perplexity.samples=2", "run.dir=run", "run.prove=off"]) == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert 0.5 < metrics["pruned/top1_agreement/embedded@128[16]"] < 1
    right = {when: metrics[f"{when}/top1/embedded@128[16]"] for when in ("dense", "pruned")}
    assert 0.3 < right["pruned"] < right["dense"] < 1
    written = {file.name: float(file.read_text()) for file in Path("run/samples").iterdir()}
    assert written == {f"top1_{when}.txt": value for when, value in right.items()}


def test_a_table_of_times_written_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table = block("conf/README.md", "json", '"query_heads"')
    assert len(table.splitlines()) <= 10
    Path("latency.json").write_text(table)
    (command,) = (each for each in pruneexp_commands() if "sparsity.table=latency.json" in each)
    for granularity in ("heads", "query_heads"):
        typed = [f"search.granularity=[{granularity},channels]", "search=global", "evaluator=[size]"]
        assert main([*command, *typed, "dataset.samples=4", "run.dry=true"]) == 0
    output = capsys.readouterr().out
    total = 6 * (0.14 + 0.33)  # ms of all layers
    assert f"to remove: 20.0% of {round(total * 1e9):,} = " in output and "times of my board (4 threads)" in output


def test_a_sweep_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_conf" / "sweep").mkdir(parents=True)
    (tmp_path / "my_conf" / "sweep" / "mine.yaml").write_text(block("sweeps/README.md", "yaml", "sweeper:"))
    command = re.findall(r"`pruneexp (--config-dir my_conf [^`]*)`", manual.text("sweeps/README.md"))[0].split()
    assert main([*command, "dataset.samples=4", "sparsity.ratio=0.2", "evaluator=[size]"]) == 0
    assert len(list(Path("outputs/sweeps/mine").glob("*/metrics.json"))) == 2


def test_every_choice_that_the_readme_names_exists() -> None:
    conf = manual.ROOT / "conf"
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", README, flags=re.MULTILINE)
    assert {group for group, _ in rows} == {path.name for path in conf.iterdir() if path.is_dir()}
    for group, text in rows:
        known = {path.stem for path in (conf / group).glob("*.yaml")}
        named = set(re.findall(r"`([a-z0-9_]+)`", text))
        assert named and named <= known, (group, named - known)


@pytest.mark.slow
def test_every_command_for_one_run_builds_and_names_a_dataset_for_a_model_of_ones_own() -> None:
    hydra, own = open_hydra(), 0
    for command in pruneexp_commands():
        if not swept(command) and "--config-dir" not in command:
            run = composed(compose_raw(hydra, command, RunMode.RUN))
            check_dataset(hydra, run)  # raises ConfigError
            build(run)  # raises ConfigError
            own += any(re.match("model=(?!embedded)", text) for text in command)
    assert own >= 8


@pytest.mark.slow
def test_every_command_for_many_runs_composes_its_jobs() -> None:
    sweeps = [command for command in pruneexp_commands() if swept(command) and "--config-dir" not in command]
    sweeps = [command for command in sweeps if "hydra/sweeper=optuna" not in command]  # a plugin, apart
    assert len(sweeps) >= 6
    hydra = open_hydra()
    for command in sweeps:
        launched = ("--multirun", "hydra/launcher=", "hydra.launcher.")  # by plugins, apart
        _, config = whole(hydra, [text for text in command if not text.startswith(launched)])
        jobs = list(job_configs(hydra, config))
        assert len(jobs) > 1
        for job in (jobs[0], jobs[-1]):
            build(job)  # raises ConfigError


@pytest.mark.parametrize(("program", "reads"), [("export", request), ("report", report_command.request)])
def test_every_command_for_exports_and_reports_is_read(program: str, reads) -> None:
    commands = [command for file in manual.FILES for command in manual.commands(file, f"pruneexp-{program}")]
    assert len(commands) >= 3
    for command in commands:
        reads(command)  # raises ConfigError


def test_the_two_commands_stand_first() -> None:
    install = [line.strip() for line in README.splitlines() if line.strip().startswith("pip install")]
    assert install[:2] == [
        "pip install -c constraints.txt -e . && pruneexp",
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]
