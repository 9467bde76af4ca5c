"""The nouns of a pruning run: sites, blocks, plans, budgets, and the protocols that methods satisfy.

Shape letters, used as suffixes of tensor names everywhere in this package:

    B batch        T time (tokens of a window)   N tokens in all, N = B*T (of a token array: windows)
    D hidden size  C input channels of a reader  U units of a site
    W channels per unit, C = U*W                 R writer rows per unit
    K kept channels                              O outputs of a reader (= D)

A *site* is one prunable axis of one decoder layer: U interchangeable units. Removing a unit removes its rows of the
*writers* (query, key, value; gate, up; fc1) and its columns of the one *reader* (o_proj, down_proj, fc2).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

PLAN_VERSION = 1


class ConfigError(ValueError):
    """A config that cannot work. The message is one line: the key, the value, what was expected. Exit code 2."""


class RunError(RuntimeError):
    """A run that failed for a reason the user can act on. The message is one line. Exit code 1."""


@dataclass(frozen=True)
class Cost:
    """What leaves the model with one unit."""

    params: int  # parameters: the unit's writer rows (and their biases) and its reader columns
    macs: int  # multiply-accumulates per token in those matrices
    kv: int  # KV-cache elements per token
    context_macs: int = 0  # multiply-accumulates of attention per token, for each token of context it looks at


@dataclass(frozen=True)
class Site:
    """One prunable axis: U interchangeable units of one sublayer (U = 1: the whole sublayer or block)."""

    name: str  # module path in the original model: "model.layers.0.self_attn", "model.layers.0.mlp"
    kind: (
        # "attention" (unit = KV group: a key/value head and its query heads; a query head where one key/value head
        # serves all), "mlp" (unit = FFN channel), "block"
        str
    )
    layer: int  # index of the decoder layer in the original model
    units: int  # U
    width: int  # W: reader input channels per unit
    cost: Cost  # of one unit

    @property
    def channels(self) -> int:
        """C = U*W, input channels of the reader."""
        return self.units * self.width

    def keep_C(self, kept: Sequence[int]) -> Tensor:
        """Reader channels of the kept units: int64 [K], ascending when `kept` is."""
        units = torch.as_tensor(kept, dtype=torch.int64)
        return (units[:, None] * self.width + torch.arange(self.width)).reshape(-1)


@dataclass(frozen=True)
class SiteWeights:
    """The weights of one site, ordered by unit: views, never written to."""

    writers: Mapping[str, Tensor]  # role ("query", "key", "value", "gate", "up"; not of shared heads) -> [U, R, D]
    writer_biases: Mapping[str, Tensor]  # role -> [U, R]; empty where there are none
    reader: Tensor  # [O, C]
    reader_bias: Tensor | None  # [O]


@dataclass(frozen=True)
class Block:
    """One decoder layer as tensors by role, with its sites. Criteria see this, never modules."""

    name: str  # "model.layers.0"
    layer: int
    sites: tuple[Site, ...]
    weights: Mapping[str, SiteWeights]  # by site name
    norms: Mapping[str, Tensor] = field(default_factory=dict)  # site name -> scale [D] of the norm in front of it


@dataclass(frozen=True)
class SitePlan:
    """Which units of one site stay."""

    kind: str
    units: int
    kept: tuple[int, ...]  # ascending

    def __post_init__(self) -> None:
        if list(self.kept) != sorted(set(self.kept)) or any(not 0 <= u < self.units for u in self.kept):
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

    def added_params(self, count: int) -> int:
        """What so many parameters without a unit (new biases) add."""
        return {"params": count, "bytes": self.element_size * count}.get(self.counts, 0)


@dataclass(frozen=True)
class RemovalPath:
    """The answer of a criterion whose costs change as units leave."""

    order_U: Tensor  # int64 [U]: the unit that leaves first, second, ...
    cost_U: Tensor  # float [U]: cumulative cost once the first 1, 2, ..., U units of `order_U` have left
    readers: Mapping[int, tuple[Tensor, Tensor | None]] = field(
        default_factory=dict
    )  # removed units -> refitted reader

    @property
    def scores_U(self) -> Tensor:
        """As importances, higher = keep: a unit's score is the cumulative cost at which it leaves."""
        return torch.empty_like(self.cost_U).scatter_(0, self.order_U, self.cost_U)


@dataclass(frozen=True)
class ColumnScores:
    """The answer of a criterion that judges the reader's channels: importances of the units, and of the channels that
    make them up. A search that compares sites can so standardise by the spread of the channels, as FLAP does."""

    scores_U: Tensor  # [U], higher = keep
    columns_C: Tensor  # [C], higher = keep


Score = Tensor | RemovalPath | ColumnScores
Scores = Mapping[str, Score]  # site name -> importances of its units


def unit_scores(score: Score) -> Tensor:
    """Importances of a site's units, higher = keep: [U]."""
    return score if isinstance(score, Tensor) else score.scores_U


@dataclass(frozen=True)
class Candidate:
    """A structure that a search wants judged, with replacement readers where it has them."""

    plan: Plan
    readers: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)  # site -> weight [O,K], bias [O]


@runtime_checkable
class Evidence(Protocol):
    """What calibration collects for one site. Values: `update` and `merge` return new evidence.

    `source` says which collector feeds it, and so what `update` receives:

    - "reader": `update(x_BTC)`, the reader's input, batch by batch
    - "writer": `update(x_BTD)`, what the site's writers read
    - "wanted": `update(x_BTC, y_BTO)`, the reader's input in the partly pruned model, and the output with which the
      hidden state behind it would be the dense model's (compensators that walk site by site)
    - "block": `update(x_BTD, y_BTD)`, hidden states before and after the block
    - "probe": `update(without, whole)`, the calibration loss with the site (a whole block) off, and on
    - "gradient": `update(gradients, windows)`, the gradients (SiteWeights) of the mean loss of a batch of windows;
      `per_sample` (a class variable) asks for one window at a time
    - "zeroth_order": `update(direction, slope)`, a SiteWeights of perturbation directions (of the units' gates: [U])
      and the directional derivative (L(w + eps z) - L(w - eps z)) / (2 eps) measured along them
    """

    source: ClassVar[str]

    @classmethod
    def empty(cls, site: Site) -> Self: ...

    def update(self, *observed: Any) -> Self: ...

    def merge(self, other: Self) -> Self: ...


class Criterion(Protocol):
    """Importance of every unit. `evidence`: one type, several (each site's are then a tuple in that order), or none; a
    value with `source` and `empty` may stand for a type, and carry settings of its collector. `sequential`: where the
    search decides layer by layer, layer l is scored on what the already pruned layers before it produce. `judges` (not
    required): the kinds of sites it can score, where these are not attention and mlp."""

    evidence: ClassVar[Any]
    sequential: bool

    def __call__(self, block: Block, evidence: Mapping[str, Any]) -> Scores: ...


def evidence_kinds(wanted: Any) -> tuple[Any, ...]:
    """What a method's `evidence` names, as a tuple: nothing, one kind, or several."""
    if wanted is None:
        return ()
    return wanted if isinstance(wanted, tuple) else (wanted,)


class Oracle(Protocol):
    """What the runner lends to searches: the calibration loss of masked (or compensated) structures."""

    passes: float  # spent so far, in plain passes over the calibration tokens

    @property
    def batches(self) -> int:
        """How many batches `losses(batch=...)` can choose from."""
        ...

    def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
        """Mean next-token loss in nats of each candidate: float64 [len(candidates)], over all calibration windows or
        batch number `batch` of them."""
        ...


class Search(Protocol):
    """Scores and a budget to a Plan. `local`: decides each layer from that layer's scores alone. `granularity` (not
    required): what may leave, "blocks" alone for whole blocks. `probes` (not required): it cannot do without losses,
    and so needs the whole model in memory."""

    local: ClassVar[bool]

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan: ...


class Sparsity(Protocol):
    """How much leaves, in which rounds."""

    ratio: float
    of: str
    context: int

    def rounds(self) -> tuple[float, ...]:
        """Cumulative share removed after each round; the last is `ratio`."""
        ...


class Compensator(Protocol):
    """The reader's weight and bias after units are gone. `sequential`: its evidence is collected on what the pruned
    layers before produce (a second walk)."""

    evidence: ClassVar[type | None]
    adds_bias: ClassVar[bool]
    sequential: bool

    def __call__(
        self, weight_OC: Tensor, bias_O: Tensor | None, evidence: Any, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None]: ...


class Evaluator(Protocol):
    """Figures of a model, each name carrying its protocol: {"ppl/wikitext2@2048": 5.47}."""

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]: ...


class Dataset(Protocol):
    """Token windows, int64 [N, T], for calibration and for evaluation."""

    name: str

    def calibration(self, tokenizer: Any) -> Tensor: ...

    def evaluation(self, tokenizer: Any, length: int) -> Tensor: ...


class Tracker(Protocol):
    """Where a run's record goes. Called in this order; `fail` instead of `finish` when the run dies. `group`: the sweep
    that a run belongs to; `trace`: the traceback of what killed it, where it is no user's mistake."""

    def start(
        self,
        folder: Path,
        config: Mapping[str, Any],
        group: str | None = None,
        name: str | None = None,
        job_type: str | None = None,
    ) -> None: ...

    def log(self, metrics: Mapping[str, float]) -> None: ...

    def artifacts(self, plan: Plan, scores: Scores, sites: Sequence[Site]) -> None: ...

    def finish(self, metrics: Mapping[str, float]) -> None: ...

    def fail(self, reason: str, trace: str = "") -> None: ...
