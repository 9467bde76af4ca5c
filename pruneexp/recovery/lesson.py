"""One decoder layer's training, and the hidden states that it is trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.calibrate import Meter
from pruneexp.model import Call, Model
from pruneexp.model.half import HALF, widening_pays

BETAS = (0.9, 0.95)  # of AdamW: a layer is trained in few steps


@dataclass
class States:
    """The hidden states of all windows, on their way through a model's layers. `meter`: charged for it."""

    model: Model
    tokens_NT: Tensor
    hidden_NTD: Tensor  # in front of layer `index`
    meter: Meter
    index: int = 0
    _calls: dict[int, list[Call]] = field(default_factory=dict)  # by the number of windows

    @classmethod
    def entering(cls, model: Model, tokens_NT: Tensor, meter: Meter) -> States:
        """The states in front of the first layer."""
        hidden_NTD = torch.cat([model.enter(batch)[0] for batch in tokens_NT.split(model.batch_size)])
        return cls(model, tokens_NT, hidden_NTD, meter)

    def call(self, windows: int) -> Call:
        """What the next layer is called with beside the hidden states of so many windows."""
        if windows not in self._calls:
            self._calls[windows] = self.model.enter(self.tokens_NT[:windows])[1]
        return self._calls[windows][self.index]

    def run_to(self, index: int) -> None:
        """Runs them through all layers before layer `index`."""
        while self.index < index:
            device = self.model.layer_device(self.index)
            with self.model.loaded(self.index, self.index + 1) as layer:
                for part_BTD in self.hidden_NTD.split(self.model.batch_size):
                    output_BTD = self.model.run_layer(layer, part_BTD.to(device), self.call(len(part_BTD)))
                    part_BTD.copy_(output_BTD)
            self.index += 1
            self.meter.forward += 1 / len(self.model.layers)


class Lesson:
    """The training of the layer in front of which `states` are, towards the hidden states `wanted_NTD` behind it.

    The layer is trained as a copy in at least float32; in half precision its products are taken in bfloat16, where the
    machine multiplies that. `held_B`: the windows that are not trained on, by their index.
    """

    def __init__(self, states: States, wanted_NTD: Tensor, held_B: Tensor):
        model, index = states.model, states.index
        self.states, self.wanted_NTD, self.held_B = states, wanted_NTD, held_B
        self.name, self.device = f"{model.layers_path}.{index}", model.layer_device(index)
        self.own = model.layers[index]
        half = model.dtype in HALF
        self.dtype = torch.float32 if half else model.dtype
        self.autocast = half and not widening_pays(states.hidden_NTD[:1].bfloat16())
        self.layer = copy.deepcopy(self.own).to(self.dtype).requires_grad_(True)
        self.parameters = list(self.layer.parameters())
        self.optimiser = torch.optim.AdamW(self.parameters, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)

    @property
    def params(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def held_out(self) -> float:
        """The loss of the windows that are not trained on."""
        with torch.no_grad():
            losses = [self._loss(part_B).item() * len(part_B) for part_B in self._parts(self.held_B)]
        return sum(losses) / len(self.held_B)

    def step(self, windows_B: Tensor, rate: float) -> bool:
        """One step on these windows; whether its gradient was finite (nothing is done where not)."""
        self.states.meter.backward += self._share(windows_B)
        for part_B in self._parts(windows_B):
            with torch.enable_grad():
                (self._loss(part_B) * (len(part_B) / len(windows_B))).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, math.inf)
        if not torch.isfinite(norm):
            return False
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        return True

    def weights(self) -> list[Tensor]:
        """A copy of the trained weights as they are now."""
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def give_(self, weights: list[Tensor]) -> None:
        """Gives `weights` to the model's layer."""
        for parameter, weight in zip(self.own.parameters(), weights, strict=True):
            parameter.copy_(weight)

    def _parts(self, windows_B: Tensor) -> tuple[Tensor, ...]:
        """The windows in batches, whose forward passes are charged."""
        self.states.meter.forward += self._share(windows_B)
        return windows_B.split(self.states.model.batch_size)

    def _share(self, windows_B: Tensor) -> float:
        """What one layer's pass over these windows is of a plain pass over all windows and layers."""
        return len(windows_B) / (len(self.states.tokens_NT) * len(self.states.model.layers))

    def _loss(self, windows_B: Tensor) -> Tensor:
        hidden_BTD = self.states.hidden_NTD[windows_B].to(self.device, self.dtype)
        call = self.states.call(len(windows_B))
        if self.autocast:
            products = torch.autocast(self.device.type, torch.bfloat16)
        else:
            products, call = nullcontext(), Call(_as(self.dtype, call.args), _as(self.dtype, call.kwargs))
        with products:
            output = self.layer(hidden_BTD, *call.args, **call.kwargs)
        output_BTD = output[0] if isinstance(output, tuple) else output
        return relative_error(output_BTD.to(self.dtype), self.wanted_NTD[windows_B].to(self.device, self.dtype))


def relative_error(output_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    """Mean over tokens of ||y - y*||^2 / ||y*||^2."""
    errors_BT = (output_BTD - wanted_BTD).square().sum(-1)
    return (errors_BT / wanted_BTD.square().sum(-1).clamp_min(torch.finfo(wanted_BTD.dtype).tiny)).mean()


def _as(dtype: torch.dtype, value: Any) -> Any:
    """What a layer is called with, floating-point tensors of masks and positions in `dtype`."""
    if type(value) in (tuple, list):
        return type(value)(_as(dtype, each) for each in value)
    if isinstance(value, Mapping):
        return {key: _as(dtype, each) for key, each in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
