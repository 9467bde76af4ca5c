"""Two models of the same tensors."""

from __future__ import annotations

from copy import copy, deepcopy
from itertools import chain

from pruneexp.model.architecture import stock_of
from pruneexp.model.loaded import Model


def sharing(model: Model) -> Model:
    """Another model of the same tensors, none of which is copied: one that is shrunk leaves the other as it is."""
    module = model.module
    other = copy(model)
    other.module = deepcopy(module, {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())})
    other.config, other.origin = stock_of(other.module.config), list(model.origin)
    return other
