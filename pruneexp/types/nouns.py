"""Scores, candidates, what was measured, and the two ways a run can end badly."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pruneexp.types.plan import Plan

if TYPE_CHECKING:
    from pathlib import Path


class ConfigError(ValueError):
    """A config that cannot work. The message is one line: the key, the value, what was expected. Exit code 2."""


class ConfigErrors(ConfigError):
    """Several mistakes, each a message of one line."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("; ".join(lines))
        self.lines = tuple(lines)


class RunError(RuntimeError):
    """A run that failed for a reason the user can act on. The message is one line. Exit code 1."""


def one_line(said: object) -> str:
    """What an error says, as the one line that a message takes; its kind where it says nothing."""
    return " ".join(str(said).split()) or type(said).__name__


def size_text(size: float, digits: int = 3) -> str:
    """So many bytes, in so many digits: "13.5 GiB"."""
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    unit, name = next((each for each in units if size >= each[0]), (1, "B"))
    decimals = 0 if unit == 1 else max(0, digits - len(str(int(size / unit))))
    return f"{size / unit:,.{decimals}f} {name}"


def require_least(part: Any, least: int, *names: str, besides: str = "") -> None:
    """Raises ConfigError where one of the named settings is below `least`; None is not. `besides` ends the message."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}={value!r}: expected an integer >= {least}{besides}")


def require_within(part: Any, span: str, *names: str, what: str = "a number", besides: str = "") -> None:
    """Raises ConfigError where one of the named settings lies outside the interval `span`: "[0, 1)", "(0, inf)". NaN
    always does. `what`, such as "a share,", begins what is expected, `besides` ends it."""
    least, most = (float(end) for end in span[1:-1].split(","))
    more, sign = (operator.ge, ">=") if span[0] == "[" else (operator.gt, ">")
    less = operator.le if span[-1] == "]" else operator.lt
    expected = f"in {span}" if math.isfinite(most) else f"{sign} {least:g}"
    for name in names:
        value = getattr(part, name)
        if not (more(value, least) and less(value, most)):
            raise ConfigError(f"{name}={value!r}: expected {what} {expected}{besides}")


@dataclass(frozen=True)
class RemovalPath:
    """The answer of a criterion whose costs change as units leave."""

    order_U: Tensor  # int64 [U]: the unit that leaves first, second, ...
    cost_U: Tensor  # float [U]: cumulative cost once the first 1, 2, ..., U units of `order_U` have left
    # removed units -> refitted out-projection
    out_projections: Mapping[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    chosen: Mapping[str, float] = field(default_factory=dict)  # what the criterion chose for the site, by name

    @property
    def scores_U(self) -> Tensor:
        """As importances, higher = keep: a unit's score is the cumulative cost at which it leaves."""
        return torch.empty_like(self.cost_U).scatter_(0, self.order_U, self.cost_U)


@runtime_checkable
class Reorderable(Protocol):
    """Refitted out-projections of a `RemovalPath` that can also be had for another order of removal."""

    def in_order(self, order_U: Tensor) -> Mapping[int, tuple[Tensor, Tensor | None]]:
        """Removed units -> refitted out-projection, where units leave in the order `order_U`, int64 [U]."""
        ...


@dataclass(frozen=True)
class ColumnScores:
    """The answer of a criterion that judges the out-projection's channels: importances of the units, and of the
    channels that make them up. A search that compares sites can so standardise by the spread of the channels, as FLAP
    does."""

    scores_U: Tensor  # [U], higher = keep
    columns_C: Tensor  # [C], higher = keep


Score = Tensor | RemovalPath | ColumnScores
Scores = Mapping[str, Score]  # site name -> importances of its units


def start_name(start: str, site: str) -> str:
    """What the scores of a search's start are called, among those of the criterion: "flap:model.layers.0.mlp"."""
    return f"{start}:{site}"


def own_scores(scores: Scores) -> dict[str, Score]:
    """The scores of the criterion itself, without those of a search's starts."""
    return {name: score for name, score in scores.items() if ":" not in name}


def unit_scores(score: Score) -> Tensor:
    """Importances of a site's units, higher = keep: [U]."""
    return score if isinstance(score, Tensor) else score.scores_U


@dataclass(frozen=True)
class Candidate:
    """A structure that a search wants judged, with replacement out-projections where it has them."""

    plan: Plan
    out_projections: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)  # site -> [O,K], bias [O]


@dataclass(frozen=True)
class Measured:
    """What an evaluator found of one model. `files`: files for the run folder's samples/, by the ending of their name
    ("json"). `seen`: what a comparison of the dense and the pruned model needs; the cache can keep numbers, text,
    tensors, lists and mappings of it."""

    figures: Mapping[str, float]
    files: Mapping[str, str] = field(default_factory=dict)
    seen: Any = None


@dataclass(frozen=True)
class RunRecord:
    """A run as trackers know it when it starts."""

    folder: Path  # the run folder
    config: Mapping[str, Any]  # the composed config
    group: str | None  # the sweep that it belongs to
    name: str | None
    job_type: str | None  # "run", "job" of a sweep, or its "summary"
    job: Mapping[str, Any] = field(default_factory=dict)  # `recipe`, `choices` of each group, `overrides` as typed
