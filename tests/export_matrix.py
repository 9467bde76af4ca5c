"""Which export format holds which pruned model: a table of every family, from real exports of tiny random models.

    python -m tests.export_matrix

writes it into pruneexp/export/README.md, where `test_export_matrix` holds it to what exports do.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pruneexp.export import Request, export
from pruneexp.model import Model, ModelSource
from pruneexp.model.modeling_pruned import FAMILIES
from pruneexp.surgery import save, shrink_
from pruneexp.types import ConfigError, Plan, Site, SitePlan
from tests.conftest import FAMILIES as CONFTEST_FAMILIES
from tests.conftest import tiny_config
from tests.tiny_families import TINY, tiny_model

MANUAL = Path(__file__).parents[1] / "pruneexp" / "export" / "README.md"
FORMATS = ("stock", "padded", "remote_code", "gguf", "vllm")


def plan_of(model: Model, count: Callable[[Site, int], int], block: bool) -> Plan:
    """The first units of every site stay: so many of the first site of its kind, of the second ...; without the first
    decoder layer, if `block`."""
    kept, number = {}, Counter[str]()
    for site in model.sites():
        if site.layer or not block:
            kept[site.name] = SitePlan(site.kind, site.units, tuple(range(count(site, number[site.kind]))))
        number[site.kind] += 1
    return Plan(kept | ({f"{model.layers_path}.0": SitePlan("block", 1, ())} if block else {}))


def fewer(site: Site, number: int) -> int:
    return max(1, site.units - number % 3)


def fewer_channels(site: Site, number: int) -> int:
    return 2 if site.kind == "attention" else fewer(site, number)


def two_thirds(site: Site, number: int) -> int:
    return site.units * 2 // 3


def two_thirds_of_channels(site: Site, number: int) -> int:
    return site.units if site.kind == "attention" else two_thirds(site, number)


PLANS: dict[str, Callable[[Model], Plan]] = {
    "any": lambda model: plan_of(model, fewer, block=True),
    "heads alike": lambda model: plan_of(model, fewer_channels, block=True),
    "uniform": lambda model: plan_of(model, two_thirds, block=False),
    "FFNs uniform": lambda model: plan_of(model, two_thirds_of_channels, block=False),
    "blocks": lambda model: plan_of(model, lambda site, number: site.units, block=True),
}
WIDER = {"heads alike": ["any"], "uniform": ["any", "heads alike"], "FFNs uniform": ["any", "heads alike", "uniform"]}
WIDER["blocks"] = ["any", "heads alike"]  # what holds one of these holds the plan, too, and is not tried


def model_of(model_type: str) -> Any:
    """A tiny random model of the family, or of a name in `TINY`."""
    import transformers

    if model_type in CONFTEST_FAMILIES:
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(tiny_config(model_type)).double()
    if model_type in TINY:
        return tiny_model(model_type)
    named = (name for name, (prefix, _) in TINY.items() if prefix == FAMILIES[model_type].stock)
    return tiny_model(next(named))


def holds(checkpoint: Path, format: str, out: Path) -> bool:
    """Whether the export is made, and proved to be the model; False where it is refused."""
    try:
        export(Request(checkpoint, out, format, prove="in_place"))
    except ConfigError:
        return False
    return True


def cells(model_type: str, folder: Path) -> tuple[str, ...]:
    """Which plans each format holds."""
    model_of(model_type).save_pretrained(folder / "dense")
    held: dict[str, list[str]] = {format: [] for format in FORMATS}
    for plan, made in PLANS.items():
        model = ModelSource(model_type, str(folder / "dense"), None, "float64", "cpu", False, False, 4).load()
        shrink_(model, made(model))
        save(model, folder / plan)
        for format, plans in held.items():
            if not set(WIDER.get(plan, ())) & set(plans) and holds(folder / plan, format, folder / f"{plan}.{format}"):
                plans.append(plan)
    return tuple(", ".join(plans) or "–" for plans in held.values())


def matrix() -> str:
    """The table, as it stands in pruneexp/export/README.md."""
    lines = [
        "| family | " + " | ".join(f"`{format}`" for format in FORMATS) + " |",
        "|---" * (1 + len(FORMATS)) + "|",
    ]
    rows: dict[tuple[str, ...], list[str]] = {}
    for model_type in sorted(FAMILIES):
        with tempfile.TemporaryDirectory() as folder:
            rows.setdefault(cells(model_type, Path(folder)), []).append(model_type)
    for row, families in rows.items():  # families alike share one
        lines.append(f"| {', '.join(f'`{name}`' for name in families)} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    text, new = MANUAL.read_text(encoding="utf-8"), matrix()
    start = text.index(new.splitlines()[0])
    end = text.index("\n\n", start) + 1
    MANUAL.write_text(text[:start] + new + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
