"""pruneexp: structured, training-free pruning of language models, composed from configs.

From Python: `run`, `prune`, `apply`, `Result`, `ConfigError`, `RunError`, each imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from pruneexp.fingerprint import __version__

if TYPE_CHECKING:
    from pruneexp.api import ConfigError, Plan, Result, RunError, apply, prune, run

__all__ = ["ConfigError", "Plan", "Result", "RunError", "__version__", "apply", "prune", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pruneexp' has no attribute {name!r}")
    from pruneexp import api

    return getattr(api, name)
