"""The README's own examples."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from hydra.types import RunMode

from pruneexp.__main__ import main
from pruneexp.cli.compose import check_dataset, compose_raw, composed, open_hydra
from tests.conftest import PARITY

README = (Path(__file__).parent.parent / "README.md").read_text()


def block(language: str, about: str) -> str:
    """The one block of the language that holds the text."""
    (found,) = (text for text in re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL) if about in text)
    return found


def test_a_criterion_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_criteria.py").write_text(block("python", "class Energy"))
    (tmp_path / "my_conf" / "criterion").mkdir(parents=True)
    (tmp_path / "my_conf" / "criterion" / "energy.yaml").write_text(block("yaml", "Energy"))
    command = next(line for line in README.splitlines() if "--config-dir my_conf criterion=" in line).split()
    assert command[0] == "pruneexp"
    data = [f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
    ours = ["model=hf", f"model.path={PARITY}", "dataset=tokens", "dataset.length=64", *data]
    assert main([*command[1:], *ours, "run.dir=run", "run.prove=off"]) == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["sparsity/decoder"] == pytest.approx(0.2, abs=2e-3)
    assert "my_criteria.Energy" in Path("run/config.yaml").read_text()


def test_a_sweep_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_conf" / "sweep").mkdir(parents=True)
    (tmp_path / "my_conf" / "sweep" / "mine.yaml").write_text(block("yaml", "sweeper:"))
    command = re.findall(r"`pruneexp (--config-dir my_conf [^`]*)`", README)[0].split()
    assert main([*command, "dataset.samples=4", "sparsity.ratio=0.2", "evaluator=[size]"]) == 0
    assert len(list(Path("outputs/sweeps/mine").glob("*/metrics.json"))) == 2


def test_every_choice_that_the_readme_names_exists() -> None:
    conf = Path(__file__).parent.parent / "conf"
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", README, flags=re.MULTILINE)
    assert {group for group, _ in rows} >= {"recipe", "criterion", "search", "compensator", "dataset", "evaluator"}
    for group, text in rows:
        known = {path.stem for path in (conf / group).glob("*.yaml")}
        named = set(re.findall(r"`([a-z0-9_]+)`", text))
        assert named <= known | {"flap"}, (group, named - known)


def test_every_command_on_a_model_of_ones_own_names_a_dataset() -> None:
    lines = README.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("    pruneexp ")]
    own = [command for command in commands if any(re.match("model=(?!embedded)", text) for text in command)]
    assert len(own) >= 8
    for command in own:
        hydra = open_hydra()
        check_dataset(hydra, composed(compose_raw(hydra, command, RunMode.RUN)))


def test_the_two_commands_stand_first() -> None:
    install = [line.strip() for line in README.splitlines() if line.strip().startswith("pip install")]
    assert install[:2] == [
        "pip install -c constraints.txt -e . && pruneexp",
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]
