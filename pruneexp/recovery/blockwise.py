"""Each decoder layer trained by itself towards what the dense model has behind it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruneexp.calibrate import Meter
from pruneexp.model import Model
from pruneexp.model.modeling_pruned import Family
from pruneexp.progress import progress
from pruneexp.recovery.common import Recovered, rate_factor
from pruneexp.recovery.lesson import Lesson, States
from pruneexp.types import ConfigError, require_least, require_within

logger = logging.getLogger("pruneexp")

LEAST_HELD = 2  # windows that say something together


@dataclass(frozen=True)
class Blockwise:
    """Block-wise fine-tuning (EBFT; Guo et al., 2024): every weight of a decoder layer is trained by gradient descent
    through that layer alone, layer by layer, each behind the ones that were trained before it. Loss: the mean over
    tokens of

        ||y_t - y*_t||^2 / ||y*_t||^2,

    y_t the layer's output for the pruned model's hidden states, y*_t the dense model's hidden state at that place: in
    front of the next layer that was kept (EBFT: the dense layer's output, and the plain squared error, which a few
    outlier tokens of a large model are nearly all of).

    AdamW without weight decay, in float32 where the model is in half precision. The rate rises and falls as `Lora`'s
    does, in every layer anew. A share `held_out` of the windows is not trained on: after every epoch the loss is
    measured there, and the layer takes the weights that had the least, those that it came with included. A layer whose
    training meets NaN or Inf takes those, too.
    """

    trains: ClassVar[bool] = True
    layerwise: ClassVar[bool] = True

    epochs: int
    batch: int
    rate: float
    warmup: float
    held_out: float

    def __post_init__(self) -> None:
        require_least(self, 1, "epochs", "batch")
        require_within(self, "(0, inf)", "rate")
        require_within(self, "[0, 1]", "warmup", what="a share of the steps,")
        require_within(self, "(0, 1)", "held_out", what="a share of the windows,")

    def prepare(self, family: Family, windows: int) -> None:
        """What can be told once the calibration windows are known. Raises ConfigError."""
        held = self._held(windows)
        if held < LEAST_HELD or held == windows:
            raise ConfigError(
                f"recovery.held_out={self.held_out:g}: that is {held} of {windows} calibration windows; expected at "
                f"least {LEAST_HELD}, and some that are left: another share, or more windows"
            )

    def _held(self, windows: int) -> int:
        return round(self.held_out * windows)

    def seen(self, windows: int) -> int:
        """Windows that all steps together train on, of so many for calibration."""
        return self.epochs * (windows - self._held(windows))

    def looks(self, windows: int) -> int:
        """Windows that are run forwards beside that: held out ones before every epoch and after the last, and all
        through the dense layers and through the trained ones."""
        return 2 * windows + (self.epochs + 1) * self._held(windows)

    def __call__(self, model: Model, tokens_NT: Tensor, meter: Meter, seed: int, dense: Model) -> Recovered:
        """Trains `model` in place, towards `dense`, of which it loads one layer after the other."""
        rng = torch.Generator().manual_seed(seed)
        held_B, others_B = split(len(tokens_NT), self._held(len(tokens_NT)), rng)
        own, wanted = (States.entering(each, tokens_NT, meter) for each in (model, dense))
        count, taught = len(model.layers), []
        for index in progress(range(count), "recover", count, "blocks"):
            wanted.run_to(model.origin[index + 1] if index + 1 < count else len(dense.layers))
            if any(True for _ in model.layers[index].parameters()):
                taught.append(self._teach(Lesson(own, wanted.hidden_NTD, held_B), others_B, rng))
            own.run_to(index + 1)
        return Recovered(_metrics(taught), None)

    def _teach(self, lesson: Lesson, windows_B: Tensor, rng: torch.Generator) -> Taught:
        """Trains one layer on these windows."""
        steps = self.epochs * math.ceil(len(windows_B) / self.batch)
        warmup, done = round(self.warmup * steps), 0
        first = least = lesson.held_out()
        best = None
        for _ in range(self.epochs):
            finite = True
            for batch_B in windows_B[torch.randperm(len(windows_B), generator=rng)].split(self.batch):
                finite = finite and lesson.step(batch_B, self.rate * rate_factor(done, steps, warmup))
                done += 1
            loss = lesson.held_out()
            if not finite or not math.isfinite(loss):
                logger.warning("recovery: %s: its training met NaN or Inf; it stays as it was pruned", lesson.name)
                return Taught(lesson.params, done, first, first)
            if loss < least:
                least, best = loss, lesson.weights()
        if best is not None:
            lesson.give_(best)
        return Taught(lesson.params, done, first, least)


@dataclass(frozen=True)
class Taught:
    """What a layer's training came to: the loss of the windows held out `first` and with the weights that it took."""

    params: int
    steps: int
    first: float
    least: float


def split(windows: int, held: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The windows to hold out, one drawn from each of so many stretches of equal length, so that every source of a
    mixture has its share, in whatever order they come; and the others."""
    bounds = torch.arange(held + 1) * windows // held
    drawn = (torch.rand(held, generator=rng) * (bounds[1:] - bounds[:-1])).long()
    held_B = bounds[:-1] + drawn
    others = torch.ones(windows, dtype=torch.bool)
    others[held_B] = False
    return held_B, others.nonzero().flatten()


def _metrics(taught: Sequence[Taught]) -> dict[str, float]:
    count = max(1, len(taught))
    first, last = sum(t.first for t in taught) / count, sum(t.least for t in taught) / count
    kept = sum(t.least == t.first for t in taught)
    unchanged = f"; {kept} layers stay as they were pruned" if kept else ""
    logger.info("recovery: loss of the windows held out %.4g before, %.4g after%s", first, last, unchanged)
    return {
        "recovery/params": sum(t.params for t in taught),
        "recovery/steps": sum(t.steps for t in taught),
        "recovery/loss_first": first,
        "recovery/loss_last": last,
        "recovery/layers_kept": kept,
    }
