"""The protocols that calibration windows come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Dataset(Protocol):
    """Token windows, int64 [N, T], for calibration and for evaluation: `samples` and `evaluation_samples` of `length`
    tokens, None for as many, or as long, as there are. `contiguous`: evaluation windows are one text cut up, so that
    windows over their edges make sense. `bos`, a field of a dataclass: whether each window begins with the
    beginning-of-sequence token; None where windows are used as they are. `origins`: of each calibration window the name
    of its source. `apart(tokenizer, length)`: what is evaluated apart, by name: a weight, and windows. Both None where
    there is one source.
    """

    name: str
    samples: int | None
    evaluation_samples: int | None
    length: int | None
    contiguous: Any
    bos: Any
    origins: Any
    apart: Any

    def check(self, calibration: bool = True, evaluation: bool = True) -> None:
        """Raises ConfigError for what files alone can tell, before any weight is loaded, of the parts a run needs."""
        ...

    def calibration(self, tokenizer: Any) -> Tensor: ...

    def evaluation(self, tokenizer: Any, length: int | None) -> Tensor:
        """int64 [N, T]; T is `length`, or the dataset's own where that is None."""
        ...

    def key(self, part: str) -> str:
        """Where "calibration" or "evaluation" comes from, as errors name it: "dataset.calibration=FILE"."""
        ...

    def description(self) -> Mapping[str, Any]:
        """Origin, protocol and fingerprints, for the run's record."""
        ...


class Augmentation(Protocol):
    """Windows that join the calibration windows, `added(windows, length)` of them, by a dense `model` in memory. For
    forecasts: `working_bytes(model, windows, length)`, beside the model."""

    def added(self, windows: int, length: int, /) -> int: ...

    def working_bytes(self, model: Any, windows: int, length: int, /) -> int: ...

    def __call__(self, model: Any, tokens_NT: Tensor, meter: Any, seed: int) -> Tensor: ...
