"""Hydra's part: the command line's overrides to a composed config of plain containers.

Composing happens here, inside our own handler, before Hydra gets to print anything: what goes wrong is a ConfigError of
one line. No DictConfig leaves this module and `multirun`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import version as hydra_version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from pruneexp.cli.coerce import takes_list, takes_text
from pruneexp.cli.explain import explained, known_keys, missing_key
from pruneexp.cli.sources import check_typed, expand_sources
from pruneexp.cli.targets import located, signature
from pruneexp.conf_files import YamlLoader, conf_folder, override_parts, sweep_files, typed_keys
from pruneexp.dataset.bos import resolved
from pruneexp.fingerprint import ASKED
from pruneexp.types import ConfigError, one_line

CONFIG_NAME = "config"
SECTIONS = ("model", "dataset", "augmentation", "criterion", "sparsity", "search", "compensator", "recovery")
SECTIONS += ("quantise", "evaluator", "tracker", "cache", "seed", "run", "sweep")
SWEEP_KEYS = ("sweep.dir", "sweep.objective")


@dataclass(frozen=True)
class Composed:
    """A run's config, resolved, in plain containers.

    `job`: `recipe` ("custom" without one), `sweep` (name or None), `overrides` as typed, `choices` (of each group; of
    evaluators a list).
    `folders`: where config files were looked for, first wins.
    """

    config: dict[str, Any]
    job: dict[str, Any]
    folders: tuple[Path, ...]


def open_hydra(config_dir: str | None = None) -> Hydra:
    """Hydra with our config folder and, after it, the user's. Raises ConfigError where that is no folder."""
    search_path = create_config_search_path(str(conf_folder()))
    if config_dir is not None:
        if not os.path.isdir(config_dir):
            raise ConfigError(f"--config-dir {config_dir}: no such folder; expected one with configs of your own")
        _require_own_names(Path(config_dir))
        path = f"file://{os.path.abspath(config_dir)}"
        search_path.prepend("command-line", path, SearchPathQuery(provider="schema"))
    # The group is called `sweep` and its folder `sweeps/`, so Hydra is handed the files instead of finding them.
    for path in sweep_files().values():
        node = _sweep_node(path, path.stat().st_mtime_ns)
        ConfigStore.instance().repo.setdefault("sweep", {})[node.name] = node
    hydra_version.setbase("1.3")
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("pruneexp", search_path)
    loader = cast(ConfigLoaderImpl, hydra.config_loader)
    loader.repository = ConfigFiles(loader.repository)
    return hydra


def _require_own_names(config_dir: Path) -> None:
    """Raises ConfigError where a file there has the name of another one of ours, which would be read in its stead."""
    for path in sorted(config_dir.glob("*/*.yaml")):
        ours = conf_folder() / path.relative_to(config_dir)
        if ours.is_file() and ours.read_bytes() != path.read_bytes():
            taken = f"{path.parent.name}={path.stem} is a choice that comes with pruneexp"
            raise ConfigError(f"--config-dir {config_dir}: {taken}; expected another name than {path.name}")


@cache
def _sweep_node(path: Path, modified: int) -> ConfigNode:
    """A sweep's file as Hydra's store holds it. Reading all of them took a third of the time of composing a run."""
    try:
        node = OmegaConf.create(yaml.load(path.read_text(), YamlLoader) or {})
    except Exception as error:
        raise ConfigError(f"sweeps/{path.name}: not YAML: {one_line(error)}") from error
    return ConfigNode(name=path.name, node=node, group="sweep", package="_global_", provider="sweeps")


class ConfigFiles(ConfigRepository):
    """Config files where Hydra looks for them, each read once: it reads all of them again for every config.

    A copy has the same sources: Hydra copies them, with all files in its store, for every config.
    """

    def __init__(self, repository: ConfigRepository):
        self.sources = repository.sources
        self.read: dict[str, ConfigResult | None] = {}

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        self.read = {}

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self.read:
            self.read[config_path] = super().load_config(config_path)
        return deepcopy(self.read[config_path])

    def __deepcopy__(self, memo: dict) -> ConfigFiles:
        return copy(self)


def compose(overrides: Sequence[str], config_dir: str | None = None) -> Composed:
    """The config of a single run. Raises ConfigError."""
    return composed(compose_raw(open_hydra(config_dir), overrides, RunMode.RUN))


def compose_raw(hydra: Hydra, overrides: Sequence[str], mode: RunMode) -> DictConfig:
    """The config as Hydra composes it, with the `hydra` node. Comma lists are mistakes, except in a multirun."""
    try:
        config = hydra.compose_config(
            CONFIG_NAME, list(overrides), mode, with_log_configuration=False, validate_sweep_overrides=False
        )
        if mode == RunMode.RUN and config.hydra.mode != RunMode.MULTIRUN:
            parsed = OverridesParser.create().parse_overrides(list(overrides))
            if swept := [str(override.input_line) for override in parsed if override.is_sweep_override()]:
                raise ConfigError(f"{swept[0]}: several values need --multirun{_as_one(config, swept[0])}")
    except Exception as error:
        raise explained(error, hydra, overrides) from error
    return config


def _as_one(config: DictConfig, override: str) -> str:
    """How several values are written as a single one, where the key takes that."""
    key, _, value = override.partition("=")
    name = key.lstrip("+")
    written_out = name in ("evaluator", "dataset.sources") or isinstance(OmegaConf.select(config, name), ListConfig)
    if written_out or takes_list(_annotation(config, name)):
        return f"; a list is written {key}=[{value}]"
    quoted = f"{key}='{value}'"
    return f'; text is written in quotes, "{quoted}"' if _is_text(config, name) else ""


def composed(config: DictConfig, hydra_node: DictConfig | None = None) -> Composed:
    """The config, resolved, in plain containers. `hydra_node`: for a config that has lost its own. Raises ConfigError
    for missing values, interpolations that lead nowhere and top-level keys that nothing reads."""
    node = config.hydra if hydra_node is None else hydra_node
    folders, job = _folders(node), _job(node)
    plain = config
    if "hydra" in config or ASKED in config:  # what a config that is passed back was asked says nothing of this one
        plain = OmegaConf.masked_copy(config, [str(key) for key in config if key not in ("hydra", ASKED)])
    known_keys([str(key) for key in plain], SECTIONS)
    _one_choice_each(job["overrides"])
    _as_typed(plain, job["overrides"])
    check_typed(job["overrides"])
    expand_sources(plain, folders)
    # Before anything is resolved: OmegaConf blames the interpolation that leads to a missing value, not the value.
    unresolved = OmegaConf.to_container(plain, resolve=False)
    for key in _missing(unresolved):
        raise missing_key(key, job["choices"], folders)
    if "${hydra:" in str(unresolved):
        HydraConfig.instance().set_config(OmegaConf.create({"hydra": node}))
    try:
        container = cast(dict[str, Any], OmegaConf.to_container(plain, resolve=True, throw_on_missing=True))
    except Exception as error:
        raise explained(error, None, job["overrides"]) from error
    for section in ("run", "sweep"):
        if not isinstance(container.get(section), dict):
            raise ConfigError(f"{section}={container.get(section)!r}: expected its keys, as {section}.dir=...")
    if "hydra" in container["sweep"]:
        raise ConfigError(f"sweep={job['sweep']}: expected '# @package _global_' as the first line of the sweep's file")
    known_keys([f"sweep.{key}" for key in container["sweep"]], SWEEP_KEYS)
    if isinstance(container.get("evaluator"), dict) and "_target_" in container["evaluator"]:
        expected = "expected '# @package evaluator.NAME' as the first line of the evaluator's file"
        raise ConfigError(f"evaluator._target_={container['evaluator']['_target_']!r}: {expected}")
    choices = {**job["choices"], "evaluator": list(container.get("evaluator") or ())}  # Hydra leaves lists out
    return Composed(resolved(container), {**job, "choices": choices}, folders)


def unswept(config: DictConfig, overrides: Sequence[str]) -> Composed:
    """What all jobs of a multirun have, unresolved. `overrides`: of them all, with what is swept over."""
    node = OmegaConf.create({str(key): value for key, value in config.items() if key != "hydra"})
    job = {**_job(config.hydra), "overrides": list(overrides)}
    return Composed(cast(dict[str, Any], OmegaConf.to_container(node, resolve=False)), job, _folders(config.hydra))


def check_dataset(hydra: Hydra, run: Composed) -> None:
    """Raises ConfigError where a model that is not embedded would be calibrated on the embedded language, and neither
    an override nor a file (of a sweep, a recipe or the like) chose that."""
    model, path = run.job["choices"].get("model"), (run.config.get("model") or {}).get("path")
    if run.job["choices"].get("dataset") != "embedded" or str(path).startswith("embedded:"):
        return
    typed = tuple(text for text in run.job["overrides"] if not re.match(r"seed=|[^=]*\.", text))
    if "dataset" not in typed_keys(typed) and not _dataset_chosen(hydra, typed):
        raise ConfigError(
            f"dataset=embedded: a default that suits the embedded models alone, not model={model}; expected a choice, "
            "dataset=wikitext2, or dataset=text dataset.calibration=FILE dataset.evaluation=FILE (dataset=embedded, "
            "typed, if it is meant)"
        )


@lru_cache(maxsize=4)  # a sweep's jobs mostly differ in values
def _dataset_chosen(hydra: Hydra, overrides: tuple[str, ...]) -> bool:
    """Whether the overrides, or a file that they name, choose a dataset, or write one out, as a finished run's
    config.yaml does."""
    loader = ConfigLoaderImpl(hydra.config_loader.get_search_path())
    defaults = loader.compute_defaults_list(CONFIG_NAME, list(overrides), RunMode.RUN)
    if defaults.overrides.override_choices.get("dataset") is not None:
        return True
    named = [default.config_path for default in defaults.defaults if default.package == "" and not default.is_self]
    files = [loader.repository.load_config(path) for path in named if path is not None]
    return any(OmegaConf.select(file.config, "dataset._target_") is not None for file in files if file is not None)


def _one_choice_each(overrides: Sequence[str]) -> None:
    """Raises ConfigError for a list where one choice is expected; Hydra would merge its choices."""
    for text in overrides:
        key, value = override_parts(text)
        if value.startswith("[") and key in (*SECTIONS, "recipe") and key != "evaluator":
            several = f"several are swept over as {key}={value.strip('[]')} with --multirun"
            raise ConfigError(f"{text}: expected one choice ({several}); evaluator is the only group that takes a list")


def _missing(node: Any, key: str = "") -> Iterator[str]:
    if isinstance(node, str) and node == "???":
        yield key
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in children:
        yield from _missing(value, f"{key}.{name}" if key else str(name))


def quoted(config: DictConfig, text: str) -> str:
    """An override, swept over or not, with quotes around what `_as_typed` would have to set back."""
    key, equals, value = text.partition("=")
    number = r"(?<![\w.'\"+-])([+-]?\d+(?:_\d+)+|\+\d+)(?![\w.'\"])"
    if not re.search(number, value) or not _is_text(config, key.lstrip("+")):
        return text
    return key + equals + re.sub(number, r"'\1'", value)


def _as_typed(config: DictConfig, overrides: Sequence[str]) -> None:
    """Sets back what was typed where text is asked for and Hydra has made a whole number of it: 1_000, +5."""
    for text in overrides:
        key, value = override_parts(text)
        deleted = text.startswith("~")
        if not deleted and re.fullmatch(r"[+-]?\d+(_\d+)+|\+\d+", value) and _is_text(config, key):
            OmegaConf.update(config, key, value)


def _is_text(config: DictConfig, key: str) -> bool:
    if key in ("run.dir", "run.name", "sweep.dir"):
        return True
    return takes_text(_annotation(config, key))


def _annotation(config: DictConfig, key: str) -> Any:
    """Of a key of a part; None where it is not known."""
    parent, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(config, parent)
        return signature(located(node["_target_"], parent))[1].get(name)
    except (ConfigError, KeyError, TypeError):
        return None  # building the part says what is wrong with it


def _folders(hydra_node: DictConfig) -> tuple[Path, ...]:
    return tuple(Path(source.path) for source in hydra_node.runtime.config_sources if source.schema == "file")


def _job(hydra_node: DictConfig) -> dict[str, Any]:
    choices = cast(dict[str, Any], OmegaConf.to_container(hydra_node.runtime.choices))
    own = {group: choice for group, choice in choices.items() if not group.startswith("hydra")}
    overrides = OmegaConf.to_container(hydra_node.overrides.task)
    return {"recipe": own.get("recipe") or "custom", "sweep": own.get("sweep"), "overrides": overrides, "choices": own}
