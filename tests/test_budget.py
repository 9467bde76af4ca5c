"""What a ratio is a share of, met in that quantity by every search; and budgets out of reach, refused in one line."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pruneexp
from pruneexp.compensator import Bias, LeastSquares, NoCompensation
from pruneexp.criterion import Magnitude, Random
from pruneexp.model import Model, ModelSource
from pruneexp.pruning import Method, Pruned, prune_
from pruneexp.pruning.budget import biases_added, check_pruning, whole_budget
from pruneexp.pruning.record import Record
from pruneexp.search import (
    AlAm,
    AlAmOfficial,
    AlMm,
    Evolutionary,
    Global,
    Greedy,
    PolicyGradient,
    UlMm,
    UlUm,
    Uniform,
)
from pruneexp.sparsity import OneShot
from pruneexp.types import Budget, ConfigError, Cost, Site
from tests.cases import UNTIMED, each, pairwise
from tests.conftest import FAMILIES, PARITY
from tests.messages import assert_told
from tests.tiny_families import tiny_model

QUANTITIES = ("decoder", "prunable", "macs", "bytes", "kv_cache")
COUNTS = {"decoder": "params", "prunable": "params"}
CONTEXT = 10
BOTH: Any = ["heads", "channels"]
NONE, BIAS = NoCompensation(False), Bias(False)
EVOLUTIONARY = Evolutionary(1, BOTH, 3.0, 0.5, 1, 0.2, 2, 1, 1, {}, 0.0, "next_token")
POLICY = PolicyGradient(1, BOTH, "separate", "scores", "sqrt", 2, 0.002, 5, 2.0, 2, 1)
GREEDY = Greedy(1, BOTH, 0, 0, 1, "scores", "none", 1)
EXACT = {
    "uniform": Uniform(1, BOTH, 0.0, 0.0, 1, alike=False, remainder="nearest"),
    "protected": Uniform(1, BOTH, 0.34, 0.0, 1, alike=False, remainder="nearest"),
    "global": Global(1, BOTH, "zscore", 1),
    "per_parameter": Global(1, BOTH, "per_parameter", 1),
    "evolutionary": EVOLUTIONARY,
    "policy_gradient": POLICY,
    "joint": replace(POLICY, budgets="joint"),
    "greedy": GREEDY,
}
BUDGETED = {
    **EXACT,
    "al_am": AlAm(),
    "heads": Global(1, ["heads"], "zscore", 1),
    "blocks": Global(0, ["blocks"], "none", 1),
}


def prune(model: Model, tokens_NT: Tensor | None, search: Any, sparsity: OneShot, compensator: Any = NONE) -> Pruned:
    return prune_(
        model,
        tokens_NT,
        Method(Random(5), sparsity, search, compensator),
        sparsity.ratio,
        Record(rng=torch.Generator().manual_seed(0)),
    )


def counted(model: Model, search: Any, of: Any) -> int:
    return whole_budget(model, search, OneShot(0.0, of, CONTEXT, *UNTIMED), 0.0).total


# What is counted


@pytest.mark.parametrize(
    ("counts", "head", "channel", "bias"),
    [("params", 40, 7, 5), ("macs", 36 + 10 * 8, 6, 0), ("bytes", 2 * (40 + 10 * 4), 14, 10), ("kv_cache", 8, 0, 0)],
)
def test_the_price_of_a_unit(counts: Any, head: int, channel: int, bias: int) -> None:
    attention = Site("a", "attention", 0, 3, 4, Cost(40, 36, 4, 8))
    mlp = Site("m", "mlp", 0, 9, 1, Cost(7, 6, 0))
    budget = Budget(0.5, 1000, counts=counts, context=10, element_size=2)
    assert (budget.price(attention), budget.price(mlp), budget.added_params(5)) == (head, channel, bias)


# decoder: 3 layers of (units x parameters + norms, readers' biases); macs: 2 x width more for each token of context and
# KV group; bytes: 8 each, 16 elements of KV cache a group and token.
TOTALS = {
    "llama": (38304, 38016, 3 * (3 * (2304 + 10 * 32) + 40 * 144), 8 * (38304 + 3 * 3 * 16 * 10), 8 * 3 * 3 * 16),
    "opt": (40584, 39720, 3 * (6 * (1536 + 10 * 16) + 40 * 96), 8 * (40584 + 3 * 6 * 16 * 10), 8 * 3 * 6 * 16),
    "bloom": (84816, 83952, 3 * (6 * (1536 + 10 * 16) + 192 * 96), 8 * (84816 + 3 * 6 * 16 * 10), 8 * 3 * 6 * 16),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_totals_by_hand(family: str, tiny: Callable[..., Model]) -> None:
    model = tiny(family)
    assert tuple(counted(model, AlAm(), of) for of in QUANTITIES) == TOTALS[family]
    blocks = BUDGETED["blocks"]
    totals = [counted(model, blocks, of) for of in QUANTITIES]
    assert totals == [TOTALS[family][0], *TOTALS[family][:1], *TOTALS[family][2:]], "a block holds its norms too"


# The budget is met in what is counted


ROWS = pairwise(list(EXACT), QUANTITIES, FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("search", EXACT)
def test_every_quantity_is_met_to_the_nearest_unit(
    search: str, tiny: Callable[..., Model], tokens_NT: Tensor, subtests: pytest.Subtests
) -> None:
    for of, family in [(of, family) for name, of, family in ROWS if name == search]:
        with subtests.test(of=of, family=family):
            assert_met(search, of, tiny(family), tokens_NT)


def assert_met(search: str, of: Any, model: Model, tokens_NT: Tensor) -> None:
    before = counted(model, EXACT[search], of)
    # what 2 of 6 or 1 of 3 heads hold, so that a KV cache can be met at all
    pruned = prune(model, tokens_NT[:4], EXACT[search], OneShot(1 / 3, of, CONTEXT, *UNTIMED))
    after = counted(model, EXACT[search], of)
    prices = [p for p in map(Budget(0, 0, 0, None, COUNTS.get(of, of), CONTEXT, 8).price, pruned.sites) if p]
    assert abs(before - after - before / 3) <= min(prices) / 2 + 1e-6
    budget, name = pruned.plan.budget, COUNTS.get(of, of)
    assert budget[f"total_{name}"] == before and budget[f"removed_{name}"] == before - after
    assert budget["of"] == of and budget["removed_params"] > 0
    if of == "kv_cache":
        assert all(not pruned.plan.removed(site) for site in pruned.sites if site.kind == "mlp")
    assert all(pruned.plan.sites[site.name].kept for site in pruned.sites)


@each("of, family", itertools.product(QUANTITIES, FAMILIES))
def test_al_am_meets_every_quantity_as_near_as_a_threshold_can(
    family: str, of: Any, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model = tiny(family)
    before = counted(model, AlAm(), of)
    sparsity = OneShot(0.4, of, CONTEXT, *UNTIMED)
    pruned = prune(model, tokens_NT, AlAm(), sparsity)
    dearest = max(map(whole_budget(model, AlAm(), sparsity, 0.4).price, pruned.sites))
    removed = pruned.plan.budget[f"removed_{COUNTS.get(of, of)}"]
    # the nearest prefix of its ranking, and the unit at the threshold leaves too
    assert removed > 0 and abs(removed - 0.4 * before) <= 1.5 * dearest


@pytest.mark.parametrize("search", [UlUm(), AlAmOfficial()], ids=["ul_um", "al_am_official"])
def test_what_goes_by_units_alone_does_not_care(search: Any, tiny: Callable[..., Model]) -> None:
    plans = [prune(tiny("llama"), None, search, OneShot(0.4, of, CONTEXT, *UNTIMED)).plan for of in QUANTITIES]  # type: ignore
    assert all(plan.sites == plans[0].sites for plan in plans)


@each("search, of", itertools.product([UlMm(3), AlMm(3)], ["decoder", "prunable", "macs", "bytes"]))
def test_channels_make_up_for_given_heads_in_every_quantity_they_fill(
    search: Any, of: Any, tiny: Callable[..., Model]
) -> None:
    model = tiny("llama")
    before = counted(model, search, of)
    pruned = prune(model, None, search, OneShot(0.4, of, CONTEXT, *UNTIMED))
    left = sum(len(plan.kept) for plan in pruned.plan.sites.values() if plan.kind == "attention")
    assert left == 6
    after = counted(model, search, of)
    channel = whole_budget(model, search, OneShot(0.4, of, CONTEXT, *UNTIMED), 0.4).price(pruned.sites[1])
    assert 0 <= 0.4 * before - (before - after) < 3 * channel, "rounded down, layer by layer"


@pytest.mark.parametrize("search", [UlMm(1), AlMm(1)], ids=["ul_mm", "al_mm"])
def test_given_heads_do_not_go_with_a_kv_cache(search: Any, tiny: Callable[..., Model]) -> None:
    with pytest.raises(ConfigError, match=r"^sparsity\.of='kv_cache': expected decoder, prunable, macs or bytes"):
        prune(tiny("llama"), None, search, OneShot(0.4, "kv_cache", 0, *UNTIMED))


@each("search", [each for name, each in BUDGETED.items() if name != "blocks"])
def test_a_model_without_any_kv_cache_is_no_division_by_zero(
    search: Any, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    from pruneexp.surgery import shrink_
    from pruneexp.types import Plan, SitePlan

    model = tiny("llama")
    shrink_(model, Plan({s.name: SitePlan(s.kind, s.units, ()) for s in model.sites() if s.kind == "attention"}))
    with pytest.raises(ConfigError, match=r"^sparsity\.of='kv_cache': expected another quantity, this model has none"):
        prune(model, tokens_NT, search, OneShot(0.2, "kv_cache", 0, *UNTIMED))


# Out of reach


@each("search, of, compensator", pairwise(list(BUDGETED), ["decoder", "macs", "kv_cache"], [NONE, BIAS]))
def test_the_largest_ratio_that_is_named_works(
    search: str, of: Any, compensator: Any, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model, method = tiny("llama"), BUDGETED[search]
    if search == "al_am" and of != "decoder":  # it may remove everything
        assert check_pruning(model, method, OneShot(0.999, of, 0, *UNTIMED), compensator).ratio == 0.999
        return
    with pytest.raises(ConfigError) as refused:
        check_pruning(model, method, OneShot(0.999, of, 0, *UNTIMED), compensator)
    match = re.fullmatch(r"sparsity\.ratio=0\.999: expected at most (0\.\d+), all that .*", str(refused.value))
    assert match, refused.value
    largest = float(match[1])
    with pytest.raises(ConfigError, match=r"^sparsity\.ratio="):
        check_pruning(model, method, OneShot(min(largest + 0.02, 0.9999), of, 0, *UNTIMED), compensator)
    check_pruning(model, method, OneShot(largest, of, 0, *UNTIMED), compensator)
    if search not in ("greedy", "evolutionary"):  # slow at such ratios, and the same check
        pruned = prune(model, tokens_NT[:2], method, OneShot(largest, of, 0, *UNTIMED), compensator)
        assert any(len(plan.kept) < plan.units for plan in pruned.plan.sites.values())


def test_biases_of_sites_that_stay_whole_are_no_obstacle(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model, search = tiny("llama"), BUDGETED["heads"]
    sparsity = OneShot(
        0.356, "decoder", 0, *UNTIMED
    )  # 6 heads of 2304 less 3 biases of 48; with those of the FFN it is too much
    assert 0.356 * 38304 + 6 * 48 > 6 * 2304 > 0.356 * 38304 + 3 * 48
    assert biases_added(model, sparsity, BIAS, model.sites()) == 6 * 48
    check_pruning(model, search, sparsity, BIAS)
    pruned = prune(model, tokens_NT, search, sparsity, BIAS)
    assert pruned.plan.budget["removed_params"] == 6 * 2304


REFUSED = [  # what is typed, what the line names, what it says to type instead
    ("search=uniform sparsity.ratio=0.999", "sparsity.ratio=0.999", ["at most 0.8895"]),
    ("search=global search.min_units=3 sparsity.ratio=0.99", "sparsity.ratio=0.99", ["at most 0.6731"]),
    ("search=global search.granularity=[heads] sparsity.ratio=0.5", "sparsity.ratio=0.5", ["at most 0.3185"]),
    ("search=llm_pruner sparsity.ratio=0.9", "sparsity.ratio=0.9", ["at most 0.7411"]),
    ("search=llm_pruner search.protect_first=0.5 search.protect_last=0.45", "search.protect_first=0.5", ["less"]),
    ("search=greedy criterion=random search.keep_first=3 search.keep_last=3", "search.keep_first=3", ["less"]),
    ("search=greedy criterion=random search.keep_last=9", "search.keep_first=1", ["less"]),
    ("search=greedy criterion=random sparsity.ratio=0.7", "sparsity.ratio=0.7", ["at most 0.6666"]),
    ("search=blocks criterion=random sparsity.ratio=0.9", "sparsity.ratio=0.9", ["at most 0.8333"]),
    ("search=evolutionary criterion=obs sparsity.ratio=0.999", "sparsity.ratio=0.999", ["at most 0.8895"]),
    ("search=policy_gradient sparsity.ratio=0.999", "sparsity.ratio=0.999", ["at most 0.8895"]),
    ("search=uniform sparsity.of=kv_cache sparsity.ratio=0.8", "sparsity.ratio=0.8", ["at most 0.75"]),
    ("search=al_am sparsity.ratio=0.9999", "sparsity.ratio=0.9999", ["at most 0.9977"]),
    ("search=ul_mm search.heads=1000", "search.heads=1000", ["at most 6", "sparsity.ratio"]),
    ("search=al_mm search.heads=1000", "search.heads=1000", ["at most 11", "sparsity.ratio"]),
    ("search=al_mm search.heads=0 sparsity.ratio=0.9", "search.heads=0", ["at least 19"]),
    ("search=ul_mm search.heads=0 sparsity.of=kv_cache", "sparsity.of='kv_cache'", ["FFN channels"]),
    ("search=global search.granularity=[channels] sparsity.of=kv_cache", "search.granularity=['channels']", []),
]


@pytest.mark.slow
@each("command, named, typed, dry", [(*case, dry) for case in REFUSED for dry in (False, True)])
def test_a_budget_out_of_reach_is_refused_before_a_weight_is_loaded(
    command: str, named: str, typed: list[str], dry: bool, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: Any) -> Any:
        raise AssertionError("too late")

    monkeypatch.setattr(ModelSource, "load", touched)
    monkeypatch.setattr(ModelSource, "describe", touched)  # nor a text tokenised
    code, out, err = cli(*command.split(), f"run.dry={str(dry).lower()}")
    assert (code, out) == (2, "")
    assert_told(err, named, *typed)
    assert not list(Path().iterdir())


def test_dense_targets_behind_post_norms_are_refused_before_a_weight_is_loaded(
    tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import OPTForCausalLM

    from tests.conftest import tiny_config

    config = tiny_config("opt")
    config.do_layer_norm_before = False
    OPTForCausalLM(config).save_pretrained(tmp_path / "post")
    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("too late"))
    data = [f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
    ours = ["model=hf", "model.path=post", "dataset=tokens", "dataset.length=64", *data, "run.dir=run"]
    code, _, err = cli(*ours, "compensator=least_squares", "compensator.target=dense", "compensator.sequential=true")
    assert code == 2 and err.endswith(
        "pruneexp: compensator.target='dense': this model normalises behind its sublayers; expected "
        "compensator.target=pruned\n"
    )
    assert not Path("run").exists()
    blocks = Global(0, ["blocks"], "none", 1)  # leaves nothing to compensate
    outline = deepcopy(ModelSource("post", "post", None, "auto", "cpu", False, False, 4).outline())
    check_pruning(outline, blocks, OneShot(0.3, "decoder", 0, *UNTIMED), LeastSquares(1e-3, "dense", True, "site"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_best_runs_as_typed_behind_post_norms(name: str, tmp_path: Path, cli: Any) -> None:
    tiny_model(name).save_pretrained(tmp_path / name)
    np.save(tmp_path / "windows.npy", np.random.default_rng(0).integers(3, 64, (8, 16)))
    data = ["dataset=tokens", *(f"dataset.{part}=windows.npy" for part in ("calibration", "evaluation"))]
    typed = ["recipe=best", "search.effort=1", "model=hf", f"model.path={name}", *data, "run.dir=run", "run.prove=off"]
    code, _, err = cli(*typed, "evaluator=[size]")
    assert code == 0, err


@pytest.mark.slow
def test_whole_attention_sublayers_free_a_kv_cache(cli: Any) -> None:
    code, _, err = cli(
        *("search=sublayers", "sparsity.of=kv_cache", "sparsity.ratio=0.5", "criterion=magnitude", "run.dir=run"),
        *("evaluator=[size]", "run.save=false", "run.prove=off", "dataset.samples=2"),
    )
    assert code == 0, err
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["sparsity/kv_cache"] == pytest.approx(0.5) and metrics["pruned/params"] < metrics["dense/params"]


SHARED = [
    "search=sublayers search.granularity=[attention]",
    "search=sublayers sparsity.of=macs",
    "search=sublayers search.granularity=[attention] sparsity.of=kv_cache",
    "search=global search.granularity=[heads,attention] sparsity.of=prunable",
    "search=greedy search.granularity=[attention,ffn]",
    "search=policy_gradient search.granularity=[heads,attention,ffn] search.budgets=joint search.steps=4",
    "search=evolutionary search.granularity=[heads,channels,attention] search.effort=3",
]


@pytest.mark.parametrize("name", ["llama_multi_query", "gemma_multi_query", "falcon_7b"])
def test_shared_keys_and_values_leave_with_the_whole_attention(name: str, tokens_NT: Tensor) -> None:
    """They belong to no head, and yet they are paid for."""
    model = tiny_model(name).eval()
    wholes = 0
    for typed in SHARED:
        options = [*typed.split(), "evaluator=[size]"]
        result = pruneexp.prune(model, None, tokens_NT % 64, recipe="magnitude", ratio=0.3, overrides=options)
        metrics, budget = result.metrics, result.plan.budget
        removed = budget["removed_params"]
        gone = [own for own in result.plan.sites.values() if not own.kept]
        wholes += sum(own.kind == "attention" for own in gone)
        norms = model.config.hidden_size * len(gone)  # the one in front of a sublayer leaves with it
        assert 0 <= metrics["dense/params/decoder"] - metrics["pruned/params/decoder"] - removed <= norms, typed
        of = budget["of"]
        if of != "decoder":
            counted = COUNTS.get(of, of)
            assert metrics[f"sparsity/{of}"] == pytest.approx(budget[f"removed_{counted}"] / budget[f"total_{counted}"])
    assert wholes > 3


# What a run says


@pytest.mark.slow
@pytest.mark.parametrize("of", ["macs", "bytes", "kv_cache", "prunable"])
def test_the_share_is_a_metric_and_in_the_summary(of: str, cli: Any) -> None:
    data = [f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
    ours = ["model=hf", f"model.path={PARITY}", "dataset=tokens", "dataset.length=64", *data, "run.dir=run"]
    budget = [f"sparsity.of={of}", "sparsity.ratio=0.25", "sparsity.context=100", "compensator=bias", "search=uniform"]
    code, out, err = cli(*ours, *budget, "run.prove=off", "run.save=false", "evaluator=[size]")
    assert code == 0, err
    metrics = json.loads(Path("run/metrics.json").read_text())
    plan = json.loads(Path("run/plan.json").read_text())["budget"]
    name = COUNTS.get(of, of)
    share = metrics[f"sparsity/{of}"]
    assert share == pytest.approx(0.25, abs=0.002 if of != "kv_cache" else 1e-9)
    if of != "bytes":  # where biases count, which the plan has no part in
        assert share == pytest.approx(plan[f"removed_{name}"] / plan[f"total_{name}"])
    assert share < plan[f"removed_{name}"] / plan[f"total_{name}"] + 1e-9
    if of == "kv_cache":
        assert share == 1 - metrics["pruned/kv_bytes/token"] / metrics["dense/kv_bytes/token"]
    words = {"macs": "multiply-accumulates", "bytes": "weights and KV cache", "kv_cache": "KV cache"}
    assert re.search(rf"{words.get(of, 'parameters that units hold')}.*-2[45]\.\d %", out), out
    assert f"sparsity/{of}" not in out


@pytest.mark.slow
def test_a_dry_run_counts_as_the_sparsity_does(cli: Any) -> None:
    code, out, err = cli("run.dry=true", "search=uniform", "sparsity.of=kv_cache", "sparsity.ratio=0.5")
    assert code == 0, err
    # 6 layers, 4 groups, a key and a value of 32, 4 bytes each
    assert "to remove: 50.0% of 6,144 = 3,072 bytes of KV cache per token\n" in out
    code, out, err = cli("run.dry=true", "sparsity.ratio=0.1", "sparsity.of=macs", "sparsity.context=128")
    assert code == 0, err
    assert re.search(r"to remove: 10\.0% of [\d,]+ = [\d,]+ multiply-accumulates per token over 128 tokens", out)


def test_magnitudes_need_no_tokens_to_meet_a_budget_in_bytes(tiny: Callable[..., Model]) -> None:
    model = tiny("bloom")
    sparsity = OneShot(0.2, "bytes", 1000, *UNTIMED)
    before = counted(model, AlAm(), "bytes")
    method = Method(Magnitude("reader", 2), sparsity, EXACT["global"], NONE)
    prune_(model, None, method, 0.2, Record())
    assert counted(model, AlAm(), "bytes") < before
