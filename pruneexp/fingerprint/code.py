"""What says that two answers come from the same code: hashes of ours, and of classes that are somebody's own."""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any

ROOT = Path(__file__).parents[1]
STANDARD_LIBRARY = Path(ast.__file__).parent
STATISTICS = (  # what gives scores and statistics, and what is made of them
    "pruneexp.calibrate",
    "pruneexp.criterion",
    "pruneexp.compensator",
    "pruneexp.pruning.dense_evidence",
)

_LONG = r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
_STRING = _LONG + "|" + _LONG.replace('"', "'") + r"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'"""
_PIECE = re.compile(rf"(?:\A|(?<=:\n))\s*[rR]?{_LONG}|({_STRING})|#[^\n]*", re.DOTALL)  # docstring, string, comment
_NO_CODE = re.compile("__(module|dict|weakref|doc|firstlineno|static_attributes|dataclass.*)__$")  # members
_IMPORT = re.compile(r"^[ \t]*(?:from (pruneexp[\w.]*) import (\([^)]*\)|.*)|import (pruneexp[\w.]*))", re.MULTILINE)


@cache
def code_version(*more: str) -> str:
    """16 hex digits over the code that gives an answer, without comments and docstrings: `STATISTICS`, the modules or
    packages `more`, all of ours that these import, and the versions of torch and transformers."""
    used = libraries()
    digest = hashlib.sha256(f"torch {used['torch']} transformers {used['transformers']}".encode())
    for name in sorted(import_closure(*STATISTICS, *more)):
        digest.update(f"{name} {_code(name)[0]}".encode())
    return digest.hexdigest()[:16]


def import_closure(*names: str) -> set[str]:
    """Dotted names of these modules of ours (of packages, all in them) and of all of ours that they import, at any
    depth."""
    files = (path.relative_to(ROOT.parent).with_suffix("") for path in ROOT.rglob("*.py"))
    modules = {".".join(file.parts).removesuffix(".__init__") for file in files} - {"pruneexp"}
    closure: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        while name not in modules and name:  # of what is imported from a module, the module
            name = name.rpartition(".")[0]
        if not name or name in closure:
            continue
        closure.add(name)
        waiting += _code(name)[1]
        waiting += [each for each in modules if each.rpartition(".")[0] == name]
    return closure


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
    module's file and of those of its author's that this imports, at any depth; without a file (in a notebook), of its
    code. Our own code is in `code_version`."""
    kind = part if isinstance(part, type) else type(part)
    name, source = kind.__module__, ""
    if not name.startswith("pruneexp."):
        read = _own_files(name) or ["\n".join(_written(kind, name, set())).encode()]
        source = hashlib.sha256(b"\0".join(read)).hexdigest()[:16]
    return f"{name}.{kind.__qualname__} {'' if part is kind else repr(part)} {source}"


def _own_files(name: str) -> list[bytes]:
    """What the file of a loaded module holds, and the files of all that it imports, at any depth, as far as they are of
    its package or lie where nothing is installed. None of a module without a file."""
    sources: dict[str, bytes] = {}
    waiting = [name]
    while waiting:
        each = waiting.pop()
        file, root = _file_of(each), each.partition(".")[0]
        if each in sources or not file.is_file() or root == "pruneexp":
            continue
        if root == name.partition(".")[0] or not is_installed(file):
            sources[each] = file.read_bytes()
            package = sys.modules[each].__package__ or ""
            waiting += [package, *_imported(sources[each], package)]
    return [sources[each] for each in sorted(sources)]


def _file_of(name: str) -> Path:
    """A loaded module's; "." where it has none."""
    return Path(getattr(sys.modules.get(name), "__file__", None) or "")


def is_installed(file: Path) -> bool:
    """Whether a file is the standard library's or of a package from a registry: its version says what it is."""
    return bool({"site-packages", "dist-packages"} & {*file.parts}) or file.is_relative_to(STANDARD_LIBRARY)


def _imported(text: bytes, package: str) -> Iterator[str]:
    """Dotted names of what a Python file imports, some of them not modules but what is imported from one."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # no Python, or broken since it was loaded
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _written(thing: Any, home: str, seen: set[int]) -> Iterator[str]:
    """Bytecode and values of a thing of the module `home` and of all that it names there, on whatever lines."""
    parts: Sequence[Any] = ()
    if isinstance(thing, (type, FunctionType)):
        yield f"{thing.__module__}.{thing.__qualname__}"
        if thing.__module__ != home:
            origin = thing.__module__ or ""  # None of what was made without a module
            yield from () if is_installed(_file_of(origin)) else map(repr, _own_files(origin))
            return
        if id(thing) in seen:
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


@cache
def libraries() -> dict[str, str]:
    """The versions of those that compute answers."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")}
