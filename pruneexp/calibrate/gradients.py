"""Loss gradients of all sites' weights, by backward passes through a model held in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.calibrate.meter import Meter
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
    parameters = _site_parameters(model)
    batches = tokens_NT.split(1 if kind.per_sample else model.batch_size)
    with differentiable(parameters), torch.enable_grad():
        for number, batch in enumerate(progress(batches, "gradients", len(batches), "batches")):
            loss = model.mean_loss(batch)
            if not torch.isfinite(loss):
                raise RunError(f"the calibration loss is NaN or Inf (batch {number})")
            found = torch.autograd.grad(loss, parameters, materialize_grads=True)  # of experts without a token: zeros
            by_parameter = {id(p): g.contiguous() for p, g in zip(parameters, found, strict=True)}
            for index in range(len(model.layers)):
                block = model.block(index, read=lambda p, found=by_parameter: found[id(p)])
                for site in block.sites:
                    evidence[site.name] = evidence[site.name].update(block.weights[site.name], len(batch))
            meter.forward += len(batch) / len(tokens_NT)
            meter.backward += len(batch) / len(tokens_NT)
    return evidence


def _site_parameters(model: Model) -> list[nn.Parameter]:
    """Weights and biases of all writers and readers."""
    found: dict[int, nn.Parameter] = {}
    for index, layer in enumerate(model.layers):
        for site in model.layer_sites(index):
            writers, reader = site_parts(model.family, site)
            for path in (*(writer.path for writer in writers), reader):
                found.update({id(p): p for p in layer.get_submodule(path).parameters()})
    return list(found.values())


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
