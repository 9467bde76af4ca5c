"""Sources of `dataset=mixed`, as they are typed, to nodes that say all: {weight: 1, dataset: {_target_: ...}}."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from pruneexp.cli.targets import located
from pruneexp.conf_files import did_you_mean, option_content, option_file, override_parts
from pruneexp.dataset.document_files import holds_documents
from pruneexp.types import ConfigError

MIXED = "pruneexp.dataset.Mixed"
OF_ALL = ("samples", "length", "bos")  # of a mixture's sources alike
SHARED = (*OF_ALL, "seed", "sampling", "name")  # what a source takes from the mixture; `name` is its key
FORMS = "a weight, a file, or settings, {weight: 1, calibration: FILE, evaluation: FILE}"


def expand_sources(config: DictConfig, folders: Sequence[Path]) -> None:
    """Writes out the sources of every mixture in a config that is not resolved yet. Raises ConfigError."""
    for key, node in _mixtures(config):
        sources = OmegaConf.to_container(node, resolve=False)["sources"]  # type: ignore[index,call-overload]
        if isinstance(sources, list):
            sources = _by_name(sources, key)
        if sources is None or isinstance(sources, str) and sources.startswith("${"):
            continue
        if not isinstance(sources, Mapping):
            raise ConfigError(f"{key}={sources!r}: expected names with weights, as in {key}='{{wikitext2: 1, c4: 1}}'")
        nodes = {str(name): _expanded(str(name), each, f"{key}.{name}", folders) for name, each in sources.items()}
        _check_repeated(nodes, key)
        with open_dict(node):
            node.sources = nodes


def check_typed(overrides: Sequence[str]) -> None:
    """Raises ConfigError for a name that is typed twice, of which Hydra would take the last."""
    for text in overrides:
        key, value = override_parts(text)
        if not key.endswith("dataset.sources") or not value.startswith("{"):
            continue
        flat = value[1:-1]
        while (shorter := re.sub(r"\{[^{}]*\}|\[[^][]*\]|'[^']*'|\"[^\"]*\"", "", flat)) != flat:
            flat = shorter
        names = re.findall(r"(?:^|,)\s*([^\s:,]+)\s*:", flat)
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ConfigError(f"{text}: {name} is repeated; expected each source once, with a weight")


def with_shared(settings: Mapping[str, Any], key: str) -> Any:
    """The sources of a mixture's settings, each node with what it takes from the mixture. Raises ConfigError."""
    if not isinstance(settings.get("sources"), Mapping):
        return settings.get("sources")
    sources = {}
    for name, each in settings["sources"].items():
        node = each.get("dataset") if isinstance(each, Mapping) else None
        if not isinstance(node, Mapping):
            raise ConfigError(f"{key}.{name}={each!r}: expected {FORMS}")
        takes = inspect.signature(located(node.get("_target_"), f"{key}.{name}._target_")).parameters
        own: dict[str, Any] = {k: settings[k] for k in SHARED if k in settings} | {"name": name}
        if "samples" not in takes:
            own |= {"bos": False}  # windows that are used as they are
        sources[name] = {**each, "dataset": {k: v for k, v in own.items() if k in takes} | dict(node)}
    return sources


def _mixtures(config: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """The key of its sources, and the node: the run's dataset, and those of evaluators."""
    places = ["dataset", *(f"evaluator.{name}.dataset" for name in config.get("evaluator") or ())]
    for place in places:
        parent, _, last = place.rpartition(".")
        holder = OmegaConf.select(config, parent) if parent else config
        if isinstance(holder, DictConfig) and last in holder and not OmegaConf.is_interpolation(holder, last):
            node = holder[last]
            if isinstance(node, DictConfig) and node.get("_target_") == MIXED and "sources" in node:
                yield f"{place}.sources", node


def _by_name(sources: list[Any], key: str) -> dict[str, Any]:
    """[wikitext2, c4]: of weight 1 each."""
    for number, name in enumerate(sources):
        if not isinstance(name, str):
            raise ConfigError(f"{key}={sources!r}: expected names in a list, or names with {FORMS}")
        if name in sources[:number]:
            raise ConfigError(f"{key}={sources!r}: {name} is repeated; expected each source once, with a weight")
    return dict.fromkeys(sources, 1)


def _expanded(name: str, each: Any, key: str, folders: Sequence[Path]) -> dict[str, Any]:
    """One source's node, of what was typed. Raises ConfigError."""
    if isinstance(each, (int, float)) and not isinstance(each, bool):
        each = {"weight": each}
    elif isinstance(each, str):
        each = {"calibration": each}
    elif not isinstance(each, Mapping):
        raise ConfigError(f"{key}={each!r}: expected {FORMS}")
    settings = {k: v for k, v in each.items() if k not in ("weight", "dataset")}
    chosen, weight = each.get("dataset"), each.get("weight", 1)
    if isinstance(chosen, Mapping):  # written out already
        return {"weight": weight, "dataset": {**chosen, **settings}}
    for mine in OF_ALL:
        if mine in settings:
            raise ConfigError(f"{key}.{mine}={settings[mine]!r}: all sources have the mixture's, dataset.{mine}")
    choice = str(chosen or _choice_for(settings) or name)
    path = option_file(folders, "dataset", choice)
    if path is None or choice == "mixed":
        known = sorted({file.stem for folder in folders for file in (folder / "dataset").glob("*.yaml")} - {"mixed"})
        near = did_you_mean(choice, known)
        files = "calibration=FILE in its settings for files of your own"
        raise ConfigError(f"{key}: {choice} is no dataset; expected one of {', '.join(known)}, or {files}{near}")
    node = {k: v for k, v in option_content(path).items() if k not in SHARED}
    return {"weight": weight, "dataset": {**node, **settings}}


def _choice_for(settings: Mapping[str, Any]) -> str | None:
    """The dataset that reads files of this kind."""
    given = settings.get("calibration") or settings.get("evaluation")
    if given is None:
        return None
    if isinstance(given, list) or holds_documents(str(given)):
        return "documents"
    return "tokens" if str(given).endswith(".npy") else "text"


def _check_repeated(nodes: Mapping[str, Any], key: str) -> None:
    """Raises ConfigError where two sources calibrate on the same text; those of weight 0 do not."""
    seen: dict[str, str] = {}
    for name, node in nodes.items():
        if node["weight"] == 0:
            continue
        said = {k: v for k, v in node["dataset"].items() if "evaluation" not in k and k not in SHARED}
        if files := said.get("calibration"):
            files = files if isinstance(files, list) else [files]
            said["calibration"] = [os.path.realpath(os.path.expanduser(str(file))) for file in files]
        same = seen.setdefault(repr(sorted(said.items())), name)
        if same != name:
            raise ConfigError(f"{key}.{name}: the same text as {key}.{same}; expected each source once, with a weight")
