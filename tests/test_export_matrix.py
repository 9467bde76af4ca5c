"""The manual's table of what each export format holds is what exports do."""

from __future__ import annotations

from pathlib import Path

import pytest

from pruneexp.model.modeling_pruned import FAMILIES
from tests.export_matrix import FORMATS, MANUAL, cells

pytestmark = pytest.mark.slow

pytest.importorskip("gguf")
HEAD = "| family | " + " | ".join(f"`{format}`" for format in FORMATS) + " |"


def in_manual() -> dict[str, tuple[str, ...]]:
    """The table's cells, by family."""
    lines = MANUAL.read_text().splitlines()
    rows = {}
    for line in lines[lines.index(HEAD) + 2 :]:
        if not line.startswith("|"):
            break
        families, *row = (cell.strip() for cell in line.strip("|").split("|"))
        rows |= {family.strip("` "): tuple(row) for family in families.split(",")}
    return rows


def test_every_family_is_in_the_table() -> None:
    assert sorted(in_manual()) == sorted(FAMILIES), "python -m tests.export_matrix writes the table"


def test_long_rope_has_its_row_below_the_table(tmp_path: Path) -> None:
    assert cells("phi4_mini", tmp_path) == ("FFNs uniform, blocks", "any", "any", "–", "–")
    assert "`phi3` with `longrope`" in MANUAL.read_text(encoding="utf-8")


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_what_each_format_holds(model_type: str, tmp_path: Path) -> None:
    row = cells(model_type, tmp_path)
    assert in_manual().get(model_type) == row, "python -m tests.export_matrix writes the table"
