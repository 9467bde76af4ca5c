"""The jobs that a multirun's command line, or its sweep's file, asks for: what each overrides, and its config."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from pruneexp.compose import SECTIONS, Composed, compose_raw, composed
from pruneexp.explain import explained
from pruneexp.types import ConfigError

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra

LONGEST_NAME = 80  # of a sweep over recipes, in characters
NOT_HASHED = ("run", "sweep", "cache", "tracker", "hydra")  # where a run goes and is reported; not what it computes


def whole(hydra: Hydra, overrides: list[str]) -> tuple[list[str], DictConfig]:
    """The multirun as Hydra composes it, and the overrides that it is made of. Hydra holds `search.steps=3` against the
    default search even where `search` is swept over; such a setting is then written as a sweep of one value, which is
    left to the jobs. Raises ConfigError."""
    try:
        return overrides, compose_raw(hydra, overrides, RunMode.MULTIRUN)
    except ConfigError as error:
        try:
            overrides = [_left_to_jobs(text) for text in overrides]
            config = compose_raw(hydra, overrides, RunMode.MULTIRUN)
        except (ConfigError, HydraException):
            raise error from None
        if not decided_beforehand(config):
            raise  # no job would be composed before it runs
        return overrides, config


def _left_to_jobs(text: str) -> str:
    key, _, value = text.partition("=")
    section, dot, _ = key.lstrip("+").partition(".")
    if not dot or section not in SECTIONS or section in NOT_HASHED:
        return text
    swept = OverridesParser.create().parse_override(text).is_sweep_override()
    return text if swept or not value else f"{key}=choice({value})"


def job_configs(hydra: Hydra, config: DictConfig) -> Iterator[Composed]:
    """The runs of a multirun, as far as they are known beforehand. Raises ConfigError."""
    return (job_config(hydra, config, overrides) for overrides in job_overrides(hydra, config))


def job_overrides(hydra: Hydra, config: DictConfig) -> list[Sequence[str]]:
    """What each job of a multirun overrides: none for a sweeper that decides as it goes. Raises ConfigError."""
    if not decided_beforehand(config):
        return []
    swept = _typed(config)
    try:
        parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(swept)
        return list(BasicSweeper.split_arguments(parsed, None)[0])
    except Exception as error:
        raise explained(error, hydra, swept) from error


def decided_beforehand(config: DictConfig) -> bool:
    """Whether the jobs are known beforehand: no sweeper decides as it goes."""
    return str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper")


def _typed(config: DictConfig) -> list[str]:
    """A multirun's overrides as they were written, in the sweep's file or on the command line."""
    of_file = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    return of_file + [str(text) for text in config.hydra.overrides.task]


def job_config(hydra: Hydra, config: DictConfig, overrides: Sequence[str]) -> Composed:
    """One job of the multirun. Raises ConfigError."""
    try:
        raw = hydra.config_loader.load_sweep_config(config, list(overrides))
    except Exception as error:
        raise explained(error, hydra, overrides, _typed(config)) from error
    return composed(raw)


def recipes_name(hydra: Hydra, config: DictConfig) -> str | None:
    """The recipe's name; of several that are swept over "magnitude+flap", which Hydra reads without quotes; of very
    many the first ones and a hash of all."""
    for text in reversed(_typed(config)):
        if text.startswith("recipe="):
            (override,) = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides([text])
            if override.is_discrete_sweep():
                swept = dict.fromkeys(override.sweep_string_iterator())
                name = "+".join(re.sub(r"[^\w.-]+", "-", recipe).strip("-") for recipe in swept)
                if len(name) <= LONGEST_NAME:
                    return name
                return f"{name[:LONGEST_NAME].rpartition('+')[0]}+{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return config.hydra.runtime.choices.get("recipe")
