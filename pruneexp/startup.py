"""What makes a start, and an end, quicker."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 100  # modules, from which on what has been loaded counts as the program


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python looks for no unreachable cycles: imports and configs make objects by the hundred thousand, all of
    them to stay, and to look through them again and again is a sixth of the time that they take. What imports have
    made is not looked through later either, nor when Python ends."""
    enabled, loaded = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) >= loaded + MANY:
            gc.freeze()
        if enabled:
            gc.enable()
