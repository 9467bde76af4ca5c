"""The figures of a forecast: what they are, and how they are made of a model's structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pruneexp.experiment.forecast.memory import Memory, Running, Stage
from pruneexp.experiment.forecast.passes import Passes, dense_kinds, passes_of
from pruneexp.experiment.forecast.shape import Shape, Windows, params_left, shape_of
from pruneexp.model import Model
from pruneexp.pruning import Method, by_site
from pruneexp.pruning.budget import blocks_alone
from pruneexp.types import Budget, Recovery, evidence_kinds, source_of


@dataclass(frozen=True)
class Forecast:
    """Figures of a run. `held` and `streamed`: its stages with the model in memory, and read layer by layer (empty
    where the methods need it in memory); `streams`: which of them was asked for."""

    shape: Shape
    params_left: int
    decoder_left: int
    passes: Passes
    held: Sequence[Stage]
    streamed: Sequence[Stage]
    streams: bool

    @property
    def bytes_left(self) -> int:
        """Size of the pruned checkpoint."""
        return self.params_left * self.shape.itemsize

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages of the way, held or streamed, that was asked for."""
        return self.streamed if self.streams else self.held

    @property
    def peak(self) -> Stage:
        """The stage of the run that takes most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def files(self) -> int:
        """Bytes that lie in files of TMPDIR for a while, at most."""
        return max(stage.files for stage in self.stages)

    def metrics(self) -> dict[str, float]:
        """Flat, as those of a run. Of memory, what its `memory/peak_bytes` will be."""
        metrics: dict[str, float] = {
            "dense/params": self.shape.params,
            "dense/params/decoder": self.shape.decoder,
            "forecast/params": self.params_left,
            "forecast/params/decoder": self.decoder_left,
            "forecast/bytes/dense": self.shape.bytes,
            "forecast/bytes/pruned": self.bytes_left,
            "forecast/passes/forward": self.passes.forward,
            "forecast/passes/backward": self.passes.backward,
        }
        if self.files:
            metrics["forecast/disk/files_bytes"] = self.files
        for how, stages in (("held", self.held), ("streamed", self.streamed)):
            if stages:
                metrics[f"forecast/memory/{how}_bytes"] = max(stage.total for stage in stages)
        return metrics


def forecast(
    model: Model,
    method: Method,
    recovery: Recovery,
    budget: Budget,
    seen: Windows,
    measured: Sequence[Windows],
    how: Running,
) -> Forecast:
    """Figures for an outline `model`. `seen`: the calibration windows; `measured`: those of each evaluator that has
    some."""
    shape = shape_of(model)
    left, decoder_left = params_left(model, method, budget)
    trains = min(model.batch_size, recovery.batch) if recovery.trains else 0
    how = replace(how, shared=_in_common(method, shape, seen, how.shared))
    held = Memory(method, shape, seen, measured, left, trains, recovery.layerwise, replace(how, stream=False))
    streamed = replace(held, how=replace(how, stream=True)).stages() if _can_stream(method, recovery) else []
    passes = passes_of(method, recovery, model, shape, budget, seen)
    return Forecast(shape, left, decoder_left, passes, held.stages(), streamed, how.stream)


def _can_stream(method: Method, recovery: Recovery) -> bool:
    sources = [source_of(kind) for kind in evidence_kinds(method.criterion.evidence)]
    whole = method.search.probes or recovery.trains or len(method.sparsity.shares()) > 1
    at_once = any(kind.fits for kind in dense_kinds(method))  # the covariances of all layers
    return not (whole or at_once or any(source.differentiates or source.probes for source in sources))


def _in_common(method: Method, shape: Shape, seen: Windows, limit: int) -> int:
    """Bytes that `calibrate.DenseStates` holds from the first job's walk to the sweep's end."""
    held = (2 * len(shape.layers) + 1) * seen.tokens * shape.hidden * shape.itemsize
    return held if by_site(method.compensator) and not blocks_alone(method.search) and held <= limit else 0
