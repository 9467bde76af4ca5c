"""Imports go down only: no circle between files, a rank for every entry, and torch alone under the methods."""

from __future__ import annotations

import ast
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pruneexp

PACKAGE = Path(pruneexp.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ENTRIES = 28  # modules and packages of pruneexp/, at most
LONGEST = 9  # imports in a row from entry to entry, at most
METHODS = ("criterion", "compensator", "search", "sparsity", "evidence")  # torch and nothing else
MANY_PARAMETERS = {  # functions of more than seven
    "pruneexp.api.prune",  # the door: all but the first three have defaults
    "pruneexp.dataset.files.text",  # named by a YAML file, whose keys they are
    "pruneexp.dataset.document_files.documents",  # as `text`
}
CHOSEN = {"cache", "compensator", "criterion", "evaluator", "quantise", "recovery", "search", "sparsity", "tracker"}
ASKED_FOR = {  # by isinstance, outside of their packages
    ("pruneexp.experiment.identity", "pruneexp.cache.NoCache"),  # a cache has no protocol, and it is one question
    ("pruneexp.export.gguf_quantise", "pruneexp.evaluator.Latency"),  # llama.cpp takes its settings, all of them
}
LINES = {"modeling_pruned.py": 850}  # one file by nature: it travels beside checkpoints
DOOR = ("run", "prune", "apply")  # a module of that name would take the function's place


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, when it runs, inside functions, or for type checkers alone."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def file_graph() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports."""
    modules = {dotted(path) for path in FILES}

    def module_of(name: str) -> str:
        while name not in modules:
            name = name.rpartition(".")[0]
        return name

    graph = {}
    for path in FILES:
        own = {module_of(name) for name in imported(path) if name.split(".")[0] == "pruneexp"}
        graph[dotted(path)] = own - {dotted(path)}
    return graph


def entry_of(module: str) -> str:
    return module.split(".")[1]


@cache
def entry_graph() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for module, own in file_graph().items():
        if module != "pruneexp":
            graph.setdefault(entry_of(module), set()).update(entry_of(name) for name in own)
    return {entry: own - {entry} for entry, own in graph.items()}


@cache
def ranks() -> dict[str, int]:
    """Entry -> one more than the highest rank among those that it imports."""
    rank_of: dict[str, int] = {}
    for entry in TopologicalSorter(entry_graph()).static_order():
        rank_of[entry] = 1 + max((rank_of[own] for own in entry_graph()[entry]), default=0)
    return rank_of


def test_no_circle_between_files() -> None:
    assert len(list(TopologicalSorter(file_graph()).static_order())) == len(FILES)  # raises CycleError


def test_entries_have_ranks() -> None:
    for rank in sorted(set(ranks().values())):
        print(rank, *sorted(entry for entry, own in ranks().items() if own == rank))
    assert len(ranks()) <= ENTRIES
    assert max(ranks().values()) <= LONGEST


def test_methods_import_torch_and_nothing_else() -> None:
    for path in FILES:
        if entry_of(dotted(path) + ".") not in METHODS:
            continue
        names = imported(path)
        assert {name.split(".")[0] for name in names} <= {"pruneexp", "torch", *sys.stdlib_module_names}, path
        own = {name.split(".")[1] for name in names if name.startswith("pruneexp.")}
        assert own <= {*METHODS, "types"}, path
        assert "compensator" not in own or "compensator" in path.parts, f"{path}: a criterion needs no compensator"


def test_a_forecast_knows_no_method() -> None:
    """What one costs it says itself."""
    for path in (PACKAGE / "experiment" / "forecast").glob("*.py"):
        own = {name for name in imported(path) if name.startswith("pruneexp.") and name.split(".")[1] in METHODS}
        assert own <= {"pruneexp.criterion.spill.spill_folder"}, path


def test_a_methods_class_is_asked_for_in_its_package_alone() -> None:
    """Elsewhere its protocol says what it does."""
    checks = set()
    for path in FILES:
        homes = {name.rpartition(".")[2]: name for name in imported(path) if name.startswith("pruneexp.")}
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                kinds = [own.id for own in ast.walk(node.args[1]) if isinstance(own, ast.Name)]
                checks |= {(dotted(path), homes[kind]) for kind in kinds if kind in homes}
    elsewhere = {(path, kind) for path, kind in checks if entry_of(path + ".") != entry_of(kind) in CHOSEN}
    assert elsewhere <= ASKED_FOR, elsewhere - ASKED_FOR


def test_hydra_stops_at_the_command_line() -> None:
    for path in FILES:
        if entry_of(dotted(path) + ".") not in ("cli", "api", "__main__"):
            assert not [n for n in imported(path) if n.split(".")[0] == "hydra" or n.endswith(".DictConfig")], path


def test_no_module_bears_the_name_of_a_function_of_the_door() -> None:
    assert not {path.stem for path in PACKAGE.iterdir()} & set(DOOR)


def test_files_stay_readable() -> None:
    long = {dotted(path): len(path.read_text().splitlines()) for path in FILES if path.name not in LINES}
    assert max(long.values()) <= 300, f"{max(long, key=long.__getitem__)}: split it into a package of the same name"
    run = PACKAGE / "experiment" / "run.py"
    assert len(run.read_text().splitlines()) <= 150, "the steps of a run have files of their own"
    functions = [
        (node.end_lineno - node.lineno + 1, f"{dotted(path)}.{node.name}")
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    assert max(functions)[0] <= 60, max(functions)


def test_functions_take_few_parameters() -> None:
    many = {
        f"{dotted(path)}.{node.name}"
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and len(parameters(node)) > 7
    }
    assert many <= MANY_PARAMETERS, many - MANY_PARAMETERS


def parameters(function: ast.FunctionDef) -> list[str]:
    """Without self and cls."""
    own = function.args
    return [each.arg for each in (*own.posonlyargs, *own.args, *own.kwonlyargs) if each.arg not in ("self", "cls")]
