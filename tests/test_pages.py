"""`pruneexp-report`: what the page says is what the runs measured, and what is not whole is named and left out."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pruneexp.cli.report_command import main
from pruneexp.conf_files import conf_folder
from pruneexp.report import figures
from pruneexp.report.comparison import comparisons
from pruneexp.report.figures import styles
from pruneexp.report.folders import find
from pruneexp.report.methods import GROUPS, choice, choices_of, describe, options
from pruneexp.report.points import machine, points
from pruneexp.report.published import tables as published_tables
from pruneexp.report.sections import pareto_section
from pruneexp.report.statistics import t_quantile
from pruneexp.types import Plan, SitePlan
from tests.cases import each
from tests.report_samples import PPL, config, environment, metrics, plan, write_run

CONF = conf_folder()
VOID = {"meta", "br", "link", "img", "input", "hr"}
LATENCY = "latency/prefill_tok_s@b1x128"
DECODER = "latency/decoder_decode_ms@b1x0"


class Page(HTMLParser):
    """Every tag opened is closed; tables by caption; what the page would load or run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.labels: list[str] = []
        self._rows: list[list[tuple[str, str | None]]] = []
        self._cell: list[Any] | None = None
        self._caption = ""
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [value for key, value in attrs if key in ("src", "href", "xlink:href", "data", "action")]
        self.labels += [attributes["aria-label"]] if tag == "svg" else []
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th", "caption"):
            self._cell = ["", attributes.get("data-value")]

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell[0] += data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "caption" and self._cell is not None:
            self._caption = self._cell[0]
        if tag in ("td", "th") and self._cell is not None:
            self._rows[-1].append((self._cell[0], self._cell[1]))
        if tag in ("td", "th", "caption"):
            self._cell = None
        if tag == "table":
            self.tables[self._caption] = self._rows

    def table(self, start: str) -> list[dict[str, tuple[str, str | None]]]:
        (rows,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return [dict(zip([name for name, _ in rows[0]], row, strict=True)) for row in rows[1:]]


def report(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(newline="")))


@pytest.fixture
def drawn() -> None:
    """Asked for by a test that looks at figures of its own."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest: figures are empty but for tests that look at them."""
    if not {"made", "drawn"} & set(request.fixturenames):
        monkeypatch.setattr(figures, "as_svg", lambda figure: '<svg viewBox="0 0 1 1"></svg>')
        monkeypatch.setattr(figures, "as_png", lambda figure: b"")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two ratios, three seeds: rises in log perplexity in closed form."""
    folder = tmp_path_factory.mktemp("runs") / "two_methods"
    for recipe, factor in (("flap", 1.1), ("magnitude", 1.3)):
        for ratio in (0.2, 0.5):
            for seed in range(3):
                composed = config(f"recipe={recipe}", **{"sparsity.ratio": ratio, "dataset.seed": seed})
                ppl = 3.0 * factor ** (10 * ratio) * 1.01**seed
                cost = {f"dense/{LATENCY}": 1000.0, f"pruned/{LATENCY}": 1000.0 / (1 - ratio) * factor}
                size = {"dense/bytes": 400, "pruned/bytes": int(400 * (1 - ratio))}
                kept = plan({"attention": [4, 2, 1 + seed], "mlp": [10, 0, 5]})
                write_run(folder / "HASH", composed, metrics(ppl, ratio, **cost, **size), kept=kept)
    return folder


@pytest.fixture(scope="module")
def made(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "page"
    assert report(sweep, f"out={out}") == 0
    return out


def test_the_page_is_whole_and_refers_to_nothing_outside(made: Path) -> None:
    page = Page(made / "index.html")
    assert page.references and all(re.match("#|data:image/png;base64,", one) for one in page.references)
    assert not re.search(r"@import|<script|https?://|url\((?!#)", page.text)
    assert len(page.ids) == len(set(page.ids))
    internal = {one[1:] for one in page.references if one.startswith("#")}
    assert internal <= set(page.ids)
    assert all(page.labels) and len(page.labels) == len(list((made / "figures").glob("*.svg")))


def test_every_number_in_the_table_is_the_runs_own(made: Path, sweep: Path) -> None:
    shown = Page(made / "index.html").table("Every finished run")
    files = rows(made / "tables" / "runs.csv")
    assert len(shown) == len(files) == 12
    for row, line in zip(shown, files, strict=True):
        measured = json.loads((sweep / row["run"][0] / "metrics.json").read_text())
        keys = [key for key in row if "/" in key]
        assert {"sparsity/decoder", f"dense/{PPL}", f"pruned/{PPL}", "memory/peak_bytes"} <= set(keys)
        for key in keys:
            text, value = row[key]
            assert value is not None and float(value) == measured[key] == float(line[key])
            if not key.startswith(("memory/", "sparsity/")):
                assert float(text.replace(",", "")) == pytest.approx(measured[key], rel=1e-3)
    every = rows(made / "tables" / "metrics.csv")
    for line in every:
        measured = json.loads((sweep / line["run"] / "metrics.json").read_text())
        assert {key: float(line[key]) for key in measured} == measured


def test_seeds_are_taken_together(made: Path) -> None:
    table = rows(made / "tables" / "perplexity-ppl-embedded-128.csv")
    row_of = {(row["method"], row["ratio asked"]): row for row in table}
    assert set(row_of) == {(method, ratio) for method in ("flap", "magnitude") for ratio in ("0.2", "0.5")}
    for (method, ratio), row in row_of.items():
        factor = {"flap": 1.1, "magnitude": 1.3}[method]
        middle = math.log(3.0) + 10 * float(ratio) * math.log(factor) + math.log(1.01)
        half = t_quantile(2) * math.log(1.01) / math.sqrt(3)
        assert float(row[PPL]) == pytest.approx(math.exp(middle))
        assert float(row["95 % from"]) == pytest.approx(math.exp(middle - half))
        assert float(row["to"]) == pytest.approx(math.exp(middle + half))
        assert row["seeds"] == "3" and float(row["share removed"]) == pytest.approx(float(ratio))


def test_main_effects_of_the_sweep(made: Path) -> None:
    assert "balanced, all 4 combinations of levels alike, 3 seeds" in (made / "index.html").read_text()
    row_of = {(row["factor"], row["level"]): row for row in rows(made / "tables" / "effects-ppl-embedded-128.csv")}
    flap, magnitude = 3.5 * math.log(1.1), 3.5 * math.log(1.3)  # mean of 2 and 5 times
    assert float(row_of["recipe", "flap"]["mean rise"]) == pytest.approx(flap + math.log(1.01))
    assert float(row_of["recipe", "magnitude"]["effect"]) == pytest.approx((magnitude - flap) / 2)
    assert float(row_of["sparsity.ratio", "0.5"]["effect"]) == pytest.approx(1.5 * math.log(1.1 * 1.3) / 2)


def test_fronts_hold_the_dense_model_and_what_nothing_beats(made: Path) -> None:
    for name, cost in ((f"pareto-{LATENCY}", "prefill, ms per token (b1x128)"), ("pareto-bytes", "weights, MiB")):
        file = f"pareto-{PPL}-{name.removeprefix('pareto-')}"
        table = rows(made / "tables" / f"{re.sub('[^A-Za-z0-9]+', '-', file)}.csv")
        points = {(row["method"], row["ratio asked"]): (float(row[cost]), float(row[PPL])) for row in table}
        assert len(points) == 5 and points["dense", "0.0"][1] == 3.0
        for row in table:
            x, y = points[row["method"], row["ratio asked"]]
            beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
            assert (row["on the front"] == "yes") == (not beaten)
    assert points["flap", "0.5"][0] == pytest.approx(200 / 2**20)
    latency = rows(made / "tables" / "pareto-ppl-embedded-128-latency-prefill-tok-s-b1x128.csv")
    (dense,) = [row for row in latency if row["method"] == "dense"]
    assert float(dense["prefill, ms per token (b1x128)"]) == 1.0  # 1,000 tokens a second


def test_latencies_say_how_far_they_vary(tmp_path: Path) -> None:
    for index, ratio in enumerate((0.2, 0.3)):
        speed = {f"dense/{LATENCY}": 1000.0, f"pruned/{LATENCY}": 2000.0}
        spread = {f"dense/{LATENCY}/iqr": 50.0, f"pruned/{LATENCY}/iqr": 200.0 + 40 * index}
        composed = config("recipe=flap", **{"sparsity.ratio": ratio})
        write_run(tmp_path / str(index), composed, metrics(4.0 + index, **speed, **spread))
    assert report(tmp_path) == 0
    said = "the interquartile range over repetitions is at most 12 % of prefill, ms per token (b1x128); points"
    assert said in Page(tmp_path / "report" / "index.html").text


def test_decoder_layers_have_a_front_of_their_own_on_each_machine(tmp_path: Path) -> None:
    for index, ratio in enumerate((0.2, 0.3, 0.4)):
        timed = {f"dense/{DECODER}": 4.0, f"pruned/{DECODER}": 4.0 - index}
        composed = config("recipe=flap", **{"sparsity.ratio": ratio})
        where = environment(cpu="other" if ratio == 0.4 else "one")
        write_run(tmp_path / str(index), composed, metrics(4.0 + index, **timed), around=where)
    section = pareto_section(describe(find([tmp_path], "same").runs), styles(["flap"]))
    assert section is not None
    one, other = section.tables
    assert [table.header[2] for table in section.tables] == ["decoder layers, ms per step of decoding (b1x0)"] * 2
    assert {tuple(row[2].text for row in table.rows) for table in (one, other)} == {
        ("3.000", "4.000", "4.000"),
        ("2.000", "4.000"),
    }


def test_speeds_in_llama_cpp_say_how_far_they_vary(tmp_path: Path) -> None:
    kind = "/gguf-q4_k_m"
    for index, ratio in enumerate((0.2, 0.3)):
        measured = {f"{side}/{PPL}{kind}": 5.0 + index for side in ("dense", "pruned")}
        measured |= {f"{side}/{LATENCY}{kind}": 1000.0 for side in ("dense", "pruned")}
        measured |= {f"{side}/{LATENCY}/iqr{kind}": 30.0 + 40 * index for side in ("dense", "pruned")}
        composed = config("recipe=flap", "quantise=gguf", **{"sparsity.ratio": ratio})
        write_run(tmp_path / str(index), composed, metrics(4.0, **measured))
    section = pareto_section(describe(find([tmp_path], "same").runs), styles(["flap quantise=gguf"]))
    assert section is not None
    assert any("at most 7 % of prefill, ms per token (b1x128) in llama.cpp; points" in line for line in section.lines)
    assert len(section.tables) == 1 and len(section.tables[0].rows) == 3


def test_kept_widths_are_means_over_seeds(made: Path) -> None:
    (heads,) = [label for label in Page(made / "index.html").labels if "attention heads (KV groups) kept" in label]
    assert "flap, 0.2 100 50 50;" in heads  # the last layer keeps 1, 2 and 3 of 4
    (channels,) = [label for label in Page(made / "index.html").labels if "FFN channels kept" in label]
    assert "magnitude, 0.5 100 0 50." in f"{channels}."
    widths = [row for row in rows(made / "tables" / "widths.csv") if row["kind"] == "attention" and row["layer"] == "2"]
    assert sorted(float(row["kept"]) for row in widths) == [0.25] * 4 + [0.5] * 4 + [0.75] * 4


def test_tables_and_figures_come_in_every_form(made: Path) -> None:
    for path in (made / "tables").glob("*.csv"):
        lines = len(rows(path))
        assert len(path.with_suffix(".md").read_text().splitlines()) == lines + 2
        latex = path.with_suffix(".tex").read_text()
        assert latex.count(r"\\") == lines + 1 and latex.count(r"\hline") == 3
        assert not re.search(r"(?<!\\)[_%#$]", latex.replace(r"$\pm$", ""))
    names = {path.stem for path in (made / "figures").glob("*.svg")}
    assert names == {path.stem for path in (made / "figures").glob("*.png")}
    assert {"perplexity-ppl-embedded-128", "widths-attention", "widths-mlp", "effects-ppl-embedded-128"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (made / "figures").glob("*.png"))


@pytest.mark.slow
def test_the_same_runs_make_the_same_files(made: Path, sweep: Path, tmp_path: Path) -> None:
    assert report(sweep, f"out={tmp_path / 'again'}") == 0
    for path in made.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(made)).read_bytes() == path.read_bytes(), path.name


def test_configs_are_there_whole_and_their_differences_too(made: Path) -> None:
    page = Page(made / "index.html")
    differences = page.table("Every key that is not the same")
    assert {row["criterion._target_"][0].rpartition(".")[2] for row in differences} == {"Flap", "Magnitude"}
    assert page.text.count("evaluation_samples: 128") >= 12
    shown = page.table("Every finished run")[0]
    assert "dataset.seed" in shown and "criterion.metric" not in shown  # flap says that


def breakages() -> dict[str, tuple[Any, str]]:
    def text(name: str, change: Any) -> Any:
        return lambda folder: (folder / name).write_text(change((folder / name).read_text()))

    def data(name: str, **values: Any) -> Any:
        return text(name, lambda old: json.dumps(json.loads(old) | values))

    return {
        "failed": (data("status.json", status="failed", reason="out of memory"), "failed: out of memory"),
        "running": (lambda f: (f / "metrics.json").unlink(), "still running, as process 1 on elsewhere"),
        "older": (data("environment.json", versions={"pruneexp": "0.0.1"}), "of pruneexp 0.0.1, this is"),
        "no_environment": (lambda f: (f / "environment.json").unlink(), "environment.json is missing"),
        "no_versions": (data("environment.json", versions="0.1"), "environment.json: expected versions"),
        "no_prints": (data("environment.json", model=["llama"]), "environment.json: expected versions, and finger"),
        "budget": (data("plan.json", budget=[0.2]), "budget=[0.2]: expected an object"),
        "no_plan": (lambda f: (f / "plan.json").unlink(), "plan.json is missing"),
        "plan_2": (text("plan.json", lambda old: old.replace('"version": 1', '"version": 2')), "plan.json: ValueError"),
        "cut": (text("metrics.json", lambda old: old[:40]), "metrics.json is no JSON"),
        "nan": (data("metrics.json", **{f"pruned/{PPL}": math.nan}), "expected a finite number"),
        "nested": (data("metrics.json", pruned={"ppl": 3}), "metrics.json: pruned={'ppl': 3}"),
        "negative": (data("metrics.json", **{f"pruned/{PPL}": -2.0}), "expected a positive number"),
        "better": (data("metrics.json", **{f"pruned/{PPL}": 3.5}), f"edited: metrics.json has pruned/{PPL}=3.5, log"),
        "share": (data("metrics.json", **{"sparsity/decoder": 0.4}), "edited: sparsity/decoder=0.4, but pruned/params"),
        "yaml": (text("config.yaml", lambda old: f"{old}\n  - ]"), "config.yaml is no config"),
        "not_ours": (text("config.yaml", lambda old: "a: 1\n"), "config.yaml is no run's config: it has no model"),
        "ratio": (text("config.yaml", lambda old: old.replace("ratio: 0.2", "ratio: much")), "sparsity.ratio='much'"),
        "plan": (data("status.json", plan_sha256="0" * 64), "edited: plan.json is not the plan whose SHA-256"),
        "asked": (text("config.yaml", lambda old: old.replace("ratio: 0.2", "ratio: 0.3")), "=0.3, plan.json met 0.2"),
    }


def test_what_is_not_whole_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    write_run(runs / "good", config("recipe=flap"), metrics(4.0))
    write_run(runs / "unmeasured", config("recipe=flap", "evaluator=[]"), metrics(4.0))
    for name, (breaking, _) in breakages().items():
        breaking(write_run(runs / name, config("recipe=magnitude"), metrics(4.0)))
    hashed = write_run(runs / "HASH", config("recipe=magnitude"), metrics(4.0))
    path = hashed / "config.yaml"
    path.write_text(path.read_text().replace("ratio: 0.2", "ratio: 0.25"))
    delivered = write_run(runs / "delivered", config("recipe=magnitude"), metrics(4.0)) / "model"
    delivered.mkdir()
    (delivered / "plan.json").write_text(plan({"mlp": [9, 9, 9]}).to_json() + "\n")
    assert report(runs) == 0
    page = Page(runs / "report" / "index.html")
    reasons = {row["folder"][0]: row["reason"][0] for row in page.table("Folders that are in no figure")}
    expected = {name: reason for name, (_, reason) in breakages().items()}
    expected |= {hashed.name: "edited: config.yaml has the hash", "delivered": "edited: plan.json is not the plan of"}
    assert set(reasons) == set(expected)
    for name, reason in expected.items():
        assert reason in reasons[name], name
    assert [row["run"][0] for row in page.table("Every finished run")] == ["good", "unmeasured"]
    said = capsys.readouterr().out
    assert said.count("left out: ") == len(expected) and "2 runs; the report is" in said
    # A second report is no run, and does not replace the first unasked.
    assert report(runs) == 2 and "overwrite=true" in capsys.readouterr().err
    assert report(runs, "overwrite=true") == 0
    note = runs / "report" / "tables" / "note.md"
    note.write_text("mine")
    assert report(runs, "overwrite=true") == 2 and "tables/note.md, which no report wrote" in capsys.readouterr().err
    assert note.read_text() == "mine"


def test_runs_are_found_through_links_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "deep" / "sweep" / "run", config("recipe=flap"))
    shutil.copytree(run, tmp_path / "best" / "copy")
    (tmp_path / "best" / "linked").symlink_to(run)
    (tmp_path / "best" / "round").symlink_to(tmp_path / "best")
    assert [one.name for one in find([tmp_path / "best"], "same").repeats] == ["linked"]
    assert len(find([tmp_path / "deep", tmp_path / "best" / "linked", run.parent], "same").runs) == 1
    assert report(tmp_path / "best") == 0
    said = capsys.readouterr().out
    assert "left out: linked: the same config and results as copy" in said and "1 run; the report is" in said


def test_other_versions_come_in_where_asked_for(tmp_path: Path) -> None:
    old = environment(versions={"pruneexp": "0.0.1"})
    write_run(tmp_path / "old", config("recipe=flap"), around=old)
    assert report(tmp_path, f"out={tmp_path / 'page'}") == 2
    assert report(tmp_path, f"out={tmp_path / 'page'}", "versions=any") == 0
    assert "pruneexp 0.0.1" in (tmp_path / "page" / "index.html").read_text()


def test_one_config_with_two_results_is_shown_as_such(tmp_path: Path, drawn: None) -> None:
    composed = config("recipe=flap")
    write_run(tmp_path / "a", composed, metrics(4.0))
    write_run(tmp_path / "b", composed, metrics(5.0), around=environment(platform="Windows"))
    write_run(tmp_path / "c", config("recipe=magnitude"), metrics(6.0))
    timed = {"seconds/calibrate": 99.0, "proof/max_logit_difference": 1e-6}
    write_run(tmp_path / "d", config("recipe=magnitude"), metrics(6.0, **timed))
    out = tmp_path / "page"
    assert report(tmp_path, f"out={out}") == 0
    page = Page(out / "index.html")
    shown = {row["run"][0]: row["remark"][0] for row in page.table("Every finished run")}
    assert shown == {"a": "same config, another result", "b": "same config, another result", "c": ""}
    assert f"pruned/{PPL} is 4 and 5; their environments differ in platform." in page.text
    (left,) = page.table("Folders that are in no figure")
    assert left["reason"][0] == "the same config and results as c"  # seconds differ every time
    points = rows(out / "tables" / "perplexity-ppl-embedded-128.csv")
    assert [row["method"] for row in points] == ["magnitude"]
    figure = (out / "figures" / "perplexity-ppl-embedded-128.svg").read_text()
    assert ">same config, another result<" in figure and ">magnitude<" in figure and ">flap<" not in figure


def test_what_was_timed_makes_no_other_result(tmp_path: Path) -> None:
    """Nor does the share of time that was measured, beside that by the table."""
    composed = config("recipe=flap", "sparsity.of=latency", "sparsity.table=latency.json")
    for name, share in (("a", 0.21), ("b", 0.18)):
        timed = {f"pruned/{DECODER}": 1.0 - share, "sparsity/latency": 0.2, "sparsity/latency_measured": share}
        write_run(tmp_path / name, composed, metrics(4.0, **timed))
    runs_read = find([tmp_path], "same")
    assert [one.name for one in runs_read.repeats] == ["b"] and not runs_read.conflicts
    write_run(tmp_path / "c", composed, metrics(4.0, **{"sparsity/latency": 0.3, "sparsity/latency_measured": 0.2}))
    assert find([tmp_path], "same").conflicts


def llama(ppl: float, *overrides: str, **settings: Any) -> tuple[dict[str, Any], dict[str, float]]:
    base = ("model=llama_7b", "dataset=wikitext2", "evaluator=[wikitext2_128,size]", "model.device=cpu")
    measured = {key: value for key, value in metrics(ppl).items() if PPL not in key}
    measured |= {"dense/ppl/wikitext2@128": 12.63, "pruned/ppl/wikitext2@128": ppl}
    return config(*base, *overrides, **settings), measured


def test_published_figures_stand_beside_ours_and_never_among_them(tmp_path: Path, drawn: None) -> None:
    for seed, ppl in enumerate((14.5, 15.0)):
        composed, measured = llama(ppl, "recipe=flap", **{"dataset.seed": seed})
        accuracy = {"dense/acc/boolq@0shot": 0.70, "pruned/acc/boolq@0shot": 0.70}  # published: 73.18 and 69.63
        write_run(tmp_path / "runs" / f"flap{seed}", composed, measured | accuracy)
    composed, measured = llama(99.0, "recipe=wanda_sp")
    write_run(tmp_path / "runs" / "wanda", composed, measured)
    out = tmp_path / "page"
    assert report(tmp_path / "runs", f"out={out}") == 0
    row_of = {(row["our method"], row["published"]): row for row in rows(out / "tables" / "published.csv")}
    flap = row_of["flap", "14.62"]
    assert float(flap["ours"]) == pytest.approx(math.sqrt(14.5 * 15.0)) and flap["seeds"] == "2"
    assert flap["verdict"] == "within" and "arXiv 2312.11983" in flap["source"]
    assert float(flap["difference"]) == pytest.approx(math.sqrt(14.5 * 15.0) - 14.62)
    assert float(flap["tolerance"]) == pytest.approx(0.05 * 14.62)
    assert row_of["wanda_sp", "22.12"]["verdict"] == "outside"
    assert (flap["found by others"], row_of["flap", "69.63"]["found by others"]) == ("15.05", "")
    verdicts = {(key, row["metric"], row["verdict"]) for key, row in row_of.items() if "acc/" in row["metric"]}
    assert verdicts == {
        (("dense", "73.18"), "acc/boolq@0shot", "outside"),
        (("flap", "69.63"), "acc/boolq@0shot", "within"),
    }
    assert float(row_of["flap", "69.63"]["ours"]) == pytest.approx(70.0)
    dense = {row["metric"] for row in row_of.values() if row["our method"] == "dense"}
    assert dense == {"ppl/wikitext2@128", "params", "acc/boolq@0shot"}
    points = rows(out / "tables" / "perplexity-ppl-wikitext2-128.csv")
    assert [float(row["ppl/wikitext2@128"]) for row in points] == pytest.approx([math.sqrt(14.5 * 15.0), 99.0])
    protocols = rows(out / "tables" / "protocols.csv")
    protocol = {row["what"]: row for row in protocols if flap["no."] in row["of no."].split(", ")}
    assert protocol["read in"]["published"] == "figure in the README of github.com/CASIA-IVA-Lab/FLAP (read)"
    assert (protocol["calibration windows"]["published"], protocol["calibration windows"]["ours"]) == ("1024", "128")
    assert protocol["calibration windows"]["alike"] == "differs" and protocol["calibration data"]["alike"] == "yes"
    assert protocol["window, tokens"]["alike"] == "yes" and protocol["split"]["published"] == "test"
    svg = (out / "figures" / "perplexity-ppl-wikitext2-128.svg").read_text()
    assert "published, at its nominal ratio" in svg
    page = Page(out / "index.html")
    assert "published" in page.text and "No published figure is known" not in page.text


def test_a_papers_mean_over_tasks_stands_beside_the_mean_of_ours_on_them(tmp_path: Path) -> None:
    """FLAP prints 62.08 at 20 %: acc of four tasks and acc_norm of three, which is neither of our own two means."""
    (table,) = (table for table in published_tables() if table.name == "flap_zeroshot")
    (tasks,) = {figure.mean_of for figure in table.figures if figure.mean_of}
    ours = {task: 0.5 + 0.01 * index for index, task in enumerate(tasks)}
    means = {"acc/mean7@0shot": 0.1, "acc_norm_or_acc/mean7@0shot": 0.9}
    composed, of_ppl = llama(14.6, "recipe=flap")
    dense = {f"dense/{name}": value for name, value in (ours | means).items()}
    pruned = {f"pruned/{name}": value - 0.1 for name, value in (ours | means).items()}
    write_run(tmp_path / "whole", composed, of_ppl | dense | pruned)
    composed, _ = llama(14.6, "recipe=flap", **{"dataset.seed": 1})
    write_run(tmp_path / "part", composed, of_ppl | dict(list((dense | pruned).items())[1:-3]))
    compared = comparisons(describe(find([tmp_path], "same").runs), [table])
    (before, after) = (one for one in compared if one.published.mean_of)
    assert (before.published.value, after.published.value) == (63.25, 62.08)
    assert (before.ours.mean, after.ours.mean) == (pytest.approx(53.0), pytest.approx(43.0)) and after.ours.n == 1
    assert [one.run.name for one in after.runs] == ["whole"]
    aspects = {aspect.what: aspect.ours for aspect in after.aspects}
    assert aspects["score"].startswith("mean of acc/boolq@0shot, ") and "acc_norm/hellaswag@0shot" in aspects["score"]


def test_another_ratio_window_metric_or_recovery_is_another_figure(tmp_path: Path) -> None:
    changes = {
        "ratio": {"sparsity.ratio": 0.25},
        "criterion": {"criterion.metric": "IFV"},
        "search": {"search._target_": "pruneexp.search.UlUm"},
        "budget": {"sparsity.of": "latency"},
    }
    for name, change in changes.items():
        write_run(tmp_path / name, *llama(14.6, "recipe=flap", **change))
    write_run(tmp_path / "lora", *llama(14.6, "recipe=flap", "recovery=lora"))
    write_run(tmp_path / "int8", *llama(14.6, "recipe=flap", "quantise=int8"))
    composed, measured = llama(14.6, "recipe=flap")
    renamed = {key.replace("@128", "@2048"): value for key, value in measured.items()}
    write_run(tmp_path / "window", composed, renamed | {"dense/ppl/wikitext2@2048": 5.7})
    runs = describe(find([tmp_path], "same").runs)
    pairs = {(one.runs[0].run.name, one.published.method) for one in comparisons(runs, published_tables())}
    assert {method for _, method in pairs} == {"dense"}
    assert {one.recipe for one in runs} == {"flap", None}


def test_a_published_ratio_is_matched_as_it_is_printed_and_no_run_by_two(tmp_path: Path) -> None:
    for name, ratio in (("near", 0.203125), ("same", 0.2), ("far", 0.2051)):
        composed, measured = llama(14.6, "recipe=flap", **{"sparsity.ratio": ratio})
        left = {key: value for key, value in metrics(share=ratio + 0.001).items() if "ppl" not in key}
        write_run(tmp_path / "runs" / name, composed, measured | left)
    runs = describe(find([tmp_path / "runs"], "same").runs)
    tables = [table for table in published_tables() if table.name == "flap_perplexity"]

    def pruned(tables: Any) -> set[tuple[str, float, float]]:
        compared = [one for one in comparisons(runs, tables) if one.method != "dense"]
        assert all(len(one.runs) == 1 and one.ratio == one.runs[0].ratio for one in compared)
        return {(one.runs[0].run.name, one.published.ratio, round(one.share, 6)) for one in compared}

    assert pruned(tables) == {("near", 0.2, 0.204125), ("same", 0.2, 0.201)}
    (table,) = tables
    closer = [replace(one, ratio=0.204) for one in table.figures if one.ratio == 0.2]
    both = replace(table, figures=(*table.figures, *closer))
    assert pruned([both]) == {("near", 0.204, 0.204125), ("same", 0.2, 0.201), ("far", 0.204, 0.2061)}
    assert report(tmp_path / "runs", f"out={tmp_path / 'page'}") == 0
    shown = rows(tmp_path / "page" / "tables" / "published.csv")
    assert {(row["ratio"], row["our ratio"]) for row in shown if row["our method"] == "flap"} >= {
        ("0.2", "0.203125"), ("0.2", "0.2")
    }  # fmt: skip


def test_models_and_recipes_without_published_figures_are_named(made: Path, tmp_path: Path) -> None:
    text = (made / "index.html").read_text()
    assert "No published figure is known of embedded-llama." in text
    write_run(tmp_path / "runs" / "bip", config("recipe=llm_bip"))
    assert report(tmp_path / "runs") == 0
    text = (tmp_path / "runs" / "report" / "index.html").read_text()
    assert "No published figure is known of recipe llm_bip (LLM-BIP: " in text and "were not found" in text
    assert "The paper&#39;s claim: WikiText-2 perplexity below the best earlier method" in text
    assert ": 14.09 perplexity (second hand)." in text


def test_models_have_figures_of_their_own(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_run(runs / "llama", config("recipe=flap"), metrics(4.0))
    write_run(runs / "opt", config("recipe=flap", "model=embedded_opt"), metrics(40.0))
    other = environment(model={"files": {"model.safetensors": {"sha256": "b" * 64}}})
    write_run(runs / "retrained", config("recipe=flap", **{"sparsity.ratio": 0.3}), metrics(5.0), around=other)
    assert report(runs) == 0
    points = rows(runs / "report" / "tables" / "perplexity-ppl-embedded-128.csv")
    assert [row["model"] for row in points] == [
        f"embedded-llama weights={'a' * 8}",
        f"embedded-llama weights={'b' * 8}",
        "embedded-opt",
    ]
    assert len(list((runs / "report" / "figures").glob("perplexity*.svg"))) == 3


def test_tables_of_several_models_say_which(tmp_path: Path) -> None:
    for model in ("embedded", "embedded_opt"):
        for ratio, seed in ((0.2, 0), (0.3, 0), (0.2, 1), (0.3, 1)):
            composed = config("recipe=flap", f"model={model}", **{"sparsity.ratio": ratio, "dataset.seed": seed})
            write_run(tmp_path / f"{model}{ratio}{seed}", composed, metrics(4.0 + ratio + seed))
    assert report(tmp_path) == 0
    text = (tmp_path / "report" / "index.html").read_text()
    titles = re.findall(r"<caption>(Rise in ln [^<]*)</caption>", text)
    assert [title.rpartition("; ")[2] for title in titles] == [
        f"effect: its mean less that of all runs ({name})" for name in ("embedded-llama", "embedded-opt")
    ]
    table = rows(tmp_path / "report" / "tables" / "effects-ppl-embedded-128-model1.csv")
    assert all(float(row["95 % over seeds, ±"]) >= 0 for row in table)


@pytest.mark.slow
def test_crossed_choices_are_factors_and_an_unbalanced_design_says_so(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    cells = [(c, s) for c in ("flap", "wanda_sp", "magnitude") for s in ("uniform", "global")]
    for index, (criterion, search) in enumerate(cells[:-1]):
        chosen = config("recipe=flap", f"criterion={criterion}", f"search={search}", "compensator=none")
        write_run(runs / str(index), chosen, metrics(3.0 * math.e ** (index + 1)))
    assert report(runs) == 0
    text = (runs / "report" / "index.html").read_text()
    assert "unbalanced, 5 of 6 combinations of levels" in text
    table = rows(runs / "report" / "tables" / "effects-ppl-embedded-128.csv")
    row_of = {(row["factor"], row["level"]): row for row in table}
    assert {factor for factor, _ in row_of} == {"criterion", "search"}
    assert float(row_of["criterion", "wanda_sp"]["mean rise"]) == pytest.approx(3.5)
    assert "95 % over seeds, ±" not in table[0]  # there is one seed
    methods = [row["method"] for row in rows(runs / "report" / "tables" / "runs.csv")]
    assert "wanda_sp global" in methods and len(set(methods)) == 5


def test_a_seed_counts_once_however_often_it_was_evaluated(tmp_path: Path) -> None:
    for index, (seed, batch, ppl) in enumerate(((0, 8, 4.0), (0, 16, 4.0), (1, 8, 9.0))):
        composed = config("recipe=flap", **{"dataset.seed": seed, "evaluator.perplexity.batch_size": batch})
        write_run(tmp_path / str(index), composed, metrics(ppl))
    (point,) = points(describe(find([tmp_path], "same").runs), PPL)
    assert (point.n, len(point.runs)) == (2, 3) and point.value == pytest.approx(6.0)


def test_settings_of_one_choice_tell_methods_apart(tmp_path: Path) -> None:
    for index, metric in enumerate(("WIFV", "IFV")):
        write_run(tmp_path / str(index), config("recipe=flap", **{"criterion.metric": metric}), metrics(4.0 + index))
    assert report(tmp_path, f"out={tmp_path / 'page'}") == 0
    table = rows(tmp_path / "page" / "tables" / "runs.csv")
    assert [(row["method"], row["criterion.metric"]) for row in table] == [
        ("flap metric=IFV", "IFV"),
        ("flap metric=WIFV", "WIFV"),
    ]


def test_settings_alone_name_methods_of_parts_that_all_share(tmp_path: Path) -> None:
    for index, kinds in enumerate(("[heads,channels]", "[blocks]")):
        typed = ("recipe=flap", "search=global", "compensator=none", f"search.granularity={kinds}")
        write_run(tmp_path / str(index), config(*typed))
    methods = [one.method for one in describe(find([tmp_path], "same").runs)]
    assert methods == ["granularity=[heads,channels]", "granularity=[blocks]"]


def test_recipes_keep_their_names_beside_runs_of_no_recipe(tmp_path: Path) -> None:
    typed = {
        "flap": ("recipe=flap",),
        "flap search=greedy": ("recipe=flap", "search=greedy"),
        "magnitude ul_um bias": ("recipe=magnitude", "compensator=bias"),  # that recipe is not there
        "wanda_sp": ("recipe=wanda_sp",),
        "wanda_sp compensator=least_squares": ("recipe=wanda_sp", "compensator=least_squares"),
    }
    for index, overrides in enumerate(typed.values()):
        write_run(tmp_path / str(index), config(*overrides), metrics(4.0 + index))
    assert [one.method for one in describe(find([tmp_path], "same").runs)] == list(typed)


def test_a_recipe_says_what_it_chooses_itself(tmp_path: Path) -> None:
    typed = {
        "a": ("recipe=best",),
        "b": ("recipe=best_tuned",),
        "c": ("recipe=flap",),
        "d": ("recipe=flap", "augmentation=self_generated"),
        "e": ("recipe=flap", "recovery=lora"),
    }
    for name, overrides in typed.items():
        write_run(tmp_path / name, config(*overrides))
    methods = [one.method for one in describe(find([tmp_path], "same").runs)]
    assert methods == ["best", "best_tuned", "flap", "flap augmentation=self_generated", "flap recovery=lora"]


def test_runs_without_perplexity_have_a_page_too(tmp_path: Path, drawn: None) -> None:
    blocks = Plan({f"model.layers.{k}": SitePlan("block", 1, (0,) if k else ()) for k in range(3)})
    measured = {key: value for key, value in metrics().items() if "ppl/" not in key} | {"pruned/questions/acc": 0.5}
    write_run(tmp_path / "run", config("recipe=shortgpt"), measured, kept=blocks)
    assert report(tmp_path / "run") == 0
    page = Page(tmp_path / "run" / "report" / "index.html")
    assert re.findall("<h2>(.*?)</h2>", page.text) == ["Runs", "Accuracy and share removed", "Kept widths", "Configs"]
    assert page.table("Every finished run")[0]["pruned/questions/acc"] == ("0.5000", "0.5")
    files = {path.stem for path in (tmp_path / "run" / "report" / "figures").iterdir()}
    assert files == {"widths-block", "accuracy-questions-acc"}


def test_accuracies_are_means_over_seeds_beside_the_dense_models(tmp_path: Path) -> None:
    mean, task = "acc/mean7@0shot[280]", "acc/piqa@0shot[40]"
    for recipe, share in (("flap", 0.2), ("magnitude", 0.15)):
        for seed, accuracy in enumerate((0.40, 0.44)):
            measured = {
                f"dense/{mean}": 0.5,
                f"pruned/{mean}": accuracy,
                f"dense/{task}": 0.7,
                f"pruned/{task}": 0.6 + accuracy / 10,
            }
            composed = config(
                f"recipe={recipe}", **{"dataset.seed": seed, "model.path": "a/b/c/llm", "model.name": "a/b/c/llm"}
            )
            write_run(tmp_path / "runs" / "HASH", composed, metrics(4.0 + seed, share, **measured))
    assert report(tmp_path / "runs", f"out={tmp_path / 'page'}") == 0
    page = Page(tmp_path / "page" / "index.html")
    row_of = {(row["model"][0], row["method"][0]): row for row in page.table("Accuracy on every task")}
    assert set(row_of) == {("llm", "dense"), ("llm", "flap"), ("llm", "magnitude")}  # of a path, the folder's name
    assert [row_of["llm", "dense"][key][0] for key in (mean, task)] == ["0.5000", "0.7000"]
    assert [row_of["llm", "flap"][key][0] for key in (mean, task)] == ["0.4200", "0.6420"]
    (first, _) = page.table(f"{mean}: mean accuracy")
    half = t_quantile(1) * 0.02  # s / sqrt(n) of 0.40 and 0.44
    assert [float(first[key][1] or "") for key in ("95 % from", "to")] == pytest.approx([0.42 - half, 0.42 + half])
    assert f"{mean}: 280 items, whose draw alone moves an accuracy by up to 0.06" in page.text
    drawn = {path.stem for path in (tmp_path / "page" / "figures").glob("accuracy*.svg")}
    assert drawn == {"accuracy-acc-mean7-0shot-280"}  # tasks are tabled alone
    columns = set(page.table("Every finished run")[0])
    assert f"pruned/{mean}" in columns and f"pruned/{task}" not in columns
    assert "the shares really removed differ at one ratio asked (15.0 to 20.0 % at 0.2)" in page.text


def test_figures_of_other_evaluators_are_a_table(tmp_path: Path) -> None:
    own = {"dense/mine/x@8": 0.5, "pruned/mine/x@8": 0.25, "pruned/agreement/text@8": 0.75, "pruned/kv_bytes/token": 8}
    write_run(tmp_path / "runs" / "HASH", config(), metrics(**own))
    write_run(tmp_path / "runs" / "HASH", config(seed=1))
    assert report(tmp_path / "runs", f"out={tmp_path / 'page'}") == 0
    (row,) = Page(tmp_path / "page" / "index.html").table("What else was measured")
    del own["pruned/kv_bytes/token"]
    assert {key: value for key, (_, value) in row.items() if "/" in key} == {k: str(v) for k, v in own.items()}


def test_the_share_is_of_what_all_budgets_count(tmp_path: Path) -> None:
    """Of another quantity where all runs count that, at one context; of the decoder's parameters where they differ."""
    for recipe, at in (("flap", 0.5), ("magnitude", 0.4)):
        typed = (f"recipe={recipe}", "sparsity.of=macs", "sparsity.context=64")
        write_run(tmp_path / "alike" / recipe, config(*typed), metrics(4.0, 0.2, **{"sparsity/macs": at}))
    other = config("recipe=wanda_sp", "sparsity.of=macs", "sparsity.context=9")
    write_run(tmp_path / "context", other, metrics(5.0, 0.3, **{"sparsity/macs": 0.6}))
    write_run(tmp_path / "of", config("recipe=wanda_sp"), metrics(5.0, 0.3))

    def shown(*folders: Path) -> tuple[list[float], str, set[str]]:
        out = tmp_path / "page"
        assert report(*folders, f"out={out}", "overwrite=true") == 0
        name = re.sub("[^A-Za-z0-9]+", "-", f"perplexity-{PPL}")
        table, page = rows(out / "tables" / f"{name}.csv"), Page(out / "index.html")
        (column,) = [key for key in table[0] if key.startswith("share removed")]
        assert page.table(f"{PPL}: exp")[0][column][0] == f"{100 * float(table[0][column]):.2f} %"
        return [float(row[column]) for row in table], column, set(page.table("Every finished run")[0])

    shares, column, of_run = shown(tmp_path / "alike")
    assert (shares, column) == ([0.5, 0.4], "share removed (sparsity/macs)")
    assert {"sparsity/macs", "sparsity/decoder"} < of_run and "sparsity.of" not in of_run
    text = (tmp_path / "page" / "index.html").read_text()
    assert f"{PPL} against the share removed (sparsity/macs), 1 seed a point." in text
    assert "the shares really removed (sparsity/macs) differ at one ratio asked (40.0 to 50.0 % at 0.2)" in text
    for name, differing in (("context", "sparsity.context"), ("of", "sparsity.of")):
        shares, column, of_run = shown(tmp_path / "alike", tmp_path / name)
        assert (shares, column) == (pytest.approx([0.2, 0.2, 0.3]), "share removed (sparsity/decoder)")
        why = f"The share is of the decoder&#39;s parameters, since the runs differ in {differing}."
        assert why in (tmp_path / "page" / "index.html").read_text() and "sparsity.of" in of_run


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    write_run(tmp_path / "run", config("recipe=flap"), metrics(4.0))
    assert report(tmp_path / "run", f"out={tmp_path / 'page'}") == 0
    (row,) = Page(tmp_path / "page" / "index.html").table(f"{PPL}: exp of the mean")
    assert {"95 % from", "to"}.isdisjoint(row) and row[PPL][1] == "4.0"


def test_names_are_text_and_nothing_else(tmp_path: Path, drawn: None) -> None:
    name = "a<script>alert(1)<_|&'\"%$"
    write_run(tmp_path / "runs" / name, config("recipe=flap", **{"model.name": "<b>|x_y</b>"}))
    assert report(tmp_path / "runs") == 0
    out = tmp_path / "runs" / "report"
    page = Page(out / "index.html")
    assert "<script" not in page.text and "<b>" not in page.text
    assert page.table("Every finished run")[0]["run"][0] == name
    (row,) = (out / "tables" / "runs.md").read_text().splitlines()[2:]
    assert len(re.findall(r"(?<!\\)\|", row)) == 1 + len(rows(out / "tables" / "runs.csv")[0])


@each(
    "arguments, message",
    [
        ([], "FOLDER is missing"),
        (["{runs}/nowhere"], "FOLDER='{runs}/nowhere': no such folder"),
        (["{runs}/file"], "FOLDER='{runs}/file': is a file"),
        (["{runs}/empty"], "FOLDER='{runs}/empty': no finished run there"),
        (["{runs}/failed"], "no finished run there; the first of 1 left out: {runs}/failed: failed: too hot"),
        (["{runs}/good", "out={runs}"], "out='{runs}': holds"),
        (["{runs}/good", "out={runs}/good"], "out='{runs}/good': holds"),
        (["{runs}/good", "out={runs}/file"], "out='{runs}/file': is a file"),
        (["{runs}/good", "out={runs}/full"], "expected a new folder, or overwrite=true"),
        (["{runs}/good", "out={runs}/full", "overwrite=true"], "holds no report.json"),
        (["{runs}/good", "out="], "out=: expected a folder"),
        (["{runs}/good", "overwrite=yes"], "overwrite=yes: expected true or false"),
        (["{runs}/good", "versions=al"], "versions=al: expected same or any"),
        (["{runs}/good", "ouT=x"], "ouT: unknown key; expected one of out, versions, overwrite; did you mean out?"),
        (["{runs}/good", "out=a", "out=b"], "out=b: out is given twice"),
        (["{runs}/good", "--force"], "--force: unknown option"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "good", config("recipe=flap"))
    write_run(tmp_path / "failed", config("recipe=flap"), status="failed", reason="too hot")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    assert report(*(argument.format(runs=tmp_path) for argument in arguments)) == 2
    said = capsys.readouterr()
    assert message.format(runs=tmp_path) in said.err and said.err.count("\n") == 1 and not said.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pruneexp.cli import report_command

    write_run(tmp_path / "good", config("recipe=flap"))
    assert report(tmp_path / "good", f"out={tmp_path / 'page'}") == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_command, "_write", full)
    assert report(tmp_path / "good", f"out={tmp_path / 'page'}", "overwrite=true") == 1
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert report("--help") == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: pruneexp-report FOLDER...") and "exit code: 0 done; 2" in said


@pytest.mark.slow
@each("recipe", sorted(path.stem for path in (CONF / "recipe").glob("*.yaml")))
def test_a_recipe_is_told_from_its_parts(recipe: str) -> None:
    name, choices = choices_of(config(f"recipe={recipe}"))
    assert name == recipe and not any(one.departures for one in choices.values())
    name, choices = choices_of(config(f"recipe={recipe}", **{"sparsity.of": "macs", "sparsity.ratio": 0.4, "seed": 7}))
    assert name == recipe
    assert {g: one.departures for g, one in choices.items() if one.departures} == {"sparsity": {"of": "macs"}}
    assert choices_of(config(f"recipe={recipe}", "compensator=none", "criterion=random"))[0] is None


def test_what_was_chosen_goes_before_what_the_settings_look_like() -> None:
    chosen = {"recipe": "flap", "criterion": "flap", "sparsity": "one_shot", "search": "al_am", "compensator": "bias"}
    recipe, choices = choices_of(config("recipe=flap", "criterion.metric=IFV"), chosen)
    assert (
        recipe == "flap" and choices["criterion"].departures == {"metric": "IFV"} and not choices["search"].departures
    )
    assert choices_of(config("recipe=flap"), {**chosen, "search": "mine"})[0] is None
    assert choices_of(config("recipe=flap"), {**chosen, "search": "mine"})[1]["search"].name == "mine"
    assert choices_of(config("recipe=flap"), {**chosen, "recipe": "my_own"})[0] == "my_own"


def test_a_recipe_of_ones_own_stands_beside_ours(tmp_path: Path) -> None:
    chosen = {"criterion": "flap", "sparsity": "one_shot", "search": "al_am", "compensator": "bias"}
    for recipe, swap in (("flap", {}), ("mine", {"search": "global"}), ("wanda_sp", {"compensator": "none"})):
        options = {"recipe": recipe, **chosen, **swap}
        composed = config(*(f"{group}={name}" for group, name in (chosen | swap).items()))
        write_run(tmp_path / recipe, composed, around=environment(choices=options))
        again = config(*(f"{group}={name}" for group, name in (chosen | swap).items()), "dataset.samples=64")
        write_run(tmp_path / f"{recipe}64", again, around=environment(choices=options))
    methods = {one.run.name: one.method for one in describe(find([tmp_path], "same").runs)}
    assert methods["mine"] == "mine samples=128" and methods["flap64"] == "flap samples=64"


def test_which_gpu_of_a_machine_is_no_other_model_and_a_cpu_is_named_beside_gpus(tmp_path: Path) -> None:
    around = environment(gpus=["NVIDIA H100"], cpu="EPYC")
    for number, device in enumerate(("cuda:0", "cuda:1", "cuda:any")):
        write_run(
            tmp_path / str(number), config("recipe=flap", f"seed={number}", f"model.device={device}"), around=around
        )
    runs = describe(find([tmp_path], "same").runs)
    assert len({(one.context, one.method) for one in runs}) == 1
    assert {machine(one.run) for one in runs} == {"NVIDIA H100, 1 thread"}
    write_run(tmp_path / "cpu", config("recipe=flap", "model.device=cpu"), around=around)
    (last,) = (one for one in describe(find([tmp_path], "same").runs) if one.run.name == "cpu")
    assert machine(last.run) == "Linux, EPYC, 2 CPUs, 1 thread" and last.context.endswith("device=cpu")


def test_published_figures_of_a_swapped_criterion_stand_beside_runs_that_swap_it(tmp_path: Path) -> None:
    """LLM-Pruner's tables have its structure with magnitudes (L2) and with random choices."""
    (table,) = (table for table in published_tables() if table.name == "llm_pruner_llama")
    for criterion in ("magnitude_coupled", "random", "taylor", "wanda_sp"):
        composed, measured = llama(20.0, "recipe=llm_pruner", f"criterion={criterion}")
        write_run(tmp_path / criterion, composed, measured)
        composed, measured = llama(20.0, "recipe=llm_pruner", f"criterion={criterion}", "compensator=bias")
        write_run(tmp_path / f"{criterion}_bias", composed, measured)
    compared = comparisons(describe(find([tmp_path], "same").runs), [table])
    beside = {one.published.method: {run.run.name for run in one.runs} for one in compared if one.published.ratio}
    assert beside == {"L2": {"magnitude_coupled"}, "Random": {"random"}, "Element1": {"taylor"}}


@each("group, name", [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))])
def test_an_option_is_told_from_its_settings(group: str, name: str) -> None:
    node = OmegaConf.create({group: options(group)[name], "seed": 0})
    assert choice(group, OmegaConf.to_container(node, resolve=True)).name == name  # type: ignore[arg-type]


def test_a_class_of_ones_own_has_its_own_name() -> None:
    chosen = choice("criterion", {"criterion": {"_target_": "my_criteria.Energy", "power": 0.5}})
    assert (chosen.name, dict(chosen.departures)) == ("Energy", {})
