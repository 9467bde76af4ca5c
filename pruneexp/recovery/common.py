"""What recoveries give, and what their training has in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pruneexp.calibrate import Meter
from pruneexp.files import save_tensors
from pruneexp.model import Model
from pruneexp.model.modeling_pruned import Family
from pruneexp.types import RunError


@dataclass
class Adapter:
    """Low-rank updates that are not merged: y + alpha / r B A x, added behind the linear layers by hooks. The layers
    themselves, and so the model's weights and parameter counts, are as without it."""

    config: Any  # peft.LoraConfig
    tensors: Mapping[str, Tensor]  # as peft stores them
    active: bool = field(default=True, init=False)

    def attach(self, linear: nn.Module, down: nn.Linear, up: nn.Linear, scale: float) -> None:
        """Adds `scale` * up(down(x)) to what `linear` gives."""

        def add(_linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.active:
                return None
            return (output + up(down(args[0].to(down.weight.dtype))) * scale).to(output.dtype)

        linear.register_forward_hook(add)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model without it."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def save(self, folder: Path, base: Path) -> None:
        """Writes what `peft.PeftModel.from_pretrained(model, folder)` reads; `base`: the checkpoint that it is for."""
        self.config.inference_mode, self.config.base_model_name_or_path = True, str(base)
        self.config.target_modules = sorted(self.config.target_modules)  # a set: written as it comes otherwise
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.config.save_pretrained(folder)
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
            save_tensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        except Exception as error:  # safetensors reports the disk's errors as a kind of its own
            raise RunError(f"{folder}: the adapter cannot be written ({error})") from error


@dataclass(frozen=True)
class Recovered:
    """What the training came to: its figures, and the adapter where it is kept."""

    metrics: Mapping[str, float]
    adapter: Adapter | None


@dataclass(frozen=True)
class NoRecovery:
    """The pruned model as it is."""

    trains: ClassVar[bool] = False

    def prepare(self, family: Family, windows: int) -> None:
        """Needs nothing."""

    def __call__(self, model: Model, tokens_NT: Tensor, meter: Meter, seed: int) -> Recovered:
        return Recovered({}, None)


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """The rate as a share of its peak: it rises over the warm-up to 1 and falls towards 0 after it,
    min((s + 1) / w, (n - s) / (n - w)), s from 0."""
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)


def batches_of(windows: Tensor, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches, epoch after epoch, each in an order of its own."""
    left = steps
    while left > 0:
        epoch: Sequence[Tensor] = windows[torch.randperm(len(windows), generator=generator)].split(size)
        yield from epoch[:left]
        left -= len(epoch)
