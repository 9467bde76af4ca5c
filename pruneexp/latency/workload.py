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
from pruneexp.model.forward import cache_name
from pruneexp.model.half import plain_linear
from pruneexp.model.modeling_pruned import RemovedAttention, resize_layer_
from pruneexp.model.weights import set_tensor_
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
        """Numbers of this shape. The pool grows where it has fewer."""
        count = torch.Size(shape).numel()
        if count > len(self.numbers):
            self.numbers = self.numbers.repeat(-(-count // len(self.numbers)))
        self.at = 0 if self.at + count > len(self.numbers) else self.at
        taken = self.numbers[self.at : self.at + count].view(*shape)
        step = max(1, ALIGNED // self.numbers.element_size())
        self.at += -(-count // step) * step
        return taken


@dataclass(frozen=True)
class Pass:
    """What decoder layers are called with in a pass of the model: hidden states, by layer the other arguments, and the
    KV cache that is among them."""

    hidden: Tensor
    calls: list[Call]
    cache: Any


@dataclass
class Workload:
    """A pass through decoder layers: `context` tokens of `batch` sequences (prefill), or one token behind so many in a
    KV cache (decode). Made from a model in memory before it is pruned."""

    batch: int
    context: int
    phase: str
    model: Model
    one: Pass = field(init=False)  # a single token, without a KV cache
    all: Pass = field(init=False)
    cached: list[Any] = field(init=False)  # by layer, what the KV cache holds of it before the pass
    skeletons: list[nn.Module] = field(init=False)  # the layers before pruning, without weights

    def __post_init__(self) -> None:
        layers, decodes = self.model.layers, self.phase == "decode"
        self.one = self._entered(1, self._cache())
        cache, self.cached = self._cache(), [None] * len(layers)
        for index, layer in enumerate(layers if decodes and self.context else ()):
            self.cached[index] = self._behind(layer, index, cache)
        self.all = self._entered(1 if decodes else self.context, cache)
        self.skeletons = [skeleton(layer) for layer in layers]

    def _cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.module.config)

    @torch.inference_mode()
    def _entered(self, tokens: int, cache: Any) -> Pass:
        tokens_BT = torch.zeros((self.batch, tokens), dtype=torch.int64)
        name = cache_name(self.model.module.base_model)
        hidden, calls = self.model.enter(tokens_BT, use_cache=True, **{name: cache})
        return Pass(torch.randn_like(hidden), calls, cache)

    def _behind(self, layer: nn.Module, index: int, cache: Any) -> Any:
        """Fills a layer's entry in the KV cache as it is behind the context, and gives a copy of it. Its numbers take
        no memory: here only their count matters."""
        place, shape = self._place(layer), self._key_shape(layer, index)
        if place is None or shape is None:
            return None
        none = torch.zeros((1, 1, 1, 1), dtype=self.model.dtype, device=self.model.device)
        entry, states = cache.layers[place], none.expand(*shape[:2], self.context, shape[3])
        entry.update(states, states)
        entry.keys = entry.values = none.expand(entry.keys.shape)  # of a window, fewer than the context
        return copy(entry)

    def _place(self, layer: nn.Module) -> int | None:
        """The index of the layer's entry in the KV cache; None where it has no attention."""
        attention: Any = layer.get_submodule(self.model.family.attention)
        return None if isinstance(attention, RemovedAttention) else attention.layer_idx

    @torch.inference_mode()
    def _key_shape(self, layer: nn.Module, origin: int) -> torch.Size | None:
        """[B, heads, 1, size] of what the layer puts into a KV cache for a token: some architectures put in a key for
        every query head."""
        place, call = self._place(layer), self.one.calls[origin]
        if place is None:
            return None
        entries = self.one.cache.layers
        entries[place] = emptied(entries[place])
        layer(self.one.hidden, *call.args, **call.kwargs)
        return entries[place].keys.shape

    def prepared(self, layer: nn.Module, origin: int, pool: Pool) -> Prepared:
        """A layer, made from that with the index `origin` before pruning, with a KV cache of its own."""
        place, entry = self._place(layer), copy(self.cached[origin])
        if entry is not None and (shape := self._key_shape(layer, origin)) is not None:
            tokens = entry.keys.shape[2]
            entry.keys, entry.values = (pool.take((*shape[:2], tokens, shape[3])) for _ in range(2))
        return Prepared(layer, self.all.calls[origin], place, entry)

    @torch.inference_mode()
    def run(self, layers: Sequence[Prepared]) -> None:
        """One after the other."""
        hidden, entries = self.all.hidden, self.all.cache.layers
        with plain_linear():
            for own in layers:
                if own.place is not None:
                    entries[own.place] = emptied(entries[own.place]) if own.entry is None else copy(own.entry)
                output = own.layer(hidden, *own.call.args, **own.call.kwargs)
                hidden = output[0] if isinstance(output, tuple) else output


def emptied(entry: Any) -> Any:
    """An entry of a KV cache like this one, without a token."""
    entry = copy(entry)
    entry.is_initialized = False  # else `reset` of transformers 5.14 keeps the keys, zeroed
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
        set_tensor_(layer, path, values)
    return layer


def resized(layer: nn.Module, model: Model, groups: int, heads: int, channels: int) -> nn.Module:
    """A skeleton with so many KV groups of `heads` query heads each, and FFN channels."""
    other, layout = skeleton(layer), model.head_layout
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


def alike(model: Model) -> dict[tuple[Any, ...], list[int]]:
    """Layers that are alike, in widths and kind of attention: what they are -> their indices."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(model.layers):
        attention: Any = layer.get_submodule(model.family.attention)
        kind = tuple(str(getattr(attention, name, None)) for name in ("layer_type", "is_sliding", "sliding_window"))
        shapes = tuple((name, tuple(p.shape), str(p.dtype)) for name, p in layer.named_parameters())
        groups.setdefault((kind, shapes), []).append(index)
    return groups


def widths(sites: Sequence[Site]) -> tuple[int, int, int]:
    """KV groups, query heads of each, FFN channels of a layer with these sites."""
    there = {site.kind: site for site in sites}
    attention, ffn = there.get("attention"), there.get("mlp")
    return (attention.units if attention else 0, attention.group if attention else 0, ffn.units if ffn else 0)


def bytes_of(layers: Iterable[nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for p in chain.from_iterable(layer.parameters() for layer in layers))
