"""How a run that dies says why."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pruneexp.experiment.forecast import out_of_memory
from pruneexp.tracker import Trackers
from pruneexp.types import ConfigError, RunError


@contextmanager
def failures_recorded(trackers: Trackers, folder: Path | None) -> Iterator[None]:
    """Tells the trackers how a run died; what is no error of ours becomes a RunError of one line."""
    try:
        yield
    except (ConfigError, RunError) as error:
        trackers.fail(str(error))
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        trackers.fail("interrupted" if isinstance(error, KeyboardInterrupt) else "terminated")
        raise
    except Exception as error:
        if where := out_of_memory(error):
            spread = ", model.device=auto less of each" if torch.cuda.device_count() > 1 else ""
            reason = message = f"{where}; a smaller model.batch_size or model.stream=true needs less{spread}"
        else:
            reason = f"{type(error).__name__}: {' '.join(str(error).split()) or f'raised in {_raised_in(error)}'}"
            message = reason if folder is None else f"{reason} (the traceback is in {folder / 'log.txt'})"
        trackers.fail(reason, traceback.format_exc())
        if isinstance(error, StopIteration):  # contextlib takes an error that comes of one for that one
            raise RunError(message) from None
        raise RunError(message) from error


def _raised_in(error: BaseException) -> str:
    """The place in the code that raised an error without a message."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.name} ({last.filename}, line {last.lineno})"
