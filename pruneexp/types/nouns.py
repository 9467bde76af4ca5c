"""Sites, blocks, plans, budgets, scores, and the two ways a run can end badly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

PLAN_VERSION = 1


class ConfigError(ValueError):
    """A config that cannot work. The message is one line: the key, the value, what was expected. Exit code 2."""


class ConfigErrors(ConfigError):
    """Several mistakes, each a message of one line."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("; ".join(lines))
        self.lines = tuple(lines)


class RunError(RuntimeError):
    """A run that failed for a reason the user can act on. The message is one line. Exit code 1."""


def require_least(part: Any, least: int, *names: str, besides: str = "") -> None:
    """Raises ConfigError where a setting of one of these names, unless None, is below `least`; `besides` ends it."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}={value!r}: expected an integer >= {least}{besides}")


@dataclass(frozen=True)
class Cost:
    """What leaves the model with one unit."""

    params: int  # parameters: the unit's in-projection rows (and their biases) and its out-projection columns
    macs: int  # multiply-accumulates per token in those matrices
    kv: int  # KV-cache elements per token
    context_macs: int = 0  # multiply-accumulates of attention per token, for each token of context it looks at


@dataclass(frozen=True)
class Site:
    """One prunable axis: U interchangeable units of one sublayer (U = 1: the whole sublayer or block)."""

    name: str  # module path in the original model: "model.layers.0.self_attn", "model.layers.0.mlp", "...mlp.experts.3"
    kind: (
        # "attention" (unit = KV group: a key/value head and its query heads; a query head where one key/value head
        # serves all), "mlp" (unit = FFN channel), "experts" (unit = expert of a mixture), "block"
        str
    )
    layer: int  # index of the decoder layer in the original model
    units: int  # U
    width: int  # W: out-projection input channels per unit
    cost: Cost  # of one unit
    expert: int | None = None  # which expert of a mixture an "mlp" site belongs to, as the layer counts them now
    least: int = 0  # units that cannot do without each other: so many stay

    @property
    def channels(self) -> int:
        """C = U*W, input channels of the out-projection."""
        return self.units * self.width

    def keep_C(self, kept: Sequence[int]) -> Tensor:
        """Out-projection channels of the kept units: int64 [K], ascending when `kept` is."""
        units = torch.as_tensor(kept, dtype=torch.int64)
        return (units[:, None] * self.width + torch.arange(self.width)).reshape(-1)


@dataclass(frozen=True)
class SiteWeights:
    """The weights of one site, ordered by unit: views, never written to."""

    in_projections: Mapping[str, Tensor]  # role (query, key, value, gate, up; not of shared heads) -> [U, R, D]
    in_projection_biases: Mapping[str, Tensor]  # role -> [U, R]; empty where there are none
    out_projection: Tensor  # [O, C]
    out_projection_bias: Tensor | None  # [O]


@dataclass(frozen=True)
class Block:
    """One decoder layer as tensors by role, with its sites. Criteria see this, never modules."""

    name: str  # "model.layers.0"
    layer: int
    sites: tuple[Site, ...]
    weights: Mapping[str, SiteWeights]  # by site name
    norms: Mapping[str, Tensor] = field(default_factory=dict)  # site name -> scale [D] of the norm in front of it
    side_by_side: bool = False  # the FFN does not see what attention gives, both read the block's input


@dataclass(frozen=True)
class SitePlan:
    """Which units of one site stay."""

    kind: str
    units: int
    kept: tuple[int, ...]  # ascending

    def __post_init__(self) -> None:
        ends = self.kept[:1] + self.kept[-1:]  # ascending: what is between them is below `units`, too
        if list(self.kept) != sorted(set(self.kept)) or any(not 0 <= u < self.units for u in ends):
            raise ValueError(f"kept={list(self.kept)!r}: expected ascending, distinct unit indices below {self.units}")


@dataclass(frozen=True)
class Plan:
    """The structure to keep, by site, and the budget it met. Sites that are not named stay whole."""

    sites: Mapping[str, SitePlan]
    budget: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        sites = {n: {"kind": s.kind, "units": s.units, "kept": list(s.kept)} for n, s in self.sites.items()}
        return json.dumps({"version": PLAN_VERSION, "sites": sites, "budget": dict(self.budget)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises ValueError for another version or a malformed plan."""
        data = json.loads(text)
        if data.get("version") != PLAN_VERSION:
            raise ValueError(f"version={data.get('version')!r}: expected a plan of version {PLAN_VERSION}")
        sites = {n: SitePlan(s["kind"], s["units"], tuple(s["kept"])) for n, s in data["sites"].items()}
        return cls(sites, data.get("budget", {}))

    def removed(self, site: Site) -> int:
        """Units of `site` that leave."""
        plan = self.sites.get(site.name)
        return 0 if plan is None else plan.units - len(plan.kept)

    def merged(self, other: Plan) -> Plan:
        """Both plans' sites (of different layers, say); `other`'s budget is added where it has one."""
        return Plan({**self.sites, **other.sites}, {**self.budget, **other.budget})

    @classmethod
    def keep_all(cls, sites: Sequence[Site]) -> Plan:
        return cls({s.name: SitePlan(s.kind, s.units, tuple(range(s.units))) for s in sites})

    @classmethod
    def from_masks(cls, sites: Sequence[Site], keep: Mapping[str, Tensor]) -> Plan:
        """From boolean masks [U], True = kept."""
        kept = {s: torch.nonzero(keep[s.name], as_tuple=False).flatten().tolist() for s in sites}
        return cls({s.name: SitePlan(s.kind, s.units, tuple(units)) for s, units in kept.items()})


@dataclass(frozen=True)
class Budget:
    """How much a search is to remove from the sites it is given, in what it `counts`."""

    ratio: float  # share to remove, in [0, 1)
    total: int  # what the ratio is a share of
    added: float = (
        0  # to be removed on top: parameters that compensation adds (new biases), what layers before left over
    )
    layers: int | None = None  # decoder layers of the whole run, where the sites given are not all; None: they are
    counts: Literal["params", "macs", "bytes", "kv_cache"] = "params"
    context: int = 0  # tokens of context that macs and bytes are counted at
    element_size: int = 1  # bytes of a weight, and of an entry of the KV cache

    @property
    def remove(self) -> float:
        """What is to be removed; 0 for a ratio of 0, whatever compensation would add."""
        return self.ratio * self.total + self.added if self.ratio > 0 else 0.0

    def price(self, site: Site) -> int:
        """What leaves with one unit of `site`: parameters; multiply-accumulates per token, over `context` tokens; bytes
        of weights and of the KV cache of `context` tokens; bytes of KV cache per token."""
        cost = site.cost
        return {
            "params": cost.params,
            "macs": cost.macs + self.context * cost.context_macs,
            "bytes": self.element_size * (cost.params + self.context * cost.kv),
            "kv_cache": self.element_size * cost.kv,
        }[self.counts]

    @property
    def unit(self) -> str:
        """What it counts, in words."""
        return {
            "params": "parameters",
            "macs": f"multiply-accumulates per token over {self.context} tokens",
            "bytes": f"bytes, the KV cache of {self.context} tokens with them",
            "kv_cache": "bytes of KV cache per token",
        }[self.counts]

    def added_params(self, count: int) -> int:
        """What so many parameters without a unit (new biases) add."""
        return {"params": count, "bytes": self.element_size * count}.get(self.counts, 0)


@dataclass(frozen=True)
class RemovalPath:
    """The answer of a criterion whose costs change as units leave."""

    order_U: Tensor  # int64 [U]: the unit that leaves first, second, ...
    cost_U: Tensor  # float [U]: cumulative cost once the first 1, 2, ..., U units of `order_U` have left
    out_projections: Mapping[int, tuple[Tensor, Tensor | None]] = field(
        default_factory=dict
    )  # removed units -> refitted out-projection

    @property
    def scores_U(self) -> Tensor:
        """As importances, higher = keep: a unit's score is the cumulative cost at which it leaves."""
        return torch.empty_like(self.cost_U).scatter_(0, self.order_U, self.cost_U)


@runtime_checkable
class Reorderable(Protocol):
    """Fitted out-projections of a `RemovalPath` that can be had for another order, too."""

    def in_order(self, order_U: Tensor) -> Mapping[int, tuple[Tensor, Tensor | None]]:
        """Removed units -> refitted out-projection, where units leave in the order `order_U`, int64 [U]."""
        ...


@dataclass(frozen=True)
class ColumnScores:
    """The answer of a criterion that judges the out-projection's channels: importances of the units, and of the
    channels that make them up. A search that compares sites can so standardise by the spread of the channels, as FLAP
    does."""

    scores_U: Tensor  # [U], higher = keep
    columns_C: Tensor  # [C], higher = keep


Score = Tensor | RemovalPath | ColumnScores
Scores = Mapping[str, Score]  # site name -> importances of its units


def start_name(start: str, site: str) -> str:
    """What the scores of a search's start are called, among those of the criterion: "flap:model.layers.0.mlp"."""
    return f"{start}:{site}"


def own_scores(scores: Scores) -> dict[str, Score]:
    """Those of the criterion itself."""
    return {name: score for name, score in scores.items() if ":" not in name}


def unit_scores(score: Score) -> Tensor:
    """Importances of a site's units, higher = keep: [U]."""
    return score if isinstance(score, Tensor) else score.scores_U


@dataclass(frozen=True)
class Candidate:
    """A structure that a search wants judged, with replacement out-projections where it has them."""

    plan: Plan
    out_projections: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)  # site -> [O,K], bias [O]


@dataclass(frozen=True)
class Measured:
    """What an evaluator found of one model. `files`: what goes into the run folder's samples/: the ending of a name
    ("json") and the contents. `seen`: what a comparison of the dense and the pruned model needs. The cache can keep
    numbers, text, tensors, lists and mappings."""

    figures: Mapping[str, float]
    files: Mapping[str, str] = field(default_factory=dict)
    seen: Any = None


@dataclass(frozen=True)
class RunRecord:
    """A run as trackers know it when it starts."""

    folder: Path  # the run folder
    config: Mapping[str, Any]  # the composed config
    group: str | None  # the sweep that it belongs to
    name: str | None
    job_type: str | None  # "run", "job" of a sweep, or its "summary"
    job: Mapping[str, Any] = field(default_factory=dict)  # `recipe`, `choices` of each group, `overrides` as typed
