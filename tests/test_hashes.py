"""Hashes name the folders of finished jobs: one that changes runs everybody's finished sweeps again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hydra.types import RunMode

from pruneexp import fingerprint
from pruneexp.cli.build import build
from pruneexp.cli.compose import Composed, compose_raw, open_hydra
from pruneexp.cli.sweep import as_job
from pruneexp.conf_files import conf_folder, sweep_files
from pruneexp.fingerprint import config_hash, without_new_keys
from tests.cases import each
from tests.composing import composer, job_configs

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


def run_hash(line: str) -> str:
    return config_hash(composer().job(line.split()).config)


def sweep_jobs(name: str) -> list[Composed]:
    """The sweep's jobs, in order."""
    hydra = open_hydra()
    config = compose_raw(hydra, [f"+sweep={name}"], RunMode.MULTIRUN)
    assert config.hydra.mode == RunMode.MULTIRUN, "a sweep sets hydra.mode: MULTIRUN"
    return list(job_configs(hydra, config))


def hashes(jobs: list[Composed]) -> list[str]:
    return [config_hash(job.config) for job in jobs]


def frozen(kind: str) -> dict:
    return json.loads(FROZEN.read_text())[kind]


@pytest.mark.slow
@each("line", sorted(frozen("runs")))
def test_the_hash_of_a_choice_stays(line: str) -> None:
    assert run_hash(line) == frozen("runs")[line]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(frozen("sweeps")))
def test_every_sweep_builds_its_jobs_and_their_hashes_stay(name: str, tmp_path: Path) -> None:
    composed = sweep_jobs(name)
    assert hashes(composed) == frozen("sweeps")[name]
    jobs = [as_job(job, tmp_path) for job in composed]
    assert len(jobs) > 1
    for job in jobs:
        build(job)
        assert job.job["sweep"] == name
    assert len({job.config["run"]["dir"] for job in jobs}) == len(jobs), "two jobs are the same run"


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
    parts = experiment.search, experiment.dataset, experiment.evaluators["generation"]
    assert [vars(part)[key] for part, key in zip(parts, ("alike", "bos", "bos"), strict=True)] == [False] * 3


if __name__ == "__main__":  # adds what is new; what is there already stays
    job_hashes = json.loads(FROZEN.read_text()) if FROZEN.exists() else {"runs": {}, "sweeps": {}}
    runs = {line: run_hash(line) for line in single_runs() if line not in job_hashes["runs"]}
    sweeps = {name: hashes(sweep_jobs(name)) for name in sorted(sweep_files()) if name not in job_hashes["sweeps"]}
    job_hashes = {"runs": job_hashes["runs"] | runs, "sweeps": job_hashes["sweeps"] | sweeps}
    FROZEN.write_text(json.dumps(job_hashes, indent=1) + "\n")
    print(f"added to {FROZEN}: {', '.join([*runs, *sweeps]) or 'nothing'}", file=sys.stderr)
