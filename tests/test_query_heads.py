"""Query heads, as many out of every KV group: masked, shrunk, saved, scored, searched."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pruneexp
from pruneexp.compensator import Bias, LeastSquares, NoCompensation
from pruneexp.criterion import Flap, FlapOfficial, LlmBip, Magnitude, Obs, Random, Taylor, WandaSp
from pruneexp.evidence import Gram
from pruneexp.model import Model
from pruneexp.pruning import Method, Pruned
from pruneexp.pruning.query_heads import check_query_heads, with_query_heads
from pruneexp.pruning.record import Record
from pruneexp.pruning.rounds import prune_in_rounds_
from pruneexp.report.points import kept_shares
from pruneexp.search import (
    AlAmQueryHeads,
    Evolutionary,
    Global,
    Greedy,
    Layerwise,
    PolicyGradient,
    ServeSafe,
    Turns,
    Uniform,
)
from pruneexp.sparsity import Linear, OneShot
from pruneexp.surgery import padding, save, shrink_
from pruneexp.surgery.shrink import check_plan
from pruneexp.tracker.structure import widths
from pruneexp.types import ColumnScores, ConfigError, Plan, RemovalPath, Reorderable, SitePlan, unit_scores
from tests.cases import UNTIMED, each
from tests.masking import masked
from tests.tiny_families import TINY, is_mixture, of_every_family, others, random_model, says_heads

GROUPED = ("llama", "qwen3", "phi3", "olmo2", "stablelm_2_12b", "falcon_40b", "gemma2", "granite", "mixtral")
REST = others(of_every_family(lambda family: family.key_value_heads is not None), GROUPED)


def one_of_each(site: Any, kept: tuple[int, ...], which: int) -> SitePlan:
    """Of each kept group the query head `which`, counted on from its own number."""
    heads = tuple(unit * site.group + (which + unit) % site.group for unit in kept)
    return SitePlan("attention", site.units, kept, site.units * site.group, heads)


def plan_for(model: Model, case: str) -> Plan:
    """`alike`: one query head of each group in every layer; `uneven`: in the first, of two of its groups in the last;
    channels leave, too."""
    sites = {}
    for site in model.sites():
        if site.kind == "attention":
            kept = (0, 2) if case == "uneven" and site.layer == 2 else tuple(range(site.units))
            if case == "alike" or site.layer != 1:
                sites[site.name] = one_of_each(site, kept, site.layer)
        elif case == "uneven":
            sites[site.name] = SitePlan(site.kind, site.units, tuple(range(site.layer + 1, site.units)))
    return Plan(sites)


def logits(model: Model, tokens_NT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.module(tokens_NT).logits


@each("name, case", itertools.product(GROUPED, ["alike", "uneven"]))
def test_masked_is_shrunk_is_saved(
    name: str, case: str, loaded: Callable[..., Model], tokens_NT: torch.Tensor, tmp_path: Path, modules_cache: None
) -> None:
    masked_is_shrunk_is_saved(name, case, loaded, tokens_NT, tmp_path)


@pytest.mark.slow
@each("name, case", itertools.product(REST, ["alike", "uneven"]))
def test_so_it_is_in_every_other_family(
    name: str, case: str, loaded: Callable[..., Model], tokens_NT: torch.Tensor, tmp_path: Path, modules_cache: None
) -> None:
    masked_is_shrunk_is_saved(name, case, loaded, tokens_NT, tmp_path)


def masked_is_shrunk_is_saved(
    name: str, case: str, loaded: Callable[..., Model], tokens_NT: torch.Tensor, tmp_path: Path
) -> None:
    import transformers

    model = loaded(name)
    tokens_NT = tokens_NT % model.vocab_size
    plan, before = plan_for(model, case), model.decoder_params
    freed = sum(site.cost.params * plan.removed(site) for site in model.sites())
    freed += sum(s.head_cost.params * plan.lost_heads(s) for s in model.sites() if s.head_cost is not None)
    with masked(model, plan):
        expected = logits(model, tokens_NT)
    assert not torch.allclose(expected, logits(model, tokens_NT), atol=1e-3)
    shrink_(model, Plan.from_json(plan.to_json()))
    assert model.decoder_params == before - freed
    torch.testing.assert_close(logits(model, tokens_NT), expected, rtol=1e-9, atol=1e-10)
    form = save(model, tmp_path / "saved")
    eager = {"experts_implementation": "eager"} if is_mixture(name) else {}  # experts' other ways know no float64
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", trust_remote_code=True, dtype=torch.float64, **eager
    )
    torch.testing.assert_close(again(tokens_NT).logits, expected, rtol=1e-9, atol=1e-10)
    assert (form.kind == "stock") == (case == "alike" and says_heads(name))


def test_padded_is_refused(loaded: Callable[..., Model]) -> None:
    model = loaded("llama")
    shrink_(model, plan_for(model, "uneven"))
    with pytest.raises(ConfigError, match="format=padded: expected format=remote_code for KV groups that lost query"):
        padding(model)


# Plans


def test_a_plan_says_which_query_heads_stay() -> None:
    data = {"kind": "attention", "units": 3, "kept": [0, 2], "query_heads": 9, "kept_query_heads": [0, 2, 7, 8]}
    plan = Plan.from_json(json.dumps({"version": 1, "sites": {"a": data}, "budget": {}}))
    assert json.loads(plan.to_json())["sites"]["a"] == data
    whole = {"kind": "attention", "units": 3, "kept": [0, 2]}
    old = Plan.from_json(json.dumps({"version": 1, "sites": {"a": whole}, "budget": {}}))
    assert json.loads(old.to_json())["sites"]["a"] == whole


@each(
    "kept, heads, kept_heads",
    [
        ((0, 1), 6, (0, 1, 3)),  # two of one group, one of the other
        ((0, 1), 6, (0, 1)),  # none of a group that stays
        ((0,), 6, (3,)),  # of another group
        ((0, 1), 6, (3, 0)),
        ((0, 1), 7, (0, 4)),
        ((), 6, ()),
        ((0, 1), None, (0, 3)),
        ((0, 1), 6, None),
    ],
)
def test_uneven_query_heads_are_no_plan(kept: tuple[int, ...], heads: int | None, kept_heads: Any) -> None:
    with pytest.raises(ValueError, match="kept_query_heads=.*expected ascending, distinct heads below query_heads="):
        SitePlan("attention", 2, kept, heads, kept_heads)


def test_a_plan_of_other_query_heads_is_refused(loaded: Callable[..., Model]) -> None:
    model = loaded("llama")
    plan = Plan({"model.layers.0.self_attn": SitePlan("attention", 3, (0, 1, 2), 9, (0, 3, 6))})
    with pytest.raises(ConfigError, match="is of 9 query heads, in this model 6; expected a plan of the same model"):
        check_plan(model, plan)


# Scores and searches

QUERY = ["query_heads", "channels"]
SEARCHES: dict[str, Any] = {
    "uniform": Uniform(1, QUERY, 0.0, 0.0, 1, False, remainder="nearest"),
    "global": Global(1, QUERY, "zscore", 1),
    "ranking": Global(1, QUERY, "per_parameter", 1),
    "multiple": Global(1, QUERY, "zscore", 4),
    "blocks": Global(1, [*QUERY, "blocks"], "per_parameter", 1),
    "layerwise": Layerwise(1, QUERY, "none"),
    "al_am": AlAmQueryHeads(),
    "serve_safe": ServeSafe(1, QUERY, "zscore", 4, "down"),
    "evolutionary": Evolutionary(1, QUERY, 8.0, 0.5, 1, 0.5, 4, None, 1, {}, 0.0, "next_token"),
    "policy_gradient": PolicyGradient(1, QUERY, "separate", "scores", "sqrt", 2, 0.01, 5, 8.0, 3, 1),
    "greedy": Greedy(1, QUERY, 0, 0, 2, "probes", "per_parameter", 4),
}
CRITERIA: dict[str, Any] = {
    "flap": Flap("WIFV", False),
    "flap_official": FlapOfficial("WIFN", False),
    "wanda_sp": WandaSp("sum", True),
    "magnitude": Magnitude("coupled", 1),
    "random": Random(3),
    "taylor": Taylor("param_mix", "sum", "attention"),
    "llm_bip": LlmBip("l2", "up", "scale", True),
    "obs": Obs(1e-3, 1, 4, "output", False, 1.0, "site"),
}
LEAST_SQUARES, BIAS, NONE = LeastSquares(1e-3, "pruned", False, "site"), Bias(False), NoCompensation(False)


@pytest.fixture
def grouped(tmp_path: Path, source: Callable[..., Any]) -> Model:
    """Twelve query heads of 8 in three groups, 24 FFN channels, three layers."""
    values = {**TINY["qwen2"][1], "num_attention_heads": 12, "head_dim": 8, "tie_word_embeddings": False}
    values |= {"attention_bias": True}
    random_model("Llama", values).save_pretrained(tmp_path / "grouped")
    return source(tmp_path / "grouped", name="grouped", dtype="float64").load()


def pruned(model: Model, tokens_NT: torch.Tensor, *parts: Any, schedule: Any = None) -> Pruned:
    criterion, search, compensator = parts
    method = Method(criterion, schedule or OneShot(0.25, "decoder", 0, *UNTIMED), search, compensator)
    return prune_in_rounds_(model, tokens_NT % 64, method, Record(rng=torch.Generator().manual_seed(0)))


PARTS = [(name, "flap") for name in SEARCHES] + [("global", name) for name in CRITERIA] + [("evolutionary", "obs")]


@pytest.mark.parametrize(("search", "criterion"), PARTS)
def test_scored_searched_shrunk(search: str, criterion: str, grouped: Model, tokens_NT: torch.Tensor) -> None:
    before, sites = grouped.decoder_params, grouped.sites()
    outcome = pruned(grouped, tokens_NT, CRITERIA[criterion], SEARCHES[search], NONE)
    plan = Plan.from_json(outcome.plan.to_json())
    gone = {site.layer for site in sites if site.name not in plan.sites}
    fewer = [site for site in sites if plan.lost_heads(site)]
    assert fewer and plan.budget["removed_params"] == before - grouped.decoder_params
    assert abs(plan.budget["removed_params"] - 0.25 * before) < (0.04 if search == "al_am" else 0.01) * before
    for site in fewer:
        own, score_H = plan.sites[site.name], unit_scores(outcome.scores[f"{site.name}.query_heads"])
        assert own.kept == (0, 1, 2) and own.query_heads == 12 == len(score_H)
        for group in range(3):  # its own weakest
            stays = torch.isin(torch.arange(4 * group, 4 * group + 4), torch.tensor(own.heads(site)))
            ours_H = score_H[4 * group : 4 * group + 4]
            if search != "policy_gradient" and criterion != "obs":
                assert ours_H[~stays].max() < ours_H[stays].min()
    assert search == "blocks" or not gone
    assert torch.isfinite(grouped.token_losses(tokens_NT % 64, 5)).all()


def test_a_heads_score_is_that_of_its_columns(grouped: Model, tokens_NT: torch.Tensor) -> None:
    scores = pruned(grouped, tokens_NT, CRITERIA["flap"], SEARCHES["global"], NONE).scores
    for site in (site for site in grouped.sites() if site.kind == "attention"):
        groups, heads = scores[site.name], scores[f"{site.name}.query_heads"]
        assert isinstance(heads, ColumnScores) and isinstance(groups, ColumnScores)
        assert torch.equal(heads.columns_C, groups.columns_C)
        torch.testing.assert_close(heads.scores_U.view(3, 4).sum(1), groups.scores_U)
        torch.testing.assert_close(heads.scores_U, heads.columns_C.view(12, 8).sum(1))


@pytest.mark.parametrize("compensator", [BIAS, LEAST_SQUARES, LeastSquares(1e-3, "dense", True, "site")])
def test_what_is_compensated_is_what_is_left(compensator: Any, grouped: Model, tokens_NT: torch.Tensor) -> None:
    dense = grouped.token_losses(tokens_NT % 64, 5)
    weights = [grouped.block(index).weights for index in range(3)]
    plan = pruned(grouped, tokens_NT, CRITERIA["flap"], SEARCHES["al_am"], compensator).plan
    for index, block in enumerate(grouped.block(i) for i in range(3)):
        for site in block.sites:
            own, old = block.weights[site.name], weights[index][site.name].out_projection
            own_plan = plan.sites[site.name]
            kept = own_plan.kept_query_heads or own_plan.kept
            width = 8 if own_plan.kept_query_heads else old.shape[1] // own_plan.units
            keep_C = (torch.tensor(kept)[:, None] * width + torch.arange(width)).flatten()
            assert own.out_projection.shape == (48, len(keep_C)) and own.out_projection_bias is not None
            assert torch.equal(own.out_projection, old[:, keep_C]) == isinstance(compensator, Bias)
    assert torch.isfinite(dense).all() and torch.isfinite(grouped.token_losses(tokens_NT % 64, 5)).all()


def test_least_squares_does_better_than_nothing(grouped: Model, tokens_NT: torch.Tensor) -> None:
    """On a layer's own output: OBS's refit is what a search judges, the compensator's the same."""
    other, tokens_NT = deepcopy(grouped), tokens_NT % 64
    dense = grouped.module(tokens_NT).logits
    search, gaps = Global(1, ["query_heads"], "zscore", 1), []
    for model, compensator in ((grouped, LEAST_SQUARES), (other, NONE)):
        pruned(model, tokens_NT, CRITERIA["obs"], search, compensator, schedule=OneShot(0.1, "decoder", 0, *UNTIMED))
        gaps.append((model.module(tokens_NT).logits - dense).square().mean().item())
    assert gaps[0] < 0.9 * gaps[1]


def test_refits_by_turn_are_those_of_the_heads_that_stay(grouped: Model) -> None:
    block = grouped.block(1)
    site = next(site for site in block.sites if site.kind == "attention")
    x_BTC = torch.randn(4, 64, site.channels, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alone, evidence = replace(block, sites=(site,)), {site.name: Gram.empty(site).update_(x_BTC)}
    scores = CRITERIA["obs"](*with_query_heads(alone, evidence))
    turns, name = Turns([site], scores), f"{site.name}.query_heads"
    score, path = turns.scored()[name], scores[name]
    assert isinstance(score, RemovalPath) and len(score.cost_U) == 4 and len(path.cost_U) == 12
    heads = turns.heads[name]
    assert sorted(heads.flatten().tolist()) == list(range(12)) and (heads // 4 == torch.arange(3)).all()
    weight, _ = score.out_projections[1]
    assert isinstance(path.out_projections, Reorderable)
    expected, _ = path.out_projections.in_order(heads.flatten())[3]
    assert weight.shape == (48, 72) and torch.equal(weight, expected)


def test_rounds_count_heads_as_the_original(grouped: Model, tokens_NT: torch.Tensor) -> None:
    dense = deepcopy(grouped)
    parts = (CRITERIA["flap"], Global(1, ["query_heads"], "zscore", 1), NONE)
    outcome = pruned(grouped, tokens_NT, *parts, schedule=Linear(0.35, "decoder", 0, 3, *UNTIMED))
    lost = [outcome.plan.lost_heads(site) for site in dense.sites() if site.kind == "attention"]
    assert max(lost) > 3 and len(outcome.plan.budget["rounds"]) == 3
    for site in (site for site in dense.sites() if site.kind == "attention"):
        assert len(unit_scores(outcome.scores[f"{site.name}.query_heads"])) == 12
    shrink_(dense, outcome.plan)
    torch.testing.assert_close(logits(dense, tokens_NT % 64), logits(grouped, tokens_NT % 64))


@each(
    "values, why",
    [
        (
            {"num_key_value_heads": 12},
            "every query head of mine has a key/value head of its own, and leaves with it",
        ),
        (
            {"num_key_value_heads": 1},
            "the query heads of mine share one key/value head, and leave one by one as heads",
        ),
    ],
)
def test_without_groups_it_says_what_to_type(
    values: dict[str, Any], why: str, tmp_path: Path, source: Callable[..., Any]
) -> None:
    random_model("Llama", {**TINY["qwen3"][1], "num_attention_heads": 12, **values}).save_pretrained(tmp_path / "m")
    model = source(tmp_path / "m", name="mine").outline()
    with pytest.raises(ConfigError) as raised:
        check_query_heads(model, CRITERIA["flap"], SEARCHES["global"], {"criterion": "flap"})
    line = f"search.granularity=['query_heads', 'channels']: expected heads in the place of query_heads; {why}"
    assert str(raised.value) == line
    with pytest.raises(ConfigError) as raised:
        check_query_heads(model, CRITERIA["flap"], AlAmQueryHeads(), {"criterion": "flap", "search": "mine"})
    instead = "expected one of heads in the place of query heads, such as search=al_am"
    assert str(raised.value) == f"search=mine: {instead}; {why}", "it has no granularity to type"


def test_criteria_of_gates_are_refused(grouped: Model, build_from: Callable[..., Any]) -> None:
    for typed in ("criterion=ifso", "criterion.perturb=gates criterion=mini_llm"):
        criterion = build_from("search=uniform", *typed.split()).criterion
        with pytest.raises(
            ConfigError, match="criterion=mine: expected another with query_heads in search.granularity"
        ):
            check_query_heads(grouped, criterion, SEARCHES["global"], {"criterion": "mine"})
        check_query_heads(grouped, criterion, Global(1, ["heads"], "none", 1), {"criterion": "mine"})


@each("granularity", [["query_heads", "heads"], ["attention", "query_heads"]])
def test_not_with_what_holds_them(granularity: list[Any]) -> None:
    with pytest.raises(ConfigError, match="expected query_heads, or heads .* or attention, which hold them"):
        Global(1, granularity, "none", 1)


# A run


@pytest.mark.slow
@pytest.mark.usefixtures("forked_proofs")
def test_a_run_records_them(tmp_path: Path, grouped: Model, tokens_NT: torch.Tensor, modules_cache: None) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grouped", dtype=torch.float32)
    folder, ours = tmp_path / "run", ("search=uniform", "search.granularity=[query_heads,channels]")
    result = pruneexp.prune(model, None, tokens_NT % 64, recipe="flap", ratio=0.25, overrides=ours, folder=folder)
    written = json.loads((folder / "plan.json").read_text())["sites"]["model.layers.0.self_attn"]
    assert written["query_heads"] == 12 and written["units"] == 3 and written["kept"] == [0, 1, 2]
    assert len(written["kept_query_heads"]) in (3, 6, 9)
    scores = load_file(folder / "scores.safetensors")
    assert scores["model.layers.0.self_attn.query_heads"].shape == (12,)
    assert scores["model.layers.0.self_attn"].shape == (3,)
    again = pruneexp.apply(model, folder / "plan.json")
    count = sum(p.numel() for p in again.parameters())
    biases = result.model.num_parameters() - count
    assert count < model.num_parameters() and biases % 48 == 0
    assert kept_shares(result.plan)["query_heads"][0] == len(written["kept_query_heads"]) / 12
    shown = widths(result.plan, grouped.sites())
    assert [w.kept for w in shown["query_heads"]][0] == len(written["kept_query_heads"])
    assert [w.kept for w in shown["attention"]] == [3, 3, 3] and shown["attention"][0].kept_params > 0
