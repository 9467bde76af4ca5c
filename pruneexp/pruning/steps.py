"""The steps of pruning, all layers at once or one after the other: calibrate, score, search, compensate, shrink."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from pruneexp.calibrate import Bookmark, Visit, walk, walk_sites
from pruneexp.model import Model, sharing
from pruneexp.pruning.answers import compensation_of, scores_of
from pruneexp.pruning.ask import plan_all_layers, plan_within_budget
from pruneexp.pruning.budget import as_planned, as_searched, blocks_alone, budget_of, searched_sites, whole_budget
from pruneexp.pruning.dense_evidence import distinct, without_out_projections
from pruneexp.pruning.method import (
    Method,
    Pruned,
    Pruning,
    by_site,
    goes_layer_by_layer,
    scores_behind_masks,
    shown_to,
)
from pruneexp.pruning.on_windows import by_all_windows, dense_kind, dense_results, masked_scores, scores_of_part
from pruneexp.pruning.query_heads import with_query_heads
from pruneexp.pruning.record import Record
from pruneexp.search import block_scores, expert_scores
from pruneexp.surgery import remove_blocks_, replace_out_projections_, shrink_layer_
from pruneexp.types import (
    QUERY_HEADS,
    Candidate,
    Plan,
    RunError,
    Search,
    Site,
    SiteWeights,
    own_scores,
)

logger = logging.getLogger("pruneexp")


def prune_(
    model: Model, tokens_NT: Tensor | None, method: Method, ratio: float, record: Record, original: int | None = None
) -> Pruned:
    """Shrinks `model` in place by a share `ratio` and returns the plan, the scores and the sites it had.

    Layer by layer in one walk where the criterion is sequential and the search decides each layer alone; otherwise
    all layers are scored on the dense model first. `original`: what the ratio is a share of, where that is not this
    model but a larger one that it was pruned from.
    """
    sites = model.sites()
    blocks = [site for index in range(len(model.layers)) for site in model.whole_block(index).sites]
    leave = {site.name: site for site in (*sites, *as_planned(model, method.search, sites), *blocks)}
    work = Pruning(model, tokens_NT, method, ratio, record)
    budget = whole_budget(model, method.search, method.sparsity, ratio)
    if original is not None:  # what is still to leave, as a share of what is left; biases that were added count as left
        work.ratio = max(0.0, (ratio * original - (original - budget.total)) / budget.total)
    if goes_layer_by_layer(method):
        plan = _layer_by_layer(work, sites)
    else:
        plan = _all_at_once(work)
    figures = {"ratio": ratio, "of": method.sparsity.of, f"total_{budget.counts}": budget.total}
    for counted in (budget, replace(budget, counts="params")):
        removed = sum(counted.freed(plan, site) for site in leave.values())
        figures[f"removed_{counted.counts}"] = removed
    plan = replace(plan, budget={**plan.budget, **figures})
    return Pruned(plan, work.scores, sites, budget.total, work.chosen)


def _all_at_once(work: Pruning) -> Plan:
    """Scores of the dense model, or behind masks, one search over all layers, then a walk that compensates and
    shrinks."""
    criterion, search, kind = work.method.criterion, work.method.search, dense_kind(work.method)
    shown, compensates = shown_to(work.method), not blocks_alone(search)
    with work.record.clock("calibrate"):
        held_out = search.held_out and work.tokens_NT is not None
        if held_out or scores_behind_masks(work.method):
            scores = scores_of_part(work, criterion, shown) if held_out else masked_scores(work)
            _, kept_evidence = dense_results(work, None, kind, shown)
        else:
            scores, kept_evidence = dense_results(work, criterion, kind, shown)
        if lost := criterion.lost(scores):  # said of scores from the cache, too
            logger.warning("calibrate: %d of %d losses were not finite and count as the dearest", lost, len(scores))
        work.scores.update(scores)
    with work.record.clock("search"):
        sites = searched_sites(work.model, search)
        work.scores.update(expert_scores(work.scores, sites, search.starts))
        scores = work.scores if compensates or shown else block_scores(work.scores, sites)
        plan = plan_all_layers(work, sites, scores, _trial if compensates else None)
    work.scores = without_out_projections(work.scores)
    del scores  # and with them the covariances of removal paths
    if search.held_out and any(0 < plan.removed(site) < site.units for site in sites):
        with work.record.clock("calibrate"):
            plan = by_all_windows(work, plan, sites, shown)
    work.scores = own_scores(work.scores)
    plan, moved = _remove_blocks(work.model, plan, search)
    renamed = Plan({new: plan.sites[old] for new, old in moved.items() if old in plan.sites})
    dense = {new: kept_evidence[old] for new, old in moved.items() if old in kept_evidence}
    with work.record.clock("shrink"):
        _compensate_and_shrink(work, renamed, dense, "shrink")
    work.chosen = {moved[name]: chosen for name, chosen in work.chosen.items()}
    return plan


def _compensate_and_shrink(work: Pruning, plan: Plan, dense: Mapping[str, Any], stage: str) -> None:
    """A walk over all layers. `dense`: the compensator's evidence on the dense model, where it goes by that."""
    compensator, compensates = work.method.compensator, not blocks_alone(work.method.search)
    note = work.record.bookmark(stage, lambda: work.chosen)
    work.chosen.update(note.state or {})
    if by_site(compensator) and compensates:
        _site_by_site(work, lambda visit: plan, (), note)
        return
    kinds = distinct(compensator.evidence if compensator.sequential and compensates else None)
    for visit in walk(work.model, work.tokens_NT, kinds, note):
        evidence = visit.of(compensator.evidence) if kinds else dense
        _shrink(work, visit, plan, evidence)
        del visit, evidence


def _trial(work: Pruning, plan: Plan, tokens_NT: Tensor) -> Candidate:
    """`plan` with the out-projections that compensation gives it on these windows; the model stays as it is."""
    model = sharing(work.model)

    def let_go(index: int) -> None:
        """Of the shrunk layer, once the walk is through it."""
        model.layers[index] = work.model.layers[index]

    record, given = Record(rng=work.record.rng, shrunk=let_go), {}
    own = Pruning(model, tokens_NT, work.method, work.ratio, record, given=given)
    _, dense = dense_results(own, None, dense_kind(work.method), ())
    _compensate_and_shrink(own, plan, dense, "search: fits")
    assert work.tokens_NT is not None
    work.record.meter.forward += record.meter.forward * len(tokens_NT) / len(work.tokens_NT)
    return Candidate(plan, given)


def _remove_blocks(model: Model, plan: Plan, search: Search) -> tuple[Plan, dict[str, str]]:
    """Takes out the layers that `plan` drops. Returns the plan of these layers and of the sites that stay; and the
    names of these sites from here on (layers behind a gap move up), each with its name in the plan."""
    blocks = {name: site for name, site in plan.sites.items() if site.kind == "block"}
    gone = {name: site for name, site in blocks.items() if not site.kept}
    there = as_planned(model, search, model.sites())
    stay = [site for site in there if f"{model.layers_path}.{site.layer}" not in gone]
    if not blocks:
        return plan, {site.name: site.name for site in stay}
    chosen = {site.name: plan.sites[site.name] for site in stay if site.name in plan.sites}
    plan = Plan({**Plan.keep_all(stay).sites, **chosen, **gone}, plan.budget)
    remove_blocks_(model, plan)
    left = as_planned(model, search, model.sites())
    return plan, dict(zip((site.name for site in left), (site.name for site in stay), strict=True))


def _site_by_site(work: Pruning, decide: Callable[[Visit], Plan], kinds: Sequence[type], note: Bookmark) -> None:
    """Each sublayer is compensated and shrunk on what the pruned sublayers before it produce."""
    wanted = work.method.compensator.evidence
    assert wanted is not None
    if work.tokens_NT is None:
        raise RunError("compensator.target='dense': expected calibration windows")
    plan, states = Plan({}), work.record.results.dense_states(work.model)
    walked = walk_sites(work.model, work.tokens_NT, wanted, kinds, note, states)
    for visit, site, collect in walked:
        sites = visit.block.sites or (None,)  # a layer may have lost both before
        plan = decide(visit) if site is sites[0] else plan
        if site is not None and plan.changes(site):
            alone = Plan({name: own for name, own in plan.sites.items() if name == site.name})
            keep_C = plan.keep_C(site)
            weights = work.model.block(visit.index).weights[site.name]
            weights = replace(weights, in_projections={}, in_projection_biases={})  # rows leave, and are not held
            before = wanted.of is not None and len(keep_C) > 0  # evidence of what stays alone: nothing else need run
            if before:
                shrink_layer_(work.model, visit.index, alone)
            out_projections = {site.name: _compensated(work, site, weights, collect(keep_C), keep_C)}
            if before:
                replace_out_projections_(work.model, visit.index, out_projections)
            else:
                shrink_layer_(work.model, visit.index, alone, out_projections)
            del weights, out_projections
        if site is sites[-1]:
            work.record.shrunk(visit.index)
        del visit, collect


def _layer_by_layer(work: Pruning, sites: Sequence[Site]) -> Plan:
    """Each layer is scored, searched and shrunk on what the pruned layers before it produce."""
    criterion, compensator = work.method.criterion, work.method.compensator
    with work.record.clock("calibrate"):
        _, dense = dense_results(work, None, dense_kind(work.method), ())
    sitewise = by_site(compensator)
    kinds = distinct(criterion.evidence, compensator.evidence if compensator.sequential and not sitewise else None)
    decided = _Decided(work)
    note = work.record.bookmark("shrink" if sitewise else "calibrate and shrink", decided.noted)
    if note.state is not None:
        decided.go_on(note.state)
    with work.record.clock("calibrate"):
        if sitewise:
            _site_by_site(work, decided.at, kinds, note)
        else:
            for visit in walk(work.model, work.tokens_NT, kinds, note):
                plan = decided.at(visit)
                evidence = visit.of(compensator.evidence) if compensator.sequential else dense
                _shrink(work, visit, plan, evidence)
                del visit, evidence
    return decided.plan


@dataclass
class _Decided:
    """The layers decided so far, and the parameters that they left over or took too much."""

    work: Pruning
    plan: Plan = field(default_factory=lambda: Plan({}))
    carry: float = 0.0

    def at(self, visit: Visit) -> Plan:
        """Scores and decides the visited layer."""
        work = self.work
        sites = as_searched(work.model, work.method.search, visit.block.sites)
        block, evidence = visit.block, visit.of(work.method.criterion.evidence)
        if QUERY_HEADS in work.method.search.granularity:
            block, evidence = with_query_heads(block, evidence)
        scores = scores_of(work.method.criterion, block, evidence)
        scores = {**scores, **expert_scores(scores, sites)}
        work.scores.update(without_out_projections(scores))
        held = as_planned(work.model, work.method.search, visit.block.sites)
        budget = budget_of(work.model, work.method.sparsity, work.ratio, held, [visit.index])
        layer_plan, self.carry = plan_within_budget(
            work, scores, sites, replace(budget, added=self.carry, layers=len(work.model.layers)), None
        )
        self.plan = self.plan.merged(Plan(layer_plan.sites))
        return self.plan

    def noted(self) -> Any:
        """What to go on from."""
        return self.plan, self.carry, self.work.scores, self.work.chosen, self.work.record.rng.get_state()

    def go_on(self, noted: Any) -> None:
        self.plan, self.carry, self.work.scores, self.work.chosen, rng = noted
        self.work.record.rng.set_state(rng)


def _shrink(work: Pruning, visit: Visit, plan: Plan, evidence: Mapping[str, Any]) -> None:
    """Compensates and shrinks the visited layer. Sites that keep all units are left untouched. Evidence may be spent,
    a site's being used once."""
    weights = visit.block.weights
    out_projections = {
        site.name: _compensated(work, site, weights[site.name], evidence.get(site.name), plan.keep_C(site))
        for site in visit.block.sites
        if plan.changes(site)
    }
    shrink_layer_(work.model, visit.index, plan, out_projections)
    work.record.shrunk(visit.index)


def _compensated(
    work: Pruning, site: Site, weights: SiteWeights, evidence: Any, keep_C: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The compensated out-projection of a site that loses units; the evidence may be spent on it."""
    weight, bias, chosen = compensation_of(work.method.compensator, site, weights, evidence, keep_C)
    if chosen is not None:
        work.chosen[site.name] = chosen
    if work.given is not None:
        work.given[site.name] = weight, bias
    return weight, bias
