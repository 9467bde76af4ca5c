"""The protocols that methods satisfy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from pruneexp.types.nouns import Candidate, Measured, Scores
from pruneexp.types.plan import Budget, Plan
from pruneexp.types.site import Block, Site
from pruneexp.types.sources import Sequential

if TYPE_CHECKING:
    from typing_extensions import Self


@runtime_checkable
class Evidence(Protocol):
    """What calibration collects for one site. `update_` and `merge` return evidence; that of `update_` may be in the
    memory of the old, which is then spent. What may be left out, here and in the protocols below, is in
    `types/defaults.py`, with what that means.

    `source` says which collector feeds it, and so what `update_` receives:

    - "reader": `update_(x_BTC)`, the out-projection's input, batch by batch; an expert's tokens, of many windows, as
      one: `by_window` says that windows must be told apart
    - "writer": `update_(x_BTD)`, what the site's in-projections read
    - "wanted": `update_(x_BTC, y_BTO)`, the out-projection's input in the partly pruned model, and the output with
      which the hidden state behind it would be the dense model's (compensators that walk site by site).
      `of(site, keep_C)`, where it is not None, in the stead of `empty`: evidence of the channels that stay; x is then
      of these alone
    - "block": `update_(x_BTD, y_BTD)`, hidden states before and after the layer
    - "probe": `update_(without, whole)`, the calibration loss with the site (a whole layer) off, and on
    - "gradient": `update_(gradients, windows)`, the gradients (SiteWeights) of the mean loss of a batch of windows;
      `per_sample` (a class variable) asks for one window at a time
    - "influence": `update_(derivatives)`, second derivatives of the loss by gates on the site's units; once for each of
      the parts that the windows are split into
    - "zeroth_order": `update_(direction, slope)`, a SiteWeights of perturbation directions (of the units' gates: [U])
      and the directional derivative (L(w + eps z) - L(w - eps z)) / (2 eps) measured along them

    `fits`: weights are fitted to it, as to second moments, which wants many tokens. `wide`: it takes differences that
    half precision would round away. `by_unit`: it is of the site's units, and says nothing of what they are made of.
    `least_windows`: how many calibration windows it takes at least.

    What it costs, for forecasts: `passes(windows, sites)`, the plain forward and backward passes over the calibration
    windows that are made for it beside the walk, `sites` being all that the criterion judges; none for what a walk
    collects. `held_bytes(site, outputs, itemsize)`, unless None: the bytes that it takes for a site, with what is made
    of one batch, the out-projection's outputs being `outputs` and a weight taking `itemsize` bytes; None: what `empty`
    takes.
    """

    source: ClassVar[str]
    by_window: ClassVar[bool]
    per_sample: ClassVar[bool]
    fits: ClassVar[bool]
    least_windows: ClassVar[int]
    wide: ClassVar[bool]
    by_unit: ClassVar[bool]
    of: ClassVar[Any]
    passes: ClassVar[Any]
    held_bytes: ClassVar[Any]

    @classmethod
    def empty(cls, site: Site) -> Self: ...

    def update_(self, *observed: Any) -> Self: ...

    def merge(self, other: Self) -> Self: ...


class Criterion(Protocol):
    """Importance of every unit. `evidence`: one type, several (each site's are then a tuple in that order), or none; a
    value with `source` and `empty` may stand for a type, and carry settings of its collector. `sequential`: where the
    search decides layer by layer, layer l is scored on what the already pruned layers before it produce; "always":
    where it decides over all layers, too, on what the layers before produce once their lowest units are masked.
    `judges`: what it can score: units of "attention" and "mlp", "sublayer", "block", as a whole. `lost(scores)`: how
    many of these stand for a loss that was not finite; the log says so. `few_tokens`: it reads so few numbers off its
    evidence that few tokens do, also where that is what others fit weights to. Others read the evidence after it, and
    the weights are the model's: it writes into neither.

    What it costs, for forecasts: `working_bytes(site, outputs)`, the bytes that it works in at one site beside its
    evidence, such as 24 C^2 for a covariance and two factors; `kept_bytes(sites, outputs, itemsize, refits)`, the bytes
    of its scores of all `sites` until the search has ended, in memory and in files of TMPDIR, with `refits` fitted
    out-projections of each (see `Search`)."""

    evidence: ClassVar[Any]
    few_tokens: ClassVar[bool]
    sequential: Sequential
    judges: Any

    def lost(self, scores: Scores, /) -> int: ...

    def working_bytes(self, site: Site, outputs: int, /) -> int: ...

    def kept_bytes(self, sites: Sequence[Site], outputs: int, itemsize: int, refits: float, /) -> tuple[int, int]: ...

    def __call__(self, block: Block, evidence: Mapping[str, Any]) -> Scores: ...


Objective = Literal["next_token", "kl"]


class Oracle(Protocol):
    """What the runner lends to searches: the calibration loss of masked (or compensated) structures, on the windows
    that the search's `held_out` leaves for it, as its `objective` says."""

    @property
    def passes(self) -> float:
        """Spent so far, in plain passes over the calibration tokens."""
        ...

    @property
    def batches(self) -> int:
        """How many batches `losses(batch=...)` can choose from."""
        ...

    def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
        """Mean loss in nats per token of each candidate: float64 [len(candidates)], over all the windows or batch
        number `batch` of them."""
        ...

    def trial(self, plan: Plan, share: float) -> Candidate:
        """The structure with the out-projections that the run's compensation gives it, fitted to a share of the
        windows that do not decide (of all, where all decide)."""
        ...


class Search(Protocol):
    """Scores and a budget to a Plan.

    local        it decides each layer from that layer's scores alone
    granularity  what may leave: units ("heads", "channels", "experts"), sublayers ("attention", "ffn"), "blocks"
    heads        a count to remove in place of the ratio
    probes       it cannot do without losses, and so needs the whole model in memory
    spends       unless None, of (sites, budget, batches): passes that its probes may cost, for forecasts and progress
    refits       about how many refitted out-projections of each site its probes ask for, for forecasts
    rebalanced   unless None, of (plan, scores, sites, budget): its plan at another budget, without a probe
    rescored     unless None, of (plan, before, after, sites, budget): its plan by scores `after`, of all windows, where
                 it was made by scores `before`, of the windows that do not decide
    starts       other criteria by name, whose scores it is given under `start_name(start, site)`
    held_out     share of the windows that its probes measure losses on, scores being of the others; 0: all for both
    objective    of the probes' losses: "next_token", or "kl", KL(p || q) from the dense model's predictions p
    tries        share of the windows that structures are compensated on for its trials; 0: it has none
    check        raises ConfigError for a budget that it cannot meet, before there are scores
    warning      a line for the log, or None
    """

    local: ClassVar[bool]
    granularity: Any
    heads: int | None
    probes: bool
    spends: Any
    refits: Any
    rebalanced: Any
    rescored: Any
    starts: Any
    held_out: float
    objective: Any
    tries: Any

    def check(self, sites: Sequence[Site], budget: Budget, /) -> None: ...

    def warning(self, sites: Sequence[Site], budget: Budget, /) -> str | None: ...

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan: ...


class Sparsity(Protocol):
    """How much leaves, in which rounds. `batch`, `phase` and `table`: what times are measured at, or the file that has
    them."""

    ratio: float
    of: str
    context: int
    batch: int
    phase: Any
    table: str | None

    def shares(self) -> tuple[float, ...]:
        """Cumulative share removed after each round; the last is `ratio`."""
        ...


class Compensator(Protocol):
    """The out-projection's weight and bias after units are gone. `sequential`: its evidence is collected on what the
    pruned layers before produce (a second walk). `few_tokens`: as of a `Criterion`. Calling it spends the evidence: it
    may be worked out in its memory, though not in that of the weights. `working_bytes(site, outputs)`, for forecasts:
    the bytes that it works in at one site beside that. `settled(sums)`, unless None: itself as it is for a model whose
    hidden states are plain sums of what out-projections give, or are none. What it chose for the site by itself may
    come third, by name, {"ridge": 0.3}: compensation.json in the run folder has it."""

    evidence: ClassVar[Any]
    few_tokens: ClassVar[bool]
    adds_bias: ClassVar[bool]
    sequential: bool
    settled: Any

    def working_bytes(self, site: Site, outputs: int, /) -> int: ...

    def __call__(
        self, weight_OC: Tensor, bias_O: Tensor | None, evidence: Any, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Mapping[str, float]]: ...


class Recovery(Protocol):
    """Training after pruning. `trains`: it does (and so needs the whole pruned model in memory), `batch` windows at a
    time. `layerwise`: through one decoder layer after the other, towards the dense model, which it is called with as
    `dense` (its layers are loaded one at a time); else with backward passes through the whole model. `merge`:
    what it learned is in the weights afterwards, not beside them. For forecasts:
    `seen(windows)`, unless None, the windows that it trains on in all, and `looks(windows)`, those that it runs
    forwards beside that."""

    trains: ClassVar[bool]
    layerwise: ClassVar[bool]
    batch: int
    merge: bool
    seen: Any

    def looks(self, windows: int, /) -> int: ...

    def prepare(self, family: Any, windows: int) -> None:
        """Checks itself against the model's architecture and the number of calibration windows. Raises ConfigError."""
        ...

    def __call__(self, model: Any, tokens_NT: Tensor, meter: Any, seed: int, dense: Any = None) -> Any:
        """Trains the model in place; gives `metrics` and the `adapter` that is not merged into it, or None."""
        ...


class Quantise(Protocol):
    """Fewer bits for the pruned model's weights. `applies`: it does anything. `note()`: what, in words. Called with the
    model `when` it is "dense" and when it is "pruned" (and recovered, and saved), before it is evaluated: gives figures
    of it, without the "dense/" or "pruned/" in front. `in_place`: the pruned model is another one afterwards, and has
    the evaluators' figures; else it is converted, and the evaluators that can be are run on that. `folder`: where a
    file of it goes, None: it is not kept. `check()` says what the machine lacks, `prepare(model)` what a model's
    structure does, before a weight is loaded; `scratch_bytes(model)`, for forecasts: about what its files take
    meanwhile, in the system's folder for such. `measured_on(model, evaluators)`: what its figures of the dense model
    depend on beside the model (None: nothing says): those are then kept."""

    applies: ClassVar[bool]
    in_place: ClassVar[bool]

    def note(self) -> str: ...

    def check(self) -> None: ...

    def prepare(self, model: Any, /) -> None: ...

    def scratch_bytes(self, model: Any, /) -> int: ...

    def measured_on(self, model: Any, evaluators: Mapping[str, Evaluator], /) -> Any: ...

    def __call__(
        self, model: Any, when: str, evaluators: Mapping[str, Evaluator], folder: Any, /
    ) -> Mapping[str, float]: ...


class Evaluator(Protocol):
    """Figures of a model, each name carrying its protocol: {"ppl/wikitext2@2048": 5.47}; in a Measured where there are
    files beside them. It holds no state between calls.

    Called with the dense model, then with the pruned one. `streams`: it can do without the whole model in memory.
    `check()`, `prepare(tokenizer, vocabulary)` and `longest(tokenizer)`, the most tokens that the model will see at
    once, say what can be told before a weight is loaded. `windows(tokenizer)`: those it reads, of its `dataset`,
    `length` tokens each, `batch_size` at a time, or its `prompts`. `bos`: a beginning-of-sequence token is put in
    front; `lacks_bos(tokenizer, token)`: what it reads is without one. `against(dense, pruned, tokenizer)`: figures of
    the pruned model that say how far it is from the dense one, and files of both. `measured_on(tokenizer)`: what
    identifies its inputs (None: nothing does), of one whose figures are the same each time: what it found of the dense
    model, files included, is then kept.
    """

    streams: bool
    bos: Any
    dataset: Any
    prompts: Any
    length: Any
    batch_size: int

    def check(self) -> None: ...

    def prepare(self, tokenizer: Any, vocabulary: int, /) -> None: ...

    def longest(self, tokenizer: Any, /) -> int | None: ...

    def windows(self, tokenizer: Any, /) -> Tensor | None: ...

    def lacks_bos(self, tokenizer: Any, token: int, /) -> bool: ...

    def against(self, dense: Measured, pruned: Measured, tokenizer: Any, /) -> Measured: ...

    def measured_on(self, tokenizer: Any, /) -> Any: ...

    def __call__(self, model: Any, tokenizer: Any) -> Measured | Mapping[str, float]: ...
