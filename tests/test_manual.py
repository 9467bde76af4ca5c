"""The manual agrees with the code, holds together, and the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_class

from pruneexp.conf_files import choices, conf_folder
from pruneexp.export.command import CHOICES
from pruneexp.model.modeling_pruned import FAMILIES
from pruneexp.surgery.served import NOT_SERVED
from tests import manual
from tests.conftest import FAMILIES as TINY_FAMILIES
from tests.tiny_families import TINY, model_type_of

EXPORT = "pruneexp/export/README.md"


def rows(file: str, first: str) -> list[list[str]]:
    """The cells of the table whose first head is `first`, the head with them."""
    lines = manual.text(file).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {first} |"))
    end = next((index for index in range(start, len(lines)) if not lines[index].startswith("|")), len(lines))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]
    return [table[0], *table[2:]]


def anchor(heading: str) -> str:
    """A heading as links name it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_readme_is_short() -> None:
    assert len((manual.ROOT / "README.md").read_bytes()) <= 10 * 1024


@pytest.mark.parametrize("file", manual.FILES)
def test_what_is_made_from_the_code_is_as_the_code_has_it(file: str) -> None:
    parts = manual.parts(file)
    for name, text in parts.items():
        assert text == f"{manual.PARTS[name]()}\n", f"{file}: {name}; python -m tests.manual writes it anew"


def test_every_part_stands_somewhere_once() -> None:
    names = [name for file in manual.FILES for name in manual.parts(file)]
    marks = sum(manual.text(file).count("<!-- made by tests.manual") for file in manual.FILES)
    assert sorted(names) == sorted(manual.PARTS) and marks == len(names)


@pytest.mark.parametrize("file", manual.FILES)
def test_every_link_leads_somewhere(file: str) -> None:
    folder = (manual.ROOT / file).parent
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", manual.text(file), flags=re.DOTALL))
    for link in links:
        path, _, name = link.partition("#")
        if "://" in link:
            continue
        target = (folder / path).resolve() if path else manual.ROOT / file
        assert target.exists() and target.is_relative_to(manual.ROOT), f"{file}: {link}"
        if name:
            page = target / "README.md" if target.is_dir() else target
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert name in map(anchor, headings), f"{file}: {link}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = set(), {"README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", manual.text(page))
        paths = {((manual.ROOT / page).parent / link).resolve() for link in links if "://" not in link}
        new |= {str(path.relative_to(manual.ROOT)) for path in paths} & set(manual.FILES) - reached
    assert reached == set(manual.FILES)


def test_every_page_of_ours_is_of_the_manual() -> None:
    folders = ("conf", "pruneexp", "sweeps", "tests/benchmarks")
    pages = {str(path.relative_to(manual.ROOT)) for folder in folders for path in (manual.ROOT / folder).rglob("*.md")}
    assert pages == set(manual.FILES) - {"README.md", "outputs/README.md"}


def test_the_table_of_searches_is_of_all_of_them() -> None:
    head, *body = rows("conf/README.md", "search")
    assert [row[0].strip("`") for row in body] == choices(conf_folder() / "search")
    assert tuple(cell.strip("`") for cell in head[1 : 1 + len(manual.GRANULARITIES)]) == manual.GRANULARITIES
    cells = {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in body}
    assert cells["al_am"]["`heads`"] == "fixed" and cells["al_am"]["`ffn`"] == "–"
    fixed = {head for head, cell in cells["two_stage"].items() if cell == "fixed"}
    assert fixed == {"`channels`", "`attention`", "units and sublayers"}
    assert cells["uniform"]["`heads`"] == "default" and cells["uniform"]["`blocks`"] == "–"
    assert cells["evolutionary"]["`blocks`"] == "yes" and cells["evolutionary"]["blocks and others"] == "–"
    assert cells["policy_gradient"]["units and sublayers"] == "`budgets=joint`"


def test_the_table_of_model_keys_has_the_defaults_of_all_models() -> None:
    (line,) = re.findall(r"^\| `model\.batch_size` \|.*$", manual.text("conf/README.md"), re.MULTILINE)
    assert "`8` (all but embedded, " in line and "`16` (embedded, " in line


def test_the_tables_of_forms_have_every_form() -> None:
    forms = set(CHOICES["format"]) - {"auto"}
    for first in ("engine", "family"):
        head, *_ = rows(EXPORT, first)
        assert {cell.strip("`") for cell in head[1:]} == forms


def test_the_table_of_biases_is_what_stock_classes_have() -> None:
    from tests.test_export import takes_biases

    _, *body = rows(EXPORT, "added biases stay stock behind")
    named = {place: set(re.findall(r"`(\w+)`", families)) for place, families in body}
    assert sorted(name for families in named.values() for name in families) == sorted(FAMILIES)
    tiny = {model_type_of(name): name for name in TINY} | {name: name for name in TINY_FAMILIES}
    plain = [name for name, family in FAMILIES.items() if not family.experts and name not in ("mistral", "falcon")]
    both = {name for name in plain if takes_biases(tiny[name])}
    assert named["attention and FFN"] == both
    assert "qwen3" in named["attention alone"] and {"qwen2", "mistral", "mixtral"} <= named["neither"]


def test_the_table_of_engines_names_what_they_do_not_take() -> None:
    head, *body = rows(EXPORT, "engine")
    cells = {row[0]: dict(zip(head, row, strict=True))["`remote_code`"] for row in body}
    named = {engine: set(re.findall(r"`(\w+)`", text)) & set(FAMILIES) for engine, text in cells.items()}
    assert named["vLLM"] == set(NOT_SERVED)
    late = {name for name, family in FAMILIES.items() if family.pruned_since > "4.57"}
    assert named["transformers 4.57"] == late


def test_the_table_of_families_has_all_of_them() -> None:
    named = "".join(re.findall("[a-z]", " ".join(row[0] for row in rows("conf/README.md", "model family")).lower()))
    for family in FAMILIES.values():
        stem = re.sub(r"Moe$|Text$|\d|_", "", family.stock).lower()
        assert stem in named, f"{family.stock}: conf/README.md has no row for it"


def test_the_evaluators_that_need_the_model_in_memory_are_marked() -> None:
    for path in (conf_folder() / "evaluator").glob("*.yaml"):
        kind = get_class(yaml.safe_load(path.read_text())["_target_"])
        marked = "(not with model.stream=true)" in path.read_text().splitlines()[1]
        assert marked == (not kind.streams), path.stem


def test_conf_holds_no_page_that_hydra_would_read() -> None:
    assert {path.suffix for path in Path(conf_folder()).rglob("*") if path.is_file()} == {".yaml", ".md"}


def test_the_pages_say_nothing_of_where_they_were_written() -> None:
    folder = re.compile(r"(?<![\w./])/(home|root|tmp|work|Users|mnt)/")
    assert [file for file in manual.FILES if folder.search(manual.text(file))] == []
