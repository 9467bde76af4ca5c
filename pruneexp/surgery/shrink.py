"""Removing units for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.model import Model, select_layers_
from pruneexp.model.modeling_pruned import (
    LayerStructure,
    UnitRows,
    as_matrix,
    join_parts,
    keep_experts_,
    number_caches_,
    resize_layer_,
    split_parts,
)
from pruneexp.model.sites import experts_name, head_norm_rows, layer_structure, site_parts, unit_rows
from pruneexp.model.weights import set_tensor_
from pruneexp.surgery.mask import OutProjections
from pruneexp.types import ConfigError, Plan, RunError, Site, SitePlan


def check_plan(model: Model, plan: Plan) -> None:
    """Raises ConfigError, naming a site or a size, where the plan is not one of this model, as it stands, or leaves a
    model that cannot run: without layers, or with fewer experts than a token goes to."""
    whole = [site for index in range(len(model.layers)) for site in model.whole_block(index).sites]
    experts = [site for index in range(len(model.layers)) for site in model.whole_experts(index)]
    known = {site.name: site for site in (*model.sites(), *experts, *whole)}
    for name, own in plan.sites.items():
        site = known.get(name)
        if site is None:
            raise ConfigError(f"plan: {name} is no site of this model; expected a plan of the same model")
        if (own.kind, own.units) != (site.kind, site.units):
            raise ConfigError(
                f"plan: {name} is of kind {own.kind} with {own.units} units, in this model {site.kind} with "
                f"{site.units}; expected a plan of the same model"
            )
        if own.query_heads not in (None, site.units * site.group) or (own.query_heads and site.kind != "attention"):
            raise ConfigError(
                f"plan: {name} is of {own.query_heads} query heads, in this model {site.units * site.group}; expected "
                "a plan of the same model"
            )
        if not all(isinstance(index, int) for index in (*own.kept, *(own.kept_query_heads or ()))):
            raise ConfigError(
                f"plan: {name} keeps units by numbers that are no integers; expected indices from 0 to {own.units - 1}"
            )
        if len(own.kept) < site.least:
            raise ConfigError(
                f"plan: {name} keeps {len(own.kept)} of {site.units} {site.kind}, a token of this model goes to "
                f"{site.least}; expected at least as many"
            )
    blocks = [plan.sites.get(f"{model.layers_path}.{index}") for index in range(len(model.layers))]
    if all(own is not None and not own.kept for own in blocks):
        raise ConfigError("plan: removes every decoder layer; expected one or more that stay")
    total = plan.budget.get("total_params") if plan.budget.get("of") == "decoder" else None
    if total not in (None, model.decoder_params):  # sites that are not named stay whole: the sites alone may fit
        raise ConfigError(
            f"plan: of a decoder of {total} parameters, this one has {model.decoder_params}; expected a plan of the "
            "same model"
        )


def shrink_(model: Model, plan: Plan, out_projections: OutProjections | None = None) -> None:
    """Shrinks every layer of a model in memory to `plan`; `out_projections` as for `shrink_layer_`."""
    for index in range(len(model.layers)):
        shrink_layer_(model, index, plan, out_projections)
    remove_blocks_(model, plan)


def shrink_layer_(model: Model, index: int, plan: Plan, out_projections: OutProjections | None = None) -> None:
    """Shrinks decoder layer `index`: in-projections lose the rows, the out-projection the columns of the units that
    `plan` drops.

    `out_projections` (site name -> weight [O, K], bias [O] or None) replaces out-projections, as a compensator returned
    them. Of a mixture, whole experts leave with their rows of the router. Sites that keep all units are left untouched,
    to the bit.

    Raises:
        RunError: a replacement with NaN or Inf; the message names the site.
    """
    layer, out_projections = model.layers[index], out_projections or {}
    _narrow_(model, index, plan, out_projections)
    experts = plan.sites.get(experts_name(model.family, f"{model.layers_path}.{index}"))
    if experts is not None and len(experts.kept) < experts.units:
        keep_experts_(layer, model.family, experts.kept)


def _narrow_(model: Model, index: int, plan: Plan, out_projections: OutProjections) -> None:
    """Takes heads and channels out of a layer."""
    layer = model.layers[index]
    sites = [site for site in model.layer_sites(index) if plan.changes(site) or site.name in out_projections]
    if not sites:
        return
    tensors = {}
    for site in sites:
        tensors.update(_kept_tensors(model, layer, site, plan, out_projections.get(site.name)))
    structure = _structure_after(model, layer, sites, plan, out_projections)
    resize_layer_(layer, model.family, structure, model.head_layout)
    _set_(layer, tensors)
    number_caches_(model.layers, model.family, model.configs)


def replace_out_projections_(model: Model, index: int, out_projections: OutProjections) -> None:
    """Gives decoder layer `index` other out-projections, as wide as they are, by site name. Raises RunError as
    `shrink_layer_`."""
    layer = model.layers[index]
    sites = [site for site in model.layer_sites(index) if site.name in out_projections]
    structure = _structure_after(model, layer, sites, Plan({}), out_projections)  # one may get a bias
    resize_layer_(layer, model.family, structure, model.head_layout)
    for site in sites:
        path = site_parts(model.family, site)[1]
        linear: Any = layer.get_submodule(path)
        _set_(layer, _named(path, *_fitted(site, out_projections[site.name], linear.weight)))


def _set_(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives the layer new parameters by name, as far as it still has them."""
    parameters = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        if name in parameters:  # a removed sublayer's in-projections are gone
            if tensor.ndim == 2:
                tensor = as_matrix(layer.get_submodule(name.rpartition(".")[0]), tensor).contiguous()
            set_tensor_(layer, name, tensor)


def remove_blocks_(model: Model, plan: Plan) -> None:
    """Takes whole decoder layers out; those behind them move up."""
    plans = [plan.sites.get(f"{model.layers_path}.{index}") for index in range(len(model.layers))]
    kept = [index for index, own in enumerate(plans) if own is None or own.kept]
    if len(kept) == len(plans):
        return
    model.module.set_submodule(model.layers_path, nn.ModuleList(model.layers[index] for index in kept))
    model.origin = [model.origin[index] for index in kept]
    for config in model.configs:
        select_layers_(config, kept)
    number_caches_(model.layers, model.family, model.configs)


def _structure_after(
    model: Model, layer: nn.Module, sites: list[Site], plan: Plan, out_projections: OutProjections
) -> LayerStructure:
    structure = layer_structure(layer, model.family, model.config)
    for site in sites:
        own = _own(plan, site)
        bias = out_projections[site.name][1] is not None if site.name in out_projections else None
        if site.kind == "attention":
            heads, before = own.heads(site), structure.kept_heads
            shared = model.head_layout.shared
            structure = replace(
                structure,
                num_attention_heads=len(heads),
                num_key_value_heads=min(len(own.kept), 1) if shared else len(own.kept),
                attention_output_bias=structure.attention_output_bias if bias is None else bias,
                kept_heads=before and tuple(before[head] for head in heads),
            )
        elif site.expert is None:
            structure = replace(
                structure,
                intermediate_size=len(own.kept),
                mlp_output_bias=structure.mlp_output_bias if bias is None else bias,
            )
        else:
            structure = _with_expert(structure, site.expert, len(own.kept), bias)
    return structure


def _with_expert(structure: LayerStructure, expert: int, channels: int, bias: bool | None) -> LayerStructure:
    """The structure with another width (and bias, unless None) of one expert."""
    sizes, biases = list(structure.expert_sizes or ()), list(structure.expert_output_biases or ())
    sizes[expert], biases[expert] = channels, biases[expert] if bias is None else bias
    return replace(
        structure,
        intermediate_size=sum(sizes),
        mlp_output_bias=any(biases),
        expert_sizes=tuple(sizes),
        expert_output_biases=tuple(biases),
    )


@torch.no_grad()
def _kept_tensors(
    model: Model, layer: nn.Module, site: Site, plan: Plan, out_projection: tuple[Tensor, Tensor | None] | None
) -> dict[str, Tensor]:
    """New tensors of the site's projections, by parameter name below the layer."""
    own = _own(plan, site)
    in_projections, out_path = site_parts(model.family, site)
    tensors = {}
    for in_projection in in_projections:
        linear = layer.get_submodule(in_projection.path)
        for leaf, parameter in linear.named_parameters():
            rows = as_matrix(linear, parameter) if parameter.ndim == 2 else parameter
            tensors[f"{in_projection.path}.{leaf}"] = _kept_rows(model, rows, in_projection, site, own)
    for norm in model.family.head_norms if site.kind == "attention" else ():
        for name, weight in head_norm_rows(layer, norm).items():
            scales = _kept_rows(model, weight, norm, site, own)
            heads = scales.split(model.head_layout.size)
            by_head = {f"{norm.path}.{name.format(i)}": head for i, head in enumerate(heads)}
            tensors.update(by_head if "{}" in name else {f"{norm.path}.{name}": scales})
    linear: Any = layer.get_submodule(out_path)
    if out_projection is None:
        matrix = as_matrix(linear, linear.weight)
        out_projection = matrix.index_select(1, own.keep_C(site).to(matrix.device)), linear.bias
    else:
        out_projection = _fitted(site, out_projection, linear.weight)
    return {**tensors, **_named(out_path, *out_projection)}


def _fitted(site: Site, out_projection: tuple[Tensor, Tensor | None], like: Tensor) -> tuple[Tensor, Tensor | None]:
    """A compensator's answer, of the kind and on the device of what it replaces. Raises RunError."""
    weight, bias = out_projection[0].to(like), None if out_projection[1] is None else out_projection[1].to(like)
    for tensor in (weight, bias):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise RunError(f"{site.name}: the compensated out-projection holds NaN or Inf")
    return weight, bias


def _named(path: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    named = {f"{path}.weight": weight.contiguous()}
    return named if bias is None else {**named, f"{path}.bias": bias.detach()}


def _kept_rows(model: Model, rows: Tensor, in_projection: UnitRows, site: Site, own: SitePlan) -> Tensor:
    """The rows of the kept units, of these the kept query heads' alone, and those that belong to none."""
    shared = model.family.shared_roles
    parts = split_parts(rows, in_projection, site.units, unit_rows(site, model.config), shared)
    units = torch.as_tensor(own.kept, dtype=torch.int64, device=rows.device)
    kept = {role: part if role in shared else part.index_select(0, units) for role, part in parts.items()}
    if own.kept_query_heads is not None and "query" in kept:
        heads = torch.as_tensor(own.kept_query_heads, dtype=torch.int64, device=rows.device)
        by_head = parts["query"].unflatten(1, (site.group, -1)).flatten(0, 1).index_select(0, heads)
        kept["query"] = by_head.unflatten(0, (len(own.kept), -1)).flatten(1, 2)
    return join_parts(kept, in_projection)


def _own(plan: Plan, site: Site) -> SitePlan:
    """The site's part of a plan; sites that are not named stay whole."""
    return plan.sites.get(site.name) or SitePlan(site.kind, site.units, tuple(range(site.units)))
