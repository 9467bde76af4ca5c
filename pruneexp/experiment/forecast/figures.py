"""The figures of a forecast: what they are, and how they are made of a model's structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from pruneexp.experiment.forecast.memory import Stage, stages
from pruneexp.experiment.forecast.shape import Shape, params_left, shape_of
from pruneexp.experiment.forecast.work import Calibration, Work, blocks_alone, flops, work_of
from pruneexp.model import Model
from pruneexp.pruning import Method, by_site
from pruneexp.types import Budget, Recovery, evidence_kinds


@dataclass(frozen=True)
class Forecast:
    """Figures of a run. `held` and `streamed`: its stages with the model in memory, and read layer by layer (empty
    where the methods need it in memory); `streams`: which of them was asked for."""

    shape: Shape
    params_left: int
    decoder_left: int
    seen: Calibration
    counted: Callable[[], Work]  # takes a while where a search is rehearsed, and a real run need not know
    measuring: float  # operations in the model's dtype, of what evaluators measure on windows
    held: Sequence[Stage]
    streamed: Sequence[Stage]
    streams: bool

    @cached_property
    def work(self) -> Work:
        """What pruning and training compute."""
        return self.counted()

    @cached_property
    def flops(self) -> float:
        """In the model's dtype: pruning, training, and what evaluators measure."""
        return flops(self.work, self.shape, self.seen) + self.measuring

    @property
    def bytes_left(self) -> int:
        """Of the pruned checkpoint."""
        return self.params_left * self.shape.itemsize

    @property
    def peak(self) -> Stage:
        """The stage of the run that takes most memory."""
        return max(self.streamed if self.streams else self.held, key=lambda stage: stage.total)

    @property
    def files(self) -> int:
        """Bytes that lie in files of TMPDIR for a while, at most."""
        return max(stage.files for stage in (self.streamed if self.streams else self.held))

    @property
    def read(self) -> int:
        """Bytes that a streamed run reads from disk for pruning."""
        return self.work.walks * self.shape.decoder * self.shape.itemsize

    def seconds(self, speed: float, speed64: float) -> float:
        """At so many operations per second, in the model's dtype and in float64."""
        return self.flops / speed + self.work.float64 / speed64

    def metrics(self, speed: float, speed64: float) -> dict[str, float]:
        """Flat, as those of a run; times at so many operations per second."""
        found: dict[str, float] = {
            "dense/params": self.shape.params,
            "dense/params/decoder": self.shape.decoder,
            "forecast/params": self.params_left,
            "forecast/params/decoder": self.decoder_left,
            "forecast/bytes/dense": self.shape.bytes,
            "forecast/bytes/pruned": self.bytes_left,
            "forecast/passes/forward": self.work.forward,
            "forecast/passes/backward": self.work.backward,
            "forecast/flops": self.flops,
            "forecast/flops/float64": self.work.float64,
            "forecast/seconds": self.seconds(speed, speed64),
        }
        if self.files:
            found["forecast/disk/files_bytes"] = self.files
        for how, stages_ in (("held", self.held), ("streamed", self.streamed)):
            if stages_:
                found[f"forecast/memory/{how}_bytes"] = max(stage.total for stage in stages_)
        return found


def forecast(
    model: Model,
    method: Method,
    recovery: Recovery,
    budget: Budget,
    seen: Calibration,
    measured: Sequence[Calibration],
    *,
    stream: bool,
    prove: str,
    shared: int = 0,
) -> Forecast:
    """Figures for an outline `model`. `measured`: the windows of each evaluator that has some; `prove`: as `run.prove`,
    "" where no checkpoint is written; `shared`: bytes of the dense model's hidden states that jobs of a sweep may keep
    for each other."""
    shape = shape_of(model)
    left, decoder_left = params_left(model, method.search, method.sparsity, method.compensator, budget)
    share = decoder_left / shape.decoder if shape.decoder else 1.0
    measuring = sum(w.tokens * ((1 + share) * shape.forward_flops(w.length) + 2 * 2.0 * shape.head) for w in measured)
    trains = min(model.batch_size, recovery.batch) if recovery.trains else 0
    settings: dict[str, Any] = {"left": left, "trains": trains, "prove": prove}
    held = stages(method, shape, seen, measured, stream=False, **settings)
    streamed = stages(method, shape, seen, measured, stream=True, **settings) if _can_stream(method, recovery) else []
    if common := _in_common(method, shape, seen, shared):
        held, streamed = ([stage.with_hidden_states(common) for stage in each] for each in (held, streamed))
    counted = partial(work_of, method, recovery, model, shape, budget, seen)
    return Forecast(shape, left, decoder_left, seen, counted, measuring, held, streamed, stream)


def _can_stream(method: Method, recovery: Recovery) -> bool:
    sources = {kind.source for kind in evidence_kinds(method.criterion.evidence)}
    probes = method.search.probes or recovery.trains or len(method.sparsity.shares()) > 1
    return not probes and not sources & {"gradient", "influence", "probe"}


def _in_common(method: Method, shape: Shape, seen: Calibration, limit: int) -> int:
    """Bytes that `calibrate.DenseStates` holds from the first job's walk to the sweep's end."""
    held = (2 * len(shape.layers) + 1) * seen.tokens * shape.hidden * shape.itemsize
    return held if by_site(method.compensator) and not blocks_alone(method) and held <= limit else 0
