"""Perplexity over a dataset's evaluation split."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pruneexp.dataset import (
    bos_token,
    check_takes_bos,
    check_vocabulary,
    evaluation_parts,
    fingerprint,
    with_bos,
)
from pruneexp.evaluator.once import once_per_tokenizer
from pruneexp.model.half import overflow_hint
from pruneexp.types import ConfigError, Dataset, RunError, require_least

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, in nats, over all scored tokens of all windows; lower is better.

    The evaluation text is cut into consecutive windows of `length` tokens (None: the dataset's own), a partial one at
    the end dropped. Each window is a context of its own, so that its first token is never scored: T-1 tokens a window.

    - `stride` < `length`: windows begin every `stride` tokens; the first scores T-1 tokens, each other one its last
      `stride`, so that every token but the first is scored once, with at least T-`stride` tokens of context. The text
      is the one that windows without overlap cover.
    - `bos`: each window is the beginning-of-sequence token and T-1 tokens of text, all of which are scored, the first
      one, too: T-1 tokens a window again. With a stride, windows begin every `stride` tokens of text.
    - `samples`: only the first so many windows, of each source.

    Of a dataset of several sources, each is measured apart, and all together: exp of the mean of their losses, by
    weights.

    Named "ppl/<dataset>@<T>", then "s<stride>", "+bos", "[<samples>]" where they apply: "ppl/ptb@2048s512+bos[40]".
    """

    dataset: Dataset
    length: int | None
    stride: int | None
    batch_size: int
    bos: bool
    samples: int | None

    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_least(self, 2, "length", besides=", or null")
        if self.stride is not None and not 1 <= self.stride <= (self.length or 0):
            raise ConfigError(f"stride={self.stride!r}: expected null or an int from 1 to length={self.length}")
        require_least(self, 1, "batch_size")
        require_least(self, 1, "samples", besides=", or null")
        check_takes_bos(self.bos, self.dataset)
        if self.stride not in (None, self.length) and not self.dataset.contiguous:
            only = f"dataset {self.dataset.name!r} has separate windows, not one text"
            raise ConfigError(f"stride={self.stride!r}: {only}; expected null")

    def check(self) -> None:
        """The dataset's files. Raises ConfigError."""
        self.dataset.check(calibration=False)

    def prepare(self, tokenizer: Any, vocabulary: int) -> None:
        """Makes the windows, so that text that is too short or foreign to the model is found before weights load."""
        check_vocabulary(self.windows(tokenizer), vocabulary, self.dataset.key("evaluation"))

    def lacks_bos(self, tokenizer: Any, token: int) -> bool:
        """Whether any window begins with another token."""
        return bool((self.windows(tokenizer)[:, 0] != token).any())

    def measured_on(self, tokenizer: Any) -> str:
        """The windows' fingerprint: a model that is the same has the same figures on them."""
        return fingerprint(self.windows(tokenizer))

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
        windows_NT = self.windows(tokenizer)
        name = self._name(windows_NT, self.dataset.name)
        length = windows_NT.shape[1]
        if model.max_length is not None and length > model.max_length:
            log.warning("%s: windows of %d tokens, more than the model's %d", name, length, model.max_length)
        losses_NT = model.token_losses(windows_NT, self.batch_size, name).double()
        broken = torch.nonzero(~losses_NT.isfinite().all(dim=1)).flatten().tolist()
        if broken:
            where = f"{len(broken)} of {len(losses_NT)} windows, first in window {broken[0]}"
            layer = model.broken_layer(windows_NT[broken[:1]])
            blame = f": {layer}'s activations hold NaN or Inf" if layer else ""
            raise RunError(f"{name}: the model's loss is not finite in {where}{blame}{overflow_hint(model.dtype)}")
        return self._figures(losses_NT, self._parts(tokenizer))

    def _figures(self, losses_NT: Tensor, parts: Mapping[str, tuple[float, Tensor]]) -> dict[str, float]:
        """Perplexity of each source, and of all by weights, unless all that are measured have the weight 0."""
        apart = losses_NT.split([len(windows_NT) for _, windows_NT in parts.values()])
        means = {
            self._name(windows_NT, source): (weight, self._mean(each_NT))
            for (source, (weight, windows_NT)), each_NT in zip(parts.items(), apart, strict=True)
        }
        whole = sum(weight for weight, _ in means.values())
        if self.dataset.name not in parts and whole:
            windows_NT = next(windows_NT for _, windows_NT in parts.values())
            name = self._name(windows_NT, self.dataset.name)
            means[name] = whole, sum(weight * mean for weight, mean in means.values()) / whole
        for name, (_, mean) in means.items():
            if mean > math.log(sys.float_info.max):
                raise RunError(f"{name}: a mean loss of {mean:.1f} nats has no finite perplexity")
        return {name: math.exp(mean) for name, (_, mean) in means.items()}

    def _mean(self, losses_NT: Tensor) -> float:
        """Mean over the scored tokens."""
        if self.stride is None or self.stride >= losses_NT.shape[1]:
            return float(losses_NT.mean())
        scored = losses_NT[0].sum() + losses_NT[1:, -self.stride :].sum()
        return float(scored / (losses_NT.shape[1] + (len(losses_NT) - 1) * self.stride))

    @once_per_tokenizer
    def windows(self, tokenizer: Any) -> Tensor:
        """int64 [N, T], those of one source after the other."""
        return torch.cat([windows_NT for _, windows_NT in self._parts(tokenizer).values()])

    @once_per_tokenizer
    def _parts(self, tokenizer: Any) -> dict[str, tuple[float, Tensor]]:
        """Each source's weight and windows, by its name."""
        bos = bos_token(tokenizer, "evaluator.*.bos") if self.bos else None
        parts = evaluation_parts(self.dataset, tokenizer, self.length, self.bos)
        return {name: (weight, self._cut(windows_NT, bos)) for name, (weight, windows_NT) in parts.items()}

    def _cut(self, windows_NT: Tensor, bos: int | None) -> Tensor:
        """A source's windows, overlapping as `stride` has it, as many as are wanted."""
        text_NT = windows_NT if bos is None else windows_NT[:, 1:]
        if self.stride is not None and self.stride < text_NT.shape[1]:
            text_NT = text_NT.reshape(-1).unfold(0, text_NT.shape[1], self.stride)
            windows_NT = text_NT if bos is None else with_bos(text_NT, bos)
        return windows_NT[: self.samples]

    def _name(self, windows_NT: Tensor, source: str) -> str:
        length = self.length or windows_NT.shape[1]
        apart = self.stride is None or self.stride >= length - self.bos  # windows that do not overlap
        stride = "" if apart else f"s{self.stride}"
        count = "" if self.samples is None else f"[{len(windows_NT)}]"
        return f"ppl/{source}@{length}{stride}{'+bos' if self.bos else ''}{count}"
