"""Fewer bits for the weights of the pruned model: what evaluators then measure, and what that takes on a disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pruneexp.model import Model
from pruneexp.model.modeling_pruned import as_matrix
from pruneexp.types import ConfigError, Evaluator, require_least
from pruneexp.types.defaults import QUANTISE, fill_in

__all__ = ["NoQuantise", "WeightOnly"]

logger = logging.getLogger("pruneexp")

HOW = {
    True: "by torchao's kernels",
    False: "by arithmetic: the numbers of a quantised model, at the speed of one that is not",
}
SCALE_BYTES = {8: 4, 4: 4}  # of a group: a float32 scale; a float16 scale and a float16 offset


@dataclass(frozen=True)
class NoQuantise:
    """Weights as they are."""

    applies: ClassVar[bool] = False

    def note(self) -> str:
        return ""

    def __call__(
        self, model: Model, when: str, evaluators: Mapping[str, Evaluator], folder: Path | None
    ) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class WeightOnly:
    """The weights of the decoder's linear layers, rounded to the nearest of 2^bits levels; activations, embeddings,
    norms, biases and the head stay. Neighbouring inputs of an output share their levels, `group` at a time, the last
    ones of a row that is no multiple being a shorter group; None: the whole row.

    - 8 bits, symmetric: s = max|w| / 127.5, q = clamp(round(w / s), -128, 127), w' = s q; s in float32. torchao's
      weight-only int8 for whole rows. |w - w'| <= s / 2
    - 4 bits, asymmetric: s = (max w - min w) / 15 and m = min w, both rounded to float16, q = clamp(round((w - m) / s),
      0, 15), w' = m + s q. |w - w'| <= s / 2 but for the rounding of m and s

    w' takes the place of w in the model's own dtype: the numbers of a quantised model, at the speed and the memory of
    one that is not. With `kernels`, layers keep q and s and run by torchao: of 8 bits and whole rows alone.

    Figures: "bytes", all parameters as they would lie on a disk: rows of q whole bytes each, 4 bytes a group, and what
    is not quantised in its own dtype; "bits/param", these of a parameter.
    """

    applies: ClassVar[bool] = True
    in_place: ClassVar[bool] = True

    bits: Literal[4, 8]
    group: int | None
    kernels: bool

    def __post_init__(self) -> None:
        require_least(self, 1, "group", besides=", such as 32, 64 or 128, or null for whole rows")
        if self.kernels and (self.bits != 8 or self.group is not None):
            groups = "" if self.group is None else f" and group={self.group}"
            raise ConfigError(
                f"kernels=True: torchao's run 8 bits and whole rows alone, not bits={self.bits}{groups}; expected "
                "false, or quantise=int8 quantise.group=null"
            )

    def note(self) -> str:
        groups = "a row" if self.group is None else f"{self.group} inputs"
        return f"the decoder's linear layers in {self.bits} bits a weight and {8 * SCALE_BYTES[self.bits]} for {groups}"

    def check(self) -> None:
        if self.kernels and find_spec("torchao") is None:
            raise ConfigError(
                "quantise.kernels=True: needs the package torchao; expected pip install 'pruneexp[torchao]', or false"
            )

    def prepare(self, model: Model) -> None:
        """Raises ConfigError for a decoder that holds other matrices than those of linear layers, or none for torchao
        where its kernels are asked for."""
        layers = [linear for _, linear in linears(model, self.bits)]
        if self.kernels and not any(isinstance(linear, nn.Linear) for linear in layers):
            kinds = ", ".join(sorted({type(linear).__name__ for linear in layers}))
            raise ConfigError(
                f"quantise.kernels=True: torchao runs layers of type Linear alone, these are {kinds}; expected false"
            )

    def __call__(
        self, model: Model, when: str, evaluators: Mapping[str, Evaluator], folder: Path | None
    ) -> dict[str, float]:
        """Quantises the pruned `model` in place; figures of it, or of the dense one as it is."""
        if when == "pruned":
            self._quantise_(model)
        return {"bytes": model.bytes, "bits/param": 8 * model.bytes / model.params}

    @torch.no_grad()
    def _quantise_(self, model: Model) -> None:
        shorter = count = 0
        for path, linear in linears(model, self.bits):
            weight_OI = as_matrix(linear, linear.weight)
            outputs, inputs = weight_OI.shape
            own = self.kernels and isinstance(linear, nn.Linear)
            new = _int8_tensor(weight_OI) if own else as_matrix(linear, rounded(weight_OI, self.bits, self.group))
            linear.weight = nn.Parameter(new if own else new.contiguous(), requires_grad=False)
            groups = -(-inputs // (self.group or max(1, inputs)))
            model.stored_bytes[f"{path}.weight"] = outputs * (
                -(-inputs * self.bits // 8) + groups * SCALE_BYTES[self.bits]
            )
            count, shorter = count + 1, shorter + bool(self.group and inputs % self.group)
        short = f"; the last group of a row is shorter in {shorter} of them" if shorter else ""
        logger.info("quantise=int%d: %d linear layers %s%s", self.bits, count, HOW[self.kernels], short)


def linears(model: Model, bits: int) -> Iterator[tuple[str, Any]]:
    """The decoder's linear layers by their paths. Raises ConfigError for a part that is none and holds a matrix."""
    for name, module in model.layers.named_modules():
        if all(parameter.ndim < 2 for parameter in module.parameters(recurse=False)):
            continue
        path = f"{model.layers_path}.{name}"
        if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
            raise ConfigError(
                f"quantise=int{bits}: {path} is a {type(module).__name__}, no linear layer; expected quantise=none"
            )
        yield path, module


def rounded(weight_OI: Tensor, bits: int, group: int | None) -> Tensor:
    """w' of `WeightOnly`, in the dtype of the weights."""
    parts = [levels(part_OGI, bits) for part_OGI in _groups(weight_OI.float(), group)]
    values = [(q_OGI * scale_OG1 + offset_OG1).flatten(1) for q_OGI, scale_OG1, offset_OG1 in parts]
    return torch.cat(values, 1).to(weight_OI.dtype)


def levels(weight_OGI: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, s and m (0 where symmetric) of every group, q [O, G, I], the others [O, G, 1]; float32."""
    if bits == 8:
        scale = weight_OGI.abs().amax(-1, keepdim=True) / 127.5
        return _nearest(weight_OGI, scale, -128, 127), scale, torch.zeros_like(scale)
    low, high = weight_OGI.aminmax(dim=-1, keepdim=True)
    scale, low = ((high - low) / 15).half().float(), low.half().float()
    return _nearest(weight_OGI - low, scale, 0, 15), scale, low


def _nearest(value: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Where the scale is 0, any answer will do. Times the inverse, as torchao has it: ties fall alike."""
    return (value * (1 / scale.where(scale > 0, 1))).round().clamp(low, high)


def _groups(weight_OI: Tensor, group: int | None) -> list[Tensor]:
    """Whole groups [O, G, I], and what is left of each row as a group of its own."""
    inputs = weight_OI.shape[1]
    group = inputs if group is None else group
    whole = inputs - inputs % group if group else 0
    parts = [weight_OI[:, :whole].unflatten(1, (-1, group))] if whole else []
    return parts + ([weight_OI[:, None, whole:]] if inputs > whole else [])


def _int8_tensor(weight_OI: Tensor) -> Tensor:
    """The weight as torchao holds it."""
    from torchao.quantization import Int8Tensor  # pyright: ignore[reportMissingImports]

    q_OGI, scale_OG1, _ = levels(weight_OI.float()[:, None], 8)
    scale_O1 = scale_OG1[:, 0]
    zeros_O1 = torch.zeros_like(scale_O1, dtype=torch.int8)
    q_OI = q_OGI[:, 0].to(torch.int8)
    return Int8Tensor(q_OI, scale_O1, [1, weight_OI.shape[1]], weight_OI.dtype, zero_point=zeros_O1)


fill_in(globals(), QUANTISE)
