"""A command line that asks for one run, as an experiment."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import DictConfig

from pruneexp.cli.build import build
from pruneexp.cli.compose import Composed, check_dataset, compose_raw, composed
from pruneexp.conf_files import override_parts
from pruneexp.experiment.settings import Experiment
from pruneexp.types import ConfigError


def asked_for_one(hydra: Hydra, overrides: Sequence[str], multirun: bool) -> DictConfig | None:
    """The config of a single run; None where many are asked for, by `multirun` or by a sweep's file. Raises
    ConfigError."""
    for text in overrides:
        if override_parts(text)[0].startswith(("hydra.run.", "hydra.sweep.")):
            raise ConfigError(f"{text}: the folders of runs are not Hydra's here; expected run.dir or sweep.dir")
    if multirun:
        return None
    config = compose_raw(hydra, overrides, RunMode.RUN)
    if config.hydra.mode == RunMode.MULTIRUN:
        return None
    if swept := config.hydra.sweeper.get("params"):
        several = f"hydra.sweeper.params: {', '.join(map(str, swept))} would be swept over in a single run"
        raise ConfigError(f"{several}; expected --multirun, or hydra.mode: MULTIRUN in the sweep's file")
    return config


def single_experiment(hydra: Hydra, config: DictConfig) -> Experiment:
    """Built and checked, before a weight is loaded. Raises ConfigError."""
    run = composed(config)
    check_dataset(hydra, run)
    check_unswept(run)
    experiment = build(run)
    experiment.check()
    return experiment


def check_unswept(run: Composed) -> None:
    """Raises ConfigError for settings that only sweeps have."""
    for key, value in run.config["sweep"].items():
        if value is not None:
            raise ConfigError(f"sweep.{key}={value!r}: expected null in a single run; add --multirun")
