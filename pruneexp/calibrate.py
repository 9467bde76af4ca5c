"""The walk over a model's blocks that collects evidence, and loss probes of masked structures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.model import Call, Model, next_token_losses
from pruneexp.model.sites import site_parts
from pruneexp.modeling_pruned import is_pre_norm
from pruneexp.progress import progress
from pruneexp.surgery import masked_layer
from pruneexp.types import Block, Candidate, ConfigError, RunError, Site


@dataclass
class Meter:
    """What calibration spent, in plain passes of all decoder layers over the calibration windows."""

    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True)
class Visit:
    """One stop of the walk: a decoder layer with its weights at hand, and what was seen there."""

    index: int
    layer: nn.Module
    block: Block
    evidence: Mapping[type, Mapping[str, Any]] = field(default_factory=dict)  # evidence type -> site name -> evidence

    def of(self, kind: type | None) -> Mapping[str, Any]:
        """This block's evidence of one type, by site name."""
        return {} if kind is None else self.evidence[kind]


def walk(
    model: Model,
    tokens_NT: Tensor | None,
    kinds: Sequence[type],
    meter: Meter,
    stage: str,
    *,
    read_only: bool = False,
) -> Iterator[Visit]:
    """Goes block by block: runs a block on all windows, collecting evidence of every type in `kinds`, and yields it.

    The next block's input is made by the block *as the caller left it*. A caller that does not touch it gets
    statistics of the dense model for one forward pass in all; one that prunes it gets sequential statistics, each
    block running once more. `read_only`: the caller promises not to touch blocks, and the windows' hidden states are
    held once (N x D) instead of twice. Without `kinds`, or without tokens, blocks are only opened, not run.

    Raises:
        RunError: NaN or Inf in weights or activations; the message names the block.
    """
    total = len(model.layers)
    if not kinds or tokens_NT is None:
        for index in progress(range(total), stage, total, "blocks"):
            with model.loaded(index) as layer:
                yield Visit(index, layer, model.block(index))
        return
    hidden, calls = _enter_all(model, tokens_NT)
    for index in progress(range(total), stage, total, "blocks"):
        with model.loaded(index) as layer:
            block = model.block(index)
            output = hidden if read_only else [torch.empty(0)] * len(hidden)
            evidence = _observe(model, layer, block, hidden, calls, kinds, output)
            meter.forward += 1 / total
            before = _fingerprint(layer)
            yield Visit(index, layer, block, evidence)
            touched = _fingerprint(layer) != before
            if touched and read_only:
                raise AssertionError(f"{block.name} was changed during a read-only walk")
            if touched and index + 1 < total:
                output = [torch.empty(0)] * len(hidden)
                _observe(model, layer, block, hidden, calls, (), output)
                meter.forward += 1 / total
            hidden = output


def walk_sites(
    model: Model, tokens_NT: Tensor, kind: type, kinds: Sequence[type], meter: Meter, stage: str
) -> Iterator[tuple[Visit, Site, Any]]:
    """Goes sublayer by sublayer, the dense model's hidden states beside the pruned one's, and yields each site with its
    evidence of type `kind` (source "wanted"): its reader's input, the sublayers before it as the caller left them, and
    the output with which the hidden state behind it would be the dense model's.

    The layer's visit is that before anything left it, and holds its evidence of `kinds` on the pruned model's hidden
    states, as in `walk`. Four plain passes, one more with `kinds`; holds three times the hidden states, N x D each.

    Raises:
        ConfigError: normalisation behind the sublayers, where hidden states are no sums.
        RunError: NaN or Inf in weights or activations.
    """
    if not is_pre_norm(model.family, model.config):
        raise ConfigError(
            "compensator.target='dense': expected pruned for a model that normalises behind its sublayers"
        )
    total = len(model.layers)
    dense, calls = _enter_all(model, tokens_NT)
    hidden = list(dense)
    for index in progress(range(total), stage, total, "blocks"):
        with model.loaded(index) as layer:
            block = model.block(index)
            seen = _observe(model, layer, block, hidden, calls, kinds, [torch.empty(0)] * len(hidden)) if kinds else {}
            visit = Visit(index, layer, block, seen)
            middle = _run(model, visit, dense, calls)
            for site in block.sites:
                last = site is block.sites[-1] or site.kind == "mlp"
                wanted = dense if last else middle
                yield visit, site, _wanted(model, visit, site, kind, hidden, wanted, calls)
            _run(model, visit, hidden, calls)
            meter.forward += (2 + len(block.sites) + bool(kinds)) / total


def _run(model: Model, visit: Visit, hidden: list[Tensor], calls: list[list[Call]]) -> list[Tensor]:
    """Runs the layer over all batches in place; returns the hidden states in front of the last sublayer's sum."""
    middle = []
    for number, (x_BTD, call) in enumerate(zip(hidden, calls, strict=True)):
        with _readers(model, visit) as seen:
            hidden[number] = model.run_layer(visit.layer, x_BTD, call[visit.index])
        _finite(hidden[number], visit.block, number)
        middle.append(hidden[number] - seen["mlp"][1].view_as(x_BTD) if "mlp" in seen else hidden[number])
    return middle


def _wanted(
    model: Model,
    visit: Visit,
    site: Site,
    kind: Any,
    hidden: list[Tensor],
    wanted: list[Tensor],
    calls: list[list[Call]],
) -> Any:
    """Evidence of a reader's input and wanted output: what it gives, and what its hidden state lacks behind it."""
    evidence = kind.empty(site)
    for x_BTD, wanted_BTD, call in zip(hidden, wanted, calls, strict=True):
        with _readers(model, visit) as seen:
            behind_BTD = model.run_layer(visit.layer, x_BTD, call[visit.index])
        input_BTC, given_BTD = (t.view(*x_BTD.shape[:2], -1) for t in seen[site.kind])
        if site.kind == "attention" and "mlp" in seen:
            behind_BTD = behind_BTD - seen["mlp"][1].view_as(x_BTD)
        evidence = evidence.update(input_BTC, given_BTD + wanted_BTD - behind_BTD)
    return evidence


@contextmanager
def _readers(model: Model, visit: Visit) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What every reader of the layer gets and gives, by the kind of its site."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(kind: str) -> Any:
        return lambda _reader, args, output: seen.update({kind: (args[0], output)})

    with torch.no_grad(), ExitStack() as hooks:
        for site in visit.block.sites:
            reader = visit.layer.get_submodule(site_parts(model.family, site)[1])
            hooks.enter_context(reader.register_forward_hook(watch(site.kind)))
        yield seen


def _finite(y_BTD: Tensor, block: Block, number: int) -> None:
    if not torch.isfinite(y_BTD.sum(dtype=torch.float32)) and not torch.isfinite(y_BTD).all():
        raise RunError(f"{block.name}: activations hold NaN or Inf (calibration batch {number})")


def _enter_all(model: Model, tokens_NT: Tensor) -> tuple[list[Tensor], list[list[Call]]]:
    """Hidden states in front of the first block, batch by batch; the calls are shared by batches of one size."""
    hidden, calls, by_size = [], [], {}
    for batch in tokens_NT.split(model.batch_size):
        entered, made = model.enter(batch)
        hidden.append(entered)
        calls.append(by_size.setdefault(len(batch), made))
    return hidden, calls


@torch.no_grad()
def _observe(
    model: Model,
    layer: nn.Module,
    block: Block,
    hidden: list[Tensor],
    calls: list[list[Call]],
    kinds: Sequence[type],
    output: list[Tensor],
) -> dict[type, dict[str, Any]]:
    """Runs the layer over all batches into `output` (which may be `hidden`) and returns the evidence."""
    evidence = {kind: {site.name: kind.empty(site) for site in block.sites} for kind in kinds}  # type: ignore[attr-defined]
    at_reader = [kind for kind in kinds if kind.source == "reader"]  # type: ignore[attr-defined]
    at_block = [kind for kind in kinds if kind.source == "block"]  # type: ignore[attr-defined]
    with ExitStack() as hooks:
        for site in block.sites if at_reader else ():
            hooks.enter_context(_watched(layer, model, site, at_reader, evidence, hidden[0].shape[1]))
        for number, (x_BTD, call) in enumerate(zip(hidden, calls, strict=True)):
            y_BTD = model.run_layer(layer, x_BTD, call[block.layer])
            _finite(y_BTD, block, number)
            for kind in at_block:
                seen = evidence[kind]
                seen.update({name: e.update(x_BTD, y_BTD) for name, e in seen.items()})
            output[number] = y_BTD
    return evidence


def _watched(
    layer: nn.Module, model: Model, site: Site, kinds: Sequence[type], evidence: dict[type, dict], length: int
) -> Any:
    """A hook on the site's reader that updates its evidence with the reader's input; removed on exit."""

    def update(_reader: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].view(-1, length, args[0].shape[-1])  # OPT flattens windows in front of its FFN
        for kind in kinds:
            evidence[kind][site.name] = evidence[kind][site.name].update(x)

    reader = layer.get_submodule(site_parts(model.family, site)[1])
    return reader.register_forward_pre_hook(update)


def _fingerprint(layer: nn.Module) -> tuple:
    """Changes when a parameter is replaced, resized or written to in place."""
    return tuple((name, id(p), p._version, tuple(p.shape)) for name, p in layer.named_parameters())


class Probe:
    """The oracle lent to searches: calibration losses of candidate structures, by masking the model in place.

    Candidates that begin alike share the layers they have in common: each layer is run once for all candidates that
    are the same up to it, batch by batch. `passes` counts what was run so far, in plain passes of all decoder layers
    over the calibration windows.
    """

    def __init__(self, model: Model, tokens_NT: Tensor, meter: Meter):
        self.model, self.tokens_NT, self.meter = model, tokens_NT, meter
        self.passes = 0.0

    @property
    def batches(self) -> int:
        """How many batches `losses(batch=...)` can choose from."""
        return -(-len(self.tokens_NT) // self.model.batch_size)

    @torch.no_grad()
    def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
        """Mean next-token loss in nats of each candidate, float64 [len(candidates)]."""
        batches = self.tokens_NT.split(self.model.batch_size)
        layers = [self._layer_keys(candidate) for candidate in candidates]
        sums, windows = torch.zeros(len(candidates), dtype=torch.float64), 0
        for tokens_BT in batches if batch is None else batches[batch : batch + 1]:
            hidden, calls = self.model.enter(tokens_BT)
            self._descend(0, hidden, list(range(len(candidates))), candidates, layers, calls, tokens_BT, sums)
            windows += len(tokens_BT)
        return sums / windows

    def _descend(
        self,
        index: int,
        hidden_BTD: Tensor,
        alike: list[int],
        candidates: Sequence[Candidate],
        layers: list[list[Any]],
        calls: list[Call],
        tokens_BT: Tensor,
        sums: Tensor,
    ) -> None:
        """Runs layer `index` once for each of its variants among the candidates that are alike up to it."""
        model = self.model
        if index == len(model.layers):
            sums[alike] += next_token_losses(model.leave(tokens_BT, hidden_BTD), tokens_BT).mean(1).sum()
            return
        variants: dict[Any, list[int]] = {}
        for number in alike:
            variants.setdefault(layers[number][index], []).append(number)
        for same in variants.values():
            first = candidates[same[0]]
            with masked_layer(model, index, first.plan, first.readers) as layer:
                output_BTD = model.run_layer(layer, hidden_BTD, calls[index])
            spent = len(tokens_BT) / len(self.tokens_NT) / len(model.layers)
            self.passes += spent
            self.meter.forward += spent
            self._descend(index + 1, output_BTD, same, candidates, layers, calls, tokens_BT, sums)

    def _layer_keys(self, candidate: Candidate) -> list[Any]:
        """What tells a candidate's layers from another's: units kept, and the very tensors of its readers."""
        keys: list[list[Any]] = [[] for _ in self.model.layers]
        for index, own in enumerate(keys):
            block = candidate.plan.sites.get(f"{self.model.layers_path}.{index}")
            if block is not None and not block.kept:
                own.append("removed")
        for site in self.model.sites():
            plan = candidate.plan.sites.get(site.name)
            reader = candidate.readers.get(site.name)
            keys[site.layer].append((plan and plan.kept, reader and (id(reader[0]), id(reader[1]))))
        return [tuple(own) for own in keys]
