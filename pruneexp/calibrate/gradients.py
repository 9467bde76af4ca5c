"""Loss gradients of all sites' weights, by backward passes through a model held in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.calibrate.bookmark import Meter
from pruneexp.model import Model
from pruneexp.model.sites import site_parts
from pruneexp.progress import progress
from pruneexp.types import RunError


def gradient_evidence(model: Model, tokens_NT: Tensor, kind: Any, meter: Meter) -> dict[str, Any]:
    """Evidence of one gradient type for every site, by name: a backward pass a batch, or a window (`per_sample`).

    Only the sites' weights are differentiated; no gradient outlives the call, and `requires_grad` is as before.

    Raises:
        RunError: a loss that is NaN or Inf; the message names the batch.
    """
    if model.streamed:
        raise RunError("gradients need the whole model in memory: expected model.stream=false")
    evidence = {site.name: kind.empty(site) for site in model.sites()}
    modules = [module for index in range(len(model.layers)) for _, module in site_modules(model, index)]
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())  # biases, too
    batches = tokens_NT.split(1 if kind.per_sample else model.batch_size)
    with differentiable(parameters), torch.enable_grad():
        for number, batch in enumerate(progress(batches, "gradients", len(batches), "batches")):
            loss = model.mean_loss(batch)
            if not torch.isfinite(loss):
                raise RunError(f"the calibration loss is NaN or Inf (batch {number})")
            # zeros for experts without a token
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            by_parameter = {id(p): g.contiguous() for p, g in zip(parameters, gradients, strict=True)}
            for index in range(len(model.layers)):
                block = model.block(index, read=lambda p, of=by_parameter: of[id(p)])
                for site in block.sites:
                    evidence[site.name] = evidence[site.name].update_(block.weights[site.name], len(batch))
            meter.forward += len(batch) / len(tokens_NT)
            meter.backward += len(batch) / len(tokens_NT)
    return evidence


def site_modules(model: Model, index: int, in_projections: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """The in-projections and out-projections (or these alone) of a layer's sites, by their paths in it; one of several
    roles once for each."""
    for site in model.layer_sites(index):
        written, out_projection = site_parts(model.family, site)
        for path in (*(in_projection.path for in_projection in written if in_projections), out_projection):
            yield path, model.layers[index].get_submodule(path)


@contextmanager
def differentiable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """`requires_grad` for these parameters, and afterwards as before."""
    before = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
