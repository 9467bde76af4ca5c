"""What a combination of methods computes: passes over the calibration windows, and operations in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pruneexp.calibrate import KEPT_BYTES, passes_of_layer
from pruneexp.compensator import LeastSquares
from pruneexp.criterion import Obs
from pruneexp.evidence import Gram
from pruneexp.experiment.forecast.rehearsal import refits
from pruneexp.experiment.forecast.shape import Shape
from pruneexp.model import Model
from pruneexp.pruning import Method, by_site, goes_layer_by_layer, judged_whole
from pruneexp.pruning.budget import searched_sites
from pruneexp.search import Evolutionary
from pruneexp.types import Budget, Recovery, Site, evidence_kinds

WALKED = ("reader", "writer", "block")  # sources of evidence that a walk collects


@dataclass(frozen=True)
class Calibration:
    """The calibration windows and how they are run."""

    windows: int  # N
    length: int  # T
    batch_size: int

    @property
    def tokens(self) -> int:
        return self.windows * self.length

    @property
    def batches(self) -> int:
        return -(-self.windows // self.batch_size)


@dataclass(frozen=True)
class Work:
    """What is computed. Passes are plain ones of all decoder layers over the calibration windows, counted as
    `passes/forward` and `passes/backward` of a run are; a search's are what it may spend."""

    forward: float = 0.0
    backward: float = 0.0
    losses: float = 0.0  # of the forward passes, those that go on to the loss, through the head
    walks: int = 0  # times that all decoder layers are opened one by one
    float64: float = 0.0  # operations of statistics and solves in float64

    def __add__(self, other: Work) -> Work:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(a + b for a, b in pairs))

    def times(self, count: int) -> Work:
        return Work(*(count * value for value in vars(self).values()))


def work_of(method: Method, recovery: Recovery, model: Model, shape: Shape, budget: Budget, seen: Calibration) -> Work:
    """What pruning computes, in all rounds, and training after it. Layers and sites that keep all units are taken to be
    as much work as others; searches that probe are taken to spend all they may."""
    if goes_layer_by_layer(method):
        one = _layer_by_layer(method, shape, budget, seen)
    else:
        one = _at_once(method, model, shape, budget, seen)
    spends = method.search.spends
    if spends is not None and budget.ratio > 0:
        sites = searched_sites(model, method.search)
        probes = spends(sites, budget, seen.batches)
        one += Work(forward=probes, losses=probes, float64=_probed_readers(method, sites, shape, budget, seen))
    one += Work(float64=_solves(method, shape, budget))
    trains = recovery.seen if recovery.trains else None
    trained = 0.0 if trains is None else trains(seen.windows) / seen.windows
    return one.times(len(method.sparsity.shares())) + Work(trained, trained, trained)


def blocks_alone(method: Method) -> bool:
    """Whether whole blocks leave and nothing else, so that no reader is there to be compensated."""
    return set(method.search.granularity) == {"blocks"}


def _at_once(method: Method, model: Model, shape: Shape, budget: Budget, seen: Calibration) -> Work:
    criterion, compensator = method.criterion, method.compensator
    dense = None if compensator.sequential or blocks_alone(method) else compensator.evidence
    kinds = distinct(criterion.evidence, dense)
    shown = judged_whole(method)
    whole = [site for index in range(len(shape.layers)) for site in model.whole_block(index, shown).sites]
    work = _walk(kinds, shape, seen, shrinks=False) + _ahead(kinds, shape, seen, whole)
    if blocks_alone(method):
        return work + Work(walks=1)
    if by_site(compensator):
        return work + _walk_sites((), shape, budget, seen)
    return work + _walk(distinct(compensator.evidence if compensator.sequential else None), shape, seen, shrinks=True)


def _layer_by_layer(method: Method, shape: Shape, budget: Budget, seen: Calibration) -> Work:
    criterion, compensator = method.criterion, method.compensator
    work = _ahead(evidence_kinds(criterion.evidence), shape, seen, ())
    if compensator.evidence is not None and not compensator.sequential:
        work += _walk((compensator.evidence,), shape, seen, shrinks=False)
    if by_site(compensator):
        return work + _walk_sites(evidence_kinds(criterion.evidence), shape, budget, seen)
    kinds = distinct(criterion.evidence, compensator.evidence if compensator.sequential else None)
    return work + _walk(kinds, shape, seen, shrinks=True)


def _walk(kinds: Sequence[Any], shape: Shape, seen: Calibration, shrinks: bool) -> Work:
    """`calibrate.walk`: a pass where anything is collected, and another of all layers but the last once they shrink."""
    if not any(kind.source in WALKED for kind in kinds):
        return Work(walks=1)
    again = (len(shape.layers) - 1) / len(shape.layers) if shrinks else 0.0
    return Work(forward=1 + again, walks=1, float64=_gram_flops(kinds, shape, seen))


def _walk_sites(kinds: Sequence[Any], shape: Shape, budget: Budget, seen: Calibration) -> Work:
    """`calibrate.walk_sites`, and a pass more where the criterion sees what the pruned layers before give; statistics
    of the inputs that readers are left with: 2 K^2 a token and site, and 2 K O beside the wanted outputs."""
    total = len(shape.layers)

    def kept(site: Site) -> float:
        return min(1.0, KEPT_BYTES / max(1, site.channels * seen.tokens * shape.itemsize))

    runs = sum(
        passes_of_layer(
            cost, shape.of_layer(index), shape.hidden, seen.length, kept, first=index == 0, last=index + 1 == total
        )
        for index, cost in enumerate(shape.layers)
    )
    left = [(1 - budget.ratio) * site.channels for site in shape.sites]
    fitted = sum(2.0 * channels * (channels + shape.hidden) for channels in left) * seen.tokens
    passes = runs / total + bool(kinds)
    return Work(forward=passes, walks=1, float64=fitted + _gram_flops(kinds, shape, seen))


def _ahead(kinds: Sequence[Any], shape: Shape, seen: Calibration, whole: Sequence[Site]) -> Work:
    """Whole passes before the walk: derivatives, slopes along directions, losses without each of `whole`."""
    work, layers = Work(), len(shape.layers)
    for kind in kinds:
        if kind.source == "gradient":
            work += Work(1, 1, 1)
        elif kind.source == "zeroth_order":
            passes = 2 * kind.directions * min(kind.windows or seen.windows, seen.windows) / seen.windows
            work += Work(passes, 0, passes)
        elif kind.source == "influence":
            work += _influence(kind, shape, seen)
        elif kind.source == "probe":  # structures share the layers in front of what they leave out
            passes = 1 + sum((layers - site.layer) / layers for site in whole)
            work += Work(passes, 0, passes)
    return work


def _influence(kind: Any, shape: Shape, seen: Calibration) -> Work:
    share = min(kind.windows or seen.windows, seen.windows) / seen.windows
    forward, backward = (1, 3) if kind.hessian == "exact" else (2, 2)
    solve = kind.steps if kind.inverse == "conjugate_gradient" else 0
    products = 2 + solve if kind.directions == "together" else sum(s.units for s in shape.sites) * (1 + solve)
    return Work(share * products * forward, share * products * backward, share * products * forward)


def _gram_flops(kinds: Iterable[Any], shape: Shape, seen: Calibration) -> float:
    """2 C^2 a token and site."""
    return sum(kind is Gram for kind in kinds) * sum(2.0 * site.channels**2 for site in shape.sites) * seen.tokens


def _solves(method: Method, shape: Shape, budget: Budget) -> float:
    flops, kept = 0.0, 1 - budget.ratio
    for site in shape.sites:
        if isinstance(method.criterion, Obs):
            flops += removal_flops(site.channels, shape.hidden)
        if isinstance(method.compensator, LeastSquares) and budget.ratio > 0 and not blocks_alone(method):
            flops += refit_flops(site.channels, round(kept * site.channels), shape.hidden)
    return flops


def _probed_readers(method: Method, sites: Sequence[Site], shape: Shape, budget: Budget, seen: Calibration) -> float:
    """Of the readers that probes ask removal paths for."""
    search, criterion = method.search, method.criterion
    if not isinstance(search, Evolutionary) or not isinstance(criterion, Obs) or blocks_alone(method):
        return 0.0
    fitted = refits(search, sites, budget, seen.batches, criterion.levels)
    return sum(path_flops(s.channels, (s.units - removed) * s.width, shape.hidden) for s, removed in fitted)


def path_flops(channels: int, kept: int, outputs: int) -> float:
    """Of a removal path's reader on K of its C inputs: K^3 / 3 for the factor of the inputs' covariance, 2 K (C - K) O
    for what the others gave, 2 K^2 O for the solve."""
    return kept**3 / 3 + 2.0 * kept * channels * outputs


def refit_flops(channels: int, kept: int, outputs: int) -> float:
    """Of a reader fitted anew on K of its C inputs, O outputs: K^3 / 3 for the factor of the inputs' covariance, and
    2 O (C^2 + 2 K^2) for what is wanted (the covariance times the reader), what is there, and the solve."""
    return kept**3 / 3 + 2.0 * outputs * (channels**2 + 2 * kept**2)


def removal_flops(channels: int, outputs: int) -> float:
    """Of removing all C channels one after the other: C^3 / 3 and 2 C^3 / 3 for factor and inverse, and downdates of
    what is left, sum_m 2 m (m + O) = 2 C^3 / 3 + C^2 O."""
    return channels**3 * 5 / 3 + float(channels) ** 2 * outputs


def distinct(*wanted: Any) -> tuple[Any, ...]:
    """The kinds of evidence that some methods name, each once."""
    return tuple(dict.fromkeys(kind for each in wanted for kind in evidence_kinds(each)))


def flops(work: Work, shape: Shape, seen: Calibration) -> float:
    """Operations in the model's dtype; a backward pass is two forward ones."""
    layers = (work.forward + 2 * work.backward) * shape.forward_flops(seen.length)
    return seen.tokens * (layers + 2.0 * shape.head * (work.losses + 2 * work.backward))
