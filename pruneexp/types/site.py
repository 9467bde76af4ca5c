"""Sites and layers: what can leave a layer, and its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

QUERY_HEADS = "query_heads"  # what scores of query heads are called behind their attention's name


@dataclass(frozen=True)
class Cost:
    """What leaves the model with one unit."""

    params: int  # parameters: the unit's in-projection rows (and their biases) and its out-projection columns
    macs: int  # multiply-accumulates per token in those matrices
    kv: int  # KV-cache elements per token
    context_macs: int = 0  # multiply-accumulates of attention per token, for each token of context it looks at
    picoseconds: int = 0  # of a pass, by the latency table; 0 where there is none


NOTHING = Cost(0, 0, 0)


@dataclass(frozen=True)
class Site:
    """One prunable axis: U interchangeable units of one sublayer (U = 1: the whole sublayer or layer)."""

    name: str  # module path in the original model: "model.layers.0.self_attn", "model.layers.0.mlp", "...mlp.experts.3"
    # "attention" (unit = KV group: a key/value head and its query heads; a query head where one key/value head serves
    # all), "mlp" (unit = FFN channel), "experts" (unit = expert of a mixture), "block"
    kind: str
    layer: int  # index of the decoder layer in the original model
    units: int  # U
    width: int  # W: out-projection input channels per unit
    cost: Cost  # of one unit
    expert: int | None = None  # which expert of a mixture an "mlp" site belongs to, as the layer counts them now
    least: int = 0  # units that cannot do without each other: so many stay
    group: int = 1  # query heads of a unit of "attention"
    head_cost: Cost | None = None  # what leaves with one of them alone, where there are several
    shared: Cost = NOTHING  # of the key and value heads that serve all units and belong to none
    beside: Cost = NOTHING  # what only leaves with the whole sublayer, where that may leave

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
    side_by_side: bool = False  # the FFN does not see what attention gives, both read the layer's input
