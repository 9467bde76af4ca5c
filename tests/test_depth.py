"""Whole blocks: influence, loss without, greedy removal; the same structure masked, shrunk, saved and streamed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneexp.cache import Cache, NoCache
from pruneexp.calibrate import Bookmark, Meter, Probe, walk
from pruneexp.compensator import NoCompensation
from pruneexp.criterion import BlockInfluence, LossDrop, Random
from pruneexp.evidence import BlockChange, LossWithout
from pruneexp.experiment.run import run_experiment
from pruneexp.model import Model
from pruneexp.pruning import Method, prune_
from pruneexp.pruning.dense_evidence import Results
from pruneexp.pruning.record import Record
from pruneexp.search import Global, Greedy
from pruneexp.sparsity import OneShot
from pruneexp.types import Budget, Candidate, ConfigError, Cost, Plan, RunError, Site, SitePlan
from tests.cases import UNTIMED, each
from tests.conftest import FAMILIES
from tests.masking import masked
from tests.toy_sites import model_sites

RNG = torch.Generator()
QUIET: dict[str, Any] = {"rng": RNG}
GREEDY = Greedy(0, ["blocks"], 0, 0, None, "scores", "none", 1)


def block_sites(*costs: int) -> list[Site]:
    return [Site(f"model.layers.{i}", "block", i, 1, 0, Cost(cost, cost, 1)) for i, cost in enumerate(costs)]


class Additive:
    """An oracle whose loss adds up what each block is worth, and a bonus where two leave together."""

    def __init__(self, worth: Sequence[float], together: dict[frozenset[int], float] | None = None):
        self.worth, self.together, self.passes, self.calls = worth, together or {}, 0.0, 0

    def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
        self.calls += len(candidates)
        return torch.tensor([self._loss(candidate.plan) for candidate in candidates], dtype=torch.float64)

    def _loss(self, plan: Plan) -> float:
        out = frozenset(gone(plan))
        return sum(self.worth[i] for i in out) + self.together.get(out, 0.0)


def gone(plan: Plan) -> list[int]:
    return [int(name.split(".")[2]) for name, site in plan.sites.items() if not site.kept]


def scores_of(worth: Sequence[float]) -> dict[str, Tensor]:
    return {f"model.layers.{i}": torch.tensor([w], dtype=torch.float64) for i, w in enumerate(worth)}


def test_influence_is_one_minus_the_mean_cosine() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 5, 8, generator=draw, dtype=torch.float64)
    (site,) = block_sites(1)
    parts, whole = BlockChange.empty(site), BlockChange.empty(site).update_(x, y)
    for a, b in zip(x.split([1, 2, 3]), y.split([1, 2, 3]), strict=True):
        parts = parts.merge(BlockChange.empty(site).update_(a, b))
    cosines = [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)]
    for seen in (parts, whole):
        assert seen.n == 30
        assert seen.mean_cosine == pytest.approx(sum(cosines) / 30, rel=1e-10)
        assert seen.mean_angle == pytest.approx(sum(math.acos(c) for c in cosines) / (30 * math.pi), rel=1e-10)


@pytest.mark.parametrize("distance", ["cosine", "angular"])
def test_what_only_scales_has_no_influence_and_what_turns_back_has_all(distance: str) -> None:
    (site,) = block_sites(1)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for factor, expected in ((3.0, 0.0), (-1.0, 2.0 if distance == "cosine" else 1.0)):
        seen = {site.name: BlockChange.empty(site).update_(x, factor * x)}
        whole = next(iter(BlockInfluence(distance)(whole_block(site), seen).values()))
        assert whole.item() == pytest.approx(expected, abs=1e-7)


def whole_block(site: Site) -> Any:
    from pruneexp.types import Block

    return Block(site.name, site.layer, (site,), {})


def test_loss_without_cannot_be_merged_or_guessed() -> None:
    (site,) = block_sites(1)
    assert LossWithout.empty(site).update_(3.0, 1.0).rise == 2
    with pytest.raises(RunError, match="cannot be merged"):
        LossWithout.empty(site).merge(LossWithout.empty(site))
    with pytest.raises(RunError, match="was not measured"):
        _ = LossWithout.empty(site).rise


def test_a_block_without_which_there_is_no_loss_stays() -> None:
    sites, scores = block_sites(*[10] * 6), {}
    for site, loss in zip(sites, (9, 4, math.nan, 3, math.inf, 9), strict=True):
        scores |= LossDrop()(whole_block(site), {site.name: LossWithout.empty(site).update_(loss, 2.0)})
    assert gone(GREEDY(scores, sites, Budget(1 / 3, 60), Additive([9, 4, math.nan, 3, math.nan, 9]), RNG)) == [1, 3]
    with pytest.raises(RunError, match="the calibration loss of the whole model is NaN or Inf"):
        LossDrop()(whole_block(sites[0]), {sites[0].name: LossWithout.empty(sites[0]).update_(1.0, math.nan)})


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_drop_is_the_loss_of_the_model_without_the_block(
    family: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model, meter = tiny(family), Meter()
    dense = model.token_losses(tokens_NT, 4).mean()
    for visit in walk(model, tokens_NT, (LossWithout,), Bookmark(meter, "test"), read_only=True, whole=["block"]):
        with masked(model, Plan({visit.block.name: SitePlan("block", 1, ())})):
            expected = model.token_losses(tokens_NT, 4).mean() - dense
        score = LossDrop()(visit.whole, visit.of(LossWithout))[visit.block.name]
        assert score.item() == pytest.approx(expected.item(), abs=1e-12)
    assert meter.forward == pytest.approx(3)  # three blocks: 2 + 2 + 2 layers without one, and 3


def lose(monkeypatch: pytest.MonkeyPatch, *lost: int) -> None:
    """Makes these losses, of those that are asked for together, no numbers."""
    measured = Probe.losses

    def losses(self: Probe, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
        finite = measured(self, candidates, batch)
        finite[list(lost)] = math.nan
        return finite

    monkeypatch.setattr(Probe, "losses", losses)


def test_losses_that_are_not_finite_are_the_dearest(
    tiny: Callable[..., Model], tokens_NT: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(lost: Sequence[int]) -> list[float]:
        lose(monkeypatch, *lost)
        visits = walk(
            tiny("llama"), tokens_NT, (LossWithout,), Bookmark(Meter(), "test"), read_only=True, whole=["block"]
        )
        return [LossDrop()(visit.whole, visit.of(LossWithout))[visit.block.name].item() for visit in visits]

    assert max(scores([])) < 100
    assert [score > 1e8 for score in scores([0, 2])] == [True, False, True]
    with pytest.raises(RunError, match="calibrate: none of 3 losses .* finite"):
        scores([0, 1, 2])
    with pytest.raises(RunError, match="the calibration loss of the whole model is NaN or Inf"):
        scores([0, 1, 2, 3])


def test_losses_that_are_not_finite_are_counted_whether_measured_or_cached(
    tiny: Callable[..., Model],
    tokens_NT: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    method = Method(
        LossDrop(), OneShot(0.3, "decoder", 1, *UNTIMED), Global(0, ["blocks"], "none", 1), NoCompensation(False)
    )
    results = Results(Cache(str(tmp_path), 1.0), {})

    def left(results: Results) -> list[int]:
        caplog.clear()
        return gone(prune_(tiny("llama"), tokens_NT, method, 0.3, Record(results=results, **QUIET)).plan)

    left(Results(NoCache(), {}))
    assert not caplog.text
    lose(monkeypatch, 0, 2)
    assert left(results) == [1] and "2 of 3 losses were not finite" in caplog.text
    monkeypatch.setattr(Probe, "losses", lambda *_: pytest.fail("measured again"))
    assert left(results) == [1] and "2 of 3 losses were not finite" in caplog.text


def test_blocks_meet_the_budget_to_the_nearest_and_ties_remove_more() -> None:
    sites, scores = block_sites(*[10] * 8), scores_of(range(8))
    search = Global(1, ["blocks"], "none", 1)
    for removed, expected in ((24.9, 2), (25, 3), (34, 3), (36, 4)):
        for method, oracle in ((search, None), (GREEDY, Additive(range(8)))):
            plan = method(scores, sites, Budget(removed / 80, 80), oracle, RNG)
            assert gone(plan) == list(range(expected)), method


@pytest.mark.parametrize("method", [Global(0, ["blocks"], "none", 1), GREEDY], ids=repr)
def test_one_block_always_stays(method: Any) -> None:
    sites, scores = block_sites(10, 10, 10), scores_of([1, 2, 3])
    with pytest.raises(ConfigError, match=r"^sparsity.ratio=0.9: expected at most 0.6666"):
        method(scores, sites, Budget(0.9, 30), Additive([1, 2, 3]), RNG)
    assert gone(method(scores, sites, Budget(0.66, 30), Additive([1, 2, 3]), RNG)) == [0, 1]


def test_greedy_measures_again_after_every_removal() -> None:
    worth, synergy = [9, 1.0, 1.1, 1.5, 9], {frozenset({1, 2}): 5.0}
    oracle = Additive(worth, synergy)
    plan = GREEDY(scores_of(worth), block_sites(*[10] * 5), Budget(0.4, 50), oracle, RNG)
    assert gone(plan) == [1, 3] and oracle.calls == 4  # the first left by its score
    assert gone(
        Global(0, ["blocks"], "none", 1)(scores_of(worth), block_sites(*[10] * 5), Budget(0.4, 50), None, RNG)
    ) == [1, 2]
    probing = Additive(worth, synergy)
    Greedy(0, ["blocks"], 0, 0, None, "probes", "none", 1)(
        scores_of(worth), block_sites(*[10] * 5), Budget(0.4, 50), probing, RNG
    )
    assert probing.calls == 5 + 4
    short = Additive(worth, synergy)
    Greedy(0, ["blocks"], 0, 0, 2, "probes", "none", 1)(
        scores_of(worth), block_sites(*[10] * 5), Budget(0.4, 50), short, RNG
    )
    assert short.calls == 4


def test_greedy_keeps_the_ends_and_passes_over_nan(caplog: pytest.LogCaptureFixture) -> None:
    worth = [0, 0, 5.0, math.nan, 7.0, 0]
    method = Greedy(0, ["blocks"], 2, 1, None, "probes", "none", 1)
    assert gone(method(scores_of([0] * 6), block_sites(*[10] * 6), Budget(1 / 6, 60), Additive(worth), RNG)) == [2]
    assert gone(method(scores_of([0] * 6), block_sites(*[10] * 6), Budget(2 / 6, 60), Additive(worth), RNG)) == [2, 4]
    assert "2 of 5 losses were not finite" in caplog.text  # one in each of two rounds
    with pytest.raises(RunError, match="the losses of all 1 candidates are NaN or Inf"):
        method(scores_of([0] * 6), block_sites(*[10] * 6), Budget(3 / 6, 60), Additive(worth), RNG)
    with pytest.raises(ConfigError, match=r"^sparsity.ratio=0.7: expected at most 0.5"):
        method(scores_of([0] * 6), block_sites(*[10] * 6), Budget(0.7, 60), Additive(worth), RNG)


def test_greedy_removes_heads_and_channels_too() -> None:
    sites = model_sites(2, heads=3, channels=4)
    scores = {site.name: torch.arange(site.units, dtype=torch.float64) for site in sites}

    class Count:
        passes = 0.0

        def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
            kept = [sum(len(s.kept) * (1 if s.kind == "mlp" else 9) for s in c.plan.sites.values()) for c in candidates]
            return -torch.tensor(kept, dtype=torch.float64)  # loses most of what keeps most: channels leave first

    total = sum(site.units * site.cost.params for site in sites)
    budget = Budget(4 * sites[1].cost.params / total, total)
    plan = Greedy(1, ["heads", "channels"], 0, 0, None, "probes", "none", 1)(scores, sites, budget, Count(), RNG)
    assert [len(plan.sites[s.name].kept) for s in sites] == [3, 1, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["shortgpt", "sleb", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_leave_every_family(
    family: str, recipe: str, tiny: Callable[..., Model], tokens_NT: Tensor, build_from: Callable[..., Any]
) -> None:
    chosen = ["recipe=shortgpt", "criterion=random", "compensator=bias"] if recipe == "random" else [f"recipe={recipe}"]
    experiment = build_from(*chosen)
    method = Method(experiment.criterion, experiment.sparsity, experiment.search, experiment.compensator)
    model, meter = tiny(family), Meter()
    with torch.no_grad():
        dense = model.module(tokens_NT).logits
    pruned = prune_(model, tokens_NT, method, 0.3, Record(meter=meter, **QUIET))
    (removed,) = [name for name, site in pruned.plan.sites.items() if site.kind == "block"]
    assert pruned.plan.sites[removed] == SitePlan("block", 1, ()) and len(model.layers) == 2
    assert not [name for name in pruned.plan.sites if name.startswith(f"{removed}.")]
    assert len(pruned.plan.sites) == 5 and all(pruned.plan.removed(site) == 0 for site in pruned.sites)
    assert len(pruned.scores) == 3 and all(score.shape == (1,) for score in pruned.scores.values())  # type: ignore
    fresh = tiny(family)
    assert pruned.plan.budget["removed_params"] == fresh.decoder_params - model.decoder_params
    with torch.no_grad(), masked(fresh, pruned.plan):
        expected = fresh.module(tokens_NT).logits
        torch.testing.assert_close(model.module(tokens_NT).logits, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected, dense)
    # shortgpt: one pass; sleb: three blocks and the whole, and the first of the rest by its score
    assert meter.forward == pytest.approx({"shortgpt": 1, "sleb": 3, "random": 0}[recipe])


def test_the_best_block_by_loss_is_the_one_that_sleb_removes(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = tiny("opt")
    probe = Probe(model, tokens_NT, Meter())
    plans = [Plan({f"{model.layers_path}.{i}": SitePlan("block", 1, ())}) for i in range(3)]
    best = int(probe.losses([Candidate(plan) for plan in plans]).argmin())
    scores = {f"{model.layers_path}.{i}": torch.zeros(1) for i in range(3)}
    sites = [model.whole_block(i).sites[0] for i in range(3)]
    plan = Greedy(0, ["blocks"], 0, 0, None, "probes", "none", 1)(
        scores, sites, Budget(0.3, model.decoder_params), probe, RNG
    )
    assert [name for name, site in plan.sites.items() if not site.kept] == [f"{model.layers_path}.{best}"]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_saves_what_is_left_and_it_reloads(
    family: str, stream: bool, tiny_folder: Callable[[str], Path], build_from: Callable[..., Any], tmp_path: Path
) -> None:
    import numpy as np

    windows = np.random.default_rng(0).integers(3, 96, (6, 24))
    np.save(tmp_path / "tokens.npy", windows)
    data = [f"dataset.{part}={tmp_path / 'tokens.npy'}" for part in ("calibration", "evaluation")]
    plain = [
        "model=hf",
        f"model.path={tiny_folder(family)}",
        f"model.stream={stream}",
        "dataset=tokens",
        "dataset.length=24",
    ]
    rest = ["evaluator=[perplexity]", "run.dir=run", "run.prove=in_place", "sparsity.ratio=0.3"]
    metrics = run_experiment(build_from("recipe=shortgpt", *plain, *data, *rest)).metrics
    assert metrics["proof/max_logit_difference"] < 1e-6
    assert metrics["sparsity/decoder"] == pytest.approx(1 / 3)
    plan = json.loads(Path("run/plan.json").read_text())
    gone = [entry for entry in plan["sites"].values() if entry["kind"] == "block"]
    assert gone == [{"kind": "block", "units": 1, "kept": []}]
    assert (
        math.isfinite(metrics["pruned/ppl/tokens@24"])
        and metrics["pruned/ppl/tokens@24"] != metrics["dense/ppl/tokens@24"]
    )


@each(
    "overrides, message",
    [
        (
            ["criterion=loss_drop", "search=global", "search.granularity=[heads,ffn]"],
            r"^search.granularity=\['heads', 'ffn'\]: criterion=loss_drop has no scores of heads, which search=global",
        ),
        (["criterion=block_influence"], r"^criterion=block_influence .*search=al_am .*expected search=blocks"),
        (
            ["recipe=shortgpt", "search.granularity=[heads]"],
            r"^criterion=block_influence .*=blocks search\.granularity=\['heads'\] .*expected search=blocks",
        ),
        (
            ["recipe=sleb", "search=two_stage"],
            r"^criterion=loss_drop has no scores of channels, which search=two_stage removes; .*another search$",
        ),
        (["recipe=sleb", "search=uniform"], r"^criterion=loss_drop .*search=uniform .*expected search=blocks"),
        (
            ["search=uniform", "search.granularity=[blocks]"],
            r"^search.granularity=\['blocks'\]: expected heads, channels",
        ),
        (["recipe=sleb", "model.stream=true", "evaluator=[size]"], r"^model.stream=True: criterion=loss_drop measures"),
        (
            ["recipe=sleb", "criterion=random", "model.stream=true", "evaluator=[size]"],
            r"^model.stream=True: search=greedy",
        ),
        (["recipe=sleb", "search.shortlist=0"], r"^search.shortlist=0: expected an integer >= 1"),
        (["recipe=sleb", "search.keep_last=-1"], r"^search.keep_last=-1: expected an integer >= 0"),
    ],
)
def test_what_cannot_go_together_is_refused_at_once(
    overrides: list[str], message: str, build_from: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_from(*overrides)


def test_random_scores_blocks() -> None:
    (site,) = block_sites(1)
    assert Random(0)(whole_block(site), {})[site.name].shape == (1,)
