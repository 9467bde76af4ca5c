"""Decoder layers as they run in a prefill or a decoding step: what they are called with, and layers of other widths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.model import Call, Model, layer_structure
from pruneexp.model.modeling_pruned import RemovedAttention, head_layout, resize_layer_
from pruneexp.types import Site

POOL_BYTES = 2**30  # of weights at most: more than any processor's cache holds
ALIGNED = 64  # bytes, as PyTorch lays tensors out
SPREAD = 0.02  # of random weights


class Pool:
    """Memory that weights are views of, one behind the other and round again: none is in a cache when its turn comes,
    as in a model that is run from its first layer to its last."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device):
        numbers = size // dtype.itemsize
        piece = torch.randn(min(numbers, 2**20), generator=torch.Generator().manual_seed(0)) * SPREAD
        self.numbers = piece.to(device, dtype).repeat(-(-numbers // len(piece)))
        self.at = 0

    def take(self, shape: Sequence[int]) -> Tensor:
        """Numbers of this shape."""
        count = torch.Size(shape).numel()
        if count > len(self.numbers):
            return self.numbers.repeat(-(-count // len(self.numbers)))[:count].view(*shape)
        self.at = 0 if self.at + count > len(self.numbers) else self.at
        taken = self.numbers[self.at : self.at + count].view(*shape)
        step = max(1, ALIGNED // self.numbers.element_size())
        self.at += -(-count // step) * step
        return taken


@dataclass
class Workload:
    """A pass through decoder layers: `context` tokens of `batch` sequences (prefill), or one token behind so many in a
    KV cache (decode). Made from a model in memory before it is pruned."""

    batch: int
    context: int
    phase: str
    model: Model
    hidden: Tensor = field(init=False)
    calls: list[Call] = field(init=False)
    cached: list[Any] = field(init=False)  # by layer, what the KV cache holds of it before the pass
    cache: Any = field(init=False)  # the one that the calls name
    skeletons: list[nn.Module] = field(init=False)  # the layers before pruning, without weights

    def __post_init__(self) -> None:
        from transformers import DynamicCache

        model, layers = self.model, self.model.layers
        self.cache = DynamicCache(config=model.module.config)
        behind = self.context if self.phase == "decode" else 0
        self.cached = [self._filled(index, behind) for index in range(len(layers))]
        tokens_BT = torch.zeros((self.batch, 1 if self.phase == "decode" else self.context), dtype=torch.int64)
        with torch.inference_mode():
            entered, self.calls = model.enter(tokens_BT, past_key_values=self.cache, use_cache=True)
            self.hidden = torch.randn_like(entered)
        self.skeletons = [skeleton(layer) for layer in layers]

    def _filled(self, index: int, tokens: int) -> Any:
        """The KV cache's entry of a layer behind so many tokens. Its numbers take no memory: what counts here is how
        many there are."""
        from transformers import DynamicCache

        model = self.model
        attention: Any = model.layers[index].get_submodule(model.family.attention)
        if not tokens or isinstance(attention, RemovedAttention):
            return None
        heads = layer_structure(model.layers[index], model.family, model.config).num_key_value_heads
        size = head_layout(model.family, model.config).size
        none = torch.zeros((1, 1, 1, 1), dtype=model.dtype, device=model.device)
        entry = DynamicCache(config=model.module.config)
        states = none.expand(self.batch, heads, tokens, size)
        entry.update(states, states, attention.layer_idx)
        filled = entry.layers[attention.layer_idx]
        filled.keys = filled.values = none.expand(filled.keys.shape)
        self.cache.layers[attention.layer_idx] = copy(filled)
        return filled

    def prepared(self, layer: nn.Module, origin: int, pool: Pool) -> Prepared:
        """A layer, made from that with the index `origin` before pruning, with a KV cache of its own."""
        attention: Any = layer.get_submodule(self.model.family.attention)
        entry, place = self.cached[origin], getattr(attention, "layer_idx", None)
        if entry is not None and not isinstance(attention, RemovedAttention):
            entry = copy(entry)
            heads = layer_structure(layer, self.model.family, self.model.config).num_key_value_heads
            batch, _, tokens, size = entry.keys.shape
            entry.keys, entry.values = (pool.take((batch, heads, tokens, size)) for _ in range(2))
        return Prepared(layer, self.calls[origin], place, entry)

    @torch.inference_mode()
    def run(self, layers: Sequence[Prepared]) -> None:
        """One after the other."""
        hidden, entries = self.hidden, self.cache.layers
        for own in layers:
            if own.place is not None:
                entries[own.place] = type_of(entries[own.place]) if own.entry is None else copy(own.entry)
            output = own.layer(hidden, *own.call.args, **own.call.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output


def type_of(entry: Any) -> Any:
    """An empty entry of a KV cache like this one."""
    entry = copy(entry)
    entry.reset()
    return entry


@dataclass(frozen=True)
class Prepared:
    """A layer and what it is called with. `place`: of its entry in the KV cache."""

    layer: nn.Module
    call: Call
    place: int | None
    entry: Any


def skeleton(layer: nn.Module) -> nn.Module:
    """The layer without its weights; it shares its buffers and its config."""
    shared: dict[int, Any] = {id(buffer): buffer for buffer in layer.buffers()}
    for part in layer.modules():
        config = getattr(part, "config", None)
        if config is not None:
            shared[id(config)] = config
    for parameter in layer.parameters():
        shared[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return deepcopy(layer, shared)


def filled_(layer: nn.Module, pool: Pool) -> nn.Module:
    """Gives a skeleton weights."""
    for path, old in list(layer.named_parameters()):
        numbers = pool.numbers
        of_pool = old.dtype == numbers.dtype
        values = pool.take(old.shape) if of_pool else torch.ones(old.shape, dtype=old.dtype, device=numbers.device)
        owner, _, name = path.rpartition(".")
        layer.get_submodule(owner)._parameters[name] = nn.Parameter(values, requires_grad=False)
    return layer


def resized(layer: nn.Module, model: Model, groups: int, heads: int, channels: int) -> nn.Module:
    """A skeleton with so many KV groups of `heads` query heads each, and FFN channels."""
    other, layout = skeleton(layer), head_layout(model.family, model.config)
    structure = layer_structure(other, model.family, model.config)
    kept = groups * heads
    structure = replace(
        structure,
        num_attention_heads=kept,
        num_key_value_heads=min(groups, 1) if layout.shared else groups,
        intermediate_size=channels,
        kept_heads=structure.kept_heads and structure.kept_heads[:kept],
    )
    resize_layer_(other, model.family, structure, layout)
    return other


def structures(model: Model) -> dict[tuple[Any, ...], list[int]]:
    """Layers that are alike, widths and kind of attention: what they are -> their indices."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(model.layers):
        attention: Any = layer.get_submodule(model.family.attention)
        kind = tuple(str(getattr(attention, name, None)) for name in ("layer_type", "is_sliding", "sliding_window"))
        shapes = tuple((name, tuple(p.shape), str(p.dtype)) for name, p in layer.named_parameters())
        found.setdefault((kind, shapes), []).append(index)
    return found


def widths(sites: Sequence[Site]) -> tuple[int, int, int]:
    """KV groups, query heads of each, FFN channels of a layer with these sites."""
    there = {site.kind: site for site in sites}
    attention, ffn = there.get("attention"), there.get("mlp")
    return (attention.units if attention else 0, attention.group if attention else 0, ffn.units if ffn else 0)


def bytes_of(layers: Iterable[nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for p in chain.from_iterable(layer.parameters() for layer in layers))
