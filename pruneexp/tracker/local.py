"""The local run: the run folder and everything in it but the checkpoint. Always on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch

from pruneexp.files import hold, write_atomic
from pruneexp.tracker.environment import environment
from pruneexp.tracker.folder import LOG, claim_folder, timestamp
from pruneexp.types import Plan, RunError, RunRecord, Scores, Site, unit_scores

logger = logging.getLogger("pruneexp")


class LocalRun:
    """One run's folder, from claiming it to the `metrics.json` that says that it is done.

    `overwrite`: a finished run in the folder is replaced. Methods raise RunError where the folder cannot be written."""

    summarise = None  # a sweep's table lies beside its jobs

    def __init__(self, overwrite: bool) -> None:
        self.overwrite = overwrite
        self._folder: Path | None = None  # None: not claimed (yet, or any more), so there is nothing to write to
        self._status: dict[str, Any] = {}
        self._choices: Mapping[str, Any] = {}  # of each group
        self._handlers: list[logging.Handler] = []
        self._log: IO[Any] | None = None  # held as long as the run is on
        self._level = logging.NOTSET

    @property
    def folder(self) -> Path:
        if self._folder is None:
            raise RuntimeError("the run has not started, or has ended")
        return self._folder

    def start(self, record: RunRecord) -> None:
        """Claims the folder, by status.json; opens log.txt, to which everything logged under "pruneexp" goes from here
        on; writes config.yaml and environment.json. Raises ConfigError where another run is in the way."""
        folder = record.folder
        self._folder, self._status = folder, claim_folder(folder, self.overwrite)
        self._open_log()
        self._write("config.yaml", _yaml(record.config))
        self._choices = record.job.get("choices", {})
        self.environment({}, {})
        logger.info("started in %s", folder)

    def environment(self, model: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Writes environment.json, with the model's and the data's fingerprints once they are known."""
        self._write_json("environment.json", {**environment(model, data), "choices": dict(self._choices)})

    def log(self, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            logger.info("%s = %s", key, f"{value:.6g}" if isinstance(value, float) else value)

    def artifacts(self, plan: Plan, scores: Scores, sites: Sequence[Site]) -> None:
        """Writes plan.json, scores.safetensors (float32 [U] per site) and structure.png. status.json will have the
        plan's SHA-256."""
        text = plan.to_json() + "\n"
        self._write("plan.json", text)
        self._status = {**self._status, "plan_sha256": hashlib.sha256(text.encode()).hexdigest()}
        self._write("scores.safetensors", _safetensors(scores))
        try:
            from pruneexp.tracker.structure import structure_figure

            structure_figure(plan, sites, self.folder / "structure.png")
        except Exception as error:
            # A picture is not worth a run: the plan it shows is on the disk already.
            logger.warning("no structure.png: %s: %s", type(error).__name__, error)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Marks the run done and writes metrics.json, last of all."""
        checked = flat_metrics(metrics)
        logger.info("done")
        self._end("done", None)
        self._write_json("metrics.json", checked)
        self._leave()

    def fail(self, reason: str, trace: str = "") -> None:
        """Marks the run failed, the reason in status.json and the trace in log.txt. Does nothing where no folder was
        claimed or the run is done; never raises, so that the reason reaches the user."""
        if self._folder is None:
            return
        # To the file alone: what reaches the screen is the one line that the caller prints.
        text = f"failed: {reason}" + (f"\n{trace}" if trace else "")
        for handler in self._handlers[:1]:
            handler.handle(logger.makeRecord(logger.name, logging.ERROR, "", 0, text, (), None))
        try:
            self._end("failed", reason)
        except RunError as error:
            print(f"pruneexp: {error}", file=sys.stderr)
        self._leave()

    def _leave(self) -> None:
        self._folder = None
        if self._log is not None:
            self._log.close()

    def _end(self, status: str, reason: str | None) -> None:
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        if self._handlers:
            logger.setLevel(self._level)
        self._handlers = []
        self._status = {**self._status, "status": status, "reason": reason, "ended": timestamp()}
        # The machine's name is for whoever finds the run running. The process stays: should it die before metrics.json
        # is written, that is how one tells.
        self._status.pop("host", None)
        self._write_json("status.json", self._status)

    def _open_log(self) -> None:
        try:
            file = logging.FileHandler(self.folder / LOG, encoding="utf-8")
            self._log = open(self.folder / LOG, "rb+")
        except OSError as error:
            raise self._unwritable(LOG, error) from error
        hold(self._log)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        screen = _Screen(logging.WARNING)
        screen.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        self._level = logger.level
        logger.setLevel(logging.INFO)
        self._handlers = [file, screen]
        for handler in self._handlers:
            logger.addHandler(handler)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._write(name, json.dumps(content, indent=1) + "\n")

    def _write(self, name: str, data: bytes | str) -> None:
        try:
            write_atomic(self.folder / name, data)
        except OSError as error:
            raise self._unwritable(name, error) from error

    def _unwritable(self, name: str, error: OSError) -> RunError:
        return RunError(f"run.dir={str(self.folder)!r}: cannot write {name}: {error.strerror or error}")


class _Screen(logging.Handler):
    """Lines on stderr, above a progress bar where one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        # sys.stderr at this moment: a stream remembered from the start may have been swapped or closed since.
        tqdm.write(self.format(record), file=sys.stderr)


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    """Sorted, plain ints and floats. Raises RunError, naming the key, for anything that is not one finite number."""
    return {key: _number(key, metrics[key]) for key in sorted(metrics)}


def _number(key: str, value: Any) -> int | float:
    plain = value.item() if getattr(value, "shape", None) == () else value  # of numpy or torch
    if not isinstance(plain, numbers.Real) or not math.isfinite(plain):
        raise RunError(f"{key}={value!r}: expected a finite number")
    return int(plain) if isinstance(plain, numbers.Integral) else float(plain)


def _yaml(config: Mapping[str, Any]) -> str:
    texts = {key: json.dumps(value) for key, value in config.items()}
    exact = {key: json.loads(text) == config[key] for key, text in texts.items()}  # not of integers as keys, or of NaN
    return "".join(_remembered(key, text) if exact[key] else _dumped({key: config[key]}) for key, text in texts.items())


@lru_cache(maxsize=64)
def _remembered(key: str, value: str) -> str:
    """The YAML of a section given as JSON, remembered: most sections of a job's config are those of the job before."""
    return _dumped({key: json.loads(value)})


def _dumped(config: Mapping[str, Any]) -> str:
    from omegaconf import OmegaConf

    # OmegaConf's own dumper quotes what its loader would read as something else ("1e-5"): the file composes back.
    return OmegaConf.to_yaml(OmegaConf.create(dict(config)))


def _safetensors(scores: Scores) -> bytes:
    from safetensors.torch import save

    values = {name: unit_scores(score).detach() for name, score in scores.items()}
    return save({name: s.to("cpu", torch.float32, copy=True).contiguous() for name, s in values.items()})
