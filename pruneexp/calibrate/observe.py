"""What is seen of one decoder layer as it runs: a stop of the walk, the windows in front of it, and its evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.model import Call, Model
from pruneexp.model.half import overflow_hint
from pruneexp.model.sites import site_parts
from pruneexp.types import Block, ConfigError, RunError, Site


@dataclass(frozen=True)
class Visit:
    """One stop of the walk: a decoder layer with its weights at hand, and what was seen there."""

    index: int
    layer: nn.Module
    block: Block
    evidence: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)  # evidence type -> site name -> evidence
    whole: Block | None = None  # the layer as whole sublayers, or as a whole, where these are judged

    def of(self, wanted: Any) -> Mapping[str, Any]:
        """This layer's evidence of one type, by site name; of several types, tuples of them."""
        if isinstance(wanted, tuple):
            assert self.whole is None, "criteria of whole sublayers and layers name one type"
            return {site.name: tuple(self.evidence[kind][site.name] for kind in wanted) for site in self.block.sites}
        return {} if wanted is None else self.evidence[wanted]


@dataclass
class Windows:
    """The calibration windows in front of a layer, batch by batch."""

    hidden: list[Tensor]  # states [B, T, D]
    calls: list[list[Call]]  # what each layer is called with; shared by batches of one size

    @classmethod
    def entering(cls, model: Model, tokens_NT: Tensor) -> Windows:
        """In front of the first layer."""
        return cls(*model.enter_all(tokens_NT.split(model.batch_size)))

    def unknown(self) -> list[Tensor]:
        """Room for other hidden states of these windows."""
        return [torch.empty(0)] * len(self.hidden)


@torch.no_grad()
def observe(
    model: Model,
    here: Visit,
    windows: Windows,
    kinds: Sequence[Any],
    output: list[Tensor],
    read: list[tuple[Tensor, Tensor]] | None = None,
) -> dict[Any, dict[str, Any]]:
    """Runs the layer over all batches into `output` (which may be the windows' own states) and returns the evidence: of
    source "block" that of the sites of `here.whole`. What attention's out-projection gets and gives is left in `read`.

    An expert's evidence is of the tokens that are routed to it; where these are fewer than two, zeros stand for the
    others, so that an expert which nothing needs carries nothing."""
    block, layer, judged, device = here.block, here.layer, here.whole or here.block, model.layer_device(here.index)
    by_source = {name: [kind for kind in kinds if kind.source == name] for name in ("reader", "writer", "block")}
    evidence = {
        kind: {site.name: kind.empty(site) for site in (judged if kind.source == "block" else block).sites}
        for kind in kinds
    }
    watches: list[_Watch] = []
    middle: list[Tensor] = []
    _, length, width_D = windows.hidden[0].shape
    with ExitStack() as hooks:
        for site in block.sites:
            in_projections, out_projection = site_parts(model.family, site)
            for path, source, width in (
                (out_projection, "reader", site.channels),
                (in_projections[0].path, "writer", width_D),
            ):
                if by_source[source]:
                    watches.append(_Watch(site, by_source[source], evidence, length, width))
                    hooks.enter_context(layer.get_submodule(path).register_forward_pre_hook(watches[-1].update))
        if read is not None:
            attention_out = layer.get_submodule(model.family.attention_out)
            hooks.enter_context(attention_out.register_forward_hook(partial(_note, read)))
        if by_source["block"] and here.whole is not None and any(site.kind != "block" for site in judged.sites):
            hooks.enter_context(_between_sublayers(model, layer, middle))
        for number, (x_BTD, call) in enumerate(zip(windows.hidden, windows.calls, strict=True)):
            x_BTD = x_BTD.to(device)  # the layer before may lie on another
            y_BTD = model.run_layer(layer, x_BTD, call[here.index])
            check_finite(y_BTD, block, number)
            attends = any(site.kind == "attention" for site in block.sites)  # else nothing comes between
            if middle and attends and torch.equal(middle[0].view_as(x_BTD), x_BTD):
                raise _no_middle("runs its sublayers side by side")
            for kind in by_source["block"]:
                for site in judged.sites:
                    before_BTD = middle[0].view_as(x_BTD) if middle and site.kind == "mlp" else x_BTD
                    after_BTD = middle[0].view_as(x_BTD) if middle and site.kind == "attention" else y_BTD
                    evidence[kind][site.name] = evidence[kind][site.name].update_(before_BTD, after_BTD)
            output[number] = y_BTD
            middle.clear()
    for watch in watches:
        if watch.site.expert is not None and watch.tokens < 2:
            watch.add(windows.hidden[0].new_zeros(1, 2 - watch.tokens, watch.width, device=device))
    return evidence


def check_finite(y_BTD: Tensor, block: Block, number: int) -> None:
    if not torch.isfinite(y_BTD.sum(dtype=torch.float32)) and not torch.isfinite(y_BTD).all():
        hint = overflow_hint(y_BTD.dtype)
        raise RunError(f"{block.name}: activations hold NaN or Inf (calibration batch {number}){hint}")


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
    """What a site's out-projection or in-projection is given, as evidence of some kinds."""

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
            self.evidence[kind][self.site.name] = self.evidence[kind][self.site.name].update_(x_BTC)
