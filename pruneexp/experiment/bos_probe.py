"""What a beginning-of-sequence token is worth to a model, and whether a run uses it: a line of the log, or none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pruneexp.dataset import bos_token, fingerprint, takes_bos, windows_of
from pruneexp.experiment.forecast import Windows
from pruneexp.experiment.settings import Experiment
from pruneexp.model import Model

logger = logging.getLogger("pruneexp")

WORTH_SAYING = 0.2  # nats a token
WINDOWS, LENGTH = 4, 128  # of the calibration text, on which it is measured


def check_bos(experiment: Experiment, tokenizer: Any) -> None:
    """Raises ConfigError, naming the key, where a token is asked for that the tokenizer does not have."""
    dataset: Any = experiment.dataset
    of_evaluators = {f"evaluator.{name}.bos": each.bos for name, each in experiment.evaluators.items()}
    for key, bos in ({"dataset.bos": takes_bos(dataset) and dataset.bos} | of_evaluators).items():
        if tokenizer is not None and bos:  # where there is none, whoever needs one says so
            bos_token(tokenizer, key)


def tell_of_bos(
    experiment: Experiment, model: Model, tokens_NT: Tensor, known: Callable[[str, Callable[[], float]], float]
) -> None:
    """Logs a line where windows lack a beginning-of-sequence token that the family needs, or that is worth more than
    `WORTH_SAYING` to a model in memory. `known`: gives what was measured before on windows of this fingerprint, or
    measures."""
    token = getattr(model.config if model.tokenizer is None else model.tokenizer, "bos_token_id", None)
    if token is None or not 0 <= token < model.vocab_size:
        return
    lacking: dict[str, Any] = {"dataset": experiment.dataset} if bool((tokens_NT[:, 0] != token).any()) else {}
    for name, each in experiment.evaluators.items():
        if each.lacks_bos(model.tokenizer, token):
            lacking[f"evaluator.{name}"] = each
    if not lacking:
        return
    if model.family.needs_bos:
        needs = f"{model.family.stock} models need a beginning-of-sequence token, id {token}, in front of every window"
        logger.warning("%s, which is missing; what puts it there: %s", needs, _mended(lacking))
        return
    embedded = experiment.model.path.startswith("embedded:")  # to those it is worth nothing
    if model.tokenizer is not None and not model.streamed and not embedded:
        begun_NT = begun(tokens_NT, token, model.max_length)
        worth = known(fingerprint(begun_NT), lambda: worth_of(model, begun_NT))
        if worth > WORTH_SAYING:
            gains = f"a beginning-of-sequence token before a window is worth {worth:.2f} nats a token to this model"
            logger.warning("%s, and is not used; what puts it there: %s", gains, _mended(lacking))


def begun(tokens_NT: Tensor, token: int, max_length: int | None) -> Tensor:
    """The first few calibration windows, not too long, each behind a beginning-of-sequence token."""
    text = min(LENGTH, tokens_NT.shape[1] - 1, (max_length or LENGTH + 1) - 1)
    rows = [windows_of(row_T, text + 1, token, lambda text_M, n: text_M[None, :n]) for row_T in tokens_NT[:WINDOWS]]
    return torch.cat(rows)


def measured_windows(seen: Windows) -> Windows:
    """The windows that `worth_of` would see, of the calibration windows `seen`: for forecasts."""
    return replace(seen, count=min(WINDOWS, seen.count), length=min(LENGTH + 1, seen.length))


def worth_of(model: Model, begun_NT: Tensor) -> float:
    """How much lower the loss is, in nats a token, with a beginning-of-sequence token in front of the windows than
    without: over the tokens that are scored in both, 0 where there are none."""
    if begun_NT.shape[1] < 3:
        return 0.0
    without, with_it = (model.token_losses(each, model.batch_size) for each in (begun_NT[:, 1:], begun_NT))
    return float((without - with_it[:, 1:]).mean())


def _mended(lacking: dict[str, Any]) -> str:
    """What to type, or where that does not help, what to do."""
    words = []
    for key, part in lacking.items():
        source = part if key == "dataset" else part.dataset
        as_they_are = source is not None and not (key != "dataset" and part.prompts) and not takes_bos(source)
        words.append(f"(in the windows of {key} themselves)" if as_they_are else f"{key}.bos=true")
    return " ".join(words)
