"""Evidence that takes whole passes through the model: derivatives, slopes, and losses without each sublayer."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from pruneexp.calibrate.gradients import gradient_evidence
from pruneexp.calibrate.influence import influence_evidence
from pruneexp.calibrate.meter import Meter
from pruneexp.calibrate.probe import Probe
from pruneexp.calibrate.zeroth_order import Slopes
from pruneexp.model import Model
from pruneexp.types import Block, Candidate, Plan, RunError, SitePlan


class WholeModelEvidence:
    """Evidence that whole passes through the model give before the walk, handed out block by block."""

    def __init__(
        self, model: Model, tokens_NT: Tensor | None, kinds: Sequence[Any], meter: Meter, whole: Collection[str]
    ):
        self.gradients: dict[Any, dict[str, Any]] = {}  # first or second derivatives, by site name
        self.slopes: dict[Any, Slopes] = {}
        self.losses: dict[Any, tuple[dict[str, float], float]] = {}  # without each site, and of the whole model
        for kind in kinds:
            if tokens_NT is None:
                continue
            if kind.source == "gradient":
                self.gradients[kind] = gradient_evidence(model, tokens_NT, kind, meter)
            elif kind.source == "influence":
                self.gradients[kind] = influence_evidence(model, tokens_NT, kind, meter)
            elif kind.source == "zeroth_order":
                self.slopes[kind] = Slopes(model, tokens_NT, kind, meter)
            elif kind.source == "probe":
                shown = [site for i in range(len(model.layers)) for site in model.whole_block(i, whole).sites]
                units = {site.name: site.units for site in model.sites()}
                plans = [Plan({s.name: SitePlan(s.kind, units.get(s.name, 1), ())}) for s in shown]
                probe = Probe(model, tokens_NT, meter)
                *without, dense = probe.losses([Candidate(p) for p in (*plans, Plan({}))]).tolist()
                probe.close()
                _require_some(without, dense)
                self.losses[kind] = dict(zip((site.name for site in shown), without, strict=True)), dense

    def of(self, block: Block, whole: Block | None) -> dict[Any, dict[str, Any]]:
        """The block's share; what was handed out is no longer held."""
        gradients = {kind: {s.name: found.pop(s.name) for s in block.sites} for kind, found in self.gradients.items()}
        found = gradients | {kind: slopes.of(block) for kind, slopes in self.slopes.items()}
        for kind, (without, dense) in self.losses.items():
            sites = (whole or block).sites
            found[kind] = {s.name: kind.empty(s).update(without[s.name], dense) for s in sites}
        return found


def _require_some(without: Sequence[float], whole: float) -> None:
    """Raises RunError where the whole model's loss is the only one that is finite; if it is not, the criterion does."""
    if math.isfinite(whole) and not any(map(math.isfinite, without)):
        raise RunError(f"calibrate: none of {len(without)} losses without a block or sublayer is finite")
