"""What says that two things are the same: files, configs, code, runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pruneexp.fingerprint.code import STATISTICS as STATISTICS
from pruneexp.fingerprint.code import code_version as code_version
from pruneexp.fingerprint.code import import_closure as import_closure
from pruneexp.fingerprint.code import libraries
from pruneexp.fingerprint.code import version_of as version_of

__version__ = "0.1.0"  # of this package
ASKED = "asked"  # top-level key of a config: what each `bos` was before it was resolved
NOT_HASHED = ("run", "sweep", "cache", "tracker", "hydra", ASKED)  # where a run goes and is reported, not what it does
PERPLEXITY = "pruneexp.evaluator.Perplexity"
GGUF = "/gguf-"  # between a figure's name and the type of the file that llama.cpp measured it on
NOTES_VERSION = 3  # of what a streamed run notes of how far it has come

FileState = tuple[str, int, int, int]


def file_state(path: Path) -> FileState:
    """Absolute path, inode, size and time of the last change (ns): a key for what was read from the file. Raises
    OSError."""
    status = path.stat()
    return str(path.absolute()), status.st_ino, status.st_size, status.st_mtime_ns


# Configs

# Patterns of keys that came later, each with the value that means what was done before the key existed. A key with this
# value is left out of the hash, so that finished jobs stay finished.
NEW_KEYS: Mapping[str, Any] = {
    "augmentation": {"_target_": "pruneexp.calibrate.NoAugmentation"},
    "quantise": {"_target_": "pruneexp.quantise.NoQuantise"},
    "dataset.bos": False,
    "evaluator.*.dataset.bos": False,
    **{f"evaluator.{name}.bos": False for name in ("generation", "latency", "questions", "zeroshot")},
    "sparsity.batch": 1,
    "sparsity.phase": "decode",
    "sparsity.table": None,
    "search.alike": False,
    "search.remainder": "nearest",
    "criterion.coupling": "attention",
    "search.starts": [],
    "search.held_out": 0.0,
    "search.objective": "next_token",
}


def came_later(key: str) -> bool:
    """Whether configs of older versions lack the key."""
    return any(fnmatchcase(key, new) for new in NEW_KEYS)


def value_before(key: str) -> Any:
    """Of a key that came later, the value that means what was done before the key existed; None for all others."""
    return next((before for new, before in NEW_KEYS.items() if fnmatchcase(key, new)), None)


def without_new_keys(node: Any, name: str = "") -> Any:
    """The config without the keys of `NEW_KEYS` that change nothing, at every depth."""
    if not isinstance(node, Mapping):
        return node
    dotted = {key: f"{name}.{key}".lstrip(".") for key in node}
    return {
        key: without_new_keys(value, dotted[key])
        for key, value in node.items()
        if not any(fnmatchcase(dotted[key], new) and value == before for new, before in NEW_KEYS.items())
    }


def config_hash(config: Mapping[str, Any]) -> str:
    """12 hex digits that say what a run computes: a hash of its config, but for where it runs and reports."""
    content = {key: value for key, value in as_hashed(config).items() if key not in NOT_HASHED}
    text = json.dumps(without_new_keys(content), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def with_bos(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The config with other values of `bos` in the nodes that `values` names: {"evaluator.ptb.dataset": True, ...}."""

    def node(key: str, part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        own = {"bos": values[key]} if key in values else {}
        inner = {"dataset": node(f"{key}.dataset", part["dataset"])} if "dataset" in part else {}
        return {**part, **own, **inner}

    changed = dict(config)
    if "dataset" in config:
        changed["dataset"] = node("dataset", config["dataset"])
    if isinstance(config.get("evaluator"), Mapping):
        changed["evaluator"] = {name: node(f"evaluator.{name}", each) for name, each in config["evaluator"].items()}
    return changed


def as_hashed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config as it is hashed. The `bos` of an evaluator's dataset is left out, since the evaluator's own
    decides. Perplexities with `bos` are marked where the config has `asked`: without it, their windows were a token
    longer."""
    typed, values = config.get(ASKED, {}), {}
    for key, node in bos_nodes(config):
        if is_inner(key) and "bos" in node:
            values[key] = False
        elif node.get("_target_") == PERPLEXITY and node.get("bos") is True and f"{key}.bos" in typed:
            values[key] = "counted"
    return with_bos(config, values)


def comparable(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's metrics by names that compare.

    Configs without `asked` come from versions whose "+bos" windows of T tokens had the token besides: they become
    windows of T+1. In a run that quantises, what was measured on the unquantised pruned model becomes "unquantised/..."
    in place of "pruned/...": with GGUF files all that transformers measured, with rounded weights the speed, where
    torchao's kernels ran that of the decoder layers alone, which are timed before."""
    quantise, before = config.get("quantise") or {}, None
    if any(GGUF in key for key in metrics):
        before = rf"pruned/(?!params|macs|kv_bytes|.*{GGUF})"
    elif "kernels" in quantise:
        ran = quantise["kernels"] and quantise.get("bits") == 8 and not quantise.get("group")
        before = "pruned/latency/decoder_" if ran else "pruned/latency/"
    named = {}
    for key, value in metrics.items():
        if "+bos" in key and ASKED not in config:  # "...@2048s512+bos" -> "...@2049s512+bos"
            key = re.sub(r"@(\d+)(?=[^@]*$)", lambda length: f"@{int(length[1]) + 1}", key)
        named[key.replace("pruned", "unquantised", 1) if before and re.match(before, key) else key] = value
    return named


def bos_nodes(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The dataset, every evaluator and its own dataset, by their keys."""
    dataset, evaluators = config.get("dataset"), config.get("evaluator")
    if isinstance(dataset, Mapping):
        yield "dataset", dataset
    for name, node in evaluators.items() if isinstance(evaluators, Mapping) else ():
        if isinstance(node, Mapping):
            yield f"evaluator.{name}", node
            if isinstance(node.get("dataset"), Mapping):
                yield f"evaluator.{name}.dataset", node["dataset"]


def is_inner(key: str) -> bool:
    """Whether the node is an evaluator's dataset."""
    return key.startswith("evaluator.") and key.endswith(".dataset")


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config computes, flat: {"sparsity.ratio": 0.2}. A list of plain words is written as one types it,
    "[heads,channels]", any other as JSON."""
    return dict(_flat({key: value for key, value in config.items() if key not in NOT_HASHED}))


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _typed(value) if isinstance(value, list) else value


def _typed(values: list[Any]) -> str:
    plain = all(isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w.-]*", value) for value in values)
    return f"[{','.join(values)}]" if plain else json.dumps(values)


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose value is not the same in all settings; empty settings are passed over. An absent key that came later
    counts as the value that means what was done before."""
    known = [setting for setting in configs if setting]
    keys = dict.fromkeys(key for setting in known for key in setting)
    before = {key: value_before(key) for key in keys}
    return [key for key in keys if len({str(setting.get(key, before[key])) for setting in known}) > 1]


# Runs


def identity(**what: Any) -> str:
    """One hash over `what` a run's results depend on and the versions of what computes them."""
    text = json.dumps(
        {"version": NOTES_VERSION, "pruneexp": __version__, **libraries(), **what}, sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()
