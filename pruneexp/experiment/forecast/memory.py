"""What a run holds in memory at its stages, by what it is.

Each stage holds, in bytes,

    process + weights + hidden states + statistics + kept + copies + the larger of activations and solves

process        what Python, libraries and texts took before the model (0 where it lies on a GPU)
weights        P e of P parameters of e bytes; streamed, two decoder layers and what is outside them
hidden states  N D e for each copy of the N tokens' hidden states: 1 in a walk that only looks, 2 in one that shrinks,
               3 in one that goes site by site
statistics     what evidence says that it holds (`held_bytes`): of all sites where a later stage asks for it or whole
               passes give it, of one layer where a walk does; and the inputs of out-projections that are fitted
kept           what scores keep until the search has ended (`Criterion.kept_bytes`)
copies         a decoder layer beside what it becomes; streamed, what waits to be written; for timing layers, what
               `timing` says
activations    of a batch in flight, as `activations` has them; of all layers where backward passes are made
solves         what a criterion or a compensator works in at its widest site (`working_bytes`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pruneexp.calibrate import KEPT_BYTES, at_once
from pruneexp.experiment.forecast.passes import dense_kinds
from pruneexp.experiment.forecast.shape import Shape, Windows
from pruneexp.pruning import Method, by_site, goes_layer_by_layer, scores_behind_masks
from pruneexp.pruning.ask import LEAST_BATCHES
from pruneexp.pruning.budget import blocks_alone
from pruneexp.pruning.dense_evidence import distinct, empty_bytes
from pruneexp.surgery import STREAMED_SHARD_BYTES
from pruneexp.types import Site, collected_by, evidence_kinds

PARTS = ("process", "weights", "hidden states", "activations", "statistics", "solves", "kept", "copies")
TRAINED = 5  # times a layer's weights: themselves, the best ones, gradients, two moments
SUBLAYERS = 2  # of a layer, whose activations wait for the way back
CONVERTED = 2**22  # elements of an out-projection's input that second moments take in float64 at once


@dataclass(frozen=True)
class Stage:
    """One stage of a run and the bytes of each of PARTS that it holds at most. `files`: bytes of what does not fit into
    `criterion.memory`, which lie in files meanwhile."""

    name: str
    parts: Mapping[str, int]
    files: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Bytes beside what the process holds already."""
        return self.total - self.parts.get("process", 0)


@dataclass(frozen=True)
class Running:
    """How a run is run. `prove`: as `run.prove`, "" where no checkpoint is written; `shared`: bytes of the dense
    model's hidden states that jobs of a sweep keep for each other; `process`: bytes that this process holds already,
    `reached`: that it has held at most."""

    stream: bool
    prove: str = ""
    shared: int = 0
    process: int = 0
    reached: int = 0


@dataclass(frozen=True)
class Memory:
    """What the stages are worked out from. `measured`: the windows of each evaluator that has some; `left`: parameters
    of the pruned model; `trains`: windows in a batch of training after pruning, 0 for none, `layerwise` through one
    layer after the other."""

    method: Method
    shape: Shape
    seen: Windows
    measured: Sequence[Windows]
    left: int
    trains: int
    layerwise: bool
    how: Running

    def stages(self) -> list[Stage]:
        """All stages in their order. Of the evaluators, the one that takes most."""
        shape, stages = self.shape, []
        if self.how.reached > self.how.process:
            stages.append(Stage("start", {"process": self.how.reached}))
        if self.measured:
            stages.append(max(map(self._evaluating, self.measured), key=lambda stage: stage.total))
        if goes_layer_by_layer(self.method):
            stages.append(self._calibrating(shrinks=True))
        else:
            stages += [self._calibrating(shrinks=False), *self._searching(), self._shrinking()]
        if self.trains:
            stages.append(self._recovering())
        if self.how.prove in ("process", "in_place") and not self.how.stream:  # the source comes, too
            process = {"process": self.how.process}
            stages.append(Stage("prove", {**process, "weights": self.left * shape.itemsize, "copies": shape.bytes}))
        return stages

    def _stage(self, name: str, hidden: int, **parts: int) -> Stage:
        """`hidden`: bytes of hidden states."""
        shape = self.shape
        streamed = 2 * shape.block_bytes + shape.outside * shape.itemsize
        weights = streamed if self.how.stream else shape.bytes
        work = {"activations": parts.get("activations", 0), "solves": parts.get("solves", 0)}
        less = min(work, key=work.__getitem__)  # a batch is through before anything is solved
        always = {"process": self.how.process, "weights": weights, "hidden states": hidden + self.how.shared}
        return Stage(name, {**always, **parts, less: 0})

    def _hidden(self, tokens: int, times: int = 1) -> int:
        return times * tokens * self.shape.hidden * self.shape.itemsize

    @property
    def _copies(self) -> int:
        block = self.shape.block_bytes
        return STREAMED_SHARD_BYTES + 2 * block if self.how.stream else block

    def _evaluating(self, windows: Windows) -> Stage:
        """A streamed model runs all windows layer by layer."""
        hidden = self._hidden(windows.tokens if self.how.stream else 0)
        return self._stage("evaluate", hidden, activations=activations(self.shape, windows, self.shape.itemsize))

    def _calibrating(self, shrinks: bool) -> Stage:
        """The first walk, or the only one, which `shrinks`."""
        criterion, compensator = self.method.criterion, self.method.compensator
        sitewise = shrinks and by_site(compensator)
        kinds, fitted, solves = distinct(criterion.evidence), 0, self._widest(criterion.working_bytes)
        times = 2 if scores_behind_masks(self.method) else 1
        if shrinks:
            times = 3 if sitewise else 2
            fitted = self._fitted() if sitewise else 0
            solves = max(solves, self._widest(compensator.working_bytes))
            if compensator.sequential and not sitewise:
                kinds = distinct(criterion.evidence, compensator.evidence)
        walked, ahead = collected_by("walk", kinds), collected_by("whole_model", kinds)
        dense = dense_kinds(self.method)
        kept, files = (0, 0) if shrinks else self._kept(0)
        stage = self._stage(
            "calibrate",
            self._hidden(self.seen.tokens, times) if walked or dense or sitewise else 0,
            activations=max(self._collecting((*walked, *dense)), self._passes(ahead)),
            statistics=self._of_all(dense) + self._of_all(ahead) + self._of_any_layer(walked) + fitted,
            solves=solves,
            kept=kept,
            copies=self._copies if shrinks else 0,
        )
        return replace(stage, files=files)

    def _searching(self) -> list[Stage]:
        """Probes of masked structures, or of structures whose out-projections are fitted anew; trials, whose
        out-projections are compensated as the shrinking walk does it."""
        if not self.method.search.probes:
            return []
        kept, files = self._kept(self.method.search.refits)
        held = self._of_all(dense_kinds(self.method))
        solves = self._widest(self.method.criterion.working_bytes) if kept + files else 0
        held_out, seen = self.method.search.held_out, self.seen
        if held_out:
            seen = replace(seen, batch_size=at_once(round(held_out * seen.count), seen.batch_size, LEAST_BATCHES))
        predictions = 2 if self.method.search.objective == "kl" else 1
        batch = activations(self.shape, seen, predictions * self.shape.itemsize)
        stage = self._stage("search", 0, activations=batch, statistics=held, solves=solves, kept=kept)
        if tried := round(self.method.search.tries * self.seen.count):
            trial = replace(self, seen=replace(self.seen, count=tried))._shrinking()
            layers = sum(site.channels for site in self.shape.sites) * self.shape.hidden * self.shape.itemsize
            trial = replace(trial, name="search", parts={**trial.parts, "kept": kept + layers})
            stage = max(stage, trial, key=lambda each: each.total)
        return [replace(stage, files=files)]

    def _shrinking(self) -> Stage:
        """The second walk."""
        compensator = self.method.compensator
        kinds = evidence_kinds(compensator.evidence)
        if blocks_alone(self.method.search):
            return self._stage("shrink", 0, copies=self._copies)
        copies = self._copies
        if by_site(compensator):
            times, held = 3, self._fitted()
            shape = self.shape  # whose in-projections are let go by then
            copies -= shape.block_bytes - shape.most_channels * shape.hidden * shape.itemsize
        elif compensator.sequential and kinds:
            times, held = 2, self._of_any_layer(kinds)
        else:
            times, held = 0, self._of_all(kinds)
        return self._stage(
            "shrink",
            self._hidden(self.seen.tokens, times),
            activations=self._collecting(kinds) if times else 0,
            statistics=held,
            solves=self._widest(compensator.working_bytes),
            copies=copies,
        )

    def _recovering(self) -> Stage:
        """Layer by layer, the hidden states of both models and a dense layer as it is read. Of the layer in training,
        float32 weights, the best ones so far, gradients and AdamW's two moments; and float32 activations, those that
        wait for the backward pass or a batch of windows held out."""
        shape, batch = self.shape, Windows(self.trains, self.seen.length, self.trains)
        if not self.layerwise:
            kept = activations(shape, batch, with_gradients(shape)) + len(shape.layers) * activations(shape, batch)
            return self._stage("recover", 0, activations=kept)
        wide = max(4, shape.itemsize) / shape.itemsize
        trained = round(TRAINED * wide * shape.block_bytes)
        dense = 2 * shape.block_bytes + shape.outside * shape.itemsize
        kept = round(wide * max(SUBLAYERS * activations(shape, batch), activations(shape, self.seen)))
        return self._stage("recover", self._hidden(self.seen.tokens, 2), activations=kept, copies=dense + trained)

    def _collecting(self, kinds: Sequence[Any]) -> int:
        """A batch in flight or, where it is more, an out-projection's input and what second moments make of it: the
        in-projections' outputs are gone by then. Nothing without kinds."""
        if not kinds:
            return 0
        batch = min(self.seen.batch_size, self.seen.count) * self.seen.length
        given = batch * self.shape.most_channels
        read = self.shape.itemsize * (given + 3 * batch * self.shape.hidden) + 8 * min(CONVERTED, given)
        return max(activations(self.shape, self.seen), read if any(kind.fits for kind in kinds) else 0)

    def _passes(self, kinds: Sequence[Any]) -> int:
        """Activations of whole passes to the loss, and of what waits for backward passes."""
        most = 0
        for kind in kinds:
            forward, backward = kind.passes(self.seen.count, self.shape.sites)
            batch = replace(self.seen, batch_size=1) if kind.per_sample else self.seen
            waiting = len(self.shape.layers) * activations(self.shape, batch) if backward else 0
            logits = with_gradients(self.shape) if backward else self.shape.itemsize
            most = max(most, activations(self.shape, batch, logits) + waiting if forward else 0)
        return most

    def _kept(self, refits: float) -> tuple[int, int]:
        """What scores keep for the search, in memory and in files; a streamed model's searches need nothing of it."""
        if self.how.stream:
            return 0, 0
        shape = self.shape
        return self.method.criterion.kept_bytes(shape.sites, shape.hidden, shape.itemsize, refits)

    def _fitted(self) -> int:
        """Evidence of the site whose out-projection is fitted, and the out-projections' inputs that are held until the
        layer runs."""
        inputs = min(KEPT_BYTES, self.shape.most_channels * self.seen.tokens * self.shape.itemsize)
        return self._widest_of(evidence_kinds(self.method.compensator.evidence)) + inputs

    def _of_all(self, kinds: Sequence[Any]) -> int:
        return sum(held_bytes(kind, self.shape.sites, self.shape) for kind in kinds)

    def _of_any_layer(self, kinds: Sequence[Any]) -> int:
        """Evidence of the layer that has most."""
        layers = (self.shape.of_layer(index) for index in range(len(self.shape.layers)))
        return max((sum(held_bytes(kind, sites, self.shape) for kind in kinds) for sites in layers), default=0)

    def _widest_of(self, kinds: Sequence[Any]) -> int:
        return max((held_bytes(kind, [site], self.shape) for kind in kinds for site in self.shape.sites), default=0)

    def _widest(self, bytes_of: Callable[[Site, int], int]) -> int:
        return max((bytes_of(site, self.shape.hidden) for site in self.shape.sites), default=0)


def with_gradients(shape: Shape) -> int:
    """Bytes for each logit in a forward and backward pass: as the model gives it, a copy in float32 (float64 for such a
    model), and its log-softmax."""
    return shape.itemsize + 2 * max(4, shape.itemsize)


def activations(shape: Shape, seen: Windows, logits: int = 0) -> int:
    """Bytes of a batch in flight: the most that one sublayer holds at a time or, where it is more, the logits, of
    `logits` bytes each.

    Attention: queries, keys and values, before and after their rotation, what heads give, three hidden states; T x T
    scores and their softmax where they are written out. FFN: its C channels once for every in-projection and once for
    what the out-projection gets, and as many hidden states."""
    batch = min(seen.batch_size, seen.count)
    tokens, e = batch * seen.length, shape.itemsize
    peak = 0
    for site in shape.sites:
        if site.kind == "attention":
            rows = 3 * site.channels + 2 * site.units * site.cost.kv
            scores = 2 * batch * shape.scores * seen.length**2
            peak = max(peak, ((rows + 3 * shape.hidden) * tokens + scores) * e)
        else:
            in_projections = site.cost.macs // shape.hidden - 1
            peak = max(peak, ((in_projections + 1) * site.channels + 3 * shape.hidden) * tokens * e)
    return max(peak, tokens * shape.vocabulary * logits)


def held_bytes(kind: Any, sites: Sequence[Site], shape: Shape) -> int:
    """Bytes of one kind of evidence for these sites: as the kind says, else as its `empty` lays it out (0 where that
    needs real tensors: a forecast must not stop a run)."""
    if kind.held_bytes is not None:
        return sum(kind.held_bytes(site, shape.hidden, shape.itemsize) for site in sites)
    try:
        return sum(empty_bytes(kind, replace(site, name="", layer=0)) for site in sites)
    except Exception:
        return 0
