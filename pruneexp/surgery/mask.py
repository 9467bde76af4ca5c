"""Switching units off without touching a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.model import Model
from pruneexp.model.sites import site_parts
from pruneexp.types import Plan, Site

Readers = Mapping[str, tuple[Tensor, "Tensor | None"]]  # site name -> weight [O, K], bias [O]


@contextmanager
def masked(model: Model, plan: Plan, readers: Readers | None = None) -> Iterator[Model]:
    """Runs `model` as if `plan`'s units were gone: what they hand to the reader is zeroed.

    Where `readers` names a site, its reader is replaced by that weight and bias on the kept channels (a compensated
    candidate). No weight is copied or written; on exit the model is as before.
    """
    with ExitStack() as layers:
        for index in range(len(model.layers)):
            layers.enter_context(masked_layer(model, index, plan, readers))
        yield model


@contextmanager
def masked_layer(model: Model, index: int, plan: Plan, readers: Readers | None = None) -> Iterator[nn.Module]:
    """`masked` for decoder layer `index` alone."""
    layer, readers = model.layers[index], readers or {}
    handles: list[Any] = []
    silenced: list[nn.Module] = []
    name = f"{model.layers_path}.{index}"
    try:
        if name in plan.sites and not plan.sites[name].kept:
            layer.forward = _skip(model)
            silenced.append(layer)
        for site in () if silenced else model.layer_sites(index):
            if site.name in readers:
                reader = layer.get_submodule(site_parts(model.family, site)[1])
                reader.forward = _replacement(site, plan, *readers[site.name], device=model.device)
                silenced.append(reader)
            elif plan.removed(site):
                reader = layer.get_submodule(site_parts(model.family, site)[1])
                handles.append(reader.register_forward_pre_hook(_zeroing(site, plan, model.device)))
        yield layer
    finally:
        for handle in handles:
            handle.remove()
        for module in silenced:
            module.__dict__.pop("forward", None)


def _zeroing(site: Site, plan: Plan, device: torch.device) -> Any:
    keep_C = torch.zeros(site.channels, dtype=torch.bool)
    keep_C[site.keep_C(plan.sites[site.name].kept)] = True
    keep_C = keep_C.to(device)
    return lambda _reader, args: (args[0] * keep_C,)


def _replacement(site: Site, plan: Plan, weight_OK: Tensor, bias_O: Tensor | None, device: torch.device) -> Any:
    kept = plan.sites[site.name].kept if site.name in plan.sites else range(site.units)
    keep_C = site.keep_C(kept).to(device)
    return lambda x: nn.functional.linear(x.index_select(-1, keep_C), weight_OK, bias_O)


def _skip(model: Model) -> Any:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden, None) if model.family.returns_tuple else hidden

    return forward
