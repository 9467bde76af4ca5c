"""Pruning in rounds: on budget, in the original model's units, rescored each time, and one round as one shot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneexp import progress
from pruneexp.__main__ import main
from pruneexp.compensator import Bias, LeastSquares, NoCompensation
from pruneexp.criterion import BlockInfluence, Flap, LossDrop, Magnitude, Random, WandaSp
from pruneexp.model import Model
from pruneexp.pruning import Method, Pruned
from pruneexp.pruning.record import Record
from pruneexp.pruning.rounds import prune_in_rounds_
from pruneexp.search import AlAm, Global, Greedy, PolicyGradient, UlUm, Uniform
from pruneexp.sparsity import Cubic, Linear, OneShot
from pruneexp.surgery import prove_in_place, save, shrink_
from pruneexp.types import ConfigError, Plan, unit_scores
from tests.cases import UNTIMED, each
from tests.conftest import FAMILIES
from tests.masking import masked

FLAP, WANDA = Flap("WIFV", False), WandaSp("sum", True)
NONE, BIAS, SEQUENTIAL_BIAS = NoCompensation(False), Bias(False), Bias(True)
UNIFORM, GLOBAL = (
    Uniform(1, ["heads", "channels"], 0.0, 0.0, 1, alike=False, remainder="nearest"),
    Global(1, ["heads", "channels"], "zscore", 1),
)
BLOCKS = Global(0, ["blocks"], "none", 1)


def prune(
    model: Model, tokens_NT: Tensor, criterion: Any, schedule: Any, search: Any, compensator: Any = NONE
) -> Pruned:
    return prune_in_rounds_(
        model, tokens_NT, Method(criterion, schedule, search, compensator), Record(rng=torch.Generator().manual_seed(0))
    )


@torch.no_grad()
def logits(model: Model, tokens_NT: Tensor) -> Tensor:
    return model.module(tokens_NT[:2]).logits


METHODS = {
    "flap": (FLAP, AlAm(), BIAS),
    "wanda_sp": (WANDA, UlUm(), NONE),
    "random": (Random(3), UNIFORM, SEQUENTIAL_BIAS),
    "magnitude": (Magnitude("coupled", 1), GLOBAL, NONE),
    "blocks": (BlockInfluence("cosine"), BLOCKS, NONE),
}


@each("schedule, case", itertools.product([Linear, Cubic], METHODS))
def test_one_round_is_one_shot_to_the_bit(
    case: str, schedule: Any, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    criterion, search, compensator = METHODS[case]
    models = [tiny("llama"), tiny("llama")]
    schedules = [OneShot(0.4, "decoder", 0, *UNTIMED), schedule(0.4, "decoder", 0, 1, *UNTIMED)]
    first, second = (
        prune(model, tokens_NT, criterion, how, search, compensator)
        for model, how in zip(models, schedules, strict=True)
    )
    assert first.plan.to_json() == second.plan.to_json() and "rounds" not in first.plan.budget
    assert first.scores.keys() == second.scores.keys()
    assert all(torch.equal(unit_scores(s), unit_scores(second.scores[n])) for n, s in first.scores.items())
    states = [model.module.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.slow
@each(
    "schedule, compensator, criterion, search, family",
    [
        (schedule, compensator, *case, family)
        for schedule, compensator, case, family in itertools.product(
            [Linear, Cubic], [NONE, BIAS, SEQUENTIAL_BIAS], [(FLAP, GLOBAL), (WANDA, UNIFORM)], FAMILIES
        )
    ],
)
def test_the_budget_is_that_of_the_original_model(
    family: str,
    criterion: Any,
    search: Any,
    compensator: Any,
    schedule: Any,
    tiny: Callable[..., Model],
    tokens_NT: Tensor,
) -> None:
    dense = tiny(family)
    whole, cheapest = dense.decoder_params, min(site.cost.params for site in dense.sites())
    for ratio in (0.15, 0.4):
        model = deepcopy(dense)
        pruned = prune(model, tokens_NT[:4], criterion, schedule(ratio, "decoder", 0, 3, *UNTIMED), search, compensator)
        assert abs(whole - model.decoder_params - ratio * whole) <= cheapest / 2 + 1e-6, "biases are paid for"
        assert pruned.sites == dense.sites() and pruned.plan.sites.keys() == {site.name for site in dense.sites()}
        removed = sum(pruned.plan.removed(site) * site.cost.params for site in pruned.sites)
        budget = pruned.plan.budget
        assert budget["removed_params"] == removed == sum(each["removed_params"] for each in budget["rounds"])
        assert budget["ratio"] == ratio and len(budget["rounds"]) == 3
        assert all(each["removed_params"] > 0 for each in budget["rounds"])


def test_a_share_of_what_units_hold(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = tiny("llama")
    held = sum(site.units * site.cost.params for site in model.sites())
    pruned = prune(model, tokens_NT, FLAP, Linear(0.3, "prunable", 0, 3, *UNTIMED), GLOBAL, BIAS)
    gone = sum(pruned.plan.removed(site) * site.cost.params for site in pruned.sites)
    assert abs(gone - 0.3 * held) <= min(site.cost.params for site in pruned.sites) / 2


@each(
    "criterion, search, ratio, family",
    [
        (*case, family)
        for case, family in itertools.product(
            [(FLAP, GLOBAL, 0.5), (WANDA, UlUm(), 0.5), (FLAP, AlAm(), 0.8), (BlockInfluence("cosine"), BLOCKS, 0.66)],
            FAMILIES,
        )
    ],
)
def test_the_plan_rebuilds_the_model_from_the_original(
    family: str, criterion: Any, search: Any, ratio: float, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model, fresh = tiny(family), tiny(family)
    pruned = prune(model, tokens_NT, criterion, Linear(ratio, "decoder", 0, 3, *UNTIMED), search)
    plan = Plan.from_json(pruned.plan.to_json())
    expected = logits(model, tokens_NT)
    with masked(fresh, plan):
        torch.testing.assert_close(logits(fresh, tokens_NT), expected, rtol=1e-9, atol=1e-9)
    shrink_(fresh, plan)
    assert torch.equal(logits(fresh, tokens_NT), expected)
    assert fresh.decoder_params == model.decoder_params


def test_what_left_whole_in_an_early_round_stays_in_the_record(
    tiny: Callable[..., Model], tokens_NT: Tensor, tmp_path: Path
) -> None:
    model = tiny("llama")
    pruned = prune(model, tokens_NT, FLAP, Cubic(0.85, "decoder", 0, 3, *UNTIMED), AlAm(), BIAS)
    emptied = [name for name, site in pruned.plan.sites.items() if not site.kept]
    assert emptied, "this ratio takes whole sublayers"
    for site in pruned.sites:
        assert unit_scores(pruned.scores[site.name]).shape == (site.units,)
        assert pruned.plan.sites[site.name].units == site.units
    save(model, tmp_path / "model")
    assert prove_in_place(model, tmp_path / "model", tokens_NT[:2])["max_logit_difference"] == 0


def test_every_round_scores_what_the_one_before_left(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model, by_hand, at_once = tiny("llama"), tiny("llama"), tiny("llama")
    whole = by_hand.decoder_params
    pruned = prune(model, tokens_NT, FLAP, Linear(0.6, "decoder", 0, 2, *UNTIMED), GLOBAL)
    first = prune(by_hand, tokens_NT, FLAP, OneShot(0.3, "decoder", 0, *UNTIMED), GLOBAL)
    left = 1 - 0.4 * whole / by_hand.decoder_params
    second = prune(by_hand, tokens_NT, FLAP, OneShot(left, "decoder", 0, *UNTIMED), GLOBAL)
    intact = True  # nothing has left before the site
    for name in (site.name for site in first.sites):
        site = pruned.plan.sites[name]
        middle = list(first.plan.sites[name].kept)
        assert list(site.kept) == [middle[unit] for unit in second.plan.sites[name].kept]
        score, dense = unit_scores(pruned.scores[name]), unit_scores(first.scores[name])
        gone = [unit for unit in range(site.units) if unit not in middle]
        assert torch.equal(score[middle], unit_scores(second.scores[name]))
        assert torch.equal(score[gone], dense[gone]), "the score with which a unit left"
        assert torch.allclose(score[middle], dense[middle], rtol=1e-9, atol=0) == intact
        intact = intact and not gone
    assert not intact
    shot = prune(at_once, tokens_NT, FLAP, OneShot(0.6, "decoder", 0, *UNTIMED), GLOBAL)
    assert shot.plan.sites != pruned.plan.sites, "other scores, other units"


@pytest.mark.parametrize(
    ("criterion", "search"),
    [
        (LossDrop(), Greedy(1, ["attention", "ffn"], 0, 0, None, "scores", "none", 1)),
        (BlockInfluence("cosine"), Global(0, ["attention", "ffn"], "per_parameter", 1)),
    ],
    ids=["loss_drop", "block_influence"],
)
def test_sublayers_leave_round_by_round_by_scores_of_wholes(
    criterion: Any, search: Any, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    pruned = prune(tiny("llama"), tokens_NT, criterion, Linear(0.6, "decoder", 0, 2, *UNTIMED), search)
    empty = [name for name, site in pruned.plan.sites.items() if not site.kept]
    assert len(empty) >= 2 and all(len(unit_scores(score)) == 1 for score in pruned.scores.values())


def test_blocks_leave_round_by_round_under_their_own_names(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = tiny("llama")

    class Middle(Random):
        """The dense model's second layer is the worst, then its third."""

        def __call__(self, block: Any, evidence: Any) -> Any:
            return {site.name: torch.tensor([float(site.layer != 1)]) for site in block.sites}

    pruned = prune(model, tokens_NT, Middle(0), Linear(0.66, "decoder", 0, 2, *UNTIMED), BLOCKS)
    gone = [name for name, site in pruned.plan.sites.items() if site.kind == "block"]
    assert gone == ["model.layers.1", "model.layers.2"] and model.origin == [0]
    assert {name for name in pruned.plan.sites if name not in gone} == {
        "model.layers.0.self_attn",
        "model.layers.0.mlp",
    }
    assert pruned.scores.keys() == {f"model.layers.{index}" for index in range(3)}
    assert pruned.plan.budget["removed_params"] == tiny("llama").decoder_params - model.decoder_params


@pytest.mark.parametrize(
    ("search", "compensator"),
    [
        (PolicyGradient(1, ["heads", "channels"], "separate", "scores", "sqrt", 2, 0.01, 5, 1.0, 3, 1), NONE),
        (GLOBAL, LeastSquares(1e-3, "dense", True, "site")),
    ],
    ids=["policy_gradient", "least_squares"],
)
def test_searches_that_probe_and_readers_fitted_anew(
    search: Any, compensator: Any, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model = tiny("llama")
    pruned = prune(model, tokens_NT, FLAP, Linear(0.4, "decoder", 0, 2, *UNTIMED), search, compensator)
    assert torch.isfinite(logits(model, tokens_NT)).all()
    assert all(pruned.plan.sites[site.name].kept for site in pruned.sites)


def test_what_is_too_much_says_in_which_round(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"^sparsity\.ratio=.*: expected at most .* \(in round 2 of 2, "):
        prune(tiny("llama"), tokens_NT[:2], FLAP, Linear(0.97, "decoder", 0, 2, *UNTIMED), GLOBAL)


def test_progress_says_the_round(
    tiny: Callable[..., Model], tokens_NT: Tensor, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    prune(tiny("llama"), tokens_NT[:2], FLAP, Linear(0.4, "decoder", 0, 2, *UNTIMED), GLOBAL)
    err = capfd.readouterr().err
    assert "calibrate (round 1 of 2): 1/3 blocks" in err and "shrink (round 2 of 2): 1/3 blocks" in err
    prune(tiny("llama"), tokens_NT[:2], FLAP, OneShot(0.4, "decoder", 0, *UNTIMED), GLOBAL)
    assert "round" not in capfd.readouterr().err


REFUSED = [
    (
        ["model.stream=true", "evaluator=[size]"],
        "sparsity.rounds=4: with model.stream=true a model is written",
    ),
    (["search=al_mm", "search.heads=3"], "search.heads=3: a count for all rounds together"),
    (["search=ul_mm", "search.heads=3"], "search.heads=3: a count for all rounds together"),
    (["sparsity.rounds=0"], "sparsity.rounds=0: expected an integer >= 1"),
    (["sparsity.rounds=1.5"], "sparsity.rounds=1.5: expected an integer"),
]


@each(
    "schedule, typed, answer", [(schedule, *case) for schedule, case in itertools.product(["linear", "cubic"], REFUSED)]
)
def test_what_has_no_rounds_is_refused_before_it_starts(
    typed: list[str],
    answer: str,
    schedule: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([f"sparsity={schedule}", *typed]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"pruneexp: {answer}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_one_round_may_stream_and_count_heads(build_from: Callable[..., Any]) -> None:
    streamed = build_from("sparsity=linear", "sparsity.rounds=1", "model.stream=true")
    counted = build_from("sparsity=cubic", "sparsity.rounds=1", "search=al_mm", "search.heads=3")
    assert streamed.sparsity.shares() == counted.sparsity.shares() == (streamed.sparsity.ratio,)


@pytest.mark.slow
def test_a_whole_run_in_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "BAR_AFTER", 3600.0)
    typed = ["sparsity=cubic", "sparsity.rounds=3", "sparsity.ratio=0.3", "search=global", "evaluator=[size]"]
    assert main([*typed, "dataset.samples=16", "run.dir=run", "run.prove=in_place"]) == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["sparsity/decoder"] == pytest.approx(0.3, abs=1e-3)
    assert metrics["passes/forward"] == pytest.approx(3), "a pass a round"
    assert metrics["proof/max_logit_difference"] == 0
    budget = json.loads(Path("run/plan.json").read_text())["budget"]
    assert [round(each["removed_params"] / budget["removed_params"], 2) for each in budget["rounds"]] == pytest.approx(
        [19 / 27, 7 / 27, 1 / 27], abs=0.02
    )
