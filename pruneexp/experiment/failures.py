"""How a run that dies says why."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pruneexp.experiment.forecast import out_of_memory
from pruneexp.fingerprint.code import ROOT, is_installed
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
            reason = f"{type(error).__name__}: {_said_and_where(error)}"
            message = reason if folder is None else f"{reason} (the traceback is in {folder / 'log.txt'})"
        trackers.fail(reason, traceback.format_exc())
        if isinstance(error, StopIteration):  # contextlib takes an error that comes of one for that one
            raise RunError(message) from None
        raise RunError(message) from error


def _said_and_where(error: BaseException) -> str:
    """An error's message, with the place in somebody's own code that raised it; without a message, the place alone."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_somebodys(frame.filename)]
    last = (own or frames)[-1]
    place = f"{last.name} ({last.filename}, line {last.lineno})"
    said = " ".join(str(error).split())
    return f"{said}, raised in {place}" if said and own else said or f"raised in {place}"


def _is_somebodys(file: str) -> bool:
    """Whether code is neither ours nor installed, nor made while running ("<string>")."""
    return not file.startswith("<") and not is_installed(Path(file)) and not Path(file).is_relative_to(ROOT)
