"""Whole models masked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pruneexp.model import Model
from pruneexp.surgery import masked_layer
from pruneexp.surgery.mask import OutProjections
from pruneexp.types import Plan


@contextmanager
def masked(model: Model, plan: Plan, out_projections: OutProjections | None = None) -> Iterator[Model]:
    """`masked_layer` of every layer of a model in memory."""
    with ExitStack() as layers:
        for index in range(len(model.layers)):
            layers.enter_context(masked_layer(model, index, plan, out_projections))
        yield model
