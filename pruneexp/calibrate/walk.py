"""The walk over a model's layers that collects evidence."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pruneexp.calibrate.bookmark import Bookmark
from pruneexp.calibrate.dense_states import DenseStates
from pruneexp.calibrate.observe import Visit, Windows, observe
from pruneexp.calibrate.whole_model import evidence_ahead
from pruneexp.model import Model
from pruneexp.types import collected_by


def walk(
    model: Model,
    tokens_NT: Tensor | None,
    kinds: Sequence[Any],
    bookmark: Bookmark,
    *,
    read_only: bool = False,
    whole: Collection[str] = (),
    dense_states: DenseStates | None = None,
) -> Iterator[Visit]:
    """Goes layer by layer: runs a layer on all windows, collecting evidence of every type in `kinds`, and yields it.

    The next layer's input is made by the layer *as the caller left it*. A caller that does not touch it gets
    statistics of the dense model for one forward pass in all; one that prunes or masks it gets sequential statistics,
    each layer running once more. `read_only`: the caller promises not to touch layers, and the windows' hidden states
    are held once (N x D) instead of twice. Without `kinds`, or without tokens, layers are only opened, not run.
    `whole`: kinds of sites that are shown as a whole too, one unit each ("attention", "mlp", "block"): what is seen of
    whole sublayers and layers is then theirs. `bookmark`: where to begin, and where to note how far it has come.
    `dense_states`: where a walk that is `read_only` leaves the hidden states that it passes.

    Raises:
        RunError: NaN or Inf in weights or activations; the message names the layer. No structure's loss is finite.
    """
    total, begins = len(model.layers), bookmark.index < len(model.layers)
    ahead = evidence_ahead(model, tokens_NT, kinds if begins else (), bookmark.meter, whole)
    kinds = collected_by("walk", kinds)
    windows = Windows.entering(model, tokens_NT) if kinds and begins and tokens_NT is not None else Windows([], [])
    [windows.hidden] = bookmark.take_hidden(model.device) or [windows.hidden]
    for index in bookmark.layers(total):
        with model.loaded(index, index + 1) as layer:
            here = Visit(index, layer, model.block(index), {}, model.whole_block(index, whole) if whole else None)
            evidence, output = {}, windows.hidden if read_only else windows.unknown()
            if windows.hidden:
                keeps = read_only and dense_states is not None and dense_states.keeps(model, index, windows.hidden)
                read: list[tuple[Tensor, Tensor]] = []
                evidence = observe(model, here, windows, kinds, output, read if keeps else None)
                if dense_states is not None and keeps:
                    dense_states.put(index, read, output)
                bookmark.meter.forward += 1 / total
            evidence |= {kind: share(here.block, here.whole or here.block) for kind, share in ahead.items()}
            before = _fingerprint(layer)
            yield replace(here, evidence=evidence)
            del evidence  # the caller decides how long it lives
            touched = _fingerprint(layer) != before
            if touched and read_only:
                raise AssertionError(f"{here.block.name} was changed during a read-only walk")
            if windows.hidden and touched and index + 1 < total:
                output = windows.unknown()
                observe(model, here, windows, (), output)
                bookmark.meter.forward += 1 / total
            windows.hidden = output
            del here  # views of weights, before the next layer's come
        bookmark.reached(index + 1, total, [windows.hidden] if windows.hidden else [])


def _fingerprint(layer: nn.Module) -> tuple:
    """Changes when a parameter is replaced, resized or written to in place, and with a mask."""
    masks = sum(len(module._forward_pre_hooks) for module in layer.modules())
    return (masks, *((name, id(p), p._version, tuple(p.shape)) for name, p in layer.named_parameters()))
