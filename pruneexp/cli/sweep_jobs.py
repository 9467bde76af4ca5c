"""The jobs that a multirun's command line, or its sweep's file, asks for: what each overrides, and its config."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from pruneexp.cli.compose import SECTIONS, Composed, check_dataset, compose_raw, composed, quoted, unswept
from pruneexp.cli.explain import explained
from pruneexp.conf_files import override_parts
from pruneexp.fingerprint import NOT_HASHED
from pruneexp.types import ConfigError

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra

LONGEST_NAME = 80  # of a sweep over recipes, in characters


def whole(hydra: Hydra, overrides: list[str]) -> tuple[list[str], DictConfig]:
    """The overrides of a multirun, and its config as Hydra composes it. Hydra checks `search.steps=3` against the
    default search even where `search` is swept over; such a setting is then written as a sweep of one value, so that
    only the jobs have it. Raises ConfigError."""
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


def job_overrides(hydra: Hydra, config: DictConfig) -> list[Sequence[str]]:
    """What each job of a multirun overrides: none for a sweeper that decides as it goes. Raises ConfigError."""
    swept = _typed(config)
    if not decided_beforehand(config):
        check_dataset(hydra, unswept(config, swept))
        return []
    try:
        # Hydra writes values anew for each job, numbers as numbers are printed.
        exact = [quoted(config, text) for text in swept]
        parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(exact)
        return list(BasicSweeper.split_arguments(parsed, None)[0])
    except Exception as error:
        raise explained(error, hydra, swept) from error


def decided_beforehand(config: DictConfig) -> bool:
    """Whether the jobs are known beforehand: no sweeper decides as it goes."""
    return str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper")


def _typed(config: DictConfig) -> list[str]:
    """A multirun's overrides as they were written, in the sweep's file or on the command line."""
    of_file = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    typed = OmegaConf.to_container(config.hydra.overrides.task)  # unresolved: ${...} is a job's to resolve
    return [*of_file, *map(str, cast(list, typed))]


class JobComposer:
    """Composes a multirun's jobs as Hydra does. What several jobs choose alike is composed once, and each job's values
    are set in a copy of it, which takes a tenth of the time."""

    def __init__(self, hydra: Hydra, config: DictConfig):
        self.hydra, self.config = hydra, config
        self.loader = cast(ConfigLoaderImpl, hydra.config_loader)
        self.parser = OverridesParser.create(config_loader=hydra.config_loader)
        self.parsed: dict[str, Override] = {}
        self.groups: dict[str, bool] = {}
        self.bases: dict[tuple[str, ...], tuple[DictConfig, DictConfig]] = {}  # by overrides: config, `hydra` node

    def job(self, overrides: Sequence[str]) -> Composed:
        """One job, of its overrides. Raises ConfigError."""
        try:
            return composed(*self._from_base(overrides))
        except ConfigError:
            raise
        except Exception:  # what is wrong with it, Hydra tells of the whole
            return self._by_hydra(overrides)

    def _by_hydra(self, overrides: Sequence[str]) -> Composed:
        try:
            raw = self.loader.load_sweep_config(self.config, list(overrides))
        except Exception as error:
            raise explained(error, self.hydra, overrides, _typed(self.config)) from error
        return composed(raw)

    def _from_base(self, overrides: Sequence[str]) -> tuple[DictConfig, DictConfig]:
        parsed = [self._parsed(text) for text in overrides]
        values = [override for override in parsed if self._is_value(override, parsed)]
        rest = tuple(text for text, override in zip(overrides, parsed, strict=True) if override not in values)
        if rest not in self.bases:
            base = self.loader.load_sweep_config(self.config, list(rest))
            with open_dict(base):
                self.bases[rest] = base, base.pop("hydra")
        base, node = self.bases[rest]
        config = deepcopy(base)
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        own = [override for override in parsed if not override.is_hydra_override()]
        node.overrides.task = [override.input_line for override in own]
        named = node.job.config.override_dirname
        node.job.override_dirname = get_overrides_dirname(own, named.exclude_keys, named.item_sep, named.kv_sep)
        return config, node

    def _parsed(self, text: str) -> Override:
        if text not in self.parsed:
            self.parsed[text] = self.parser.parse_overrides([text])[0]
        return self.parsed[text]

    def _is_value(self, override: Override, others: Sequence[Override]) -> bool:
        """Whether it sets the seed, or a value below one of our sections, and nothing that another one touches too."""
        key = override.key_or_group
        section, below, _ = key.partition(".")
        if override.type is not OverrideType.CHANGE or override.package is not None:
            return False
        if section not in SECTIONS or not (below or key == "seed") or isinstance(override.value(), (list, dict)):
            return False
        set_too = [f"{other.key_or_group}." for other in others if other is not override and not self._is_group(other)]
        return not any(f"{key}.".startswith(other) or other.startswith(f"{key}.") for other in set_too)

    def _is_group(self, override: Override) -> bool:
        group = override.key_or_group
        if group not in self.groups:
            self.groups[group] = bool(self.loader.repository.get_group_options(group))
        return self.groups[group]


def recipes_name(hydra: Hydra, config: DictConfig) -> str | None:
    """The recipe's name. Where several are swept over, it is "magnitude+flap", which Hydra reads without quotes; where
    they are very many, the first ones and a hash of all."""
    for text in reversed(_typed(config)):
        if override_parts(text)[0] == "recipe":
            (override,) = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides([text])
            if override.is_discrete_sweep():
                swept = dict.fromkeys(override.sweep_string_iterator())
                name = "+".join(re.sub(r"[^\w.-]+", "-", recipe).strip("-") for recipe in swept)
                if len(name) <= LONGEST_NAME:
                    return name
                return f"{name[:LONGEST_NAME].rpartition('+')[0]}+{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return config.hydra.runtime.choices.get("recipe")
