"""What all datasets share: a token stream [M] to windows [N, T], and what can be said about windows.

Shape letters: M tokens of a stream, N windows, T tokens of a window.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pruneexp.dataset.pieces import in_pieces
from pruneexp.types import ConfigError, Dataset, filled, require_least
from pruneexp.types.defaults import DATASET

Sampling = Literal["random", "consecutive"]


def check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ConfigError(f"name={name!r}: expected letters, digits, '_', '.', '-' (it is part of metric names)")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:  # what generators take
        raise ConfigError(f"seed={seed!r}: expected an integer {'>= 0' if seed < 0 else 'below 2**63'}")


@dataclass(frozen=True)
class Drawn:
    """How many windows are drawn from text, and how."""

    name: str
    samples: int
    length: int
    seed: int
    sampling: Sampling
    bos: bool

    def __post_init__(self) -> None:
        check_name(self.name)
        require_least(self, 1, "samples")
        require_least(self, 2, "length")
        check_seed(self.seed)
        if self.sampling not in get_args(Sampling):
            raise ConfigError(f"sampling={self.sampling!r}: expected one of {', '.join(get_args(Sampling))}")

    def drawing(self) -> dict[str, Any]:
        """How windows are drawn, for the description of a dataset."""
        return {name: getattr(self, name) for name in ("sampling", "samples", "length", "seed", "bos")}


def encode(tokenizer: Any, text: str, special_tokens: bool) -> Tensor:
    """The text's tokens, as tokenising it whole gives them: int64 [M]."""
    if tokenizer is None:
        raise ConfigError("dataset: text needs a tokenizer and the model has none; expected dataset=tokens")
    # verbose=False: a stream is longer than the model's context on purpose, which tokenizers warn about.
    options = {"add_special_tokens": special_tokens, "return_attention_mask": False, "verbose": False}
    ids_M = in_pieces(tokenizer, text, options)
    if ids_M is None:
        ids_M = np.asarray(tokenizer(text, **options)["input_ids"], dtype=np.int64)
    return torch.from_numpy(ids_M)


def windows_of(stream_M: Tensor, length: int, bos: int | None, cut_up: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Windows [N, T] of a stream, as `cut_up(text_M, T)` makes them. With `bos`, the id of a beginning-of-sequence
    token, each is that token and T-1 tokens of text, in place of the one that a tokenizer has put in front of all."""
    if bos is None:
        return cut_up(stream_M, length)
    text_M = stream_M[1:] if stream_M[:1].tolist() == [bos] else stream_M
    return with_bos(cut_up(text_M, length - 1), bos)


def with_bos(text_NT: Tensor, bos: int) -> Tensor:
    """[N, T-1] -> [N, T]: the beginning-of-sequence token in front of every window."""
    return torch.cat([text_NT.new_full((len(text_NT), 1), bos), text_NT], dim=1)


def takes_bos(dataset: Dataset) -> bool:
    """Whether windows can be had with a beginning-of-sequence token in front of each."""
    return dataset.bos is not None


def check_takes_bos(bos: bool, dataset: Dataset) -> None:
    """Raises ConfigError where that token is wanted in front of windows that are used as they are."""
    if bos and not takes_bos(dataset):
        as_they_are = f"the windows of dataset {dataset.name!r} are used exactly as they are"
        raise ConfigError(f"bos={bos!r}: {as_they_are}; expected auto or false")


def with_setting(dataset: Any, name: str, value: Any) -> Dataset:
    """Another dataset that differs in one setting."""
    if is_dataclass(dataset):
        return filled(replace(dataset, **{name: value}), DATASET)  # type: ignore[type-var]
    changed = copy(dataset)
    setattr(changed, name, value)
    return changed


def evaluation_windows(dataset: Dataset, tokenizer: Any, length: int | None, bos: bool) -> Tensor:
    """The dataset's evaluation windows [N, T] as an evaluator wants them: its `bos` decides, not the dataset's."""
    source = with_setting(dataset, "bos", bos) if takes_bos(dataset) else dataset
    return source.evaluation(tokenizer, length)


def evaluation_parts(
    dataset: Dataset, tokenizer: Any, length: int | None, bos: bool
) -> Mapping[str, tuple[float, Tensor]]:
    """What is evaluated apart, by name: its weight and its windows [N, T], as `evaluation_windows` has them."""
    if dataset.apart is None:
        return {dataset.name: (1.0, evaluation_windows(dataset, tokenizer, length, bos))}
    source = with_setting(dataset, "bos", bos) if takes_bos(dataset) else dataset
    return source.apart(tokenizer, length)


def bos_token(tokenizer: Any, key: str) -> int:
    """The id of the tokenizer's beginning-of-sequence token. Raises ConfigError, naming `key`, where it has none."""
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        asked = f"{key}=true, or auto where the model needs one"
        raise ConfigError(f"{asked}: the tokenizer has no beginning-of-sequence token; expected false")
    return token


def begin_with(tokenizer: Any, bos: bool) -> int | None:
    """What a dataset's windows begin with: the id of the tokenizer's beginning-of-sequence token, or just text."""
    return bos_token(tokenizer, "dataset.bos") if bos and tokenizer is not None else None


def draw(stream_M: Tensor, samples: int, length: int, seed: int, sampling: str, key: str) -> Tensor:
    """Calibration windows [N, T] of a stream.

    "random": each start is drawn uniformly over all M-T+1 of them, with replacement, so windows may overlap.
    "consecutive": the first N windows that do not overlap. `key` names the source in errors.
    """
    if sampling == "consecutive":
        windows_NT = cut(stream_M, length, key)
        if len(windows_NT) < samples:
            there = f"{len(stream_M)} tokens found, {len(windows_NT)} windows of {length}"
            raise ConfigError(f"{key}: {there}; expected at least dataset.samples={samples} for consecutive windows")
        return windows_NT[:samples].clone()
    _check_length(stream_M, length, key)
    starts_N = torch.randint(len(stream_M) - length + 1, (samples,), generator=torch.Generator().manual_seed(seed))
    return stream_M.unfold(0, length, 1).index_select(0, starts_N)


def cut(stream_M: Tensor, length: int, key: str) -> Tensor:
    """Consecutive, non-overlapping windows [M // T, T]; a partial window at the end is dropped."""
    _check_length(stream_M, length, key)
    windows = len(stream_M) // length
    return stream_M[: windows * length].reshape(windows, length)


def _check_length(stream_M: Tensor, length: int, key: str) -> None:
    if len(stream_M) < length:
        raise ConfigError(f"{key}: {len(stream_M)} tokens found; expected at least {length}, one window")


def check_vocabulary(tokens_NT: Tensor, vocabulary: int, key: str) -> None:
    """Raises ConfigError, naming the first such token, where an id is not below `vocabulary`."""
    outside = torch.nonzero((tokens_NT >= vocabulary) | (tokens_NT < 0))
    if len(outside):
        window, position = outside[0].tolist()
        token = int(tokens_NT[window, position])
        where = f"token id {token} at window {window}, position {position}"
        raise ConfigError(f"{key}: {where} is out of the model's vocabulary ({vocabulary})")


def fingerprint(tokens_NT: Tensor) -> str:
    """sha256 over the shape and the ids of token windows, independent of their dtype."""
    digest = hashlib.sha256(str(tuple(tokens_NT.shape)).encode())
    digest.update(np.ascontiguousarray(tokens_NT.cpu().numpy(), dtype="<i8").tobytes())
    return digest.hexdigest()


def overlap(calibration_NT: Tensor, evaluation_NT: Tensor, n: int = 32) -> float:
    """Share, in [0, 1], of evaluation windows that contain a run of `n` tokens also found within a calibration window.

    Runs are compared by 64-bit hashes. Where a window is shorter than `n`, `n` is the shorter window's length.
    """
    n = min(n, calibration_NT.shape[1], evaluation_NT.shape[1])
    if not len(calibration_NT) or not len(evaluation_NT):
        return 0.0
    return float(np.isin(_run_hashes(evaluation_NT, n), _run_hashes(calibration_NT, n)).any(axis=1).mean())


def _run_hashes(tokens_NT: Tensor, n: int) -> np.ndarray:
    """Polynomial hash, modulo 2**64, of every run of `n` tokens: uint64 [N, T-n+1]."""
    ids = tokens_NT.cpu().numpy().astype(np.uint64)
    # Scrambled ids (the finaliser of splitmix64), as small ones make polynomial hashes modulo a power of two collide.
    ids = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    ids = (ids ^ (ids >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    ids ^= ids >> np.uint64(27)
    runs = ids.shape[1] - n + 1
    hashes = np.zeros((len(ids), runs), np.uint64)
    for i in range(n):
        hashes = hashes * np.uint64(0x94D049BB133111EB) + ids[:, i : i + runs]
    return hashes
