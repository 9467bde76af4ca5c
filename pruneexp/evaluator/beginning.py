"""Whether evaluators put a beginning-of-sequence token in front of what they show a model."""

from __future__ import annotations

from pruneexp.dataset import WindowSource, takes_bos
from pruneexp.types import ConfigError


def check_bos(bos: bool, dataset: WindowSource | None) -> None:
    """Raises ConfigError where the token is wanted in front of windows that are used as they are."""
    if bos and dataset is not None and not takes_bos(dataset):
        raise ConfigError(
            f"bos={bos!r}: the windows of dataset {dataset.name!r} are used exactly as they are; expected auto or false"
        )
