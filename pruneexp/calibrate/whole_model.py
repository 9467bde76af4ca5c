"""Evidence that takes whole passes through the model: derivatives, slopes, and losses without each sublayer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from pruneexp.calibrate.bookmark import Meter
from pruneexp.calibrate.gradients import gradient_evidence
from pruneexp.calibrate.influence import influence_evidence
from pruneexp.calibrate.probe import Probe
from pruneexp.calibrate.zeroth_order import Slopes
from pruneexp.model import Model
from pruneexp.types import Block, Candidate, Plan, RunError, SitePlan, collected_by

Share = Callable[[Block, Block], dict[str, Any]]  # once a layer, as it is and as it is judged: evidence by site name


def evidence_ahead(
    model: Model, tokens_NT: Tensor | None, kinds: Sequence[Any], meter: Meter, whole: Collection[str]
) -> dict[Any, Share]:
    """What whole passes through the model give before the walk, by kind; of losses, for the kinds of sites in `whole`
    as wholes. None without tokens."""
    if tokens_NT is None:
        return {}
    return {
        kind: COLLECTORS[kind.source](model, tokens_NT, kind, meter, whole)
        for kind in collected_by("whole_model", kinds)
    }


def _derivatives(collect: Callable[[Model, Tensor, Any, Meter], dict[str, Any]]) -> Callable[..., Share]:
    def collected(model: Model, tokens_NT: Tensor, kind: Any, meter: Meter, whole: Collection[str]) -> Share:
        evidence = collect(model, tokens_NT, kind, meter)
        return lambda block, judged: {site.name: evidence.pop(site.name) for site in block.sites}  # held no longer

    return collected


def _slopes(model: Model, tokens_NT: Tensor, kind: Any, meter: Meter, whole: Collection[str]) -> Share:
    slopes = Slopes(model, tokens_NT, kind, meter)
    return lambda block, judged: slopes.of(block)


def _losses(model: Model, tokens_NT: Tensor, kind: Any, meter: Meter, whole: Collection[str]) -> Share:
    shown = [site for i in range(len(model.layers)) for site in model.whole_block(i, whole).sites]
    units = {site.name: site.units for site in model.sites()}
    plans = [Plan({s.name: SitePlan(s.kind, units.get(s.name, 1), ())}) for s in shown]
    probe = Probe(model, tokens_NT, meter)
    probe.show("losses", 1 + sum(1 - site.layer / len(model.layers) for site in shown))
    *without, dense = probe.losses([Candidate(p) for p in (*plans, Plan({}))]).tolist()
    probe.close()
    if math.isfinite(dense) and not any(map(math.isfinite, without)):  # a dense one that is not: the criterion says so
        raise RunError(f"calibrate: none of {len(without)} losses without a layer or sublayer is finite")
    losses = dict(zip((site.name for site in shown), without, strict=True))
    return lambda block, judged: {s.name: kind.empty(s).update_(losses[s.name], dense) for s in judged.sites}


COLLECTORS: dict[str, Callable[..., Share]] = {  # by source
    "gradient": _derivatives(gradient_evidence),
    "influence": _derivatives(influence_evidence),
    "zeroth_order": _slopes,
    "probe": _losses,
}
