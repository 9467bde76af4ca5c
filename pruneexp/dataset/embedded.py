"""Windows of the embedded language: no files, no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from pruneexp.dataset.windows import begin_with, check_seed, encode, windows_of
from pruneexp.progress import progress
from pruneexp.types import require_least


@dataclass(frozen=True)
class Embedded:
    """Stories of the embedded language. Each window begins where a story begins; where it is shorter, the next follows.

    Calibration: `samples` windows of `length` tokens, other stories for every `seed`. Evaluation: always the same
    `evaluation_samples` windows, so that runs with different seeds compare. The language's own seed ranges keep
    calibration, evaluation and the training of the embedded models apart.
    """

    samples: int
    length: int
    seed: int
    evaluation_samples: int
    bos: bool

    name: ClassVar[str] = "embedded"
    contiguous: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_least(self, 1, "samples", "evaluation_samples")
        require_least(self, 2, "length")
        check_seed(self.seed)

    def check(self, calibration: bool = True, evaluation: bool = True) -> None:
        """There is nothing to check."""

    def calibration(self, tokenizer: Any) -> Tensor:
        return _windows(tokenizer, self._seeds()[0], self.samples, self.length, begin_with(tokenizer, self.bos))

    def evaluation(self, tokenizer: Any, length: int | None) -> Tensor:
        stories, length = self._seeds()[1], length or self.length
        return _windows(tokenizer, stories, self.evaluation_samples, length, begin_with(tokenizer, self.bos))

    def key(self, part: str) -> str:
        return "dataset=embedded"

    def description(self) -> Mapping[str, Any]:
        calibration, evaluation = self._seeds()
        return {
            "kind": "embedded",
            "calibration": {"stories": calibration, "samples": self.samples, "length": self.length},
            "evaluation": {"stories": evaluation, "samples": self.evaluation_samples},
            "special_tokens": False,
            "bos": self.bos,
        }

    def _seeds(self) -> tuple[int, int]:
        from pruneexp.embedded.language import CALIBRATION, EVALUATION

        return CALIBRATION[self.seed % len(CALIBRATION)], EVALUATION[0]


@lru_cache(maxsize=8)
def _windows(tokenizer: Any, seed: int, samples: int, length: int, bos: int | None) -> Tensor:
    """Windows for any tokenizer, also one that joins words."""
    from pruneexp.embedded.language import texts

    source, windows_NT = texts(seed), torch.empty(samples, length, dtype=torch.int64)
    for window in progress(range(samples), "write stories", unit="windows"):
        text, row_T = "", windows_NT[:0, 0]
        while len(row_T) < length:
            text += next(source)
            row_T = encode(tokenizer, text, special_tokens=False)
        windows_NT[window] = windows_of(row_T, length, bos, lambda text_M, width: text_M[None, :width])[0]
    return windows_NT
