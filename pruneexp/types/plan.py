"""Plans: the structure to keep; and budgets, which count what leaves with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from pruneexp.types.site import Cost, Site
from pruneexp.types.times import Times

PLAN_VERSION = 1


@dataclass(frozen=True)
class SitePlan:
    """Which units of one site stay. Where units that stay lost some of their query heads: which of these stay."""

    kind: str
    units: int
    kept: tuple[int, ...]  # ascending
    query_heads: int | None = None  # how many there were, where some of the units that stay lost some
    kept_query_heads: tuple[int, ...] | None = None  # ascending, equally many of each unit that stays

    def __post_init__(self) -> None:
        ends = self.kept[:1] + self.kept[-1:]  # ascending: what is between them is below `units`, too
        if list(self.kept) != sorted(set(self.kept)) or any(not 0 <= u < self.units for u in ends):
            raise ValueError(f"kept={list(self.kept)!r}: expected ascending, distinct unit indices below {self.units}")
        if (self.query_heads, self.kept_query_heads) != (None, None) and not self._evenly():
            heads = None if self.kept_query_heads is None else list(self.kept_query_heads)
            raise ValueError(
                f"kept_query_heads={heads!r}: expected ascending, distinct heads below query_heads="
                f"{self.query_heads!r}, equally many of each kept unit"
            )

    def _evenly(self) -> bool:
        """Whether the query heads are some of each unit that stays, as many of one as of every other."""
        heads, kept = self.query_heads, self.kept_query_heads
        if not heads or not kept or not self.units or heads % self.units or list(kept) != sorted(set(kept)):
            return False
        units = [head // (heads // self.units) for head in kept]
        return units == [unit for unit in self.kept for _ in range(len(kept) // max(1, len(self.kept)))]

    def keep_C(self, site: Site) -> Tensor:
        """Out-projection channels that stay: int64 [K], ascending."""
        if self.kept_query_heads is None:
            return site.keep_C(self.kept)
        return replace(site, width=site.width // site.group).keep_C(self.kept_query_heads)

    def heads(self, site: Site) -> tuple[int, ...]:
        """Query heads of an attention site that stay."""
        if self.kept_query_heads is not None:
            return self.kept_query_heads
        return tuple(unit * site.group + head for unit in self.kept for head in range(site.group))

    def to_data(self) -> dict[str, Any]:
        data: dict[str, Any] = {"kind": self.kind, "units": self.units, "kept": list(self.kept)}
        if self.kept_query_heads is not None:
            data |= {"query_heads": self.query_heads, "kept_query_heads": list(self.kept_query_heads)}
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> SitePlan:
        heads = data.get("kept_query_heads")
        kept_heads = None if heads is None else tuple(heads)
        return cls(data["kind"], data["units"], tuple(data["kept"]), data.get("query_heads"), kept_heads)


@dataclass(frozen=True)
class Plan:
    """The structure to keep, by site, and the budget it met. Sites that are not named stay whole."""

    sites: Mapping[str, SitePlan]
    budget: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        sites = {name: site.to_data() for name, site in self.sites.items()}
        return json.dumps({"version": PLAN_VERSION, "sites": sites, "budget": dict(self.budget)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises ValueError for another version or a malformed plan."""
        data = json.loads(text)
        if data.get("version") != PLAN_VERSION:
            raise ValueError(f"version={data.get('version')!r}: expected a plan of version {PLAN_VERSION}")
        sites = {name: SitePlan.from_data(site) for name, site in data["sites"].items()}
        budget = data.get("budget", {})
        if not isinstance(budget, dict):
            raise ValueError(f"budget={budget!s:.60}: expected an object")
        return cls(sites, budget)

    def removed(self, site: Site) -> int:
        """Units of `site` that leave."""
        plan = self.sites.get(site.name)
        return 0 if plan is None else plan.units - len(plan.kept)

    def changes(self, site: Site) -> bool:
        """Whether `site` loses anything: units, or query heads."""
        plan = self.sites.get(site.name)
        return plan is not None and (len(plan.kept) < plan.units or plan.kept_query_heads is not None)

    def lost_heads(self, site: Site) -> int:
        """Query heads that leave from units of `site` that stay."""
        plan = self.sites.get(site.name)
        if plan is None or plan.kept_query_heads is None:
            return 0
        return len(plan.kept) * site.group - len(plan.kept_query_heads)

    def keep_C(self, site: Site) -> Tensor:
        """Out-projection channels of `site` that stay: int64 [K], ascending."""
        plan = self.sites.get(site.name)
        return site.keep_C(range(site.units)) if plan is None else plan.keep_C(site)

    def merged(self, other: Plan) -> Plan:
        """Both plans' sites (of different layers, say); `other`'s budget is added where it has one."""
        return Plan({**self.sites, **other.sites}, {**self.budget, **other.budget})

    @classmethod
    def keep_all(cls, sites: Sequence[Site]) -> Plan:
        return cls({s.name: SitePlan(s.kind, s.units, tuple(range(s.units))) for s in sites})

    @classmethod
    def from_masks(cls, sites: Sequence[Site], keep: Mapping[str, Tensor]) -> Plan:
        """From boolean masks [U], True = kept."""
        return cls({s.name: SitePlan(s.kind, s.units, tuple(keep[s.name].nonzero().flatten().tolist())) for s in sites})


@dataclass(frozen=True)
class Budget:
    """How much a search is to remove from the sites that it is given. `counts` says what is counted."""

    ratio: float  # share to remove, in [0, 1)
    total: int  # what the ratio is a share of
    added: float = 0  # to be removed on top: for new biases of compensation, and what layers before left over
    layers: int | None = None  # decoder layers of the whole run, where the sites given are not all; None: they are
    counts: Literal["params", "macs", "bytes", "kv_cache", "latency"] = "params"
    context: int = 0  # tokens of context that macs and bytes are counted at
    element_size: int = 1  # bytes of a weight, and of an entry of the KV cache
    times: Times | None = None  # what latency is counted by, and
    origin: tuple[int, ...] = ()  # which of the original layers each layer is

    @property
    def remove(self) -> float:
        """What is to be removed; 0 for a ratio of 0, whatever compensation would add."""
        return self.ratio * self.total + self.added if self.ratio > 0 else 0.0

    def price(self, site: Site) -> int:
        """What leaves with one unit of `site`: parameters; multiply-accumulates per token, over `context` tokens; bytes
        of weights and of the KV cache of `context` tokens; bytes of KV cache per token; picoseconds, by the slope."""
        return self._counted(site.cost)

    def taken(self, site: Site, units: int) -> int:
        """What leaves with so many units of `site`, as searches count it: the price of each, and with all of them what
        only leaves with the whole."""
        return units * self.price(site) + (self.beside(site) if units == site.units else 0)

    def beside(self, site: Site) -> int:
        """What only leaves with the whole of `site`."""
        return self._counted(site.beside)

    def freed(self, plan: Plan, site: Site) -> int:
        """What leaves `site` with a plan. Times are read from the table, since they are no multiples of a unit's."""
        if self.counts == "latency" and self.times is not None:
            return self.times.freed(self.origin[site.layer], site, plan.removed(site), plan.lost_heads(site))
        freed = self.taken(site, plan.removed(site))
        return freed if site.head_cost is None else freed + plan.lost_heads(site) * self._counted(site.head_cost)

    def _counted(self, cost: Cost) -> int:
        return {
            "params": cost.params,
            "macs": cost.macs + self.context * cost.context_macs,
            "bytes": self.element_size * (cost.params + self.context * cost.kv),
            "kv_cache": self.element_size * cost.kv,
            "latency": cost.picoseconds,
        }[self.counts]

    @property
    def unit(self) -> str:
        """What it counts, in words."""
        return {
            "params": "parameters",
            "macs": f"multiply-accumulates per token over {self.context} tokens",
            "bytes": f"bytes, the KV cache of {self.context} tokens with them",
            "kv_cache": "bytes of KV cache per token",
            "latency": "picoseconds of a pass through the decoder layers",
        }[self.counts]

    def added_params(self, count: int) -> int:
        """What so many parameters that belong to no unit (new biases) add, as it counts."""
        return {"params": count, "bytes": self.element_size * count}.get(self.counts, 0)
