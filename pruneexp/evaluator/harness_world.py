"""What the evaluation harness would change around it, put back afterwards: random numbers, messages, bars."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pruneexp.progress import BAR_AFTER

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # the harness's own


@contextmanager
def seeded(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """The harness's random numbers inside; those of the run go on afterwards as if nothing had been drawn."""
    import numpy

    plain, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        random.seed(SEEDS["random"])
        numpy.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        try:
            yield
        finally:
            random.setstate(plain)
            numpy.random.set_state(arrays)


@contextmanager
def quiet() -> Iterator[None]:
    """No advice of the harness's about itself, and its bars as ours: on a terminal, after a while, gone when done."""
    from datasets.utils import logging as datasets_logging
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, init = logger.level, tqdm.__init__

    def shown_late(self: Any, *args: Any, **kwargs: Any) -> None:
        late = {"leave": False, "delay": BAR_AFTER, "disable": not sys.stderr.isatty()}
        init(self, *args, **{**kwargs, **late})

    bars = datasets_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets_logging.disable_progress_bar()
    tqdm.__init__ = shown_late  # the harness's bars take no setting but the class
    try:
        yield
    finally:
        tqdm.__init__ = init
        logger.setLevel(level)
        if bars:
            datasets_logging.enable_progress_bar()
