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
    """`weights`, `data`: as environment.json has them. `basis`: the dense model and how it is run. `tokens`: SHA-256 of
    the calibration windows. `run`: everything, as one hash."""

    weights: Mapping[str, Any]
    data: Mapping[str, Any]
    basis: Mapping[str, Any]
    tokens: str
    run: str


def identify(experiment: Experiment, model: Model, tokens_NT: Tensor, recorded: bool) -> Identity:
    """Of a run whose model is loaded. Where neither a record nor the cache asks, weights are not looked through."""
    asked = recorded or not isinstance(experiment.cache, NoCache)
    weights, tokens = experiment.model.fingerprint() if asked else {"files": {}}, fingerprint(tokens_NT)
    windows = {"calibration_windows": list(tokens_NT.shape), "calibration_tokens_sha256": tokens}
    gpus = sorted({torch.cuda.get_device_name(device) for device in model.devices if device.type == "cuda"})
    how = {"dtype": str(model.dtype), "device": gpus or "cpu", "batch_size": model.batch_size}
    method = {key: value for key, value in experiment.config.items() if key not in NOT_HASHED}
    whole = identity(config=method, save=experiment.run.save, weights=weights, tokens=tokens)
    data = {**experiment.dataset.description(), **windows}
    return Identity(weights, data, {"weights": weights["files"], **how}, tokens, whole)
