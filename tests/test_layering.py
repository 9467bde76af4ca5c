"""Imports go one way, and what holds the methods imports torch and nothing else."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pruneexp

PACKAGE = Path(pruneexp.__file__).parent
# A module imports from its own row and the rows before it.
LAYERS = (
    ("progress", "config_files", "file_state", "files", "startup", "hub", "modeling_pruned", "new_keys"),
    ("types",),
    ("evidence",),
    ("criterion", "compensator", "search", "sparsity"),
    ("calibrate", "surgery", "model", "dataset", "evaluator", "tracker", "embedded", "report", "cache", "resume"),
    ("budget", "scoring", "prune", "rounds", "recovery"),
    ("delivery", "forecast", "bos_probe"),
    ("preflight",),
    ("experiment",),
    (
        "explain",
        "coerce",
        "bos",
        "targets",
        "compose",
        "build",
        "jobs",
        "multirun",
        "cli_help",
        "summary",
        "sweep_end",
        "console",
        "ending",
        "export",
        "published",
        "pages",
    ),
    ("__main__",),
)
RANK = {module: rank for rank, row in enumerate(LAYERS) for module in row}
CORE = ("types", "evidence", "criterion", "compensator", "search", "sparsity")
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """The part of the package that a file belongs to: its first name below `pruneexp`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything a module imports when it runs, here or inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            # `from pruneexp import types` imports pruneexp.types.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported(node)


def own_imports(path: Path) -> set[str]:
    names = [name.split(".") for name in imported(ast.parse(path.read_text()))]
    return {parts[1] for parts in names if parts[0] == "pruneexp" and len(parts) > 1 and parts[1] in RANK}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    module = module_of(path)
    if module == "__init__":
        assert not own_imports(path)
        return
    assert module in RANK, f"say in LAYERS where {module} lies"
    backwards = {name for name in own_imports(path) if RANK[name] > RANK[module]}
    assert not backwards, f"{module} imports {backwards}, which come after it"


@pytest.mark.parametrize("path", [path for path in FILES if module_of(path) in CORE], ids=lambda path: path.name)
def test_methods_import_torch_and_nothing_else(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
    assert roots <= {"pruneexp", "torch", *sys.stdlib_module_names}
    assert own_imports(path) <= set(CORE)


def test_hydra_stops_before_the_experiment() -> None:
    left = [path for path in FILES if RANK.get(module_of(path), 0) <= RANK["experiment"]]
    for path in left:
        names = set(imported(ast.parse(path.read_text())))
        assert not [name for name in names if name.split(".")[0] == "hydra" or "DictConfig" in name], path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    limit = 850 if path.name == "modeling_pruned.py" else 400  # one file by nature: it travels beside checkpoints
    assert len(path.read_text().splitlines()) <= limit, "split it into a package that re-exports the same names"
