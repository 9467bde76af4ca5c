"""What decides an answer is in its key; what only says something about the code is not."""

from __future__ import annotations

import ast
import io
import shutil
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from pruneexp import fingerprint
from pruneexp.criterion import Flap
from pruneexp.fingerprint import code
from tests.test_layering import file_graph


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package's code in another place, to be edited there."""
    root = tmp_path / "pruneexp"
    shutil.copytree(code.ROOT, root, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    monkeypatch.setattr(code, "ROOT", root)
    forget()
    yield root
    forget()


def forget() -> None:
    fingerprint.code_version.cache_clear()
    code._code.cache_clear()


def closure() -> set[str]:
    """By the graph that the layering test sorts."""
    graph, reachable = file_graph(), set()
    waiting = [name for name in graph if name.startswith(fingerprint.STATISTICS)]
    while waiting:
        name = waiting.pop()
        if name not in reachable:
            reachable.add(name)
            waiting += graph[name]
    return reachable


@pytest.mark.slow
def test_every_file_that_decides_changes_the_key(copied: Path) -> None:
    names = closure()
    assert {"pruneexp.evidence.solve", "pruneexp.surgery.mask", "pruneexp.model.sites"} <= names
    assert names <= fingerprint.import_closure(*fingerprint.STATISTICS)
    before = fingerprint.code_version()
    hashes = {name: code._code(name)[0] for name in names}
    for name in sorted(names):
        file = code._file(name)
        file.write_text(file.read_text() + "\nEDITED = 1\n")
        assert code._code.__wrapped__(name)[0] != hashes[name], name
        if name in ("pruneexp.evidence.solve", "pruneexp.surgery.mask"):  # each alone: of the rest it is the same sum
            forget()
            now, before = before, fingerprint.code_version()
            assert now != before, name


def test_docstrings_comments_and_other_files_do_not(copied: Path) -> None:
    before = fingerprint.code_version()
    solve = copied / "evidence" / "solve.py"
    text = solve.read_text()
    said = text.replace('"""Lower factor', '"""The lower factor').replace("# ", "# so: ") + "\n# the end\n"
    assert said.count("so: ") and said != text
    for file, content in ((solve, said), (copied / "report" / "page.py", "BROKEN = 1\n")):
        file.write_text(content)
        forget()
        assert fingerprint.code_version() == before, file
    broken = text.replace("> 1e-14 * scale", "> 1e-13 * scale")
    assert broken != text
    solve.write_text(broken)
    forget()
    assert fingerprint.code_version() != before


def test_somebody_elses_criterion_goes_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "mine_for_fingerprints.py"
    file.write_text("class Mine:\n    pass\n")
    from mine_for_fingerprints import Mine  # type: ignore[import-not-found]

    before = fingerprint.version_of(Mine)
    file.write_text("class Mine:\n    x = 1\n")
    assert fingerprint.version_of(Mine) != before
    assert fingerprint.version_of(Flap).split() == [f"{Flap.__module__}.Flap"], "ours are in code_version"


MINE = "class Mine(Base):\n    pass\n"


def test_files_that_its_file_imports_are_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "methods_for_fingerprints"
    package.mkdir()
    files = {
        package / "__init__.py": "",
        package / "base.py": "class Base:\n    pass\n",
        package / "mine.py": f"import torch\nimport helper_for_fingerprints\nfrom .base import Base\n{MINE}",
        tmp_path / "helper_for_fingerprints.py": "from constants_for_fingerprints import POWER\n",
        tmp_path / "constants_for_fingerprints.py": "POWER = 2\n",
        tmp_path / "beside_for_fingerprints.py": "POWER = 2\n",
    }
    for file, text in files.items():
        file.write_text(text)
    import beside_for_fingerprints  # type: ignore[import-not-found]  # noqa: F401
    from methods_for_fingerprints.mine import Mine  # type: ignore[import-not-found]

    seen = [fingerprint.version_of(Mine)]
    for file in files:
        file.write_text(f"{file.read_text()}\nEDITED = 1\n")
        changed = fingerprint.version_of(Mine) != seen[-1]
        assert changed == ("beside" not in file.name), file
        seen.append(fingerprint.version_of(Mine))
    files_read = code._own_files("methods_for_fingerprints.mine")
    assert len(files_read) == 5, "none of torch's"


IN_A_NOTEBOOK = """
POWER, NAMES = 2.0, ("a", "b")

def helper(values):
    return [value**POWER for value in values if value not in {"x", "y", "z"}]

class Base:
    def shared(self):
        return 1

@dataclass(frozen=True)
class Mine(Base):
    power: float = 0.5
    names: list = field(default_factory=list)

    def __call__(self, block):
        return {name: helper(block[name]) for name in NAMES}
"""


def test_a_criterion_without_a_file_goes_by_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(text: str, file: str | None) -> str:
        module = ModuleType("notebook")
        module.__dict__.update(dataclass=dataclass, field=field, **({} if file is None else {"__file__": file}))
        monkeypatch.setitem(sys.modules, "notebook", module)
        exec(compile(text, "<cell>", "exec"), module.__dict__)
        return fingerprint.version_of(module.Mine())

    for file in (None, "<stdin>"):  # as in a notebook, and as `python -` has it
        before = version(IN_A_NOTEBOOK, file)
        assert version("# another cell\n\n" + IN_A_NOTEBOOK, file) == before
        for old, new in (("2.0", "3.0"), ('"b"', '"c"'), ("**", "*"), ('"y"', '"w"'), ("return 1", "return 2")):
            assert version(IN_A_NOTEBOOK.replace(old, new), file) != before, old


@pytest.mark.slow
def test_what_is_left_out_is_docstrings_and_comments() -> None:
    for path in sorted(code.ROOT.rglob("*.py")):
        text = path.read_text()
        said = [piece[0] for piece in code._PIECE.finditer(text) if piece[1] is None]
        tree = ast.parse(text)
        documented = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        docs = [doc for node in documented if (doc := ast.get_docstring(node, clean=False)) is not None]
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        assert sorted(each for each in said if each.startswith("#")) == sorted(comments), path
        strings = [ast.literal_eval(each.strip()) for each in said if not each.startswith("#")]
        assert sorted(strings) == sorted(docs), path
