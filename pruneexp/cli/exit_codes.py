"""How every command ends: its exit code, and a line that says why (of several mistakes in configs, a line each)."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

TERMINATED = 128 + signal.SIGTERM  # what a shell gives for a process that SIGTERM ended
NOT_READ = 128 + 13  # that SIGPIPE ended, which not every system has


def run_command(name: str, command: Callable[[], int]) -> int:
    """Runs the command called `name` and gives its exit code: its own, 2 for a ConfigError, 1 for any other failure.
    Where it was interrupted or terminated, or its output is no longer read, it is what a shell gives for that signal.
    Messages go to stderr, with the traceback where HYDRA_FULL_ERROR asks for it."""
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        signal.signal(signal.SIGTERM, _terminated)
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes stdout once more on its way out, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOT_READ
    except KeyboardInterrupt:
        return _ended(name, 130, "interrupted")
    except SystemExit as error:
        if error.code != TERMINATED:
            raise
        return _ended(name, TERMINATED, "terminated")
    except Exception as error:
        from pruneexp.types import ConfigError, ConfigErrors, RunError

        if isinstance(error, ConfigError):
            return _ended(name, 2, *(error.lines if isinstance(error, ConfigErrors) else [str(error)]))
        reason = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        return _ended(name, 1, f"failed: {reason}")


def run_small_command(
    name: str, help_text: str, command: Callable[[Sequence[str]], int], argv: Sequence[str] | None
) -> int:
    """As `run_command`, for a command that reads its own arguments: `argv`, or those typed. Prints the help where they
    ask for it."""
    typed = sys.argv[1:] if argv is None else list(argv)
    wants_help = bool({"-h", "--help"} & {*typed})
    return run_command(name, lambda: (print(help_text) or 0) if wants_help else command(typed))


def _terminated(signum: int, frame: Any) -> NoReturn:
    # An exception, so that what is half done is marked or removed on the way out.
    raise SystemExit(TERMINATED)


def _ended(name: str, code: int, *lines: str) -> int:
    if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
        import traceback

        traceback.print_exc()
    for line in lines:
        print(f"{name}: {' '.join(line.split())}", file=sys.stderr)
    return code
