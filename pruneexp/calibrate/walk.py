"""The walk over a model's blocks that collects evidence."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.calibrate.bookmark import Bookmark
from pruneexp.calibrate.dense_states import DenseStates
from pruneexp.calibrate.meter import Meter
from pruneexp.calibrate.whole_model import evidence_ahead
from pruneexp.model import Call, Model
from pruneexp.model.half import overflow_hint
from pruneexp.model.sites import site_parts
from pruneexp.progress import progress
from pruneexp.types import Block, ConfigError, RunError, Site, collected_by, updated_


@dataclass(frozen=True)
class Visit:
    """One stop of the walk: a decoder layer with its weights at hand, and what was seen there."""

    index: int
    layer: nn.Module
    block: Block
    evidence: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)  # evidence type -> site name -> evidence
    whole: Block | None = None  # the layer as whole sublayers and blocks, where these are judged

    def of(self, wanted: Any) -> Mapping[str, Any]:
        """This block's evidence of one type, by site name; of several types, tuples of them."""
        if isinstance(wanted, tuple):
            assert self.whole is None, "criteria of whole sublayers and blocks name one type"
            return {site.name: tuple(self.evidence[kind][site.name] for kind in wanted) for site in self.block.sites}
        return {} if wanted is None else self.evidence[wanted]


def walk(
    model: Model,
    tokens_NT: Tensor | None,
    kinds: Sequence[Any],
    meter: Meter,
    stage: str,
    *,
    read_only: bool = False,
    whole: Collection[str] = (),
    bookmark: Bookmark | None = None,
    dense_states: DenseStates | None = None,
) -> Iterator[Visit]:
    """Goes block by block: runs a block on all windows, collecting evidence of every type in `kinds`, and yields it.

    The next block's input is made by the block *as the caller left it*. A caller that does not touch it gets
    statistics of the dense model for one forward pass in all; one that prunes it gets sequential statistics, each
    block running once more. `read_only`: the caller promises not to touch blocks, and the windows' hidden states are
    held once (N x D) instead of twice. Without `kinds`, or without tokens, blocks are only opened, not run.
    `whole`: kinds of sites that are shown as a whole too, one unit each ("attention", "mlp", "block"): what is seen of
    whole sublayers and blocks is then theirs. `bookmark`: where to begin, and where to note how far it has come.
    `dense_states`: where a walk that is `read_only` leaves the hidden states that it passes.

    Raises:
        RunError: NaN or Inf in weights or activations; the message names the block. No structure's loss is finite.
    """
    total, bookmark = len(model.layers), bookmark or Bookmark()
    indices = range(bookmark.index, total)
    ahead = evidence_ahead(model, tokens_NT, kinds if indices else (), meter, whole)
    if bookmark.index:
        meter.forward = bookmark.forward
    kinds = collected_by("walk", kinds)
    if not kinds or tokens_NT is None:
        for index in progress(indices, stage, len(indices), "blocks"):
            with model.loaded(index, index + 1) as layer:
                block, shown = model.block(index), model.whole_block(index, whole) if whole else None
                yield Visit(
                    index, layer, block, {kind: share(block, shown or block) for kind, share in ahead.items()}, shown
                )
                del block, shown  # views of weights, before the next block's come
            bookmark.reached(index + 1, total, (), meter.forward)
        return
    hidden, calls = enter_all(model, tokens_NT) if indices else ([], [])
    [hidden] = bookmark.take_hidden(model.device) or [hidden]
    for index in progress(indices, stage, len(indices), "blocks"):
        with model.loaded(index, index + 1) as layer:
            block, shown = model.block(index), model.whole_block(index, whole) if whole else None
            output = hidden if read_only else [torch.empty(0)] * len(hidden)
            keeps = dense_states is not None and read_only and dense_states.keeps(model, index, hidden)
            read: list[tuple[Tensor, Tensor]] = []
            evidence = observe(model, layer, block, hidden, calls, kinds, output, shown, read if keeps else None)
            if dense_states is not None and keeps:
                dense_states.put(index, read, output)
            meter.forward += 1 / total
            before = _fingerprint(layer)
            evidence |= {kind: share(block, shown or block) for kind, share in ahead.items()}
            yield Visit(index, layer, block, evidence, shown)
            del evidence  # the caller decides how long it lives
            touched = _fingerprint(layer) != before
            if touched and read_only:
                raise AssertionError(f"{block.name} was changed during a read-only walk")
            if touched and index + 1 < total:
                output = [torch.empty(0)] * len(hidden)
                observe(model, layer, block, hidden, calls, (), output)
                meter.forward += 1 / total
            hidden = output
            del block, shown
        bookmark.reached(index + 1, total, (hidden,), meter.forward)


def check_finite(y_BTD: Tensor, block: Block, number: int) -> None:
    if not torch.isfinite(y_BTD.sum(dtype=torch.float32)) and not torch.isfinite(y_BTD).all():
        hint = overflow_hint(y_BTD.dtype)
        raise RunError(f"{block.name}: activations hold NaN or Inf (calibration batch {number}){hint}")


def enter_all(model: Model, tokens_NT: Tensor) -> tuple[list[Tensor], list[list[Call]]]:
    """Hidden states in front of the first block, batch by batch; the calls are shared by batches of one size."""
    hidden, calls, by_size = [], [], {}
    for batch in tokens_NT.split(model.batch_size):
        entered, made = model.enter(batch)
        hidden.append(entered)
        calls.append(by_size.setdefault(len(batch), made))
    return hidden, calls


@torch.no_grad()
def observe(
    model: Model,
    layer: nn.Module,
    block: Block,
    hidden: list[Tensor],
    calls: list[list[Call]],
    kinds: Sequence[Any],
    output: list[Tensor],
    whole: Block | None = None,
    read: list[tuple[Tensor, Tensor]] | None = None,
) -> dict[Any, dict[str, Any]]:
    """Runs the layer over all batches into `output` (which may be `hidden`) and returns the evidence: of source "block"
    that of the sites of `whole`. What attention's reader gets and gives is left in `read`.

    An expert's evidence is of the tokens that are routed to it; where these are fewer than two, zeros stand for the
    others, so that an expert which nothing needs carries nothing."""
    seen_of = {kind: whole or block if kind.source == "block" else block for kind in kinds}
    evidence = {kind: {site.name: kind.empty(site) for site in shown.sites} for kind, shown in seen_of.items()}
    at_reader = [kind for kind in kinds if kind.source == "reader"]
    at_writer = [kind for kind in kinds if kind.source == "writer"]
    at_block = [kind for kind in kinds if kind.source == "block"]
    watches: list[_Watch] = []
    device = model.layer_device(block.layer)
    with ExitStack() as hooks:
        for site in block.sites if at_reader or at_writer else ():
            writers, reader = site_parts(model.family, site)
            seen = ((reader, at_reader, site.channels), (writers[0].path, at_writer, hidden[0].shape[-1]))
            for path, wanted, width in seen:
                if wanted:
                    watches.append(_Watch(site, wanted, evidence, hidden[0].shape[1], width))
                    module = layer.get_submodule(path)
                    hooks.enter_context(module.register_forward_pre_hook(watches[-1].update))
        if read is not None:
            attention_reader = layer.get_submodule(model.family.attention_reader)
            hooks.enter_context(attention_reader.register_forward_hook(partial(_note, read)))
        middle: list[Tensor] = []
        if at_block and whole is not None and any(site.kind != "block" for site in whole.sites):
            hooks.enter_context(_between_sublayers(model, layer, middle))
        for number, (x_BTD, call) in enumerate(zip(hidden, calls, strict=True)):
            x_BTD = x_BTD.to(device)  # the layer before may lie on another
            y_BTD = model.run_layer(layer, x_BTD, call[block.layer])
            check_finite(y_BTD, block, number)
            if middle and torch.equal(middle[0].view_as(x_BTD), x_BTD):
                raise _no_middle("runs its sublayers side by side")
            for kind in at_block:
                for site in (whole or block).sites:
                    before_BTD = middle[0].view_as(x_BTD) if middle and site.kind == "mlp" else x_BTD
                    after_BTD = middle[0].view_as(x_BTD) if middle and site.kind == "attention" else y_BTD
                    evidence[kind][site.name] = evidence[kind][site.name].update(before_BTD, after_BTD)
            output[number] = y_BTD
            middle.clear()
    for watch in watches:
        if watch.site.expert is not None and watch.tokens < 2:
            watch.add(hidden[0].new_zeros(1, 2 - watch.tokens, watch.width, device=device))
    return evidence


def _note(read: list[tuple[Tensor, Tensor]], _module: nn.Module, args: tuple[Tensor, ...], given: Tensor) -> None:
    """A hook behind a module."""
    read.append((args[0], given))


def _between_sublayers(model: Model, layer: nn.Module, middle: list[Tensor]) -> Any:
    """A hook that notes the hidden states between attention and FFN: what the norm in front of the FFN reads."""
    if model.family.mlp_norm is None:
        raise _no_middle("normalises behind its sublayers")
    norm = layer.get_submodule(model.family.mlp_norm)
    return norm.register_forward_pre_hook(lambda _norm, args: middle.append(args[0]))


def _no_middle(why: str) -> ConfigError:
    return ConfigError(
        f"search.granularity: expected heads, channels or blocks for a model that {why}, "
        "of which criterion=block_influence has no scores"
    )


@dataclass
class _Watch:
    """What a site's reader or writer is given, as evidence of some kinds."""

    site: Site
    kinds: Sequence[Any]
    evidence: dict[Any, dict[str, Any]]
    length: int  # of windows
    width: int  # of what is given
    tokens: int = 0

    def update(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A hook in front of the module."""
        x = args[0]
        # OPT flattens windows in front of its FFN; an expert's tokens are of many windows
        self.add(x.view(-1, self.length, x.shape[-1]) if self.site.expert is None else x[None])

    def add(self, x_BTC: Tensor) -> None:
        self.tokens += x_BTC.shape[0] * x_BTC.shape[1]
        for kind in self.kinds:
            self.evidence[kind][self.site.name] = updated_(self.evidence[kind][self.site.name], x_BTC)


def _fingerprint(layer: nn.Module) -> tuple:
    """Changes when a parameter is replaced, resized or written to in place."""
    return tuple((name, id(p), p._version, tuple(p.shape)) for name, p in layer.named_parameters())
