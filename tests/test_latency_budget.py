"""Budgets in time: plans by made-up tables in closed form, tables as files, and a measured run from end to end."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from pruneexp.compensator import NoCompensation
from pruneexp.criterion import Random
from pruneexp.experiment import latency as of_runs
from pruneexp.experiment.forecast import timing_stages
from pruneexp.experiment.forecast.shape import shape_of
from pruneexp.experiment.latency import assumed, conditions_of
from pruneexp.fingerprint import config_hash
from pruneexp.latency import Conditions, Table, Workload, compare_times, measure, measure_table
from pruneexp.latency.measure import spaced
from pruneexp.latency.workload import Pool, bytes_of
from pruneexp.model import Model, ModelSource
from pruneexp.pruning import Method, Pruned
from pruneexp.pruning.budget import check_pruning, whole_budget
from pruneexp.pruning.record import Record
from pruneexp.pruning.rounds import prune_in_rounds_
from pruneexp.search import AlAm, AlAmQueryHeads, Global, TwoStage, UlMm
from pruneexp.sparsity import Cubic, OneShot
from pruneexp.tracker.structure import kept_times, latency_figure
from pruneexp.types import ConfigError, Curve, LayerTimes, Times
from tests.cases import UNTIMED, each
from tests.messages import assert_told
from tests.test_budget import BUDGETED, EXACT
from tests.test_forecast import LiveBytes

Time = Callable[[int], float]
BLOCKS = BUDGETED["blocks"]
SEARCHES: dict[str, Any] = {**EXACT, "al_am": AlAm(), "blocks": BLOCKS, "ul_mm": UlMm(3)}
NONE = NoCompensation(False)
DRY = ("run.dry=true", "dataset.samples=4", "dataset.length=16", "evaluator=[size]")


def curve(time: Time, most: int) -> Curve:
    """A point for every width: nothing is interpolated."""
    return Curve(tuple((n, time(n), 0.0) for n in range(most + 1)))


def with_table(model: Model, attention: Time, ffn: Time, heads: Time | None = None) -> Model:
    """Times of every layer by KV groups and channels, and by query heads of each group."""
    there = {site.kind: site for site in model.layer_sites(0)}
    by_heads = None if heads is None else curve(heads, there["attention"].group)
    own = (curve(attention, there["attention"].units), curve(ffn, there["mlp"].units), by_heads)
    model.times = Times((LayerTimes(tuple(range(len(model.layers))), *own),))
    return model


def prune(model: Model, tokens_NT: Tensor, search: Any, sparsity: Any) -> Pruned:
    record = Record(rng=torch.Generator().manual_seed(0))
    return prune_in_rounds_(model, tokens_NT[:4], Method(Random(5), sparsity, search, NONE), record)


def latency(ratio: float) -> OneShot:
    return OneShot(ratio, "latency", 0, *UNTIMED)


def total(model: Model) -> int:
    """Picoseconds by the table."""
    return whole_budget(model, AlAm(), latency(0.0), 0.0).total


def test_between_points_a_curve_is_straight() -> None:
    polyline = Curve(((0, 1.0, 0.0), (2, 3.0, 0.0), (6, 4.0, 0.0)))
    assert [polyline.at(n) for n in (0, 1, 2, 4, 6)] == [1.0, 2.0, 3.0, 3.5, 4.0]
    assert polyline.slope(6) == 0.25 and polyline.slope(2) == polyline.slope(1) == 1.0, (
        "what stays to the last is no unit's"
    )
    assert Curve(((0, 1.0, 0.0), (3, 0.5, 0.0))).slope(3) == 0.0
    with pytest.raises(ValueError, match="ascending"):
        Curve(((2, 1.0, 0.0), (1, 1.0, 0.0)))


@each("most, multiple", [(1536, 1), (1536, 64), (40, 1), (3, 1), (1, 1), (100, 8)])
def test_a_grid_ends_with_all_and_has_the_widths_that_may_stay(most: int, multiple: int) -> None:
    grid = spaced(most, 13, multiple)
    assert grid[-1] == most and grid == sorted(set(grid)) and 0 < grid[0] <= multiple and len(grid) <= 15
    assert most <= 13 or all(n % multiple == 0 and (multiple > 1 or n % 2) for n in grid[:-1])


@each("search", [name for name in SEARCHES if name != "blocks"])
def test_times_in_proportion_to_parameters_give_the_plan_of_parameters(
    search: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model = tiny("llama")
    head, channel = (site.cost.params * 1e-6 for site in model.layer_sites(0))
    by_params = prune(tiny("llama"), tokens_NT, SEARCHES[search], OneShot(0.3, "prunable", 0, *UNTIMED)).plan
    timed = prune(
        with_table(model, lambda n: n * head, lambda n: n * channel), tokens_NT, SEARCHES[search], latency(0.3)
    )
    assert timed.plan.sites == by_params.sites
    budget = timed.plan.budget
    assert budget["removed_latency"] == 1000 * by_params.budget["removed_params"] and budget["of"] == "latency"


OVERHEAD = (lambda n: 0.3 + 0.2 * n if n else 0.1, lambda n: 0.5 + 0.05 * n if n else 0.1)
CONCAVE = (lambda n: 0.4 * math.sqrt(n), lambda n: 0.3 * n**0.7)
STEPS = (lambda n: 0.1 + 0.2 * n, lambda n: 0.1 + 0.4 * math.ceil(n / 8))  # kernels of 8 channels


@each("search, shape", itertools.product([*EXACT, "query_heads"], ["overhead", "concave"]))
def test_a_share_of_times_is_met_by_the_table_to_the_nearest_unit(
    search: str, shape: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    times = {"overhead": OVERHEAD, "concave": CONCAVE}[shape]
    whole = times[0](3)
    model = with_table(tiny("llama"), *times, lambda n: whole * (0.7 + 0.15 * n))
    before, chosen = total(model), AlAmQueryHeads() if search == "query_heads" else SEARCHES[search]
    pruned = prune(model, tokens_NT, chosen, latency(0.3))
    after = total(model)
    assert pruned.plan.budget["removed_latency"] == pytest.approx(before - after) and pruned.counted == before
    dearest = max(times[1](n + 1) - times[1](n) for n in range(4, 40)) * 1e9
    slack = {"query_heads": 3 * dearest, "policy_gradient": 0.02 * before, "joint": 0.02 * before}
    slack["greedy"] = 0.02 * before  # these ask for their losses once
    assert abs(before - after - 0.3 * before) <= slack.get(search, 1.5 * dearest)


@each("ratio", [0.2, 0.4, 0.6])
def test_two_stages_meet_a_share_of_times_by_channels(
    ratio: float, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model = with_table(tiny("llama"), *OVERHEAD)
    before = total(model)
    prune(model, tokens_NT, TwoStage(1, 1.5, 1), latency(ratio))
    assert abs(before - total(model) - ratio * before) <= 0.05e9 / 2 + 3, "half a channel, and roundings"


@each("search", ["uniform", "global", "al_am", "evolutionary"])
def test_steps_are_met_to_one_of_them(search: str, tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = with_table(tiny("llama"), *STEPS)
    before = total(model)
    prune(model, tokens_NT, SEARCHES[search], latency(0.3))
    assert abs(0.7 * before - total(model)) <= 0.4e9


def test_where_an_ffn_takes_no_time_only_heads_leave(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    for search in (AlAm(), EXACT["global"], EXACT["uniform"]):
        model = with_table(tiny("llama"), lambda n: 1.0 * n, lambda n: 0.0)
        plan = prune(model, tokens_NT, search, latency(1 / 3)).plan
        gone = {site.kind: 0 for site in plan.sites.values()}
        for site in plan.sites.values():
            gone[site.kind] += site.units - len(site.kept)
        assert gone["mlp"] == 0 and abs(gone["attention"] - 3) <= isinstance(search, AlAm)


def test_a_block_takes_all_its_time_along(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = with_table(tiny("llama"), *OVERHEAD)
    before = total(model)
    prune(model, tokens_NT, BLOCKS, latency(1 / 3))
    assert len(model.layers) == 2 and total(model) == pytest.approx(2 / 3 * before)
    model = with_table(tiny("llama"), *OVERHEAD)
    sublayers = Global(0, ["attention", "ffn"], "per_parameter", 1)
    pruned = prune(model, tokens_NT, sublayers, latency(0.25))
    assert pruned.plan.budget["removed_latency"] == pytest.approx(before - total(model)) and total(model) < before


@each("search", ["global", "per_parameter", "joint", "evolutionary", "greedy"])
def test_a_sublayer_takes_along_what_is_beside_its_units(
    search: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    chosen = replace(SEARCHES[search], granularity=["heads", "channels", "attention", "ffn"])
    units_left = OVERHEAD[0](1) + OVERHEAD[1](1) - 0.2  # of the layer that stays; nothing else but 0.1 a sublayer
    for share in (0.3, 0.6):
        model = with_table(tiny("llama"), *OVERHEAD)
        before = total(model)
        most = 1 - (6 * 0.1 + units_left) * 1e9 / before
        check_pruning(model, chosen, latency(most - 1e-3), NONE)
        with pytest.raises(ConfigError, match=f"expected at most {int(most * 1e4) / 1e4}, all that"):
            check_pruning(model, chosen, latency(most + 1e-3), NONE)
        budget = prune(model, tokens_NT, chosen, latency(share)).plan.budget
        assert budget["removed_latency"] == pytest.approx(before - total(model))
        assert abs(before - total(model) - share * before) <= 0.05 * before


@each("search", ["global", "uniform", "evolutionary", "al_am"])
def test_where_the_last_unit_may_leave_all_times_may(
    search: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    chosen = SEARCHES[search] if search == "al_am" else replace(SEARCHES[search], min_units=0)
    before = total(with_table(tiny("llama"), *OVERHEAD))
    most = 1 - 6 * 0.1e9 / before
    by_prices = 1 - 3 * (0.3 + 0.5) * 1e9 / before
    for share in (most - 1e-3, by_prices + 0.03):
        model = with_table(tiny("llama"), *OVERHEAD)
        check_pruning(model, chosen, latency(share), NONE)
        prune(model, tokens_NT, chosen, latency(share))
        near = 0.7e9 if search == "evolutionary" else 0.25e9  # half of what leaves with a last channel, or with three
        assert abs(before - total(model) - share * before) <= near
    with pytest.raises(ConfigError, match=f"expected at most {int(most * 1e4) / 1e4}, all that"):
        check_pruning(with_table(tiny("llama"), *OVERHEAD), chosen, latency(most + 1e-3), NONE)


PICTURED = {
    **{name: SEARCHES[name] for name in ("al_am", "blocks")},
    "emptied": Global(0, ["attention", "ffn"], "per_parameter", 1),
    "query_heads": AlAmQueryHeads(),
}


def ranks(values: Iterable[float]) -> list[int]:
    numbers = [round(value, 6) for value in values]
    return [sorted(set(numbers)).index(number) for number in numbers]


@each("search", PICTURED)
def test_a_picture_has_the_times_of_what_is_kept(
    search: str, tiny: Callable[..., Model], tokens_NT: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They add up to those of the pruned model; each point has its interquartile range."""
    from PIL.ImageDraw import ImageDraw

    whole = OVERHEAD[0](3)
    model = with_table(tiny("llama"), *OVERHEAD, lambda n: whole * (0.7 + 0.15 * n))
    times, origin = model.times, list(model.origin)
    assert times is not None
    pruned = prune(model, tokens_NT, PICTURED[search], latency(0.4))
    by_kind = {kind: kept_times(kind, times, pruned.plan, pruned.sites, origin) for kind in ("attention", "mlp")}
    assert sum(ms for marks in by_kind.values() for _, ms in marks) * 1e9 == pytest.approx(total(model))
    gone = [layer for layer in range(3) if by_kind["attention"][layer] == by_kind["mlp"][layer] == (0, 0.0)]
    assert len(gone) == 3 - len(model.layers) and bool(gone) == (search == "blocks")
    if search == "query_heads":
        assert any(ms < times.curve("attention", 0).at(kept) for kept, ms in by_kind["attention"])
    dots, bars = [], []
    monkeypatch.setattr(ImageDraw, "ellipse", lambda _, box, fill: dots.append(box))
    monkeypatch.setattr(ImageDraw, "line", lambda _, xy, fill, width=0: bars.append(xy) if width == 1 else None)
    (own,) = times.of
    spread = Curve(tuple((kept, ms, 0.1) for kept, ms, _ in own.ffn.points))
    latency_figure(Times((replace(own, ffn=spread),)), pruned.plan, pruned.sites, origin, tmp_path / "latency.png")
    centres = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in dots]
    for kind, here in (("attention", centres[:3]), ("mlp", centres[3:])):
        assert ranks(x for x, _ in here) == ranks(kept for kept, _ in by_kind[kind])
        assert ranks(-y for _, y in here) == ranks(ms for _, ms in by_kind[kind])
    heights = [low - high for left, low, right, high in bars if left == right]
    points = len(own.attention.points)
    assert max(heights[:points]) == 0 and heights[points:] == pytest.approx([heights[-1]] * len(spread.points))
    assert heights[-1] > 1


def test_rounds_are_shares_of_the_original_times(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = with_table(tiny("llama"), *CONCAVE)
    before = total(model)
    budget = prune(model, tokens_NT, EXACT["global"], Cubic(0.4, "latency", 0, 3, *UNTIMED)).plan.budget
    assert len(budget["rounds"]) == 3 and budget["total_latency"] == before
    assert (before - total(model)) / before == pytest.approx(0.4, abs=0.02)
    assert budget["removed_latency"] == pytest.approx(before - total(model))


# Files and what is typed


@pytest.fixture
def cli(cli: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, measuring little."""
    for name, value in (("SECONDS", 0.5), ("AT_ONCE", 1e-4), ("STACK_SECONDS", 0.02)):
        monkeypatch.setattr(measure, name, value)
    return cli


OURS = ["sparsity.of=latency", "search=global", "dataset.samples=8", "evaluator=[size]", "run.save=false"]


def by_bytes(work: Workload, layers: Any) -> float:
    """In the place of a clock: others compute beside the tests."""
    work.run(layers)
    return 1e-9 * bytes_of([own.layer for own in layers])


@pytest.mark.slow
def test_a_measured_run_and_one_by_its_table(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Conditions] = []

    def counted(work: Workload, conditions: Conditions, multiple: int) -> Table:
        measured.append(conditions)
        timings = measure_table(work, conditions, multiple)
        # others compute beside the tests: straight lines up to what was measured of the whole
        calm = [
            tuple((n, c.at(c.most) * (0.1 + 0.9 * n / c.most), 0.0) for n, _, _ in c.points) for c in timings.curves
        ]
        own = replace(timings.times.of[0], attention=Curve(calm[0]), ffn=Curve(calm[1]))
        return replace(timings, times=Times((own,)))

    monkeypatch.setattr(of_runs, "measure_table", counted)
    code, out, err = cli(*OURS, "cache.dir=cache", "run.dir=a")
    assert code == 0, err
    metrics = json.loads(Path("a/metrics.json").read_text())
    plan = json.loads(Path("a/plan.json").read_text())["budget"]
    assert metrics["sparsity/latency"] == pytest.approx(0.2, abs=0.01)
    assert metrics["sparsity/latency"] == pytest.approx(plan["removed_latency"] / plan["total_latency"])
    name = "latency/decoder_decode_ms@b1x0"
    assert metrics[f"dense/{name}"] > 0 and metrics[f"pruned/{name}"] > 0 and "sparsity/latency_measured" in metrics
    assert "the table foretold" in Path("a/log.txt").read_text() and Path("a/latency.png").stat().st_size > 1000
    assert "milliseconds of the decoder, by the table" in out
    assert cli(*OURS, "cache.dir=cache", "run.dir=b")[0] == 0 and len(measured) == 1, "from the cache"
    assert ["is from the cache" in Path(run, "log.txt").read_text() for run in "ab"] == [False, True]
    assert cli(*OURS, "cache=off", "run.dir=c", "sparsity.table=a/latency.json")[0] == 0 and len(measured) == 1
    plans = [json.loads(Path(run, "plan.json").read_text())["sites"] for run in "abc"]
    assert plans[0] == plans[1] == plans[2]
    assert Path("c/latency.json").read_text() == Path("a/latency.json").read_text()
    foreign = json.loads(Path("a/latency.json").read_text()) | {"device": "another", "threads": 64}
    Path("foreign.json").write_text(json.dumps(foreign))
    assert cli(*OURS, "cache=off", "run.dir=d", "sparsity.table=foreign.json")[0] == 0
    log, metrics = Path("d/log.txt").read_text(), json.loads(Path("d/metrics.json").read_text())
    assert "times of another (64 threads)" in log and "sparsity/latency_measured" not in metrics
    code, out, err = cli(*OURS, "run.dry=true")
    assert code == 0 and "20.0% of the decoder layers' milliseconds" in out and len(measured) == 1, err
    code, out, _ = cli(*OURS, "run.dry=true", "sparsity.table=a/latency.json")
    assert code == 0 and "picoseconds of a pass through the decoder layers" in out


def test_layers_are_timed_before_they_are_quantised(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers that they are compared with are not quantised either."""
    timed: list[tuple[bool, float]] = []

    def figures(self: of_runs.Timing, model: Model, foretold: float) -> dict[str, float]:
        timed.append((bool(model.stored_bytes), foretold))
        return {}

    monkeypatch.setattr(measure, "time_pass", by_bytes)
    monkeypatch.setattr(of_runs.Timing, "figures", figures)
    code, _, err = cli(*OURS, "cache=off", "run.dir=a", "quantise=int8")
    assert code == 0, err
    metrics = json.loads(Path("a/metrics.json").read_text())
    assert timed == [(False, metrics["sparsity/latency"])] and "pruned/bits/param" in metrics


def test_an_unsteady_table_and_what_was_timed_are_told(
    cli: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a table that the cache has not kept, how other runs come by its times."""
    made: list[Table] = []

    def unsteady(work: Workload, conditions: Conditions, multiple: int) -> Table:
        times = assumed(work.model)
        wide = [replace(own, ffn=Curve(tuple((n, ms, ms) for n, ms, _ in own.ffn.points))) for own in times.of]
        wide = [replace(own, attention=Curve(tuple((n, ms, ms) for n, ms, _ in own.attention.points))) for own in wide]
        made.append(Table(conditions, Times(tuple(wide))))
        return made[-1]

    monkeypatch.setattr(of_runs, "measure_table", unsteady)
    monkeypatch.setattr(of_runs.Timing, "figures", lambda *_: {})
    for name in ("a", "b"):
        caplog.clear()
        code, _, err = cli(*OURS, "cache.dir=cache", f"run.dir={name}")
        assert code == 0, err
        (warning,) = [line for line in caplog.messages if "times spread by more than a quarter" in line]
        assert "perhaps something else was running" in warning and "sparsity.table=<run>/latency.json" in warning
        assert sum("one token behind 0 tokens, for 1 sequence (" in line for line in caplog.messages) == 1
    assert len(made) == 2
    code, out, err = cli(*OURS, "run.dry=true", "sparsity.phase=prefill", "sparsity.context=9", "sparsity.batch=2")
    assert code == 0 and "milliseconds (a pass of 9 tokens, for 2 sequences), measured" in out, err


def test_settings_of_times_without_times_are_told_of_one_run(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["sparsity.phase=prefill", "sparsity.batch=2", "sparsity.context=9"]

    def read_log(*overrides: str) -> list[str]:
        caplog.clear()
        code, _, err = cli(*overrides, *DRY)
        assert code == 0, err
        return [text for text in caplog.messages if "no effect with sparsity.of=" in text]

    both = "sparsity.batch=2, sparsity.phase='prefill'"
    assert read_log(*typed) == [f"{both}, sparsity.context=9: no effect with sparsity.of=decoder"]
    assert read_log(*typed, "sparsity.of=bytes") == [f"{both}: no effect with sparsity.of=bytes"]
    for quiet in ([], ["sparsity.of=macs", "sparsity.context=9"], ["sparsity.of=latency", *typed]):
        assert read_log(*quiet) == []
    assert read_log("--multirun", *typed, "sparsity.of=decoder,latency", "cache=off") == [], "the sweep counts by them"


def test_a_prefill_is_measured_from_python(monkeypatch: pytest.MonkeyPatch, tiny: Any, tokens_NT: Tensor) -> None:
    """The tiny model's times are too short for a budget."""
    import pruneexp

    for name, value in (("SECONDS", 0.0), ("AT_ONCE", 0.0), ("STACK_SECONDS", 0.0), ("time_pass", by_bytes)):
        monkeypatch.setattr(measure, name, value)
    model = tiny("bloom").module.float()
    typed = ["sparsity.of=latency", "sparsity.phase=prefill", "sparsity.context=16", "sparsity.batch=2"]
    metrics = pruneexp.prune(model, None, tokens_NT, ratio=0.2, overrides=[*typed, "search=uniform"]).metrics
    assert metrics["sparsity/latency"] == pytest.approx(0.2, abs=0.01)
    assert metrics["sparsity/latency_measured"] == pytest.approx(metrics["sparsity/latency"], abs=1e-3)
    assert metrics["pruned/latency/decoder_prefill_ms@b2x16"] > 0


@each("kept", [False, True])
def test_each_prefill_begins_with_an_empty_cache(kept: bool, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    """Also where transformers' `reset` zeroes the keys of an entry and keeps their number."""
    from transformers.cache_utils import DynamicLayer

    if kept:
        monkeypatch.delattr(DynamicLayer, "reset")
    model = tiny("llama")
    work, pool = Workload(2, 7, "prefill", model), Pool(2**20, model.dtype, model.device)
    layers = [work.prepared(layer, index, pool) for index, layer in enumerate(model.layers)]
    for _ in range(4):
        work.run(layers)
        assert [entry.keys.shape[2] for entry in work.all.cache.layers] == [7] * len(layers)


@pytest.mark.slow
@each("name", ["falcon_40b", "falcon_rw", "gemma3", "gpt2", "phi3", "opt"])
def test_layers_of_every_kind_can_be_measured(name: str, monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    little = {"SECONDS": 0.01, "LEAST": 3, "AT_ONCE": 0.0, "STACK_SECONDS": 0.0, "FFN_POINTS": 4}
    for setting, value in little.items():
        monkeypatch.setattr(measure, setting, value)
    monkeypatch.setattr(measure, "gc", Mock())  # no memory is short here, and all that lives is looked through
    model = loaded(name)
    for phase, context in (("decode", 9), ("decode", 0), ("prefill", 7)):
        work = Workload(2, context, phase, model)
        sparsity = OneShot(0.2, "latency", context, 2, phase, None)
        model.times = measure_table(work, conditions_of(model, sparsity), 1).times
        for index in range(len(model.layers)):
            attention, ffn = (model.times.curve(site.kind, index) for site in model.layer_sites(index))
            assert [attention.most, ffn.most] == [site.units for site in model.layer_sites(index)]
            assert attention.at(attention.most) + ffn.at(ffn.most) > 0
        assert min(compare_times(work, model).pruned) > 0


@pytest.fixture
def table(tiny: Any, tmp_path: Path) -> dict[str, Any]:
    """A good table of the embedded model, as data."""
    outline = ModelSource("e", "embedded:llama", None, "auto", "cpu", False, False, 4).outline()
    there = {site.kind: site.units for site in outline.layer_sites(0)}
    points = {"attention": curve(lambda n: 1.0 + n, there["attention"]), "ffn": curve(lambda n: n / 9, there["mlp"])}
    own = LayerTimes(tuple(range(len(outline.layers))), **points)
    return json.loads(Table(conditions_of(outline, latency(0.2)), Times((own,))).to_json())


REFUSED = [  # what is typed, what the line names, what it says besides
    ("sparsity.table=none.json", "sparsity.table='none.json'", ["latency.json"]),
    ("sparsity.table=text.json", "sparsity.table='text.json'", ["no JSON"]),
    ("sparsity.table=t.json sparsity.batch=2", "sparsity.table='t.json'", ["batch=1", "sparsity.batch=2"]),
    ("sparsity.table=t.json sparsity.context=9", "sparsity.table='t.json'", ["context=0", "sparsity.context=9"]),
    ("sparsity.table=t.json model.dtype=bfloat16", "sparsity.table='t.json'", ["model.dtype=bfloat16"]),
    ("sparsity.table=other.json", "sparsity.table='other.json'", ["hidden=7"]),
    (
        "sparsity.table=wide.json",
        "sparsity.table='wide.json'",
        ["with widths=[4, 1, 7] (KV groups, query heads of each, FFN channels) in layer 2; expected [4, 2, 344]"],
    ),
    ("sparsity.table=deeper.json", "sparsity.table='deeper.json'", ["with 7 layers; expected 6, as this one has"]),
    ("sparsity.table=short.json", "sparsity.table='short.json'", ["ffn of layer 0"]),
    ("sparsity.table=lacks.json", "sparsity.table='lacks.json'", ["has no 'dtype'"]),
    ("sparsity.table=nan.json", "sparsity.table='nan.json'", ["ffn of layers [0", "[9, nan, 0.0]"]),
    ("sparsity.table=below.json", "sparsity.table='below.json'", ["ffn of layers [0", "[9, -1.0, 0.0]"]),
    ("sparsity.table=half.json", "sparsity.table='half.json'", ["[8.5, 1.0, 0.0]"]),
    ("sparsity.table=endless.json", "sparsity.table='endless.json'", ["[inf, 1.0, 0.0]"]),
    ("sparsity.table=ages.json", "sparsity.table='ages.json'", ["[9, 1e+300, 0.0]"]),
    ("sparsity.table=list.json", "sparsity.table='list.json'", ["list"]),
    ("sparsity.table=many.json", "sparsity.table='many.json'", ["threads='many'"]),
    ("sparsity.table=down.json", "sparsity.table='down.json'", ["[8, 0.5, 0.0] comes after 8 units"]),
    ("sparsity.table=words.json", "sparsity.table='words.json'", ["ffn of layers [0", "['9', '1', '0']"]),
    ("sparsity.table=flat.json", "sparsity.table='flat.json'", ["ffn of layers [0", "9: expected [units"]),
    ("sparsity.table=number.json", "sparsity.table='number.json'", ["attention of layers [0", "7: expected a list"]),
    ("sparsity.table=twice.json", "sparsity.table='twice.json'", ["layer 0 a second time"]),
    ("sparsity.table=beyond.json", "sparsity.table='beyond.json'", ["has times of layer 99"]),
    ("sparsity.table=index.json", "sparsity.table='index.json'", ["layers='0': expected a list of"]),
    ("sparsity.table=named.json", "sparsity.table='named.json'", ["layers={'0': ", "a list of objects"]),
    ("sparsity.table=more.json", "sparsity.table='more.json'", ["has model=", "an object of architecture"]),
    ("sparsity.table=device.json", "sparsity.table='device.json'", ["device=None: expected text"]),
    ("sparsity.table=deep.json", "sparsity.table='deep.json'", ["no JSON"]),
    ("sparsity.table=slower.json", "sparsity.of='latency'", ["fewer units take no less"]),
    (
        "sparsity.table=t.json search.granularity=[query_heads,channels]",
        "sparsity.table='t.json'",
        ["no query_heads of layer 0", "1 to 2"],
    ),
    ("sparsity.table=whole.json", "sparsity.table='whole.json'", ["query_heads of layer 0 goes from 2 to 2", "1 to 2"]),
    ("sparsity.table=t.json sparsity.ratio=0.99", "sparsity.ratio=0.99", ["at most", "table of times"]),
    ("sparsity.phase=prefill", "sparsity.context=0", ["phase=prefill"]),
    ("sparsity.batch=0", "sparsity.batch=0", [">= 1"]),
    ("model.stream=true", "sparsity.of='latency'", ["model.stream=false"]),
]


@pytest.mark.slow
def test_what_cannot_be_counted_is_refused_before_a_weight_is_loaded(
    cli: Any, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("too late"))
    slower = {name: [[n, 99.0 - n / 9, iqr] for n, _, iqr in table["layers"][0][name]] for name in ("attention", "ffn")}
    short = {**table, "layers": [{**table["layers"][0], "ffn": table["layers"][0]["ffn"][:9]}]}
    other = {**table, "model": {**table["model"], "hidden": 7}}
    widths = table["model"]["widths"]
    wide = {**table, "model": {**table["model"], "widths": [*widths[:2], [4, 1, 7], *widths[3:]]}}
    deeper = {**table, "model": {**table["model"], "widths": [*widths, widths[0]]}}
    lacks = {key: value for key, value in table.items() if key != "dtype"}
    files = {
        "t": table,
        "short": short,
        "other": other,
        "wide": wide,
        "deeper": deeper,
        "lacks": lacks,
        "list": [],
        "many": table | {"threads": "many"},
        "device": table | {"device": None},
        "twice": {**table, "layers": table["layers"] * 2},
        "beyond": {**table, "layers": [*table["layers"], {**table["layers"][0], "layers": [99]}]},
        "index": {**table, "layers": [{**table["layers"][0], "layers": "0"}]},
        "named": {**table, "layers": {"0": table["layers"][0]}},
        "number": {**table, "layers": [{**table["layers"][0], "attention": 7}]},
        "more": {**table, "model": {**table["model"], "experts": 2}},
        "slower": {**table, "layers": [{**table["layers"][0], **slower}]},
        "whole": {**table, "layers": [{**table["layers"][0], "query_heads": [[2, 1.0, 0.0]]}]},
    }
    points = {"nan": [9, math.nan, 0.0], "below": [9, -1.0, 0.0], "half": [8.5, 1.0, 0.0]}
    points |= {"down": [8, 0.5, 0.0], "words": ["9", "1", "0"], "flat": 9}
    points |= {"endless": [math.inf, 1.0, 0.0], "ages": [9, 1e300, 0.0]}
    for name, point in points.items():
        (own,) = table["layers"]
        files[name] = {**table, "layers": [{**own, "ffn": [*own["ffn"][:9], point, *own["ffn"][10:]]}]}
    for name, data in files.items():
        Path(f"{name}.json").write_text(json.dumps(data))
    Path("text.json").write_text("milliseconds")
    Path("deep.json").write_text("[" * 100_000)
    for command, named, phrases in REFUSED:
        code, _, err = cli("sparsity.of=latency", "search=global", *command.split())
        assert code == 2, command
        assert_told(err, named, *phrases)


def test_a_forecast_says_what_a_run_would_of_its_table(
    cli: Any, table: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (own,) = table["layers"]
    noisy = {name: [[n, ms, ms] for n, ms, _ in own[name]] for name in ("attention", "ffn")}
    foreign = table | {"device": "another", "threads": 64, "layers": [{**own, **noisy}]}
    for name, data, said in (("t", table, False), ("foreign", foreign, True)):
        Path(f"{name}.json").write_text(json.dumps(data))
        caplog.clear()
        code, out, err = cli(*OURS, "run.dry=true", f"sparsity.table={name}.json")
        assert code == 0, err
        assert ("sparsity.table='foreign.json': times of another (64 threads), this run is on" in out) == said
        warnings = [line for line in caplog.messages if "times spread by more than a quarter" in line]
        assert len(warnings) == said and not any("the cache does not keep" in line for line in warnings)


def little(folder: Path) -> Path:
    """A LLaMA of 2 layers whose parts all weigh something."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 344, "vocab_size": 512, "max_position_embeddings": 512}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


@each("phase, context", [("decode", 400), ("prefill", 100)])
def test_memory_foretold_is_what_timing_holds(
    phase: str, context: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting in ("SECONDS", "AT_ONCE", "STACK_SECONDS"):
        monkeypatch.setattr(measure, setting, 0.0)
    monkeypatch.setattr(measure, "LEAST", 1)
    source = ModelSource("x", str(little(tmp_path)), None, "float32", "cpu", False, False, 4)
    sparsity, peaks = OneShot(0.2, "latency", context, 8, phase, None), []
    for what in (
        lambda work: measure_table(work, conditions_of(work.model, sparsity), 1),
        lambda work: compare_times(work, work.model),
    ):
        with LiveBytes() as live:
            what(Workload(sparsity.batch, sparsity.context, sparsity.phase, source.load()))
        peaks.append(live.peak)
    shape = shape_of(source.outline())
    stages = timing_stages(shape, shape.bytes, 0, sparsity)
    for stage, peak in zip(stages, peaks, strict=True):
        assert 0.75 <= stage.total / peak <= 1.2, (stage, peak)


def test_a_forecast_has_the_stages_that_a_run_times_in(cli: Any, table: dict[str, Any]) -> None:
    Path("t.json").write_text(json.dumps(table))
    Path("foreign.json").write_text(json.dumps(table | {"device": "another"}))
    for typed, timed in (
        ("sparsity.of=decoder", []),
        ("sparsity.of=latency", ["time layers", "time pruned"]),
        ("sparsity.of=latency sparsity.table=t.json", ["time pruned"]),
        ("sparsity.of=latency sparsity.table=foreign.json", []),
    ):
        code, out, err = cli(*OURS[1:], *typed.split(), "run.dry=true")
        assert code == 0, err
        assert re.findall(r"^ +(time \w+) ", out, re.MULTILINE) == timed, typed
        assert ("model.stream=true is not possible" in out) == ("latency" in typed)


def test_the_keys_of_times_leave_the_hash_where_they_are_as_they_come() -> None:
    before = {"sparsity": {"ratio": 0.2, "of": "decoder", "context": 0}}
    batch, phase, file = UNTIMED
    after = {"sparsity": {**before["sparsity"], "batch": batch, "phase": phase, "table": file}}
    assert config_hash(before) == config_hash(after)
    assert config_hash({"sparsity": {**after["sparsity"], "phase": "prefill"}}) != config_hash(before)


def test_a_noisy_table_is_said_to_be_one() -> None:
    times = Times((LayerTimes((0,), Curve(((0, 0.1, 0.0), (1, 1.0, 0.5))), Curve(((0, 0.1, 0.0), (9, 1.0, 0.0)))),))
    table = Table(Conditions("cpu", 1, "float32", "sdpa", "2", {}, 1, 0, "decode"), times)
    assert table.unsteady() == (1, 4) and table.steady
    wide = replace(times.of[0], ffn=Curve(((0, 0.1, 0.1), (9, 1.0, 0.3))))
    assert not replace(table, times=Times((wide,))).steady
