"""Low-rank updates of the linear layers, trained on the next-token loss of the whole model."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pruneexp.calibrate import Meter
from pruneexp.model import Model
from pruneexp.model.modeling_pruned import Family
from pruneexp.model.sites import site_parts
from pruneexp.progress import progress
from pruneexp.recovery.common import Adapter, Recovered, batches_of, rate_factor
from pruneexp.types import ConfigError, RunError, require_least, require_within

logger = logging.getLogger("pruneexp")

Role = Literal["query", "key", "value", "output", "gate", "up", "down"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation of the pruned model (Hu et al., 2021), as LLM-Pruner recovers its models (Ma et al., 2023):
    W + alpha / r B A for the decoder's linear layers, B starting at 0; AdamW without weight decay.

    The rate of step s of n, w of them warm-up, is `rate` * min((s + 1) / w, (n - s) / (n - w)), s from 0. Loss: mean
    next-token loss over whole windows (LLM-Pruner's: of Alpaca's responses alone). Windows are shuffled anew in every
    epoch; batches are run `model.batch_size` windows at a time. Only the updates have dropout, in float32 where the
    model is in half precision; every other weight stays as it is, to the bit.
    """

    trains: ClassVar[bool] = True

    samples: int | None
    epochs: int
    steps: int | None
    batch: int
    targets: list[Role]
    r: int
    alpha: int
    dropout: float
    rate: float
    warmup: float
    clip: float
    merge: bool

    def __post_init__(self) -> None:
        require_least(self, 1, "samples", "steps", besides=", or null")
        require_least(self, 1, "epochs", "batch", "r", "alpha")
        require_within(self, "(0, inf)", "rate", "clip")
        require_within(self, "[0, 1)", "dropout")
        require_within(self, "[0, 1]", "warmup", what="a share of the steps,")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"targets={list(self.targets)!r}: expected one or more roles, each once")

    def prepare(self, family: Family, windows: int) -> None:
        """What can be told once model and texts are known. Raises ConfigError."""
        in_projections = (*family.attention_in, *family.mlp_in)
        there = {*(role for in_projection in in_projections for role in in_projection.roles), "output", "down"}
        if not there & set(self.targets):
            raise ConfigError(f"recovery.targets={list(self.targets)!r}: expected some of {', '.join(sorted(there))}")
        if family.experts is not None and not self.merge:
            mixture = "a mixture of experts, whose stock class has no linear layers to put an adapter on"
            raise ConfigError(f"recovery.merge=False: expected true for {mixture}")
        if self.samples is not None and self.samples > windows:
            raise ConfigError(f"recovery.samples={self.samples}: expected at most {windows}, the calibration windows")

    def seen(self, windows: int) -> int:
        """Windows that all steps together train on, of so many for calibration."""
        own = min(self.samples or windows, windows)
        each = math.ceil(own / self.batch)  # steps of an epoch
        epochs, rest = divmod(self.steps or self.epochs * each, each)
        return epochs * own + min(rest * self.batch, own)

    def __call__(self, model: Model, tokens_NT: Tensor, meter: Meter, seed: int) -> Recovered:
        """Trains `model` in place. Raises RunError where the loss is NaN or Inf, or nothing is left to train."""
        linears = self._linears(model)
        if not linears:
            raise RunError(f"recovery.targets={list(self.targets)!r}: pruning left none of these layers")
        with torch.random.fork_rng(devices=[device for device in model.devices if device.type == "cuda"]):
            torch.manual_seed(seed)  # of the updates' first values and of dropout
            tuned = self._wrapped(model, linears)
            losses = self._train(model, tuned, tokens_NT, meter, seed)
        count = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        metrics = {"recovery/params": count, "recovery/steps": len(losses)}
        metrics |= {"recovery/loss_first": losses[0], "recovery/loss_last": losses[-1]}
        adapter = None if self.merge else self._adapter(tuned, linears)
        tuned.merge_and_unload() if self.merge else tuned.unload()
        model.module.eval().requires_grad_(False)
        logger.info("recovery: loss %.4f in the first step, %.4f in the last of %d", losses[0], losses[-1], len(losses))
        return Recovered(metrics, adapter)

    def _linears(self, model: Model) -> dict[str, nn.Module]:
        """The layers to adapt, GPT-2's Conv1D too, by their path; sublayers that are gone have none."""
        linears: dict[str, nn.Module] = {}
        for index, layer in enumerate(model.layers):
            for site in model.layer_sites(index):
                in_projections, out_projection = site_parts(model.family, site)
                roles = {in_projection.path: in_projection.roles for in_projection in in_projections}
                roles[out_projection] = ("output" if site.kind == "attention" else "down",)
                for path in (path for path, own in roles.items() if set(own) & set(self.targets)):
                    linears[f"{model.layers_path}.{index}.{path}"] = layer.get_submodule(path)
        return linears

    def _wrapped(self, model: Model, linears: Mapping[str, nn.Module]) -> Any:
        from peft import LoraConfig, get_peft_model

        sizes: dict[str, Any] = {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        sizes["fan_in_fan_out"] = any(type(linear).__name__ == "Conv1D" for linear in linears.values())
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=list(linears), bias="none", **sizes)
        with warnings.catch_warnings(), _as_its_modules_are(model.module.config):
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what peft asks it
            tuned = get_peft_model(model.module, config).eval()
        for name, module in tuned.named_modules():
            module.training = "lora_dropout" in name
        return tuned

    def _train(self, model: Model, tuned: Any, tokens_NT: Tensor, meter: Meter, seed: int) -> list[float]:
        """The loss of every step."""
        windows = tokens_NT[: self.samples]
        steps = self.steps or self.epochs * math.ceil(len(windows) / self.batch)
        parameters = [p for p in tuned.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=self.rate, weight_decay=0.0)
        losses, batches = [], batches_of(windows, self.batch, steps, torch.Generator().manual_seed(seed))
        for step, batch in enumerate(progress(batches, "recover", steps, "steps")):
            losses.append(0.0)
            for part in batch.split(model.batch_size):
                with torch.enable_grad():
                    loss = model.mean_loss(part) * (len(part) / len(batch))
                    loss.backward()
                losses[-1] += loss.item()
                meter.forward += len(part) / len(tokens_NT)
                meter.backward += len(part) / len(tokens_NT)
            norm = nn.utils.clip_grad_norm_(parameters, self.clip)
            if not math.isfinite(losses[-1]) or not torch.isfinite(norm):
                raise RunError(f"recovery: the loss or its gradient is NaN or Inf (step {step + 1} of {steps})")
            for group in optimiser.param_groups:
                group["lr"] = self.rate * rate_factor(step, steps, round(self.warmup * steps))
            optimiser.step()
            optimiser.zero_grad()
        if not all(torch.isfinite(p).all() for p in parameters):
            raise RunError("recovery: the trained updates hold NaN or Inf; a smaller recovery.rate may help")
        return losses

    def _adapter(self, tuned: Any, linears: Mapping[str, nn.Module]) -> Adapter:
        from peft import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(tuned, save_embedding_layers=False)
        adapter = Adapter(tuned.peft_config["default"], {n: t.detach().clone() for n, t in tensors.items()})
        for name, linear in linears.items():
            wrapper = tuned.base_model.model.get_submodule(name)
            adapter.attach(linear, wrapper.lora_A["default"], wrapper.lora_B["default"], wrapper.scaling["default"])
        return adapter


@contextmanager
def _as_its_modules_are(config: Any) -> Iterator[None]:
    """The model without its type: by that, peft looks for a mixture's experts in fused weights, as the stock class has
    them, and passes over linear layers of the same names."""
    config.model_type = ""
    try:
        yield
    finally:
        del config.model_type  # the class's shows again
