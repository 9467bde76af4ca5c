"""Windows of several datasets at once, each in proportion to its weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruneexp.dataset.document_files import DocumentFiles
from pruneexp.dataset.files import Text, Tokens
from pruneexp.dataset.windows import Drawn, evaluation_windows, takes_bos, with_setting
from pruneexp.types import ConfigError, Dataset, RunError

STRIDES = (1, 2, 4)  # of every second, and of every fourth window, each source has its part
EXAMPLE = "sources and their weights, as in dataset.sources='{wikitext2: 1, c4: 1}'"


@dataclass(frozen=True)
class Share:
    """A source and its weight among the others; with 0 it is evaluated and not calibrated on."""

    weight: float
    dataset: Dataset


@dataclass(frozen=True)
class Mixed(Drawn):
    """Windows of several sources.

    Calibration: `samples` windows in all, of `length` tokens, shared among the sources by their weights (largest
    remainder). A source's windows are those that it gives alone for as many samples, in its order; they are interleaved
    so that any first part, and every second or fourth window, has each source in proportion, up to a window or two. Of
    token windows the first ones are taken. Evaluation: every source that has an evaluation text, one after the other,
    and each measured apart.
    """

    sources: Mapping[str, Share] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, share in self._shares.items():
            if name == self.name:
                raise ConfigError(f"name={name!r}: a source has this name; expected another one, part of metric names")
            if not 0 <= share.weight < math.inf:
                raise ConfigError(f"sources.{name}.weight={share.weight:g}: expected a number >= 0")
        if self._shares and not sum(share.weight for share in self._shares.values()):
            weights = ", ".join(f"{name}: {share.weight:g}" for name, share in self._shares.items())
            raise ConfigError(f"sources={{{weights}}}: the weights sum to 0; expected one above 0")
        for name, count in self._counts().items():
            if not count and self._shares[name].weight:
                none = f"no window of dataset.samples={self.samples} falls to it"
                raise ConfigError(
                    f"sources.{name}.weight={self._shares[name].weight:g}: {none}; expected more of either"
                )

    def __hash__(self) -> int:
        return hash(repr(self))  # a dict is among the settings

    @property
    def contiguous(self) -> bool:
        """Windows over edges are made of each source apart."""
        return all(share.dataset.contiguous for share in self._evaluated.values())

    @property
    def _shares(self) -> Mapping[str, Share]:
        return self.sources or {}

    @property
    def _evaluated(self) -> Mapping[str, Share]:
        """The sources that have an evaluation text."""
        own = (Text, Tokens, DocumentFiles)
        return {
            name: share
            for name, share in self._shares.items()
            if not isinstance(share.dataset, own) or share.dataset.evaluation_file is not None
        }

    @property
    def origins(self) -> tuple[str, ...]:
        """The source of each calibration window, N names."""
        return interleaved(self._counts())

    def check(self, calibration: bool = True, evaluation: bool = True) -> None:
        if not self._shares:
            raise ConfigError(f"dataset.sources={None if self.sources is None else '{}'}: expected {EXAMPLE}")
        if evaluation:
            self._check_evaluated()
        for name, share in self._shares.items():
            with _under(name):
                share.dataset.check(calibration and share.weight > 0, evaluation and name in self._evaluated)

    def _check_evaluated(self) -> None:
        if not self._evaluated:
            text = "expected evaluation=FILE of at least one, or evaluators that read no text of the dataset"
            raise ConfigError(f"dataset.sources: none of {', '.join(self._shares)} has a text to evaluate; {text}")

    def calibration(self, tokenizer: Any) -> Tensor:
        counts = {name: count for name, count in self._counts().items() if count}
        rows = {name: iter(self._drawn(name, count, tokenizer)) for name, count in counts.items()}
        return torch.stack([next(rows[name]) for name in self.origins])

    def _drawn(self, name: str, count: int, tokenizer: Any) -> Tensor:
        """`count` windows of one source. Raises ConfigError where it has fewer, or others than of `length` tokens."""
        source = self._shares[name].dataset
        if "samples" in getattr(source, "__dataclass_fields__", ()):
            source = with_setting(source, "samples", count)
        with _under(name, count):
            windows_NT, key = source.calibration(tokenizer), source.key("calibration")
            if len(windows_NT) < count:
                raise ConfigError(f"{key}: {len(windows_NT)} windows; expected at least dataset.samples={count}")
            if windows_NT.shape[1] != self.length:
                wide = f"windows of {windows_NT.shape[1]} tokens"
                raise ConfigError(f"{key}: {wide}; expected the mixture's length, {self.length}")
        return windows_NT[:count]

    def evaluation(self, tokenizer: Any, length: int | None) -> Tensor:
        return torch.cat([windows_NT for _, windows_NT in self.apart(tokenizer, length).values()])

    def apart(self, tokenizer: Any, length: int | None) -> dict[str, tuple[float, Tensor]]:
        """Each source's weight and evaluation windows, by its name."""
        self._check_evaluated()
        parts = {}
        for name, share in self._evaluated.items():
            bos = self.bos and takes_bos(share.dataset)
            with _under(name):
                windows_NT = evaluation_windows(share.dataset, tokenizer, length or self.length, bos)
            parts[name] = share.weight, windows_NT
        return parts

    def key(self, part: str) -> str:
        return f"dataset.sources=[{','.join(self._shares)}]"

    def description(self) -> Mapping[str, Any]:
        counts = self._counts()
        sources = {
            name: {"weight": share.weight, **share.dataset.description(), "samples": counts[name], "bos": self.bos}
            for name, share in self._shares.items()
        }
        return {"kind": "mixed", "sources": sources, "samples": self.samples, "length": self.length}

    def _counts(self) -> dict[str, int]:
        return shared_out({name: share.weight for name, share in self._shares.items()}, self.samples)


def shared_out(weights: Mapping[str, float], samples: int) -> dict[str, int]:
    """Each source's number of windows: in proportion, rounded down, and what is left to the largest remainders."""
    whole = sum(weights.values()) or 1.0
    exact = {name: samples * weight / whole for name, weight in weights.items()}
    counts = {name: int(each) for name, each in exact.items()}
    left = samples - sum(counts.values()) if any(weights.values()) else 0
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:left]:
        counts[name] += 1
    return counts


def interleaved(counts: Mapping[str, int]) -> tuple[str, ...]:
    """The source of each window, in an order whose first part, every second and every fourth window have each source in
    proportion: a b b a b a a b for two alike. The next is the source that lacks most in all of these together."""
    total, order = sum(counts.values()), []
    left = {name: count for name, count in counts.items() if count}
    taken = {(stride, place): dict.fromkeys(counts, 0) for stride in STRIDES for place in range(stride)}
    for number in range(total):
        rows = [(number // stride + 1, taken[stride, number % stride]) for stride in STRIDES]

        def lacking(name: str, rows: Sequence[tuple[int, Mapping[str, int]]] = rows) -> float:
            return sum(counts[name] * due - total * had[name] for due, had in rows)

        order.append(max(left, key=lacking))
        for _, had in rows:
            had[order[-1]] += 1
        left[order[-1]] -= 1
        left = {name: count for name, count in left.items() if count}
    return tuple(order)


@contextmanager
def _under(name: str, count: int | None = None) -> Iterator[None]:
    """Errors of a source name its place. `count`: of the windows that fall to it."""
    try:
        yield
    except (ConfigError, RunError) as error:
        message = str(error).replace(f"dataset.samples={count}", f"{count}, its share of dataset.samples")
        if message.startswith("dataset."):
            message = f"dataset.sources.{name}.{message.removeprefix('dataset.')}"
        raise type(error)(message) from error
