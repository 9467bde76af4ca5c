"""Finding the prunable sites of a decoder layer, and reading it as tensors by role."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from pruneexp.modeling_pruned import (
    Family,
    LayerStructure,
    RemovedAttention,
    Writer,
    head_size,
    is_pre_norm,
    slope_heads,
)
from pruneexp.types import Block, Cost, Site, SiteWeights


def layer_structure(layer: nn.Module, family: Family, config: Any) -> LayerStructure:
    """The layer's widths, as it stands."""
    reader, down = _linear(layer, family.attention_reader), _linear(layer, family.mlp_reader)
    heads = reader.in_features // head_size(config)
    return LayerStructure(
        num_attention_heads=heads,
        num_key_value_heads=heads // query_group(config),
        intermediate_size=down.in_features,
        attention_output_bias=reader.bias is not None,
        mlp_output_bias=down.bias is not None,
        kept_heads=slope_heads(layer.get_submodule(family.attention), family),
    )


def query_group(config: Any) -> int:
    """G: query heads that share one key/value head."""
    return config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def layer_sites(layer: nn.Module, index: int, family: Family, config: Any, prefix: str) -> tuple[Site, ...]:
    """The attention and the FFN site of a decoder layer; a sublayer that is already gone has none.

    `prefix` is the layer's module path ("model.layers.0"). The cost of a unit is counted on the real tensors.
    """
    sites = []
    head_dim, group = head_size(config), query_group(config)
    if not isinstance(layer.get_submodule(family.attention), RemovedAttention):
        reader = _linear(layer, family.attention_reader)
        units = reader.in_features // (group * head_dim)
        cost = _unit_cost(
            layer, family.attention_writers, reader, units, kv=2 * head_dim, context_macs=2 * group * head_dim
        )
        sites.append(Site(f"{prefix}.{family.attention}", "attention", index, units, group * head_dim, cost))
    down = _linear(layer, family.mlp_reader)
    if down.in_features:
        cost = _unit_cost(layer, family.mlp_writers, down, down.in_features)
        sites.append(Site(f"{prefix}.{family.mlp}", "mlp", index, down.in_features, 1, cost))
    return tuple(sites)


def decoder_layer_block(
    layer: nn.Module,
    index: int,
    family: Family,
    config: Any,
    prefix: str,
    read: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Block:
    """The layer as tensors by role. The tensors are views: never write to them. `read`: what stands for a parameter of
    the sites, of its shape (its gradient, say)."""
    sites = layer_sites(layer, index, family, config, prefix)
    weights, norms = {}, {}
    for site in sites:
        attention = site.kind == "attention"
        writers = family.attention_writers if attention else family.mlp_writers
        reader = _linear(layer, family.attention_reader if attention else family.mlp_reader)
        rows = _role_rows(config) if attention else {"gate": 1, "up": 1}
        weights[site.name] = _site_weights(layer, writers, reader, site.units, rows, read)
        norm = layer.get_submodule(family.attention_norm if attention else family.mlp_norm)
        scale = getattr(norm, "weight", None)
        if is_pre_norm(family, config) and isinstance(scale, Tensor):
            norms[site.name] = scale.detach()
    return Block(prefix, index, sites, weights, norms)


def block_site(layer: nn.Module, index: int, family: Family, config: Any, prefix: str) -> Site:
    """The whole decoder layer as a site of one unit; all its parameters leave with it."""
    sites = layer_sites(layer, index, family, config, prefix)
    rest = (sum(site.units * getattr(site.cost, what) for site in sites) for what in ("macs", "kv", "context_macs"))
    return Site(prefix, "block", index, 1, 0, Cost(sum(p.numel() for p in layer.parameters()), *rest))


def as_whole(site: Site) -> Site:
    """A whole sublayer as a site of one unit."""
    cost = Cost(**{name: site.units * each for name, each in asdict(site.cost).items()})
    return replace(site, units=1, width=site.channels, cost=cost)


def site_parts(family: Family, site: Site) -> tuple[tuple[Writer, ...], str]:
    """The writers and the reader's path of a site."""
    if site.kind == "attention":
        return family.attention_writers, family.attention_reader
    return family.mlp_writers, family.mlp_reader


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    found = layer.get_submodule(path)
    assert isinstance(found, nn.Linear), path
    return found


def _role_rows(config: Any) -> dict[str, int]:
    """Rows of one KV group in each part: its query heads, its key head, its value head."""
    head_dim = head_size(config)
    return {"query": query_group(config) * head_dim, "key": head_dim, "value": head_dim}


def _unit_cost(
    layer: nn.Module, writers: tuple[Writer, ...], reader: nn.Linear, units: int, kv: int = 0, context_macs: int = 0
) -> Cost:
    linears = [_linear(layer, w.path) for w in writers]
    macs = (sum(w.weight.numel() for w in linears) + reader.weight.numel()) // units
    biases = sum(w.bias.numel() for w in linears if w.bias is not None) // units
    return Cost(params=macs + biases, macs=macs, kv=kv, context_macs=context_macs)


def _site_weights(
    layer: nn.Module,
    writers: tuple[Writer, ...],
    reader: nn.Linear,
    units: int,
    rows: dict[str, int],
    read: Callable[[Tensor], Tensor],
) -> SiteWeights:
    weights, biases = {}, {}
    for writer in writers:
        linear = _linear(layer, writer.path)
        sizes = [rows[role] for role in writer.roles]
        by_unit = read(linear.weight).view(units, sum(sizes), -1)
        weights.update(zip(writer.roles, by_unit.split(sizes, dim=1), strict=True))
        if linear.bias is not None:
            biases.update(zip(writer.roles, read(linear.bias).view(units, -1).split(sizes, dim=1), strict=True))
    bias = None if reader.bias is None else read(reader.bias)
    return SiteWeights(weights, biases, read(reader.weight), bias)
