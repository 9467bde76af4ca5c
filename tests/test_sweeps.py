"""Ready sweeps, scaled down to the embedded model: what they compose also runs."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import yaml
from hydra.types import RunMode

from pruneexp import progress
from pruneexp.__main__ import main
from pruneexp.cli import sweep as multirun
from pruneexp.cli.compose import compose_raw, open_hydra
from pruneexp.conf_files import sweep_files, sweeps_folder
from pruneexp.tracker import structure
from tests.cases import each
from tests.wandb_specs import parameters, spec

# All that is large: model, data, steps.
SMALL = ["model=embedded", "dataset=embedded", "dataset.samples=4", "dataset.length=32", "evaluator=[size]"]
STEPS = {"manual": ["search.heads=5"], "policy_gradient": ["search.steps=3"], "tuned": ["recovery.steps=1"]}
LOSES = {  # kinds of sites that lose units, where that is the point of the sweep
    "policy_gradient_heads": {"attention"},
    "policy_gradient_layers": {"block"},
}


def chosen(name: str) -> list[str]:
    """Two of its jobs: every parameter at its first value, the first of several values that matters here at two."""
    grid = {key: values for key, values in parameters(sweep_files()[name]).items() if key != "model"}
    varied = next((key for key, values in grid.items() if len(values) > 1 and key != "seed"), None)
    pinned = [f"{key}={','.join(values[:2] if key == varied else values[:1])}" for key, values in grid.items()]
    return pinned + [text for part, texts in STEPS.items() if part in name for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("name", sweep_files())
def test_a_sweep_runs_small(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(progress, "BAR_AFTER", 3600.0)
    monkeypatch.setattr(structure, "structure_figure", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main([f"+sweep={name}", *SMALL, *chosen(name), "sweep.dir=swept"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    folders = [path.parent for path in Path("swept").glob("*/metrics.json")]
    assert len(folders) == (1 if name == "llm_pruner_tuned" else 2)  # that one varies the model alone
    for folder in folders:
        plan = json.loads((folder / "plan.json").read_text())
        lost = {site["kind"] for site in plan["sites"].values() if len(site["kept"]) < site["units"]}
        assert lost == LOSES[name] if name in LOSES else lost or not plan["budget"]["ratio"]


@each("name", sweep_files())
def test_the_wandb_spec_is_the_sweep(name: str) -> None:
    path = sweeps_folder() / "wandb" / f"{name}.yaml"
    assert path.read_text() == spec(name), "python -m tests.wandb_specs writes it anew"
    assert yaml.safe_load(path.read_text())["command"][1] == f"+sweep={name}"


def test_no_wandb_spec_is_without_its_sweep() -> None:
    assert {path.stem for path in (sweeps_folder() / "wandb").glob("*.yaml")} == set(sweep_files())


@pytest.mark.slow
def test_an_agent_runs_a_job_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `wandb agent` puts in place of ${args_no_hyphens}: key=value for each parameter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sweep = yaml.safe_load((sweeps_folder() / "wandb" / "grid.yaml").read_text())
    pinned = [f"{key}={each['values'][0]}" for key, each in sweep["parameters"].items()]
    assert main([sweep["command"][1], *pinned, *SMALL, "sweep.dir=swept"]) == 0
    assert len(list(Path("swept").glob("*/metrics.json"))) == 1


@pytest.mark.slow
def test_jobs_that_were_checked_are_those_that_hydra_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same folders, same configs, same plans, whether Hydra's launcher composes each job anew or not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(structure, "structure_figure", lambda *_: None)
    swept = ["--multirun", *SMALL, "recipe=flap", "sparsity.ratio=0.2,0.4", "compensator=none", "sweep.dir=swept"]
    assert main(swept) == 0
    checked = recorded(tmp_path / "swept")
    assert len(checked) == 2
    (tmp_path / "swept").rename(tmp_path / "before")
    monkeypatch.setattr(multirun, "_runs_here", lambda node: False)
    assert main(swept) == 0
    assert recorded(tmp_path / "swept") == checked


def recorded(folder: Path) -> dict[str, tuple[str, str]]:
    jobs = [path.parent for path in folder.glob("*/metrics.json")]
    return {job.name: ((job / "config.yaml").read_text(), (job / "plan.json").read_text()) for job in jobs}


def test_what_hydra_would_add_to_a_job_is_left_to_it() -> None:
    for typed, here in (([], True), (["+hydra.job.env_set.X=1"], False), (["hydra.job.chdir=true"], False)):
        config = compose_raw(open_hydra(), ["hydra.mode=MULTIRUN", *typed], RunMode.MULTIRUN)
        assert multirun._runs_here(config.hydra) is here
