"""Pruning in rounds: each calibrates, scores, searches and shrinks what the rounds before it left."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from pruneexp.cache import NoCache
from pruneexp.model import Model
from pruneexp.model.sites import experts_name
from pruneexp.progress import part_of
from pruneexp.pruning import Method, Pruned, prune_
from pruneexp.pruning.dense_evidence import Results
from pruneexp.pruning.record import Record
from pruneexp.types import QUERY_HEADS, ConfigError, Plan, Score, SitePlan, unit_scores

logger = logging.getLogger("pruneexp")


def prune_in_rounds_(model: Model, tokens_NT: Tensor | None, method: Method, record: Record) -> Pruned:
    """Shrinks `model` in place, round by round, to the shares of the original model that the schedule says.

    Plan and scores are those of the original model's units, sites and layers, whatever has moved up meanwhile. A unit's
    score is the last that it was given: in the last round for units that were there then, in the round in which it
    left for all others, so that scores of different rounds stand side by side. The plan's budget lists the rounds'
    own under `rounds`. A round costs what one shot costs: calibration, and whatever the search is set to spend.
    """
    shares = method.sparsity.shares()
    start, first = _Start(model), None
    plan, scores, chosen, budgets = Plan({}), {}, {}, []
    for number, share in enumerate(shares, start=1):
        which = f"round {number} of {len(shares)}" if len(shares) > 1 else ""
        names = _original_names(model, start)
        with part_of(which):
            try:
                original = None if first is None else first.counted
                pruned = prune_(model, tokens_NT, method, share, record, original)
            except ConfigError as error:
                raise error if number == 1 else ConfigError(f"{error} (in {which}, of what is left by then)") from error
        first = first or pruned
        record = replace(record, results=Results(NoCache(), {}))  # those of the dense model, which is gone now
        scores = _scores_after(scores, pruned.scores, plan, names)
        plan = _plan_after(plan, pruned.plan, names)
        chosen |= {names[name]: settings for name, settings in pruned.chosen.items()}
        budgets.append(dict(pruned.plan.budget))
        if which:
            logger.info("%s: removed %d parameters, for a share of %.4g", which, budgets[-1]["removed_params"], share)
    assert first is not None
    if len(shares) > 1:
        totals = {key: value for key, value in budgets[0].items() if key.startswith("total_")}
        removed = {key: sum(budget[key] for budget in budgets) for key in budgets[0] if key.startswith("removed_")}
        figures = {"ratio": shares[-1], "of": method.sparsity.of, **totals, **removed, "rounds": budgets}
        plan = replace(plan, budget=figures)
    return replace(first, plan=plan, scores=scores, chosen=chosen)


class _Start:
    """How layers and experts are counted before the first round."""

    def __init__(self, model: Model):
        self.layers = list(model.origin)
        self.experts = [model.experts_origin(index) for index in range(len(model.layers))]

    def name(self, model: Model, index: int, site: str, expert: int | None) -> str:
        """The name of a site of layer `index`, as it would be called there."""
        layer = self.layers.index(model.origin[index])
        here, there = (f"{model.layers_path}.{i}" for i in (index, layer))
        if expert is not None:
            number = self.experts[layer].index(model.experts_origin(index)[expert])
            site = f"{site.rpartition('.')[0]}.{number}"
        return there + site.removeprefix(here)


def _original_names(model: Model, start: _Start) -> dict[str, str]:
    """Sites of the model as it stands, layers and whole experts among them -> their names as counted at the start."""
    names = {}
    for index in range(len(model.layers)):
        for site in (*model.layer_sites(index), *model.whole_block(index).sites):
            names[site.name] = start.name(model, index, site.name, site.expert)
            names[f"{site.name}.{QUERY_HEADS}"] = f"{names[site.name]}.{QUERY_HEADS}"
        experts = experts_name(model.family, f"{model.layers_path}.{index}")
        names[experts] = start.name(model, index, experts, None)
    return names


def _plan_after(before: Plan, plan: Plan, names: Mapping[str, str]) -> Plan:
    """One round's plan on top of those before it. Sites of a layer that leaves are no longer named."""
    sites = dict(before.sites)
    for name, site in plan.sites.items():
        known = before.sites.get(names[name])
        sites[names[name]] = site if known is None else _on_top(known, site)
    gone = tuple(f"{name}." for name, site in sites.items() if site.kind == "block" and not site.kept)
    return Plan({name: site for name, site in sites.items() if not name.startswith(gone)}, plan.budget)


def _on_top(known: SitePlan, site: SitePlan) -> SitePlan:
    """One round's plan of a site, as counted before the rounds before it."""
    kept = tuple(known.kept[unit] for unit in site.kept)
    if not kept or (known.query_heads, site.query_heads) == (None, None):
        return SitePlan(site.kind, known.units, kept)
    heads = known.query_heads or (site.query_heads or 0) // site.units * known.units
    left = _heads(known, heads // known.units)
    chosen = _heads(site, len(left) // site.units)
    return SitePlan(site.kind, known.units, kept, heads, tuple(left[head] for head in chosen))


def _heads(plan: SitePlan, group: int) -> tuple[int, ...]:
    """Query heads that stay, of units that held `group` of them each."""
    return plan.kept_query_heads or tuple(unit * group + head for unit in plan.kept for head in range(group))


def _scores_after(
    before: Mapping[str, Score], scores: Mapping[str, Score], plan: Plan, names: Mapping[str, str]
) -> dict[str, Score]:
    """One round's scores over those before it; `plan`: of the rounds before."""
    after = dict(before)
    for name, score in scores.items():
        original = names[name]
        known = plan.sites.get(original.removesuffix(f".{QUERY_HEADS}"))
        if known is None or original not in before or len(unit_scores(before[original])) < known.units:
            after[original] = score  # the first of this site, or one for all units at once
            continue
        all_U = unit_scores(before[original]).clone()
        of_heads = original.endswith(f".{QUERY_HEADS}")
        kept = _heads(known, len(all_U) // known.units) if of_heads else known.kept
        all_U[list(kept)] = unit_scores(score).to(all_U)
        after[original] = all_U
    return after
