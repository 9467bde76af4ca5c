"""Hashes name the folders of finished jobs: one that changes runs everybody's finished sweeps again."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import pytest

from pruneexp import fingerprint
from pruneexp.cli.build import build
from pruneexp.cli.compose import Composed, open_hydra
from pruneexp.cli.sweep_jobs import JobComposer, job_configs, whole
from pruneexp.conf_files import conf_folder, sweep_files
from pruneexp.fingerprint import config_hash, without_new_keys
from tests.cases import each

FROZEN = Path(__file__).parent / "data" / "job_hashes.json"
GROUPS = ("augmentation", "compensator", "criterion", "dataset", "evaluator", "model", "recipe", "recovery", "search")
GROUPS += ("quantise", "sparsity")
NEEDED = {
    "model=hf": "model.path=folder/of/a/model",
    "search=ul_mm": "search.heads=5",
    "search=al_mm": "search.heads=5",
}
OWN = f"model=hf {NEEDED['model=hf']}"
OWN_TEXT = "dataset=text dataset.calibration=train.txt dataset.evaluation=test.txt recipe=best"
ALL_EVALUATORS = (
    "dataset=tokens dataset.calibration=a.npy dataset.evaluation=b.npy "
    "evaluator=[perplexity,wikitext2,ptb_128,c4,zeroshot,generation,latency,questions,size]"
)


def single_runs() -> list[str]:
    """A command line for every choice of every group, and what people type for a model and texts of their own."""
    choices = [(group, path.stem) for group in GROUPS for path in sorted((conf_folder() / group).glob("*.yaml"))]
    lines = [f"{group}=[{choice}]" if group == "evaluator" else f"{group}={choice}" for group, choice in choices]
    lines = [f"{line} {NEEDED[line]}" if line in NEEDED else line for line in lines]
    return [*lines, f"{OWN} {OWN_TEXT}", f"{OWN} {ALL_EVALUATORS}"]


@cache
def composer() -> JobComposer:
    hydra = open_hydra()
    return JobComposer(hydra, whole(hydra, ["hydra.mode=MULTIRUN"])[1])


def run_hash(line: str) -> str:
    return config_hash(composer().job(line.split()).config)


def sweep_hashes(name: str) -> list[str]:
    """Of the sweep's jobs, in order."""
    hydra = open_hydra()
    _, config = whole(hydra, [f"+sweep={name}", "hydra.mode=MULTIRUN"])
    return [config_hash(job.config) for job in job_configs(hydra, config)]


def frozen(kind: str) -> dict:
    return json.loads(FROZEN.read_text())[kind]


@pytest.mark.slow
@each("line", sorted(frozen("runs")))
def test_the_hash_of_a_choice_stays(line: str) -> None:
    assert run_hash(line) == frozen("runs")[line]


@pytest.mark.slow
@each("name", sorted(frozen("sweeps")))
def test_the_hashes_of_a_sweep_stay(name: str) -> None:
    assert sweep_hashes(name) == frozen("sweeps")[name]


def test_every_sweep_is_frozen() -> None:
    assert set(sweep_files()) == set(frozen("sweeps"))


def test_new_keys_leave_the_hash_where_they_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"search": {"multiple": 1}, "evaluator": {"a": {"dataset": {"seed": 0}}}, "run": {"dir": "x"}}
    new = {"search": {"multiple": 1, "alike": False}, "evaluator": {"a": {"dataset": {"seed": 0, "head": None}}}}
    monkeypatch.setattr(fingerprint, "NEW_KEYS", {"search.alike": False, "evaluator.*.dataset.head": None})
    assert config_hash(new) == config_hash(old)
    assert config_hash({**new, "search": {"multiple": 1, "alike": True}}) != config_hash(old)
    assert config_hash({**new, "sparsity": {"alike": False}}) != config_hash(old)  # another key of the same name


def test_a_config_of_before_there_were_new_keys_still_builds() -> None:
    job = composer().job(["search=uniform", "evaluator=[generation]"])
    experiment = build(Composed(without_new_keys(job.config), job.job, job.folders))
    assert "alike" not in experiment.config["search"] and "bos" not in experiment.config["dataset"]
    found = experiment.search, experiment.dataset, experiment.evaluators["generation"]
    assert [vars(part)[key] for part, key in zip(found, ("alike", "bos", "bos"), strict=True)] == [False] * 3


if __name__ == "__main__":  # adds what is new; what is there already stays
    found = json.loads(FROZEN.read_text()) if FROZEN.exists() else {"runs": {}, "sweeps": {}}
    runs = {line: run_hash(line) for line in single_runs() if line not in found["runs"]}
    sweeps = {name: sweep_hashes(name) for name in sorted(sweep_files()) if name not in found["sweeps"]}
    found = {"runs": found["runs"] | runs, "sweeps": found["sweeps"] | sweeps}
    FROZEN.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(runs)} runs and {len(sweeps)} sweeps added to {FROZEN}", file=sys.stderr)
