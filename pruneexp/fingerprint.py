"""What says that two things are the same: files, configs, code, runs. Every hash is made here."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any

__version__ = "0.1.0"  # of this package
ASKED = "asked"  # top-level key of a config: what each `bos` was before it was resolved
NOT_HASHED = ("run", "sweep", "cache", "tracker", "hydra", ASKED)  # where a run goes and is reported, not what it does
PERPLEXITY = "pruneexp.evaluator.Perplexity"
GGUF = "/gguf-"  # between a figure's name and the type of the file that llama.cpp measured it on
NOTES_VERSION = 2  # of what a streamed run notes of how far it has come
ROOT = Path(__file__).parent
STATISTICS = (  # what gives scores and statistics, and what is made of them
    "pruneexp.calibrate",
    "pruneexp.criterion",
    "pruneexp.compensator",
    "pruneexp.pruning.dense_evidence",
)

FileState = tuple[str, int, int, int]


def file_state(path: Path) -> FileState:
    """Absolute path, inode, size and time of the last change (ns): a key for what was read from the file. Raises
    OSError."""
    found = path.stat()
    return str(path.absolute()), found.st_ino, found.st_size, found.st_mtime_ns


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

    def node(key: str, found: Any) -> Any:
        if not isinstance(found, Mapping):
            return found
        own = {"bos": values[key]} if key in values else {}
        inner = {"dataset": node(f"{key}.dataset", found["dataset"])} if "dataset" in found else {}
        return {**found, **own, **inner}

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
    asked, values = config.get(ASKED, {}), {}
    for key, node in bos_nodes(config):
        if is_inner(key) and "bos" in node:
            values[key] = False
        elif node.get("_target_") == PERPLEXITY and node.get("bos") is True and f"{key}.bos" in asked:
            values[key] = "counted"
    return with_bos(config, values)


def comparable(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's metrics by names that compare.

    Configs without `asked` come from versions whose "+bos" windows of T tokens had the token besides: they become
    windows of T+1. In a run that quantises, what was measured on the unquantised pruned model becomes "unquantised/..."
    in place of "pruned/...": with GGUF files all that transformers measured, with rounded weights the speed, unless
    torchao's kernels ran."""
    quantise, before = config.get("quantise") or {}, None
    if any(GGUF in key for key in metrics):
        before = rf"pruned/(?!params|macs|kv_bytes|.*{GGUF})"
    elif "kernels" in quantise and not (
        quantise["kernels"] and quantise.get("bits") == 8 and not quantise.get("group")
    ):
        before = "pruned/latency/"
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


def differing(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose value is not the same in all settings; empty settings are passed over. An absent key that came later
    counts as the value that means what was done before."""
    known = [setting for setting in found if setting]
    keys = dict.fromkeys(key for setting in known for key in setting)
    before = {key: value_before(key) for key in keys}
    return [key for key in keys if len({str(setting.get(key, before[key])) for setting in known}) > 1]


# Code

_LONG = r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
_STRING = _LONG + "|" + _LONG.replace('"', "'") + r"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'"""
_PIECE = re.compile(rf"(?:\A|(?<=:\n))\s*[rR]?{_LONG}|({_STRING})|#[^\n]*", re.DOTALL)  # docstring, string, comment
_NO_CODE = re.compile("__(module|dict|weakref|doc|firstlineno|static_attributes|dataclass.*)__$")  # members
_IMPORT = re.compile(r"^[ \t]*(?:from (pruneexp[\w.]*) import (\([^)]*\)|.*)|import (pruneexp[\w.]*))", re.MULTILINE)


@cache
def code_version(*more: str) -> str:
    """16 hex digits over the code that gives an answer, without comments and docstrings: `STATISTICS`, the modules or
    packages `more`, all of ours that these import, and the versions of torch and transformers."""
    used = _versions()
    digest = hashlib.sha256(f"torch {used['torch']} transformers {used['transformers']}".encode())
    for name in sorted(import_closure(*STATISTICS, *more)):
        digest.update(f"{name} {_code(name)[0]}".encode())
    return digest.hexdigest()[:16]


def import_closure(*names: str) -> set[str]:
    """Dotted names of these modules of ours (of packages, all in them) and of all of ours that they import, at any
    depth."""
    files = (path.relative_to(ROOT.parent).with_suffix("") for path in ROOT.rglob("*.py"))
    modules = {".".join(file.parts).removesuffix(".__init__") for file in files} - {"pruneexp"}
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        while name not in modules and name:  # of what is imported from a module, the module
            name = name.rpartition(".")[0]
        if not name or name in found:
            continue
        found.add(name)
        waiting += _code(name)[1]
        waiting += [each for each in modules if each.rpartition(".")[0] == name]
    return found


@cache
def _code(name: str) -> tuple[str, frozenset[str]]:
    """Of one of our modules, a hash of its code without comments, docstrings and empty lines, and the dotted names of
    ours that it imports. Both are found by patterns: syntax trees of all modules would take half a second."""
    text = _PIECE.sub(lambda piece: piece[1] or "", _file(name).read_text(encoding="utf-8"))
    imported: set[str] = set()
    for module, listed, alone in _IMPORT.findall(text):
        own = (each.split()[0] for each in listed.strip("()").split(",") if each.strip())
        imported |= {f"{module}.{each}" for each in own} if module else {alone}
    lines = "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
    return hashlib.sha256(lines.encode()).hexdigest(), frozenset(imported)


def _file(name: str) -> Path:
    path = ROOT / Path(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def version_of(part: object) -> str:
    """What identifies a method or a type of evidence: its class, its settings and, where it is not ours, a hash of its
    module's file or, without one (in a notebook), of its code. Our own code is in `code_version`."""
    kind = part if isinstance(part, type) else type(part)
    name, source = kind.__module__, ""
    if not name.startswith("pruneexp."):
        file = getattr(sys.modules.get(name), "__file__", None) or ""
        read = Path(file).read_bytes() if Path(file).is_file() else "\n".join(_written(kind, name, set())).encode()
        source = hashlib.sha256(read).hexdigest()[:16]
    return f"{name}.{kind.__qualname__} {'' if part is kind else repr(part)} {source}"


def _written(thing: Any, home: str, seen: set[int]) -> Iterator[str]:
    """Bytecode and values of a thing of the module `home` and of all that it names there, on whatever lines."""
    parts: Sequence[Any] = ()
    if isinstance(thing, (type, FunctionType)):
        yield f"{thing.__module__}.{thing.__qualname__}"
        if thing.__module__ != home or id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, type):
            parts = (*thing.__bases__, {name: each for name, each in vars(thing).items() if not _NO_CODE.match(name)})
        else:
            cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != CellType()]
            parts = (thing.__code__, thing.__defaults__, thing.__kwdefaults__, cells)
    elif isinstance(thing, CodeType):
        yield f"{thing.co_code.hex()} {thing.co_names}"
        named = getattr(sys.modules.get(home), "__dict__", {})
        parts = (*thing.co_consts, *(named[name] for name in thing.co_names if name in named))
    elif isinstance(thing, (staticmethod, classmethod, property)):
        parts = (thing.fget if isinstance(thing, property) else thing.__func__,)
    elif isinstance(thing, (tuple, list, dict)):
        parts = (*thing, *thing.values()) if isinstance(thing, dict) else thing
    else:
        shown: Any = thing.tolist() if hasattr(thing, "tolist") else thing  # an array is printed in part
        shown = sorted(map(repr, thing)) if isinstance(thing, (set, frozenset)) else shown
        yield re.sub(r" at 0x[0-9a-f]+", "", repr(shown))
    for each in parts:
        yield from _written(each, home, seen)


# Runs


def identity(**what: Any) -> str:
    """One hash over `what` a run's results depend on and the versions of what computes them."""
    text = json.dumps({"version": NOTES_VERSION, **_versions(), **what}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"pruneexp": __version__, **{name: version(name) for name in ("torch", "transformers")}}
