"""The types are wide enough: methods of every kind fit the protocols and flow through."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pruneexp.calibrate.whole_model import COLLECTORS
from pruneexp.search import Global
from pruneexp.types import (
    SOURCES,
    Block,
    Budget,
    Candidate,
    ColumnScores,
    ConfigError,
    Evidence,
    Oracle,
    Plan,
    RemovalPath,
    Scores,
    Site,
    SitePlan,
    SiteWeights,
    collected_by,
    evidence_kinds,
    require_within,
    unit_scores,
)
from tests.cases import each
from tests.toy_sites import HEAD, block, layer_sites, model_sites, params

SITES = model_sites(2)


def test_a_sites_channels_go_by_unit():
    site = SITES[0]
    assert site.channels == 4 * HEAD
    assert site.keep_C([0, 3]).tolist() == [*range(HEAD), *range(3 * HEAD, 4 * HEAD)]
    assert site.keep_C([]).dtype == torch.int64 and len(site.keep_C([])) == 0


@each("kept", [(1, 0), (0, 0), (0, 4), (-1,)])
def test_kept_units_are_ascending_distinct_and_there(kept):
    with pytest.raises(ValueError, match="expected ascending, distinct unit indices below 4"):
        SitePlan("attention", 4, kept)


def test_a_plan_survives_json():
    masks = {site.name: torch.arange(site.units) % 3 > 0 for site in SITES}
    plan = Plan(Plan.from_masks(SITES, masks).sites, {"ratio": 0.3})
    assert Plan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    assert data["version"] == 1
    assert data["sites"]["model.layers.0.self_attn"] == {"kind": "attention", "units": 4, "kept": [1, 2]}
    assert plan.removed(SITES[0]) == 2 and Plan({}).removed(SITES[0]) == 0
    with pytest.raises(ValueError, match="version=7: expected a plan of version 1"):
        Plan.from_json('{"version": 7, "sites": {}}')


def test_plans_of_layers_are_merged():
    first, second = Plan.keep_all(SITES[:2]), Plan.keep_all(SITES[2:])
    assert set(first.merged(second).sites) == {site.name for site in SITES}


def test_a_budget_counts_what_is_added_on_top():
    assert Budget(0.2, 1000, 30).remove == pytest.approx(230)
    assert Budget(0.0, 1000, 30).remove == 0


def test_every_kind_of_score_has_one_value_per_unit():
    columns = torch.arange(12.0)
    assert unit_scores(columns) is columns
    assert unit_scores(ColumnScores(columns.reshape(3, 4).sum(1), columns)).tolist() == [6.0, 22.0, 38.0]
    assert unit_scores(RemovalPath(torch.tensor([2, 0, 1]), torch.tensor([1.0, 5.0, 9.0]))).tolist() == [5.0, 9.0, 1.0]


# ---- methods of kinds that come with other modules, at their smallest


@dataclass(frozen=True)
class RemovalCost:
    """A criterion whose costs grow as units leave."""

    evidence: ClassVar[None] = None

    def __call__(self, block: Block, evidence: Mapping[str, Any]) -> dict[str, RemovalPath]:
        return {site.name: self._path(site, block.weights[site.name]) for site in block.sites}

    def _path(self, site: Site, weights: SiteWeights) -> RemovalPath:
        size_U = weights.out_projection.square().sum(0).reshape(site.units, -1).sum(1)
        cost, order = size_U.sort()
        kept = site.keep_C(sorted(order[1:].tolist()))
        return RemovalPath(order, cost.cumsum(0), {1: (weights.out_projection[:, kept], None)})


@dataclass(frozen=True)
class FakeOracle:
    """Loses 1 nat for each even unit that leaves, 0.1 for each odd one."""

    passes = 0.0

    def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
        return torch.tensor([self._loss(candidate.plan) for candidate in candidates], dtype=torch.float64)

    def _loss(self, plan: Plan) -> float:
        gone = [u for site in plan.sites.values() for u in range(site.units) if u not in site.kept]
        return sum(0.1 if u % 2 else 1.0 for u in gone)


@dataclass(frozen=True)
class Greedy:
    """A search that asks the oracle before every removal."""

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        assert oracle is not None
        plan = Plan.keep_all(sites)
        while sum(plan.removed(site) * site.cost.params for site in sites) < budget.remove:
            tries = [self._without(plan, site, unit) for site in sites for unit in plan.sites[site.name].kept]
            plan = tries[int(oracle.losses([Candidate(each) for each in tries]).argmin())]
        return plan

    def _without(self, plan: Plan, site: Site, unit: int) -> Plan:
        kept = tuple(u for u in plan.sites[site.name].kept if u != unit)
        return plan.merged(Plan({site.name: SitePlan(site.kind, site.units, kept)}))


@dataclass(frozen=True)
class Saliency:
    """Gradient evidence: |w * g| of the reader, by channel."""

    source: ClassVar[str] = "gradient"

    total_C: Tensor

    @classmethod
    def empty(cls, site: Site) -> Saliency:
        return cls(torch.zeros(site.channels, dtype=torch.float64))

    def update_(self, weights: SiteWeights, gradients: SiteWeights) -> Saliency:
        return Saliency(self.total_C + (weights.out_projection * gradients.out_projection).abs().sum(0))

    def merge(self, other: Saliency) -> Saliency:
        return Saliency(self.total_C + other.total_C)


@dataclass(frozen=True)
class SlopeGradient:
    """Zeroth-order evidence: slope * z, an estimate of the gradient, for the reader."""

    source: ClassVar[str] = "zeroth_order"

    n: int
    sum_OC: Tensor

    @classmethod
    def empty(cls, site: Site) -> SlopeGradient:
        return cls(0, torch.zeros(()))

    def update_(self, direction: SiteWeights, slope: float) -> SlopeGradient:
        return SlopeGradient(self.n + 1, self.sum_OC + slope * direction.out_projection)

    def merge(self, other: SlopeGradient) -> SlopeGradient:
        return SlopeGradient(self.n + other.n, self.sum_OC + other.sum_OC)


def test_a_criterion_may_answer_with_removal_paths():
    toy = block()
    scores = RemovalCost()(toy, {})
    budget = Budget(0.25, params(list(toy.sites)))
    plan = Global(1, ["heads", "channels"], "per_parameter", 1)(scores, toy.sites, budget, None, torch.Generator())
    for site in toy.sites:
        gone = set(range(site.units)) - set(plan.sites[site.name].kept)
        assert gone == set(scores[site.name].order_U[: len(gone)].tolist())


def test_a_search_may_live_on_the_oracle():
    sites = list(layer_sites(0, heads=1, channels=6))[1:]
    plan = Greedy()({}, sites, Budget(0.5, params(sites)), FakeOracle(), torch.Generator())
    assert plan.sites["model.layers.0.mlp"].kept == (0, 2, 4)


def test_gradient_and_zeroth_order_evidence_fit():
    toy = block()
    site = toy.sites[1]
    weights = toy.weights[site.name]
    saliency = Saliency.empty(site).update_(weights, weights).merge(Saliency.empty(site))
    torch.testing.assert_close(saliency.total_C, weights.out_projection.square().sum(0))
    estimate = SlopeGradient.empty(site)
    generator = torch.Generator().manual_seed(0)
    for _ in range(800):  # a linear loss <a, w>: the slope along z is <a, z>
        z = torch.randn(weights.out_projection.shape, generator=generator, dtype=torch.float64)
        direction = SiteWeights({}, {}, z, None)
        estimate = estimate.update_(direction, float((weights.out_projection * z).sum()))
    cosine = torch.cosine_similarity((estimate.sum_OC / estimate.n).flatten(), weights.out_projection.flatten(), dim=0)
    assert cosine > 0.5
    evidence_kinds((Saliency, SlopeGradient))  # what a method names is filled in
    assert isinstance(saliency, Evidence) and isinstance(estimate, Evidence)


class Bare:
    """A search that says nothing of itself."""


class Slotted:
    __slots__ = ()


def test_what_a_part_leaves_out_is_filled_in_once() -> None:
    from pruneexp.types import ConfigError, defaults, filled

    part = filled(Bare(), defaults.SEARCH)
    assert part.granularity == ("heads", "channels") and part.heads is None and not (part.probes or part.local)
    assert filled(Bare(), defaults.CRITERION).sequential is False
    part.check((), None)  # nothing is said against any budget
    part.granularity = ["blocks"]
    assert filled(part, defaults.SEARCH).granularity == ["blocks"], "what is there stays"
    with pytest.raises(ConfigError, match="Slotted has no local and cannot be given one"):
        filled(Slotted(), defaults.SEARCH)


@each(
    "span, value, expected",
    [
        ("[0, 1)", 0.0, None),
        ("[0, 1)", 1.0, r"size=1\.0: expected a share, in \[0, 1\), or none"),
        ("(0, 1]", 1, None),
        ("(0, 1]", 0, r"size=0: expected a share, in \(0, 1\], or none"),
        ("(0, 1]", float("nan"), "size=nan: expected a share, in"),
        ("(0, inf)", 1e300, None),
        ("(0, inf)", 0, "size=0: expected a share, > 0, or none"),
        ("(0, inf)", float("inf"), "size=inf: expected a share, > 0, or none"),
        ("[0, inf)", -1, "size=-1: expected a share, >= 0, or none"),
        ("(0, inf]", float("inf"), None),
    ],
)
def test_a_setting_lies_within_its_interval(span, value, expected) -> None:
    part = SimpleNamespace(size=value, other=0.5)
    with nullcontext() if expected is None else pytest.raises(ConfigError, match=f"^{expected}"):
        assert require_within(part, span, "other", "size", what="a share,", besides=", or none") is None


def test_our_own_parts_have_every_member() -> None:
    import inspect

    from pruneexp import criterion, dataset, evaluator, evidence, search
    from pruneexp.types import defaults

    for package, expected in (
        (search, defaults.SEARCH),
        (criterion, defaults.CRITERION),
        (evaluator, defaults.EVALUATOR),
        (evidence, defaults.EVIDENCE),
        (dataset, defaults.DATASET),
    ):
        kinds = [each for each in vars(package).values() if inspect.isclass(each)]
        assert len(kinds) > 2
        for kind in kinds:
            # a protocol, what evidence is made of, and halves, which are as their kind is
            if kind.__name__ in ("GateDerivatives", "Halves", "Halved"):
                continue
            members = {*dir(kind), *getattr(kind, "__dataclass_fields__", ())}
            assert set(expected) <= members, kind


def test_evidence_names_a_source_that_something_feeds():
    class Wrong:
        source = "readers"

    class Immutable:
        source = "reader"

        @classmethod
        def empty(cls, site: Site) -> Immutable:
            return cls()

        def update(self, x_BTC: Tensor) -> Immutable:
            return self

    with pytest.raises(ConfigError, match="Wrong.source='readers'.*reader, writer"):
        evidence_kinds((Saliency, Wrong))
    with pytest.raises(
        ConfigError, match="Immutable'> has no update_; expected statistics with source, empty, update_"
    ):
        evidence_kinds(Immutable)
    assert collected_by("whole_model", evidence_kinds((Saliency, SlopeGradient))) == (Saliency, SlopeGradient)
    assert collected_by("walk", (Saliency,)) == ()
    assert {name for name, source in SOURCES.items() if source.collector == "whole_model"} == set(COLLECTORS)
