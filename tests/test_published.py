"""The papers' tables: whole, in agreement with themselves and each other, and about things that exist here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from pruneexp.report.published import CERTAINTY, Table, read_table, tables
from pruneexp.search import Uniform
from pruneexp.types import Budget, Cost, Site
from tests.cases import each

ROOT = Path(__file__).parent.parent
TABLES = {table.name: table for table in tables()}


def value(table: str, method: str, ratio: float, metric: str, model: str = "llama_7b") -> float:
    (published,) = [
        figure.value
        for figure in TABLES[table].figures
        if (figure.method, figure.ratio, figure.metric, figure.model) == (method, ratio, metric, model)
    ]
    return published


@each("table", tables())
def test_every_table_says_where_it_is_from_and_what_it_holds(table: Table) -> None:
    source = table.source
    assert all((source.paper, source.table, source.read_in)) and re.fullmatch(r"\d{4}\.\d{5}", source.arxiv)
    assert table.certainty in CERTAINTY and bool(table.figures) != bool(table.missing)
    assert (table.certainty == "unknown") == bool(table.missing)


@each("table", tables())
def test_recipes_settings_and_data_are_ours(table: Table) -> None:
    recipes = {path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml")}
    datasets = {path.stem for path in (ROOT / "conf" / "dataset").glob("*.yaml")}
    assert set(table.recipes) <= recipes
    for figure in table.figures:
        assert set(figure.recipes) <= recipes | {"dense"}
        assert ("dense" in figure.recipes) == (figure.ratio == 0)
        assert figure.calibration is None or figure.calibration["dataset"] in datasets
        for key in figure.settings:
            group, _, name = key.partition(".")
            options = [path.read_text() for path in (ROOT / "conf" / group).glob("*.yaml")]
            assert any(re.search(rf"^{name}:", text, re.MULTILINE) for text in options), key


def test_every_recipe_of_a_paper_has_a_table() -> None:
    recipes = {path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml")}
    assert recipes - {recipe for table in tables() for recipe in table.recipes} == {"best", "best_tuned", "magnitude"}


@each("table", tables())
def test_a_perplexity_names_its_window_and_its_protocol_agrees(table: Table) -> None:
    for figure in table.figures:
        if figure.metric.startswith("ppl/"):
            match = re.fullmatch(r"ppl/(wikitext2|ptb|c4)@(128|1024|2048)", figure.metric)
            assert match and figure.unit == "perplexity" and figure.value > 1, figure
            assert figure.protocol.get("window", int(match[2])) == int(match[2]), figure
        if figure.unit == "percent":
            assert 10 < figure.value < 100, figure
        assert 0 < figure.tolerance < figure.value, figure


def test_tables_that_print_the_same_figure_agree() -> None:
    tasks = {figure.metric for figure in TABLES["flap_zeroshot"].figures} - {"acc_as_printed/mean7@0shot"}
    assert len(tasks) == 7
    for theirs, own in (("dense", "dense"), ("LLM-Pruner", "Element2"), ("LLM-Pruner LoRA", "Element2 LoRA")):
        ratio = 0.0 if own == "dense" else 0.2
        metric = "ppl/wikitext2@128"
        assert value("flap_perplexity", theirs, ratio, metric) == value("llm_pruner_llama", own, ratio, metric)
        for task in tasks:
            if (theirs, task) != ("LLM-Pruner", "acc_norm/arc_challenge@0shot"):  # 37.18, a misprint of 37.12
                assert value("flap_zeroshot", theirs, ratio, task) == value("llm_pruner_llama", own, ratio, task)
    (at_2048,) = {value(table, "dense", 0.0, "ppl/wikitext2@2048", "llama2_7b") for table in ("dense_2048", "slicegpt")}
    assert at_2048 == 5.47


def test_pruned_is_worse_than_dense_and_more_is_worse() -> None:
    for table in ("flap_perplexity", "sleb"):
        for figure in TABLES[table].figures:
            if figure.unit == "perplexity" and figure.ratio:
                dense = value(table, "dense", 0.0, figure.metric, figure.model)
                milder = [
                    other.value
                    for other in TABLES[table].figures
                    if (other.model, other.metric, other.method) == (figure.model, figure.metric, figure.method)
                    and other.ratio < figure.ratio
                ]
                assert figure.value > max([dense, *milder])


def test_what_others_found_is_known_and_within_the_tolerance() -> None:
    reproduced = {(f.method, f.ratio): f for f in TABLES["flap_perplexity"].figures if f.reproduced is not None}
    assert len(reproduced) == 6 and {figure.model for figure in reproduced.values()} == {"llama_7b"}
    assert all(abs(f.reproduced - f.value) <= f.tolerance and f.reproduced_by for f in reproduced.values())
    assert reproduced["FLAP", 0.2].tolerance == pytest.approx(0.05 * 14.62), "they were nearer than that"
    assert reproduced["Wanda-sp", 0.2].tolerance == pytest.approx(25.02 - 22.12)
    others = {"slicegpt": {5.96, 6.86, 7.56, 8.63}, "sleb": {9.34, 12.32, 7.79, 9.35}}
    for table, found_there in others.items():
        assert {figure.reproduced for figure in TABLES[table].figures} == {*found_there, None}


def test_figures_that_others_found_and_no_paper_prints_have_tables_of_their_own() -> None:
    assert value("sleb_by_others", "SLEB", 0.25, "ppl/c4@2048", "llama2_7b") == 13.74
    assert value("flap_by_others", "FLAP", 0.5, "ppl/wikitext2@128", "llama3_1_8b") == 42.86
    for paper, others in (("sleb", "sleb_by_others"), ("flap_perplexity", "flap_by_others")):
        printed, measured = (
            {(f.method, f.model, f.metric, f.ratio) for f in TABLES[name].figures} for name in (paper, others)
        )
        assert not printed & measured


def test_sizes_agree_with_their_ratios() -> None:
    dense = value("llm_pruner_statistics", "dense", 0.0, "params")
    for method, ratio in (("Block", 0.2), ("Channel", 0.2), ("Block", 0.5), ("Channel", 0.5)):
        assert 1 - value("llm_pruner_statistics", method, ratio, "params") / dense == pytest.approx(ratio, abs=0.01)


@each(
    "change, message",
    [
        (lambda d: d["rows"][1]["values"].__setitem__("7B", -1), "FLAP at 0.2, 7B: -1: expected a positive number"),
        (lambda d: d["rows"][1]["values"].__setitem__("8B", 1), "unknown 8B"),
        (lambda d: d["rows"][1].__setitem__("ratio", 1.2), r"expected a ratio in \[0, 1\)"),
        (lambda d: d["rows"][1].__setitem__("method", "FLOP"), "FLOP"),
        (lambda d: d["rows"].append(d["rows"][1]), "given twice"),
        (lambda d: d.__setitem__("missing", "lost"), "expected rows, or"),
        (lambda d: d.__setitem__("certainty", "sure"), "certainty='sure'"),
        (lambda d: d["columns"].__setitem__("mean", {"metric": "m", "model": "l", "mean_of": ["7B"]}), "mean"),
        (lambda d: d["source"].__setitem__("url", "x"), "url"),
        (lambda d: d.__setitem__("reciepes", ["flap"]), "unknown reciepes"),
        (lambda d: d["rows"][1].__setitem__("reproduced", {"7B": 15.05}), "FLAP at 0.2: expected `reproduced_by`"),
        (lambda d: d["rows"][1].__setitem__("reproduced", {"13B": 15.05}), "FLAP at 0.2, reproduced: unknown 13B"),
    ],
)
def test_a_table_that_is_not_whole_is_refused(change, message: str, tmp_path: Path) -> None:
    data = {
        "title": "t",
        "source": {"paper": "p", "arxiv": "2312.11983", "table": "1", "read_in": "x"},
        "certainty": "read",
        "tolerance": {"relative": 0.05},
        "methods": {"dense": {"recipes": ["dense"]}, "FLAP": {"recipes": ["flap"]}},
        "columns": {"7B": {"model": "llama_7b", "metric": "ppl/wikitext2@128"}},
        "rows": [
            {"method": "dense", "ratio": 0.0, "values": {"7B": 12.62}},
            {"method": "FLAP", "ratio": 0.2, "values": {"7B": 14.62}},
        ],
    }
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(data))
    assert [figure.value for figure in read_table(path).figures] == [12.62, 14.62]
    change(data)
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=message) as raised:
        read_table(path)
    assert str(raised.value).startswith("table.yaml: ")


def test_a_mean_that_is_not_the_mean_is_refused(tmp_path: Path) -> None:
    text = (ROOT / "pruneexp" / "report" / "published" / "flap_zeroshot.yaml").read_text()
    path = tmp_path / "table.yaml"
    path.write_text(text.replace("69.91, 39.25, 39.40, 62.08", "69.91, 39.25, 39.40, 62.80"))
    with pytest.raises(ValueError, match="FLAP at 0.2: average is 62.8, the mean of its columns 62.08"):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "groups", "queries", "channels", "beside", "stay"),
    [  # beside the layers: embeddings, head, last norm
        ("llm_pruner_llama3", 32, 4096, 8, 4, 14336, 2 * 128256 * 4096 + 4096, 6.61e9),
        ("llm_pruner_tinyllama", 22, 2048, 4, 8, 5632, 2 * 32000 * 2048 + 2048, 9.46e8),
    ],
)
def test_sweeps_prune_what_llm_pruner_prunes(
    name: str, layers: int, hidden: int, groups: int, queries: int, channels: int, beside: int, stay: float
) -> None:
    sweep = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
    ratio, models = sweep["sparsity"]["ratio"], sweep["hydra"]["sweeper"]["params"]["model"].split(",")
    figures = [f for f in TABLES["llm_pruner_llama3"].figures if f.model in models and f.ratio == ratio]
    assert {(f.model, f.method) for f in figures} == {(model, how) for model in models for how in ("L2", "Taylor")}
    size, sites = hidden // (groups * queries), []
    for layer in range(layers):
        head, channel = (2 * queries + 2) * size * hidden, 3 * hidden
        sites.append(Site(f"{layer}.a", "attention", layer, groups, queries * size, Cost(head, head, 2 * size)))
        sites.append(Site(f"{layer}.m", "mlp", layer, channels, 1, Cost(channel, channel, 0)))
    inside = sum(site.units * site.cost.params for site in sites) + 2 * layers * hidden
    protected = {"protect_first": 0.125, "protect_last": 0.0625} | sweep.get("search", {})
    search = Uniform(1, ["heads", "channels"], **protected, multiple=1, alike=False, remainder="nearest")
    scores = {site.name: torch.arange(site.units) for site in sites}
    plan = search(scores, sites, Budget(ratio, inside), None, torch.Generator())
    assert beside + inside - plan.budget["removed_params"] == pytest.approx(stay, rel=5e-4)
    shares = {site.layer: plan.removed(site) / site.units for site in sites}
    assert {layer for layer, share in shares.items() if share} == set(range(4, 18 if layers == 22 else 30))
    assert all(share == pytest.approx(0.25, abs=1e-3) for share in shares.values() if share)
