"""Slopes of the loss along random directions, by forward passes of a model whose weights are never written to."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.calibrate.bookmark import Meter
from pruneexp.calibrate.gradients import site_modules
from pruneexp.evidence import Perturbation
from pruneexp.evidence.statistics import wide
from pruneexp.model import Model
from pruneexp.model.sites import site_parts
from pruneexp.progress import progress
from pruneexp.types import Block, RunError

logger = logging.getLogger("pruneexp")


class Slopes:
    """Directional derivatives (L(w + eps z) - L(w - eps z)) / (2 eps) of the calibration loss, measured when made.

    Two passes over its windows a direction. A direction without finite losses is left out.
    Raises:
        RunError: no direction has finite losses; gates that move by less than the dtype's last place, which rounding
            would undo.
    """

    def __init__(self, model: Model, tokens_NT: Tensor, kind: Perturbation, meter: Meter):
        self.model, self.kind = model, kind
        least = torch.finfo(model.dtype).eps
        if kind.perturb == "gates" and kind.epsilon < least:
            name = str(model.dtype).removeprefix("torch.")
            raise RunError(f"criterion.epsilon={kind.epsilon}: expected at least {least:.2g} for gates in {name}")
        self.values: dict[int, float] = {}  # direction -> slope
        size = min(kind.windows or len(tokens_NT), len(tokens_NT))
        for number in progress(range(kind.directions), "zeroth order", kind.directions, "directions"):
            at = torch.arange(number * size, (number + 1) * size) % len(tokens_NT)
            losses = []
            for sign in (1, -1):
                with perturbed(model, kind, number, sign * kind.epsilon):
                    losses.append(model.token_losses(tokens_NT[at], model.batch_size).mean())
                meter.forward += size / len(tokens_NT)
            slope = (losses[0] - losses[1]).item() / (2 * kind.epsilon)
            if torch.isfinite(torch.tensor(slope)):
                self.values[number] = slope
        if not self.values:
            raise RunError(
                f"all {kind.directions} directions gave losses that are NaN or Inf; a smaller epsilon may help"
            )
        if lost := kind.directions - len(self.values):
            logger.warning("%d of %d directions gave losses that are NaN or Inf", lost, kind.directions)

    def of(self, block: Block) -> dict[str, Any]:
        """The layer's evidence, by site name; the layer's weights must be at hand."""
        evidence = {site.name: self.kind.empty(site) for site in block.sites}
        for number, slope in self.values.items():
            for name, direction in self._directions(block, number).items():
                evidence[name] = evidence[name].update_(direction, slope)
        return evidence

    def _directions(self, block: Block, number: int) -> dict[str, Any]:
        model, kind, device = self.model, self.kind, self.model.layer_device(block.layer)
        if kind.perturb == "gates":
            return {site.name: kind.draw(number, site.name, torch.Size([site.units]), device) for site in block.sites}
        names = {id(p): name for name, p in _weights(model, block.layer)}

        def read(parameter: Tensor) -> Tensor:
            name = names.get(id(parameter))  # biases are not perturbed
            drawn = torch.zeros(parameter.shape, device=device)
            return drawn if name is None else kind.draw(number, name, parameter.shape, device)

        return dict(model.block(block.layer, read=read).weights)


@contextmanager
def perturbed(model: Model, kind: Perturbation, number: int, step: float) -> Iterator[Model]:
    """Runs `model` with `step` times direction `number` added to its weights (or scaling its gates by 1 + step z).

    A layer gets moved copies of its weights for the time of its forward; the weights themselves are never written to,
    so that they are the same to the bit afterwards. Moved in float32 (float64 for such weights), rounded once.
    """
    with ExitStack() as hooks:
        for index, layer in enumerate(model.layers):
            if kind.perturb == "gates":
                for site in model.layer_sites(index):
                    z_U = kind.draw(number, site.name, torch.Size([site.units]), model.layer_device(index))
                    dtype = torch.promote_types(model.dtype, torch.float32)
                    gates_C = (1 + step * z_U.to(dtype)).repeat_interleave(site.width)
                    out_projection = layer.get_submodule(site_parts(model.family, site)[1])
                    hooks.enter_context(out_projection.register_forward_pre_hook(partial(_scaled, gates_C)))
            else:
                move = _Moved(model, kind, index, number, step)
                hooks.enter_context(layer.register_forward_pre_hook(move.enter))
                hooks.enter_context(layer.register_forward_hook(move.leave, always_call=True))
        yield model


def _scaled(gates_C: Tensor, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    return ((args[0] * gates_C).to(args[0].dtype),)  # rounded once: in half precision 1 + step z would be 1


class _Moved:
    """Swaps moved weights into one layer, and the weights back."""

    def __init__(self, model: Model, kind: Perturbation, index: int, number: int, step: float):
        self.model, self.kind, self.index, self.number, self.step = model, kind, index, number, step
        self.own: list[tuple[nn.Parameter, Tensor]] = []

    def enter(self, *_: Any) -> None:
        for name, parameter in _weights(self.model, self.index):
            if parameter.is_meta:  # a streamed model is looking for a layer's arguments, not running it
                return
            own = parameter.data
            z = self.kind.draw(self.number, name, parameter.shape, own.device)
            self.own.append((parameter, own))
            parameter.data = (wide(own) + self.step * z).to(own.dtype)

    def leave(self, *_: Any) -> None:
        for parameter, own in self.own:
            parameter.data = own
        self.own = []


def _weights(model: Model, index: int) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of a layer's in-projections and out-projections, by parameter name of the model."""
    for path, module in site_modules(model, index):
        yield f"{model.layers_path}.{index}.{path}.weight", module.get_parameter("weight")
