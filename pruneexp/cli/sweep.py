"""Many runs from one command line: Hydra's sweepers and launchers, with our own folders, resumption and failures.

A job's folder is named by its config, so that a sweep that is started again skips the jobs that are done. A job that
fails is recorded in its folder and the sweep goes on.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pruneexp.cli.compose import Composed, check_dataset, composed
from pruneexp.cli.sweep_end import hand_over
from pruneexp.cli.sweep_jobs import JobComposer, job_overrides, recipes_name, whole
from pruneexp.conf_files import inherited, option_file, sweep_files, typed_keys
from pruneexp.files import check_writable, typed_folder, write_atomic
from pruneexp.fingerprint import comparable, config_hash
from pruneexp.report.sweep_table import write_summary
from pruneexp.report.tables import count
from pruneexp.tracker import status_of
from pruneexp.tracker.folder import is_own, mark_failed
from pruneexp.types import ConfigError, ConfigErrors, RunError, one_line

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra

    from pruneexp.calibrate import DenseStates
    from pruneexp.experiment.run import Outcome

SHARED_BYTES = 2**29  # of the dense model's hidden states, which jobs in one process share


@dataclass(frozen=True)
class Ended:
    """A multirun that has ended. `jobs`: the folders of those that are known; `failed`: names among them; `forecasts`:
    what jobs that were not run would take, by folder; `elsewhere`: names of jobs that other processes are running."""

    folder: Path
    jobs: tuple[Path, ...]
    failed: tuple[str, ...]
    forecasts: Mapping[Path, Mapping[str, float]] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()


def multirun(hydra: Hydra, overrides: Sequence[str]) -> Ended:
    """Runs every job. Raises ConfigError for jobs that cannot be built: before the first job runs and for all of them
    at once, where the sweeper decides its jobs beforehand."""
    overrides, config = whole(hydra, [*overrides, "hydra.mode=MULTIRUN"])
    folder = sweep_folder(hydra, config)
    jobs, by_sites = _composed_jobs(hydra, config, folder)
    here, shared = bool(jobs) and _runs_here(config.hydra), None
    if here and by_sites:
        from pruneexp.calibrate import DenseStates

        shared = DenseStates(SHARED_BYTES)
    if jobs and all(job.config["run"]["dry"] for job in jobs):
        return _forecast(folder, jobs, shared)
    _make(folder)
    before = _statuses(folder)
    try:
        if here:
            for number, (job, label) in enumerate(zip(jobs, labels(jobs), strict=True)):
                metrics = _run_recorded(job, str(number), label, shared)
                _objective(job, metrics, math.inf)  # nobody asks for it, but it must be there
        else:
            swept = f"hydra.sweep.dir={_quoted(str(folder))}"
            hydra.multirun("config", run_job, [*overrides, swept], with_log_configuration=False)
    except (ConfigError, RunError):
        raise
    except Exception as error:
        raise RunError(f"the sweep stopped: {type(error).__name__}: {one_line(error)}") from error
    finally:  # also of a sweep that is interrupted
        summary = write_summary(folder)
    # The folders say how the jobs ended, whatever process or machine a launcher ran them on.
    ran = [path.parent for path, status in _statuses(folder).items() if before.get(path) != status]
    ours = [Path(job.config["run"]["dir"]) for job in jobs]  # where they are known: another sweep may write here, too
    ran = [job for job in ran if (not ours or job in ours) and (is_own(job) or not here)]
    states = {job.name: status_of(job) for job in ours or ran}
    elsewhere = sorted(job.name for job in ours or ran if states[job.name] == "running" and not is_own(job))
    failed = sorted(name for name, state in states.items() if state != "done" and name not in elsewhere)
    failures = f", failed: {', '.join(failed)}" if failed else ""
    failures += f", left to the processes that run them: {', '.join(elsewhere)}" if elsewhere else ""
    print(f"sweep in {folder}: {count(len(ran), 'job')} ran{failures}")
    print(f"all its jobs are in {summary}")
    if ran:
        hand_over(config, folder, _sweep_name(config) or folder.name)
    return Ended(folder, tuple(ours or ran), tuple(failed), elsewhere=tuple(elsewhere))


def _composed_jobs(hydra: Hydra, config: DictConfig, folder: Path) -> tuple[list[Composed], bool]:
    """The jobs in the sweep's folder, as far as they are known beforehand, and whether any goes sublayer by sublayer.
    Raises ConfigError."""
    from pruneexp.cli.build import build
    from pruneexp.pruning import by_site

    jobs, by_sites, mistakes = [], False, Counter()
    listed, composer = job_overrides(hydra, config), JobComposer(hydra, config)
    for overrides in listed:
        try:
            job = composer.job(overrides)
            check_dataset(hydra, job)
            jobs.append(as_job(job, folder))
            by_sites |= by_site(build(jobs[-1]).compensator)
        except ConfigErrors as error:
            mistakes.update(error.lines)
        except ConfigError as error:
            mistakes[one_line(error)] += 1
    if mistakes:
        some = {line: f" ({count} of {len(listed)} jobs)" for line, count in mistakes.items() if count < len(listed)}
        raise ConfigErrors([f"{line}{some.get(line, '')}" for line in mistakes])
    return jobs, by_sites


def _make(folder: Path) -> None:
    where = f"sweep.dir={str(folder)!r}"
    check_writable(folder, where)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}; expected a folder that can be made") from error


def labels(jobs: Sequence[Composed]) -> list[str]:
    """What tells each job from the others: those of its overrides that not every job has. A job that differs in
    nothing shows all of them."""
    typed = [job.job["overrides"] for job in jobs]
    shared = set.intersection(*map(set, typed)) if len(typed) > 1 else set()
    return [" ".join([text for text in of_job if text not in shared] or of_job) for of_job in typed]


def _forecast(folder: Path, jobs: Sequence[Composed], shared: DenseStates | None) -> Ended:
    """What each job of a sweep would take; nothing is written. `failed`: those that cannot run."""
    failed, forecasts = [], {}
    for number, (job, label) in enumerate(zip(jobs, labels(jobs), strict=True)):
        done = _done(job)
        print(f"job {number}: {label}{': done already' if done else ''}")
        try:
            if not done:
                forecasts[Path(job.config["run"]["dir"])] = _run(job, shared).metrics
        except (ConfigError, RunError) as error:
            failed.append(f"job {number}")
            print(f"pruneexp: job {number} cannot run: {error}", file=sys.stderr)
    return Ended(folder, tuple(Path(job.config["run"]["dir"]) for job in jobs), tuple(failed), forecasts)


def _runs_here(node: DictConfig) -> bool:
    """Whether Hydra would do no more than run the jobs one by one in this process. We then do that ourselves: Hydra
    would compose each job twice more, which costs as much as a small job."""
    own = str(node.launcher.get("_target_")).endswith(".BasicLauncher")
    return own and not node.callbacks and not node.job.env_set and not node.job.chdir


def sweep_folder(hydra: Hydra, config: DictConfig) -> Path:
    """`sweep.dir`, or outputs/sweeps/<name of the sweep, or of its recipes>."""
    name = _sweep_name(config) or recipes_name(hydra, config) or "custom"
    given = OmegaConf.select(config, "sweep.dir")
    usual = f"outputs/sweeps/{name}"
    if not isinstance(given, (str, type(None))):
        raise ConfigError(f"sweep.dir={given!r}: expected a folder, or null for {usual}")
    return Path(usual) if given is None else typed_folder("sweep.dir", given, usual)


def _sweep_name(config: DictConfig) -> str | None:
    return config.hydra.runtime.choices.get("sweep")


def run_job(config: DictConfig) -> float | None:
    """Runs one job, called by Hydra's launchers in this process or another. Gives `sweep.objective`, for a sweeper that
    optimises; a failed job counts as the worst."""
    node = HydraConfig.get()
    try:
        job = as_job(composed(config, cast(DictConfig, node)), Path(node.sweep.dir))
    except ConfigError as error:
        # Nothing to name a folder with: only sweepers that make up their jobs as they go get here.
        print(f"pruneexp: job {node.job.num}: {error}", file=sys.stderr)
        raise
    downhill = not str(node.sweeper.get("direction", "")).lower().endswith("maximize")
    label = " ".join(job.job["overrides"])  # the other jobs are not known here
    return _objective(job, _run_recorded(job, str(node.job.num), label), math.inf if downhill else -math.inf)


def _objective(job: Composed, metrics: Mapping[str, float] | None, worst: float) -> float | None:
    """`sweep.objective` of a job's metrics (None: it failed), by the names that compare: those of summary.csv. Raises
    RunError where they have no such figure."""
    objective = job.config["sweep"]["objective"]
    if objective is None:
        return None
    if metrics is None:
        return worst
    metrics = comparable(metrics, job.config)
    if objective not in metrics:
        raise RunError(f"sweep.objective={objective!r}: expected one of {', '.join(sorted(metrics))}")
    return metrics[objective]


def as_job(run: Composed, folder: Path) -> Composed:
    """The run as a job of the sweep in `folder`: its own folder there, no checkpoint and no proof unless asked."""
    settings = dict(run.config["run"])
    if settings["dir"] is not None:
        raise ConfigError(f"run.dir={settings['dir']!r}: expected null in a multirun: its jobs lie in sweep.dir/<hash>")
    settings["dir"] = str(folder / config_hash(run.config))
    typed = _run_keys(run)
    settings |= {key: value for key, value in (("save", False), ("prove", "off")) if key not in typed}
    sweep = {**run.config["sweep"], "dir": str(folder)}
    job = {**run.job, "sweep": run.job["sweep"] or folder.name}
    return Composed({**run.config, "run": settings, "sweep": sweep}, job, run.folders)


def _run_keys(run: Composed) -> set[str]:
    """Keys of `run` that were typed, swept over, or set by the sweep's file or by those that its defaults name."""
    keys = typed_keys(run.job["overrides"])
    name = run.job["sweep"]
    path = None if name is None else sweep_files().get(name) or option_file(run.folders, "sweep", name)
    contents = [yaml.safe_load(file.read_text()) or {} for file in inherited(path)] if path is not None else []
    of_files = {key for content in contents for key in content.get("run") or {}}
    return {key.removeprefix("run.") for key in keys if key.startswith("run.")} | of_files


def _run_recorded(job: Composed, number: str, label: str, shared: DenseStates | None = None) -> dict[str, float] | None:
    """The job's metrics, those on disk where it is done already; None for a failure, which is recorded."""
    folder = Path(job.config["run"]["dir"])
    done = _done(job)
    print(f"job {number}: {label} -> {folder}{': done already' if done else ''}", file=sys.stderr)
    if done:
        return json.loads((folder / "metrics.json").read_text())
    try:
        return _run(job, shared).metrics
    except Exception as error:
        if _done(job):
            print(f"job {number}: done by another process meanwhile", file=sys.stderr)
            return json.loads((folder / "metrics.json").read_text())
        if status_of(folder) == "running" and not is_own(folder):
            print(f"job {number}: left to another process: {one_line(error)}", file=sys.stderr)
            return None
        expected = isinstance(error, (ConfigError, RunError))
        reason = str(error) if expected else f"{type(error).__name__}: {one_line(error)}"
        print(f"pruneexp: job {number} failed: {reason}", file=sys.stderr)
        _record_failure(job, folder, reason)
        return None


def _run(job: Composed, shared: DenseStates | None) -> Outcome:
    from pruneexp.cli.build import build
    from pruneexp.experiment.run import run_experiment

    experiment = build(job)
    experiment.check()
    return run_experiment(experiment, shared)


def _done(job: Composed) -> bool:
    """Whether the job is done. One that lacks the checkpoint now asked for is not, and is set to run again."""
    settings = job.config["run"]
    folder = Path(settings["dir"])
    if status_of(folder) != "done" or settings["overwrite"]:
        return False
    if not settings["save"] or (folder / "model").is_dir():
        return True
    settings["overwrite"] = True
    return False


def _record_failure(job: Composed, folder: Path, reason: str) -> None:
    """Marks the folder failed where the run did not come far enough to do so itself. One that cannot be written to
    costs the others nothing."""
    try:
        if mark_failed(folder, reason):
            write_atomic(folder / "config.yaml", yaml.safe_dump(job.config, sort_keys=False))
    except OSError as error:
        print(f"pruneexp: {folder}: the failure is not recorded: {error.strerror or error}", file=sys.stderr)


def _statuses(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.glob("*/status.json")}


def _quoted(text: str) -> str:
    """A string as Hydra's override grammar reads it back."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
