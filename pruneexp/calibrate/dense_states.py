"""Hidden states of the dense model that several walks have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pruneexp.model import Model


@dataclass
class DenseStates:
    """What walks over one model and one set of windows have in common: by layer and batch, what attention's
    out-projection gives in the dense model and its hidden states behind the layer, where all of them take at most
    `limit` bytes. And what the first of these out-projections gets, which is the same in every pruned model: nothing
    has left before it."""

    limit: int
    basis: Any = None  # what identifies the model and the windows
    layers: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    entered: list[Tensor] = field(default_factory=list)

    def of(self, basis: Any) -> DenseStates:
        """Itself; those of another model or other windows are given up."""
        if basis != self.basis:
            self.basis, self.layers, self.entered = basis, {}, []
        return self

    def put(self, index: int, read: Sequence[tuple[Tensor, Tensor]], after: Sequence[Tensor]) -> None:
        """Layer `index`: by batch what attention's out-projection gets and gives, and the hidden states behind the
        layer."""
        self.layers[index] = [(given.view_as(x), x) for (_, given), x in zip(read, after, strict=True)]
        if index == 0:
            self.entered = [got for got, _ in read]

    def keeps(self, model: Model, index: int, hidden: Sequence[Tensor]) -> bool:
        """Whether a layer's states are to be kept: they are not yet known, `walk_sites` can use them, and there is room
        for those of all layers, each as large as `hidden`."""
        size = (2 * len(model.layers) + 1) * sum(x_BTD.nbytes for x_BTD in hidden)
        return index not in self.layers and size <= self.limit and model.family.adds_up and not model.mixture
