"""Switching units off without touching a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.model import Model
from pruneexp.model.forward import forward_replaced
from pruneexp.model.modeling_pruned import router_of
from pruneexp.model.sites import experts_name, site_parts, unit_rows
from pruneexp.types import Plan, Site

OutProjections = Mapping[str, tuple[Tensor, "Tensor | None"]]  # site name -> weight [O, K], bias [O]


@contextmanager
def masked_layer(
    model: Model, index: int, plan: Plan, out_projections: OutProjections | None = None
) -> Iterator[nn.Module]:
    """Runs decoder layer `index` as if the units that `plan` drops were gone: what they hand to the out-projection is
    zeroed. A whole expert's tokens go to the experts that stay, as they will once it is gone.

    Where `out_projections` names a site, its out-projection is replaced by that weight and bias on the kept channels (a
    compensated candidate). No weight is copied or written; on exit the layer is as before.
    """
    layer, out_projections, device = model.layers[index], out_projections or {}, model.layer_device(index)
    name = f"{model.layers_path}.{index}"
    with ExitStack() as changes:
        if name in plan.sites and not plan.sites[name].kept:
            changes.enter_context(forward_replaced(layer, lambda hidden, *args, **kwargs: model.as_output(hidden)))
            yield layer
            return
        experts = plan.sites.get(experts_name(model.family, name))
        if experts is not None and len(experts.kept) < experts.units:
            router = router_of(layer, model.family)
            changes.enter_context(forward_replaced(router, _fewer_experts(router, experts.kept)))
        for site in model.layer_sites(index):
            out_projection = layer.get_submodule(site_parts(model.family, site)[1])
            if site.name in out_projections:
                instead = _replacement(site, plan, *out_projections[site.name], device=device)
                changes.enter_context(forward_replaced(out_projection, instead))
            elif plan.changes(site):
                changes.enter_context(out_projection.register_forward_pre_hook(_zeroing(site, plan, device)))
            for norm, forward in _fewer_heads(model, layer, site, plan):
                changes.enter_context(forward_replaced(norm, forward))
        yield layer


def _zeroing(site: Site, plan: Plan, device: torch.device) -> Any:
    keep_C = torch.zeros(site.channels, dtype=torch.bool)
    keep_C[plan.keep_C(site)] = True
    keep_C = keep_C.to(device)
    return lambda _module, args: (args[0] * keep_C,)


def _replacement(site: Site, plan: Plan, weight_OK: Tensor, bias_O: Tensor | None, device: torch.device) -> Any:
    """Columns of zeros for the channels that are gone: to leave them out of every token's input takes longer."""
    keep_C, weight_OK = plan.keep_C(site).to(device), weight_OK.to(device)
    weight_OC = weight_OK.new_zeros(len(weight_OK), site.channels).index_copy_(1, keep_C, weight_OK)
    bias_O = None if bias_O is None else bias_O.to(device)
    return lambda x: nn.functional.linear(x, weight_OC, bias_O)


def _fewer_heads(model: Model, layer: nn.Module, site: Site, plan: Plan) -> Iterator[tuple[nn.Module, Any]]:
    """Norms over the queries or keys of all heads (OLMo 2), and what they compute: over the kept heads alone, as they
    will once the others are gone. The others' channels become zeros."""
    if site.kind != "attention" or not plan.changes(site) or not plan.sites[site.name].kept:
        return
    rows = unit_rows(site, model.config)
    for head_norm in model.family.head_norms:
        norm: Any = layer.get_submodule(head_norm.path)
        role, own = head_norm.roles[0], plan.sites[site.name]
        if hasattr(norm, "norms") or role in model.family.shared_roles:
            continue
        keep = own.keep_C(site) if role == "query" else replace(site, width=rows[role]).keep_C(own.kept)
        yield norm, _narrowed(norm, keep.to(model.layer_device(site.layer)))


def _narrowed(norm: Any, keep: Tensor) -> Any:
    own = copy(norm)  # without its hooks, and never the forward that stands in for it meanwhile
    own._parameters = {name: p.index_select(0, keep) for name, p in norm._parameters.items() if p is not None}
    forward = type(norm).forward

    def narrowed(x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_copy(-1, keep, forward(own, x.index_select(-1, keep)))

    return narrowed


def _fewer_experts(router: Any, kept: Sequence[int]) -> Any:
    """Routing among the kept experts alone; the others' logits are -inf. Where a probe keeps fewer experts than a token
    is routed to, tokens go to all of them."""
    rows = torch.tensor(kept, dtype=torch.int64, device=router.weight.device)
    own = copy(router)
    own._parameters, own.top_k = {"weight": router.weight[rows]}, min(router.top_k, len(kept))
    forward, number = type(router).forward, router.num_experts

    def routed(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, chosen = forward(own, hidden)
        all_logits = logits.new_full((len(logits), number), -torch.inf).index_copy(1, rows, logits)
        return all_logits, weights, rows[chosen]

    return routed
