"""Pruning as a whole: deterministic, the same however it is batched or held, on budget, for every combination."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneexp.calibrate import Meter, Probe
from pruneexp.cli.build import build, with_starts
from pruneexp.compensator import Bias, BiasOfficial, LeastSquares, NoCompensation
from pruneexp.conf_files import choices, conf_folder
from pruneexp.criterion import Flap, FlapOfficial, Magnitude, Random, WandaSp
from pruneexp.evidence import Moments
from pruneexp.experiment.compatible import check_together
from pruneexp.experiment.settings import Experiment
from pruneexp.model import Model
from pruneexp.pruning import Method, Pruned, prune_
from pruneexp.pruning.query_heads import check_query_heads
from pruneexp.pruning.record import Record
from pruneexp.search import AlAm, Global, UlUm, Uniform
from pruneexp.sparsity import OneShot
from pruneexp.surgery import BlockProof, StreamedSave, prove_in_place, save, shrink_
from pruneexp.types import (
    Block,
    Budget,
    ColumnScores,
    ConfigError,
    Plan,
    RemovalPath,
    RunError,
    Score,
    SitePlan,
    unit_scores,
)
from tests.cases import UNTIMED, each, pairwise
from tests.composing import PARTNERS, composer, mandatory
from tests.conftest import FAMILIES

FLAP, WANDA, OFFICIAL = Flap("WIFV", False), WandaSp("sum", True), FlapOfficial("WIFV", False)
NONE, BIAS, SEQUENTIAL_BIAS = NoCompensation(False), Bias(False), Bias(True)
UNIFORM, GLOBAL = (
    Uniform(1, ["heads", "channels"], 0.0, 0.0, 1, alike=False, remainder="nearest"),
    Global(1, ["heads", "channels"], "zscore", 1),
)


def method(criterion: Any, search: Any, compensator: Any, ratio: float = 0.4, of: Any = "decoder") -> Method:
    return Method(criterion, OneShot(ratio, of, 0, *UNTIMED), search, compensator)


def prune(
    model: Model,
    tokens_NT: Tensor | None,
    chosen: Method,
    meter: Meter | None = None,
    shrunk: Callable[[int], None] = lambda index: None,
) -> Pruned:
    return prune_(
        model,
        tokens_NT,
        chosen,
        chosen.sparsity.ratio,
        Record(rng=torch.Generator().manual_seed(0), meter=meter or Meter(), shrunk=shrunk),
    )


def weights(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def assert_same_scores(first: Mapping[str, Score], second: Mapping[str, Score], rtol: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(unit_scores(first[name]), unit_scores(second[name]), rtol=rtol, atol=0)


# The same answer, however it is had


@each(
    "chosen",
    [
        method(FLAP, AlAm(), BIAS),
        method(WANDA, UlUm(), NONE),
        method(OFFICIAL, GLOBAL, BiasOfficial(False)),
        method(Random(3), UNIFORM, SEQUENTIAL_BIAS),
        method(Magnitude("coupled", 1), GLOBAL, NONE),
    ],
)
def test_twice_is_the_same_to_the_bit(chosen: Method, tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    models = [tiny("llama"), tiny("llama")]
    first, second = (prune(model, tokens_NT, chosen) for model in models)
    assert first.plan.to_json() == second.plan.to_json()
    assert_same_scores(first.scores, second.scores, rtol=0)
    states = [weights(model) for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.slow
@each(
    "criterion, search, compensator, family",
    [
        (*case, family)
        for case, family in itertools.product(
            [
                (FLAP, AlAm(), BIAS),
                (FLAP, GLOBAL, SEQUENTIAL_BIAS),
                (WANDA, UlUm(), NONE),
                (WANDA, UNIFORM, SEQUENTIAL_BIAS),
                (OFFICIAL, AlAm(), BiasOfficial(False)),
            ],
            FAMILIES,
        )
    ],
)
def test_any_batch_size_is_the_same(
    family: str, criterion: Any, search: Any, compensator: Any, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    outcomes = []
    for batch_size in (1, 3, 10):
        model = tiny(family, batch_size=batch_size)
        pruned = prune(model, tokens_NT, method(criterion, search, compensator))
        outcomes.append((pruned, model.token_losses(tokens_NT, 5)))
    assert any(outcomes[0][0].plan.removed(site) for site in outcomes[0][0].sites)
    for pruned, losses in outcomes[1:]:
        assert pruned.plan == outcomes[0][0].plan
        assert_same_scores(pruned.scores, outcomes[0][0].scores, rtol=1e-9)
        torch.testing.assert_close(losses, outcomes[0][1], rtol=1e-9, atol=1e-9)


STREAMED = {
    "flap": method(FLAP, AlAm(), BIAS),
    "wanda_sp": method(WANDA, UlUm(), NONE),
    "wanda_sp, dense bias": method(WANDA, UNIFORM, BIAS),
    "flap, sequential bias": method(FLAP, GLOBAL, SEQUENTIAL_BIAS),
    "wanda_sp, sequential bias": method(WANDA, UNIFORM, SEQUENTIAL_BIAS),
    "magnitude": method(Magnitude("reader", 2), GLOBAL, NONE),
}


@pytest.mark.slow
@each("case, family", itertools.product(STREAMED, FAMILIES))
def test_streamed_is_in_memory(
    family: str, case: str, tiny: Callable[..., Model], tokens_NT: Tensor, tmp_path: Path
) -> None:
    held, streamed = tiny(family), tiny(family, stream=True)
    meters = Meter(), Meter()
    expected = prune(held, tokens_NT, STREAMED[case], meters[0])
    saving = StreamedSave(streamed, tmp_path / "model", BlockProof(streamed, tokens_NT[:2]))
    pruned = prune(streamed, tokens_NT, STREAMED[case], meters[1], saving.layer)
    saving.finish()
    assert pruned.plan == expected.plan and any(pruned.plan.removed(site) for site in pruned.sites)
    assert_same_scores(pruned.scores, expected.scores, rtol=0)
    assert torch.equal(streamed.token_losses(tokens_NT, 4), held.token_losses(tokens_NT, 4))
    assert streamed.decoder_params == held.decoder_params
    assert meters[0] == meters[1]
    proof = saving.prove()
    assert proof["max_block_difference"] == proof["max_logit_difference"] == 0


# The walk, as pruning uses it


@each(
    "chosen, passes",
    [
        (method(FLAP, AlAm(), BIAS), 1),
        (method(FLAP, UlUm(), NONE), 1),
        (method(OFFICIAL, AlAm(), BIAS), 1),
        (method(Magnitude("reader", 2), UlUm(), NONE), 0),
        (method(Magnitude("reader", 2), UlUm(), BIAS), 1),
        (method(WANDA, UlUm(), NONE), 1 + 2 / 3),
        (method(WANDA, UlUm(), SEQUENTIAL_BIAS), 1 + 2 / 3),
        (method(WANDA, UlUm(), BIAS), 2 + 2 / 3),
        (method(WANDA, AlAm(), NONE), 1),
        (method(FLAP, AlAm(), SEQUENTIAL_BIAS), 2 + 2 / 3),
    ],
)
def test_what_a_method_costs(chosen: Method, passes: float, tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    meter = Meter()
    pruned = prune(tiny("llama"), tokens_NT, chosen, meter)
    assert {s.layer for s in pruned.sites if pruned.plan.removed(s)} == {0, 1, 2}, "each block is touched"
    assert meter.forward == pytest.approx(passes) and meter.backward == 0


def test_a_sequential_criterion_scores_what_pruned_layers_produce(
    tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    sequential = prune(tiny("llama"), tokens_NT, method(WANDA, UlUm(), NONE))
    dense = prune(tiny("llama"), tokens_NT, method(replace(WANDA, sequential=False), UlUm(), NONE))
    for site in sequential.sites:
        same = torch.equal(unit_scores(sequential.scores[site.name]), unit_scores(dense.scores[site.name]))
        assert same == (site.layer == 0)
    for index in (1, 2):  # from scratch: the dense scores of a model whose layers before are those of the plan
        model = tiny("llama")
        before = {s.name: sequential.plan.sites[s.name] for s in sequential.sites if s.layer < index}
        shrink_(model, Plan(before))
        scratch = prune(model, tokens_NT, method(replace(WANDA, sequential=False), GLOBAL, NONE, ratio=0.0))
        for site in sequential.sites:
            if site.layer == index:
                expected = unit_scores(scratch.scores[site.name])
                assert torch.equal(unit_scores(sequential.scores[site.name]), expected)


def test_always_scores_all_layers_behind_masks_as_if_layers_were_pruned_one_by_one(
    tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    """UL-UM prunes what is masked: both then score the same, and the search over all layers sees that."""
    model, meter = tiny("llama"), Meter()
    one_by_one = prune(tiny("llama"), tokens_NT, method(WANDA, UlUm(), NONE))
    masked = prune(model, tokens_NT, method(replace(WANDA, sequential="always"), GLOBAL, NONE), meter)
    dense = prune(tiny("llama"), tokens_NT, method(WANDA, GLOBAL, NONE))
    for site in masked.sites:
        score_U, expected = (unit_scores(each.scores[site.name]) for each in (masked, one_by_one))
        torch.testing.assert_close(score_U, expected)
        assert torch.equal(score_U, unit_scores(dense.scores[site.name])) == (site.layer == 0)
    assert meter.forward == pytest.approx(1 + 2 / 3), "every layer but the last runs once more, masked"
    assert masked.plan.sites != dense.plan.sites
    assert not any(module._forward_pre_hooks for layer in model.layers for module in layer.modules())


def test_sequential_compensation_is_another_one(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    models = [tiny("llama"), tiny("llama")]
    dense, sequential = (
        prune(model, tokens_NT, method(FLAP, UlUm(), compensator))
        for model, compensator in zip(models, (BIAS, SEQUENTIAL_BIAS), strict=True)
    )
    assert dense.plan == sequential.plan, "the plan is that of the dense model in both"
    for index, (first, second) in enumerate(zip(models[0].layers, models[1].layers, strict=True)):
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            one, other = first.get_submodule(path), second.get_submodule(path)
            assert torch.equal(one.weight, other.weight)  # type: ignore[arg-type]
            same = torch.equal(one.bias, other.bias)  # type: ignore[arg-type]
            assert same == (index == 0), "only behind a pruned block do the means differ"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_is_what_the_removed_channels_gave_on_average(
    family: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    dense, model = tiny(family), tiny(family)
    pruned = prune(model, tokens_NT, method(FLAP, UlUm(), BIAS))
    read: dict[str, Tensor] = {}
    with torch.no_grad():
        for index, layer in enumerate(dense.layers):
            for site, path in zip(dense.layer_sites(index), out_projections_of(dense), strict=True):
                layer.get_submodule(path).register_forward_pre_hook(
                    lambda _m, args, name=site.name: read.update({name: args[0].flatten(0, -2).mean(0)})
                )
        dense.module(tokens_NT)
        for index, layer in enumerate(model.layers):
            for site, path in zip(dense.layer_sites(index), out_projections_of(dense), strict=True):
                before, after = dense.layers[index].get_submodule(path), layer.get_submodule(path)
                gone = torch.ones(site.channels, dtype=torch.bool)
                gone[site.keep_C(pruned.plan.sites[site.name].kept)] = False
                expected = before.weight[:, gone] @ read[site.name][gone]
                if before.bias is not None:
                    expected = expected + before.bias
                torch.testing.assert_close(after.bias, expected, rtol=1e-9, atol=1e-11)


def out_projections_of(model: Model) -> tuple[str, str]:
    return model.family.attention_out, model.family.mlp_out


# The budget


@pytest.mark.slow
@each(
    "compensator, criterion, search, family",
    [
        (compensator, *case, family)
        for compensator, case, family in itertools.product(
            [NONE, BIAS, SEQUENTIAL_BIAS],
            [(FLAP, UNIFORM), (FLAP, GLOBAL), (WANDA, UNIFORM), (WANDA, GLOBAL)],
            FAMILIES,
        )
    ],
)
def test_the_budget_is_met_to_the_nearest_unit(
    family: str, criterion: Any, search: Any, compensator: Any, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    dense = tiny(family)
    whole, cheapest = dense.decoder_params, min(site.cost.params for site in dense.sites())
    missed = {}
    for ratio in (0.02, 0.1, 0.2, 0.35, 0.7):
        model = deepcopy(dense)
        pruned = prune(model, tokens_NT[:4], method(criterion, search, compensator, ratio))
        gone = whole - model.decoder_params  # what biases add is in here
        if abs(gone - ratio * whole) > cheapest / 2 + 1e-6:
            missed[ratio] = (gone, ratio * whole)
        units = sum(pruned.plan.removed(site) * site.cost.params for site in pruned.sites)
        assert pruned.plan.budget["removed_params"] == units
        assert all(pruned.plan.sites[site.name].kept for site in pruned.sites), "each sublayer keeps a unit"
    assert not missed, f"{missed}; the cheapest unit has {cheapest} parameters"


@each("search, compensator", itertools.product([UNIFORM, GLOBAL], [NONE, BIAS]))
def test_a_share_of_what_units_hold(
    search: Any, compensator: Any, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model = tiny("llama")
    held = sum(site.units * site.cost.params for site in model.sites())
    pruned = prune(model, tokens_NT, method(FLAP, search, compensator, 0.3, of="prunable"))
    gone = sum(pruned.plan.removed(site) * site.cost.params for site in pruned.sites)
    assert abs(gone - 0.3 * held) <= min(site.cost.params for site in pruned.sites) / 2
    assert pruned.plan.budget["of"] == "prunable" and pruned.plan.budget["ratio"] == 0.3


@each("criterion, compensator, family", itertools.product([FLAP, WANDA, OFFICIAL], [BIAS, SEQUENTIAL_BIAS], FAMILIES))
def test_a_ratio_of_0_changes_nothing(
    family: str, criterion: Any, compensator: Any, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    dense = tiny(family)
    before = weights(dense)
    for search in (UNIFORM, GLOBAL, AlAm(), UlUm()):
        model = deepcopy(dense)
        pruned = prune(model, tokens_NT[:2], method(criterion, search, compensator, 0.0))
        assert pruned.plan.sites == Plan.keep_all(pruned.sites).sites
        after = model.module.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@each("ratio, search", itertools.product([0.9999, 0.97], [UNIFORM, GLOBAL]))
def test_more_than_there_is_is_refused(
    ratio: float, search: Any, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model = tiny("llama")
    before = weights(model)
    with pytest.raises(ConfigError, match=r"^sparsity\.ratio=0\.9\d+: expected at most 0\.\d+, all that search may"):
        prune(model, tokens_NT, method(FLAP, search, BIAS, ratio))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())


# Sublayers that go altogether


@each("compensator, family", itertools.product([NONE, BIAS], FAMILIES))
def test_a_sublayer_that_loses_everything_still_works_and_reloads(
    family: str,
    compensator: Any,
    tiny: Callable[..., Model],
    source: Callable[..., Any],
    tokens_NT: Tensor,
    tmp_path: Path,
) -> None:
    model = tiny(family)
    victims = {model.sites()[0].name, model.sites()[3].name}  # attention of layer 0, FFN of layer 1

    class Doomed(Flap):
        def __call__(self, block: Any, evidence: Any) -> Any:
            columns = super().__call__(block, evidence)
            return {n: unit_scores(s) * 0 + (0 if n in victims else 1) + torch.rand(s.scores_U.shape) * 1e-3
                    for n, s in columns.items()}  # fmt: skip

    class ByScore(AlAm):
        def __call__(self, scores: Any, sites: Any, budget: Any, oracle: Any, rng: Any) -> Plan:
            # al_am standardises within each sublayer, so that one that is bad as a whole goes only by its threshold
            kept = {s.name: unit_scores(scores[s.name]) > 0.5 for s in sites}
            return Plan.from_masks(sites, kept)

    pruned = prune(model, tokens_NT, method(Doomed("WIFV", False), ByScore(), compensator))
    assert {name for name, site in pruned.plan.sites.items() if not site.kept} == victims
    losses = model.token_losses(tokens_NT, 4)
    assert torch.isfinite(losses).all()
    save(model, tmp_path / "model")
    assert prove_in_place(model, tmp_path / "model", tokens_NT[:2])["max_logit_difference"] == 0
    for stream in (False, True):  # and is a model that can be pruned again
        again = source(tmp_path / "model", stream=stream).load()
        assert torch.equal(again.token_losses(tokens_NT, 4), losses)
        assert {site.name for site in again.sites()} == {site.name for site in pruned.sites} - victims
    again = source(tmp_path / "model").load()
    second = prune(again, tokens_NT, method(FLAP, GLOBAL, compensator, 0.2))
    assert second.plan.sites.keys() == {site.name for site in pruned.sites} - victims
    assert torch.isfinite(again.token_losses(tokens_NT, 4)).all()


def test_al_am_empties_a_sublayer_where_the_ratio_asks_for_it(
    tiny: Callable[..., Model], tokens_NT: Tensor, tmp_path: Path
) -> None:
    model = tiny("llama")
    pruned = prune(model, tokens_NT, method(FLAP, AlAm(), BIAS, 0.8))
    assert [name for name, site in pruned.plan.sites.items() if not site.kept]
    save(model, tmp_path / "model")
    assert prove_in_place(model, tmp_path / "model", tokens_NT[:2])["max_logit_difference"] == 0


# Every combination


BESIDE = {**PARTNERS, "sublayers": "criterion=random", "serve_safe": "search.multiple=8"}  # FFNs of 40 channels
QUICK = {"mini_llm": "criterion.directions=2", "policy_gradient": "search.passes=10", "evolutionary": "search.effort=3"}


@cache
def built(group: str, option: str) -> Experiment:
    typed = ["model=hf", "model.path=x", "dataset=tokens", "sparsity.ratio=0.3", "evaluator=[size]"]
    partner = [BESIDE[option]] if option in BESIDE else []  # alone it would be refused, which is not asked here
    quick = [QUICK[option]] if option in QUICK else []
    left_open = mandatory(group, option, 3)  # one for each of the tiny model's layers
    return build(composer().job([*typed, f"{group}={option}", *partner, *quick, *left_open]))


GROUPS = ("criterion", "search", "compensator")


COMBINATIONS = pairwise(*(choices(conf_folder() / group) for group in GROUPS))


@pytest.mark.slow
@pytest.mark.parametrize("criterion", choices(conf_folder() / "criterion"))
def test_every_combination_runs_or_is_refused_before_it_starts(
    criterion: str, tiny: Callable[..., Model], tokens_NT: Tensor, subtests: pytest.Subtests
) -> None:
    for _, search, compensator in [row for row in COMBINATIONS if row[0] == criterion]:
        with subtests.test(search=search, compensator=compensator):
            assert_runs_or_is_refused(criterion, search, compensator, tiny, tokens_NT)


def assert_runs_or_is_refused(
    criterion: str, search: str, compensator: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    parts = {"criterion": criterion, "search": search, "compensator": compensator}
    chosen = {group: getattr(built(group, option), group) for group, option in parts.items()}
    chosen["criterion"] = with_starts(chosen["criterion"], chosen["search"])
    experiment = replace(built("criterion", criterion), **chosen)
    try:
        check_together(experiment)
        model = tiny("llama")
        check_query_heads(model, experiment.criterion, experiment.search, parts)
    except ConfigError as error:
        line = str(error)
        assert "\n" not in line and any(f"{group}" in line for group in parts), line
        return
    before = model.decoder_params
    one = Method(experiment.criterion, experiment.sparsity, experiment.search, experiment.compensator)
    pruned = prune(model, tokens_NT[:6], one)
    assert torch.isfinite(model.token_losses(tokens_NT[:6], 5)).all()
    if any(site.kind == "block" for site in pruned.plan.sites.values()):
        whole = {f"model.layers.{index}" for index in range(3)}
        assert pruned.scores.keys() in (whole, {site.name for site in pruned.sites})
        assert len(model.layers) < 3 and model.decoder_params < before
        return
    named = {name for name in pruned.scores if not name.endswith(".query_heads")}
    assert named == {site.name for site in pruned.sites}
    assert pruned.plan.sites.keys() == {site.name for site in pruned.sites}
    counted = Budget(0.0, 1)
    removed = sum(counted.freed(pruned.plan, site) for site in pruned.sites)
    assert removed > 0
    touched = [site for site in pruned.sites if pruned.plan.changes(site)]
    emptied = [site for site in touched if not pruned.plan.sites[site.name].kept]
    biases = 48 * len(touched) if one.compensator.adds_bias else 0
    assert before - model.decoder_params == removed + 48 * len(emptied) - biases  # an emptied sublayer's norm goes too


def test_the_combinations_are_those_of_conf() -> None:
    assert {"flap", "wanda_sp", "magnitude"} <= set(choices(conf_folder() / "criterion"))
    assert {"al_am", "uniform", "global"} <= set(choices(conf_folder() / "search"))
    assert {"none", "bias"} <= set(choices(conf_folder() / "compensator"))


# Oracle searches


def test_a_search_that_probes_is_charged_and_asked_once(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    class Probing(AlAm):
        calls = 0

        def __call__(self, scores: Any, sites: Any, budget: Any, oracle: Any, rng: Any) -> Plan:
            Probing.calls += 1
            assert isinstance(oracle, Probe)
            plan = Plan({s.name: SitePlan(s.kind, s.units, tuple(range(1, s.units))) for s in sites})
            from pruneexp.types import Candidate

            assert oracle.losses([Candidate(plan), Candidate(Plan.keep_all(sites))]).isfinite().all()
            return plan

    meter = Meter()
    prune(tiny("llama"), tokens_NT, method(FLAP, Probing(), BIAS), meter)
    assert Probing.calls == 1 and meter.forward == pytest.approx(3)


class _Own:
    """A method of a user's own, as a criterion, a search or a compensator."""

    evidence, sequential, local, adds_bias = None, False, False, False

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    def __call__(self, *args: Any) -> Any:
        return self.answer(*args)


def _random(block: Block) -> dict[str, Tensor]:
    return {site.name: torch.rand(site.units) for site in block.sites}


@each(
    "answer, line",
    [
        (lambda block, evidence: None, r"^the criterion gave NoneType, expected scores by site name"),
        (
            lambda block, evidence: {s.name: [1.0] * s.units for s in block.sites},
            r"^model\.layers\.0\.\w+: the criterion's scores are list, expected a floating-point tensor",
        ),
        (
            lambda block, evidence: {s.name: torch.arange(s.units) for s in block.sites},
            r"^model\.layers\.0\.\w+: the criterion's scores are torch\.int64, expected a floating-point tensor",
        ),
        (
            lambda block, evidence: {**_random(block), "lm_head": torch.ones(3)},
            r"^lm_head: the criterion's scores are of no site of model\.layers\.0, expected model\.layers\.0\.\w+, ",
        ),
        (
            lambda block, evidence: {n: RemovalPath(torch.zeros(len(s)).long(), s) for n, s in _random(block).items()},
            r"^model\.layers\.0\.\w+: the removal path's order_U is no order of its \d+ units",
        ),
        (
            lambda block, evidence: {n: RemovalPath(torch.arange(len(s)), s[1:]) for n, s in _random(block).items()},
            r"^model\.layers\.0\.\w+: the removal path's cost_U has not one cost for each of its \d+ units",
        ),
        (
            lambda block, evidence: {
                n: RemovalPath(torch.arange(len(s)), s, {}, {"ridge": math.nan}) for n, s in _random(block).items()
            },
            r"^model\.layers\.0\.\w+: the criterion chose \{'ridge': nan\}, expected numbers by name",
        ),
        (
            lambda block, evidence: {n: ColumnScores(s, s[:1]) for n, s in _random(block).items()},
            r"^model\.layers\.0\.\w+: \[1\] scores of columns, expected one for each of its \d+",
        ),
        (
            lambda block, evidence: {
                s.name: ColumnScores(torch.ones(s.units), torch.full((s.channels,), math.nan)) for s in block.sites
            },
            r"^model\.layers\.0\.\w+: scores of columns hold NaN or Inf",
        ),
    ],
)
def test_what_is_no_score_is_told_in_a_line(
    answer: Callable[..., Any], line: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    with pytest.raises(RunError, match=line):
        prune(tiny("llama"), tokens_NT[:1], method(_Own(answer), UNIFORM, NONE))


@each(
    "answer, line",
    [
        (lambda w, b, e, k: (w, b), r"weights \(\d+, \d+\), expected \(\d+, \d+\), the kept channels"),
        (lambda w, b, e, k: w[:, k], "Tensor, expected weight and bias, or these and what it chose"),
        (lambda w, b, e, k: None, "NoneType, expected weight and bias"),
        (lambda w, b, e, k: (w[:, k], b, {}, {}), "4 values, expected weight and bias"),
        (lambda w, b, e, k: (w[:, k].numpy(), b), r"weights as ndarray, expected \("),
        (lambda w, b, e, k: (w[:, k].long(), b), "weights that are no dense floating-point numbers"),
        (lambda w, b, e, k: (w[:, k], torch.zeros(7)), r"a bias \(7,\), expected \(\d+,\), the outputs, or None"),
    ],
)
def test_a_compensator_must_give_the_kept_channels(
    answer: Callable[..., Any], line: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    with pytest.raises(RunError, match=rf"^model\.layers\.0\.\w+: the compensator gave {line}"):
        prune(tiny("llama"), tokens_NT[:1], method(Magnitude("reader", 2), UNIFORM, _Own(answer)))


@each(
    "answer, line",
    [
        (lambda sites: None, "^the search gave NoneType, expected a Plan"),
        (lambda sites: {site.name: [0] for site in sites}, "^the search gave dict, expected a Plan"),
        (lambda sites: Plan({"model.layers.9.mlp": SitePlan("mlp", 2, (0,))}), r"^model\.layers\.9\.mlp: is in the se"),
        (lambda sites: Plan({sites[0].name: [0]}), r"^\S+: is list in the search's plan, expected a SitePlan"),
        (lambda sites: Plan({sites[0].name: SitePlan("mlp", 9, (0,))}), r"^\S+: is mlp of 9 units in .* expected att"),
        (
            lambda sites: Plan({sites[0].name: SitePlan("attention", sites[0].units, (0.0, 1.0))}),  # type: ignore
            r"^\S+: keeps \(0\.0, 1\.0\) in the search's plan, expected indices of units",
        ),
    ],
)
def test_a_search_must_give_a_plan_of_its_sites(
    answer: Callable[..., Any], line: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    search = _Own(lambda scores, sites, budget, oracle, rng: answer(sites))
    with pytest.raises(RunError, match=line):
        prune(tiny("llama"), tokens_NT[:1], method(Random(0), search, NONE))


@each(
    "answer, line",
    [
        (lambda plan: None, "^the search's rescored gave NoneType, expected a Plan"),
        (lambda plan: Plan(None), "^the search's rescored gave a Plan of NoneType, dict, expected mappings"),
        (
            lambda plan: Plan(plan.sites, None),
            "^the search's rescored gave a Plan of dict, NoneType, expected mappings",
        ),
        (lambda plan: Plan({"lm_head": SitePlan("mlp", 2, (0,))}), "^lm_head: is in the search's plan, expected only"),
        (
            lambda plan: Plan({name: SitePlan(own.kind, 99, (0,)) for name, own in plan.sites.items()}),
            r"^\S+: is attention of 99 units in the search's plan, expected attention of 3",
        ),
        (
            lambda plan: Plan({name: replace(own, kept=(0.0,)) for name, own in plan.sites.items()}),
            r"^\S+: keeps \(0\.0,\) in the search's plan, expected indices of units",
        ),
        (
            lambda plan: Plan({name: SitePlan("attention", 3, (0, 1, 2), 3, (0, 1, 2)) for name in [*plan.sites][:1]}),
            r"^\S+: has kept_query_heads in the search's plan, expected turns",
        ),
    ],
)
def test_a_plan_by_all_windows_is_checked_as_the_search_s_own(
    answer: Callable[[Plan], Any], line: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    search = _halving()
    search.rescored = lambda plan, before, after, sites, budget: answer(plan)
    with pytest.raises(RunError, match=line):
        prune(tiny("llama"), tokens_NT, method(Random(0), search, NONE))


def _halving() -> Any:
    """A search that keeps half of the units and judges by half of the windows."""

    def halves(scores: Any, sites: Any, *_: Any) -> Plan:
        return Plan({s.name: SitePlan(s.kind, s.units, tuple(range(s.units - s.units // 2))) for s in sites})

    search: Any = _Own(halves)
    search.held_out = 0.5
    return search


def test_query_heads_by_all_windows_are_some_that_there_are(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    def by(heads: int, kept: tuple[Any, ...]) -> Pruned:
        search = _halving()
        search.granularity = ["query_heads", "channels"]

        def rescored(plan: Plan, *_: Any) -> Plan:
            own = {n: SitePlan("attention", 3, (0, 1, 2), heads, kept) for n, s in plan.sites.items() if s.units == 3}
            return Plan({**plan.sites, **own})

        search.rescored = rescored
        return prune(tiny("llama"), tokens_NT, method(Random(0), search, NONE))

    assert [own.kept_query_heads for own in by(6, (1, 2, 4)).plan.sites.values() if own.units == 3] == [(1, 2, 4)] * 3
    for heads, kept in ((3, (0, 1, 2)), (6, (1.0, 2.0, 4.0))):
        with pytest.raises(RunError, match=r"keeps .* query heads in the search's plan, expected indices of 6"):
            by(heads, kept)


@each("what", ["evidence", "weights", "norms", "out-projection"])
def test_a_method_must_not_write_into_what_others_read(
    what: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    def scores(block: Block, evidence: Any) -> dict[str, Tensor]:
        if what == "evidence":
            evidence[block.sites[1].name].m2_C.sqrt_()
        if what == "weights":
            block.weights[block.sites[1].name].out_projection.abs_()
        if what == "norms":
            block.norms[block.sites[1].name].zero_()
        return _random(block)

    def compensated(weight_OC: Tensor, bias_O: Any, evidence: Any, keep_C: Tensor) -> Any:
        return (weight_OC.mul_(2) if what == "out-projection" else weight_OC)[:, keep_C], bias_O

    criterion: Any = _Own(scores)
    criterion.evidence = Moments
    by = "compensator" if what == "out-projection" else "criterion"
    with torch.no_grad(), pytest.raises(RunError, match=rf"^model\.layers\.0\.\w+: the {by} wrote into what it was"):
        prune(tiny("llama"), tokens_NT, method(criterion, UNIFORM, _Own(compensated)))


def test_units_may_stand_in_a_list(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    def halves(scores: Any, sites: Any, *_: Any) -> Plan:
        return Plan({s.name: SitePlan(s.kind, s.units, list(range(s.units // 2))) for s in sites})  # type: ignore

    pruned = prune(tiny("llama"), tokens_NT[:1], method(Random(0), _Own(halves), NONE))
    assert all(own.kept == tuple(range(own.units // 2)) for own in pruned.plan.sites.values())


def test_sites_that_a_search_does_not_name_stay_whole(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = tiny("llama")
    site = next(site for site in model.sites() if site.kind == "mlp")
    only = Plan({site.name: SitePlan("mlp", site.units, tuple(range(1, site.units)))})
    pruned = prune(model, tokens_NT[:1], method(Random(0), _Own(lambda *args: only), NONE))
    assert [s.name for s in pruned.sites if pruned.plan.removed(s)] == [site.name]
    left = {s.name: s.units for s in model.sites()}
    assert left == {s.name: s.units - (s.name == site.name) for s in pruned.sites}


@pytest.mark.parametrize("target", ["pruned", "dense"])
def test_what_compensation_chose_is_by_the_names_of_the_original(
    target: Any, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    """Also behind a block that left, where layers move up."""
    model = tiny("llama", dtype="float64")
    sites = [site for site in model.sites() if site.layer > 0]
    plan = Plan({site.name: SitePlan(site.kind, site.units, tuple(range(1, site.units))) for site in sites})
    gone = Plan({f"{model.layers_path}.0": SitePlan("block", 1, ())})
    search: Any = _Own(lambda *args: plan.merged(gone))
    search.granularity = ["heads", "channels", "blocks"]
    pruned = prune(model, tokens_NT, method(Random(0), search, LeastSquares("auto", target, True, "site")))
    assert set(pruned.chosen) == set(plan.sites), "by the names of the model before"
    assert all(set(settings) == {"ridge"} for settings in pruned.chosen.values())
