"""What a run's results depend on: the weights, how they are run, the calibration tokens, the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruneexp.cache import NoCache
from pruneexp.dataset import fingerprint
from pruneexp.experiment.settings import Experiment
from pruneexp.fingerprint import NOT_HASHED, identity
from pruneexp.model import Model


@dataclass(frozen=True)
class Identity:
    """`data`: as environment.json has it. `tokens`: SHA-256 of the calibration windows. `run`: everything, the dense
    model too, as one hash."""

    data: Mapping[str, Any]
    tokens: str
    run: str


def dense_identity(experiment: Experiment, model: Model, recorded: bool) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Fingerprints of the weights of a model that is loaded, as environment.json has them; these, and how the model is
    run. Where neither a record nor the cache asks, weights are not looked through."""
    needed = recorded or not isinstance(experiment.cache, NoCache)
    weights = experiment.model.fingerprint() if needed else {"files": {}}
    gpus = sorted({torch.cuda.get_device_name(device) for device in model.devices if device.type == "cuda"})
    how = {"dtype": str(model.dtype), "device": gpus or "cpu", "batch_size": model.batch_size}
    return weights, {"weights": weights["files"], **how}


def identify(experiment: Experiment, weights: Mapping[str, Any], tokens_NT: Tensor) -> Identity:
    """Of a run whose calibration windows are all there. `weights`: as `dense_identity` gives them."""
    tokens = fingerprint(tokens_NT)
    windows = {"calibration_windows": list(tokens_NT.shape), "calibration_tokens_sha256": tokens}
    method = {key: value for key, value in experiment.config.items() if key not in NOT_HASHED}
    whole = identity(config=method, save=experiment.run.save, weights=weights, tokens=tokens)
    return Identity({**experiment.dataset.description(), **windows}, tokens, whole)
