"""The walk that goes sublayer by sublayer, the dense model's hidden states beside the pruned one's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from pruneexp.calibrate.bookmark import Bookmark
from pruneexp.calibrate.walk import Meter, Visit, check_finite, enter_all, observe
from pruneexp.evidence import grown
from pruneexp.model import Call, Model
from pruneexp.model.sites import site_parts
from pruneexp.progress import progress
from pruneexp.types import ConfigError, Site


def walk_sites(
    model: Model,
    tokens_NT: Tensor,
    kind: type,
    kinds: Sequence[type],
    meter: Meter,
    stage: str,
    bookmark: Bookmark | None = None,
) -> Iterator[tuple[Visit, Site, Any]]:
    """Goes sublayer by sublayer, the dense model's hidden states beside the pruned one's, and yields each site with its
    evidence of type `kind` (source "wanted"): its reader's input, the sublayers before it as the caller left them, and
    the output with which the hidden state behind it would be the dense model's.

    The layer's visit is that before anything left it, and holds its evidence of `kinds` on the pruned model's hidden
    states, as in `walk`; `bookmark` as there. Four plain passes, one more with `kinds`; holds three
    times the hidden states, N x D each.

    Raises:
        ConfigError: as `require_sums`.
        RunError: NaN or Inf in weights or activations.
    """
    require_sums(model)
    total, bookmark = len(model.layers), bookmark or Bookmark()
    indices = range(bookmark.index, total)
    if bookmark.index:
        meter.forward = bookmark.forward
    dense, calls = enter_all(model, tokens_NT) if indices else ([], [])
    dense, hidden = bookmark.take_hidden(model.device) or (dense, list(dense))
    for index in progress(indices, stage, len(indices), "blocks"):
        with model.loaded(index, index + 1) as layer:
            block = model.block(index)
            seen = observe(model, layer, block, hidden, calls, kinds, [torch.empty(0)] * len(hidden)) if kinds else {}
            visit = Visit(index, layer, block, seen)
            middle = _run(model, visit, dense, calls)
            for site in block.sites:
                last = site is block.sites[-1] or site.kind == "mlp"
                wanted = dense if last else middle
                yield visit, site, _wanted(model, visit, site, kind, hidden, wanted, calls)
            _run(model, visit, hidden, calls)
            meter.forward += (2 + len(block.sites) + bool(kinds)) / total
            del block, visit, seen  # views of weights, before the next block's come
        bookmark.reached(index + 1, total, (dense, hidden), meter.forward)


def require_sums(model: Model) -> None:
    """Raises ConfigError for normalisation behind the sublayers and for mixtures of experts, where hidden states are no
    plain sums of what readers give."""
    if model.mixture:
        raise ConfigError(
            "compensator.target='dense': expected pruned for a mixture of experts, whose router weighs readers' outputs"
        )
    if not model.family.adds_up:
        raise ConfigError(
            "compensator.target='dense': expected pruned for a model that normalises behind its sublayers"
        )


def _run(model: Model, visit: Visit, hidden: list[Tensor], calls: list[list[Call]]) -> list[Tensor]:
    """Runs the layer over all batches in place; returns the hidden states in front of the last sublayer's sum."""
    middle = []
    for number, (x_BTD, call) in enumerate(zip(hidden, calls, strict=True)):
        with _readers(model, visit) as seen:
            hidden[number] = model.run_layer(visit.layer, x_BTD, call[visit.index])
        check_finite(hidden[number], visit.block, number)
        middle.append(
            hidden[number] - _scale(model) * seen["mlp"][1].view_as(x_BTD) if "mlp" in seen else hidden[number]
        )
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
            behind_BTD = behind_BTD - _scale(model) * seen["mlp"][1].view_as(x_BTD)
        evidence = grown(evidence, input_BTC, given_BTD + (wanted_BTD - behind_BTD) / _scale(model))
    return evidence


def _scale(model: Model) -> float:
    """What a sublayer's output is multiplied by before it is added."""
    named = model.family.residual_scale
    return 1.0 if named is None else getattr(model.config, named)


@contextmanager
def _readers(model: Model, visit: Visit) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What every reader of the layer gets and gives, by the kind of its site."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(kind: str) -> Any:
        # a copy: Falcon adds the attention's output to it in place
        return lambda _reader, args, output: seen.update({kind: (args[0], output.clone())})

    with torch.no_grad(), ExitStack() as hooks:
        for site in visit.block.sites:
            reader = visit.layer.get_submodule(site_parts(model.family, site)[1])
            hooks.enter_context(reader.register_forward_hook(watch(site.kind)))
        yield seen
