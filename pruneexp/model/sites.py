"""Finding the prunable sites of a decoder layer, and reading it as tensors by role."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.model.modeling_pruned import (
    FFN_ROWS,
    Family,
    HeadLayout,
    LayerStructure,
    RemovedAttention,
    UnitRows,
    as_matrix,
    expert_path,
    experts_of,
    head_layout,
    head_size,
    linear_sizes,
    router_of,
    slope_heads,
    split_parts,
)
from pruneexp.types import NOTHING, Block, ConfigError, Cost, Site, SiteWeights


def layer_layout(layer: nn.Module, family: Family, config: Any) -> HeadLayout:
    """How the heads that a layer still has make up units: a unit may have lost some of its query heads."""
    layout = head_layout(family, config)
    if layout.shared or isinstance(layer.get_submodule(family.attention), RemovedAttention):
        return layout
    channels = inputs_of(layer, family.attention_out)
    rows = sum(linear_sizes(layer.get_submodule(in_projection.path))[1] for in_projection in family.attention_in)
    return replace(layout, group=2 * channels // (rows - channels))  # rows: queries, and as many of keys and of values


def layer_structure(layer: nn.Module, family: Family, config: Any) -> LayerStructure:
    """The layer's widths, as it stands."""
    layout, experts = layer_layout(layer, family, config), experts_of(layer, family)
    out_projections = _ffn_outs(layer, family)
    heads = inputs_of(layer, family.attention_out) // layout.size
    sizes = tuple(inputs_of(layer, path) for path in out_projections)
    biases = tuple(layer.get_submodule(path).bias is not None for path in out_projections)
    origin = None if experts is None else experts.origin
    return LayerStructure(
        num_attention_heads=heads,
        num_key_value_heads=layout.key_value_heads(heads),
        intermediate_size=sum(sizes),
        attention_output_bias=layer.get_submodule(family.attention_out).bias is not None,
        mlp_output_bias=any(biases),
        kept_heads=slope_heads(layer.get_submodule(family.attention), family),
        expert_sizes=None if experts is None else sizes,
        expert_output_biases=None if experts is None else biases,
        kept_experts=None if origin is None or origin == tuple(range(config.num_experts)) else origin,
    )


def _ffn_outs(layer: nn.Module, family: Family) -> list[str]:
    """Paths of the FFN's out-projection, or of each expert's."""
    experts = experts_of(layer, family)
    if experts is None:
        return [family.mlp_out]
    return [expert_path(family, family.mlp_out, index) for index in range(len(experts))]


def layer_sites(layer: nn.Module, index: int, family: Family, config: Any, prefix: str) -> tuple[Site, ...]:
    """The attention and the FFN site of a decoder layer, of a mixture each expert's; what is already gone has none.

    `prefix` is the layer's module path ("model.layers.0"). The cost of a unit is counted on the real tensors.
    """
    sites = []
    layout = layer_layout(layer, family, config)
    if not isinstance(layer.get_submodule(family.attention), RemovedAttention):
        width = layout.group * layout.size
        units = inputs_of(layer, family.attention_out) // width
        name = f"{prefix}.{family.attention}"
        site = Site(name, "attention", index, units, width, NOTHING, group=layout.group)
        cost = _unit_cost(layer, family, site, layout.rows)
        kv = 0 if layout.shared else 2 * layout.size
        cost = replace(cost, kv=kv, context_macs=2 * width)
        head_cost = _head_cost(layer, family, layout) if layout.group > 1 else None
        shared = _shared_cost(layer, family, layout) if layout.shared else NOTHING
        sites.append(replace(site, cost=cost, head_cost=head_cost, shared=shared))
    if experts_of(layer, family) is not None:
        return (*sites, *_expert_sites(layer, index, family, prefix))
    if channels := inputs_of(layer, family.mlp_out):
        site = Site(f"{prefix}.{family.mlp}", "mlp", index, channels, 1, NOTHING)
        sites.append(replace(site, cost=_unit_cost(layer, family, site, FFN_ROWS)))
    return tuple(sites)


def _expert_sites(layer: nn.Module, index: int, family: Family, prefix: str) -> Iterator[Site]:
    """The channels of each expert as a site. A token runs only some experts: multiply-accumulates are a token's average
    if all experts are chosen equally often."""
    cost: Cost | None = None  # of a channel, the same in all of them
    for number, out_projection in enumerate(_ffn_outs(layer, family)):
        if channels := inputs_of(layer, out_projection):
            name = f"{prefix}.{expert_path(family, family.mlp, number)}"
            site = Site(name, "mlp", index, channels, 1, NOTHING, number)
            if cost is None:
                cost, run = _unit_cost(layer, family, site, FFN_ROWS), router_of(layer, family).top_k
                cost = replace(cost, macs=round(cost.macs * run / len(experts_of(layer, family))))
            yield replace(site, cost=cost)


def experts_name(family: Family, prefix: str) -> str:
    """What the site of a layer's whole experts is called."""
    return f"{prefix}.{family.mlp}.{family.experts}"


def experts_sites(layer: nn.Module, index: int, family: Family, config: Any, prefix: str) -> tuple[Site, ...]:
    """The experts of a mixture as the units of one site; none where the FFN is no mixture, or all experts are empty.

    An expert takes its matrices and its row of the router with it. Its tokens go to other experts: of the
    multiply-accumulates only those of the row leave.

    Raises:
        ConfigError: the layer's experts are not alike any more.
    """
    experts = experts_of(layer, family)
    if experts is None or not layer_structure(layer, family, config).intermediate_size:
        return ()
    router = router_of(layer, family)
    held = {sum(p.numel() for p in expert.parameters()) for expert in experts}
    if len(held) > 1:
        differ = f"where they differ in width (those of layer {index} do)"
        raise ConfigError(f"search.granularity: expected no experts {differ}")
    cost = Cost(held.pop() + config.hidden_size, config.hidden_size, 0)
    return (Site(experts_name(family, prefix), "experts", index, len(experts), 0, cost, least=router.top_k),)


def decoder_layer_block(
    layer: nn.Module,
    index: int,
    family: Family,
    config: Any,
    prefix: str,
    sites: tuple[Site, ...],
    read: Callable[[Tensor], Tensor],
) -> Block:
    """The layer as tensors by role. The tensors are views: never write to them. `sites`: as `layer_sites` finds them.
    `read`: what stands for a parameter of the sites, of its shape (its gradient, say)."""
    weights, norms = {}, {}
    for site in sites:
        weights[site.name] = _site_weights(layer, family, site, unit_rows(site, config), read)
        path = family.attention_norm if site.kind == "attention" else family.mlp_norm
        scale = None if path is None else getattr(layer.get_submodule(path), "weight", None)
        if isinstance(scale, Tensor):
            norms[site.name] = scale.detach() + family.norm_offset if family.norm_offset else scale.detach()
    return Block(prefix, index, sites, weights, norms, family.side_by_side)


def block_site(layer: nn.Module, index: int, family: Family, config: Any, prefix: str) -> Site:
    """The whole decoder layer as a site of one unit; all its parameters leave with it."""
    sites = layer_sites(layer, index, family, config, prefix)
    macs = sum(site.units * site.cost.macs + site.shared.macs for site in sites)
    context_macs = sum(site.units * site.cost.context_macs for site in sites)
    if experts_of(layer, family) is not None:
        macs += router_of(layer, family).weight.numel()
    params = sum(p.numel() for p in layer.parameters())
    kv = 2 * head_size(config) * layer_structure(layer, family, config).num_key_value_heads
    return Site(prefix, "block", index, 1, 0, Cost(params, macs, kv, context_macs))


def as_whole(site: Site) -> Site:
    """A whole sublayer as a site of one unit."""
    shared = asdict(site.shared)
    cost = Cost(**{name: site.units * each + shared[name] for name, each in asdict(site.cost).items()})
    return replace(site, units=1, width=site.channels, cost=cost, shared=NOTHING)


def site_parts(family: Family, site: Site) -> tuple[tuple[UnitRows, ...], str]:
    """A site's in-projections, without those that serve all units alike, and the path of its out-projection."""
    if site.kind == "attention":
        own = (w for w in family.attention_in if not set(w.roles) <= set(family.shared_roles))
        return tuple(own), family.attention_out
    if site.expert is None:
        return family.mlp_in, family.mlp_out
    own = (replace(rows, path=expert_path(family, rows.path, site.expert)) for rows in family.mlp_in)
    return tuple(own), expert_path(family, family.mlp_out, site.expert)


def unit_rows(site: Site, config: Any) -> dict[str, int]:
    """Rows of one of the site's units in each part of its in-projections."""
    if site.kind != "attention":
        return FFN_ROWS
    return {"query": site.width, "key": head_size(config), "value": head_size(config)}


def head_norm_rows(layer: nn.Module, norm: UnitRows) -> dict[str, Tensor]:
    """Weights (and biases) of a norm of queries or keys by name below the norm, each [heads * size]: one norm over all
    of them, or a list of norms, one a head ("norms.{}.weight")."""
    module: Any = layer.get_submodule(norm.path)
    if not hasattr(module, "norms"):
        return dict(module.named_parameters())
    leaves = [leaf for leaf, _ in module.norms[0].named_parameters()] if len(module.norms) else []
    return {f"norms.{{}}.{leaf}": torch.cat([getattr(one, leaf) for one in module.norms]) for leaf in leaves}


def inputs_of(layer: nn.Module, path: str) -> int:
    """The number of inputs of a linear layer."""
    return linear_sizes(layer.get_submodule(path))[0]


def _unit_cost(layer: nn.Module, family: Family, site: Site, rows: dict[str, int]) -> Cost:
    """Parameters and multiply-accumulates."""
    in_projections, out_projection = site_parts(family, site)
    macs, vectors = site.width * linear_sizes(layer.get_submodule(out_projection))[1], 0
    for in_projection in in_projections:
        linear: Any = layer.get_submodule(in_projection.path)
        own = sum(rows[role] for role in in_projection.roles if role not in family.shared_roles)
        macs += own * linear_sizes(linear)[0]
        vectors += own * (linear.bias is not None)
    for norm in family.head_norms if site.kind == "attention" else ():
        if norm.roles[0] not in family.shared_roles:
            vectors += rows[norm.roles[0]] * len(head_norm_rows(layer, norm))
    return Cost(params=macs + vectors, macs=macs, kv=0)


def _shared_cost(layer: nn.Module, family: Family, layout: HeadLayout) -> Cost:
    """What the rows of the shared key and value heads hold."""
    macs, vectors = 0, 0
    for in_projection in family.attention_in:
        linear: Any = layer.get_submodule(in_projection.path)
        inputs, rows = linear_sizes(linear)
        own = rows - (inputs_of(layer, family.attention_out) if "query" in in_projection.roles else 0)
        macs += own * inputs
        vectors += own * (linear.bias is not None)
    return Cost(params=macs + vectors, macs=macs, kv=2 * layout.size)


def _head_cost(layer: nn.Module, family: Family, layout: HeadLayout) -> Cost:
    """What leaves with one query head of a unit: its rows of the queries, its columns of the out-projection."""
    macs, vectors = layout.size * linear_sizes(layer.get_submodule(family.attention_out))[1], 0
    for in_projection in family.attention_in:
        if "query" in in_projection.roles:
            linear: Any = layer.get_submodule(in_projection.path)
            macs += layout.size * linear_sizes(linear)[0]
            vectors += layout.size * (linear.bias is not None)
    for norm in family.head_norms:
        if norm.roles == ("query",):
            vectors += layout.size * len(head_norm_rows(layer, norm))
    return Cost(params=macs + vectors, macs=macs, kv=0, context_macs=2 * layout.size)


def _site_weights(
    layer: nn.Module, family: Family, site: Site, rows: dict[str, int], read: Callable[[Tensor], Tensor]
) -> SiteWeights:
    in_projections, out_path = site_parts(family, site)
    weights, biases = {}, {}
    for in_projection in in_projections:
        linear: Any = layer.get_submodule(in_projection.path)
        matrix = as_matrix(linear, read(linear.weight))
        weights.update(split_parts(matrix, in_projection, site.units, rows, family.shared_roles))
        if linear.bias is not None:
            biases.update(split_parts(read(linear.bias), in_projection, site.units, rows, family.shared_roles))
    for role in family.shared_roles:
        weights.pop(role, None)
        biases.pop(role, None)
    out_projection: Any = layer.get_submodule(out_path)
    bias = None if out_projection.bias is None else read(out_projection.bias)
    return SiteWeights(weights, biases, as_matrix(out_projection, read(out_projection.weight)), bias)
