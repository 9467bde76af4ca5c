"""Windows that join the calibration windows: text that the dense model writes itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pruneexp.calibrate.bookmark import Meter
from pruneexp.model import Model
from pruneexp.model.forward import cache_name
from pruneexp.progress import progress
from pruneexp.types import RunError, require_least, require_within

ROOM = 2**30  # bytes of cached keys and values, and of predictions, of the pieces that are written at once
LOGIT = 16  # bytes of a prediction: as the model gives it, in float32, its exponential, and their sum
PIECE = 256  # tokens that are written in one go, at most
BLOCK = 4  # windows in a row of one origin, so that every second and every fourth window has both


@dataclass(frozen=True)
class NoAugmentation:
    """The calibration windows alone."""

    def added(self, windows: int, length: int) -> int:
        return 0

    def __call__(self, model: Model, tokens_NT: Tensor, meter: Meter, seed: int) -> Tensor:
        return tokens_NT


@dataclass(frozen=True)
class SelfGenerated:
    """Text that the dense model writes joins the calibration windows, after self-calibration (Williams et al., NAACL
    2025, arXiv 2410.17170), where it stands in their place.

    Tokens are drawn one by one from the model's predictions, x_t ~ softmax(z_t / temperature), nothing left out. At
    temperature 1 the divergence on this text is that of the two models as wholes: KL(P || Q) = E_{x~P} sum_t
    KL(p(.|x_<t) || q(.|x_<t)), whatever text was given.

    `share`: windows to write for each given one, as long as these; `tokens`: at most so many in all (one window at
    least). A window is pieces of 256 tokens at most. Each begins with the token that all given windows begin with
    (BOS), or where there is none with one drawn from theirs. Written and given windows alternate in fours.
    """

    share: float
    tokens: int
    temperature: float

    def __post_init__(self) -> None:
        require_within(self, "(0, inf)", "share", besides=", or augmentation=none")
        require_least(self, 2, "tokens", besides=", or augmentation=none")
        require_within(self, "(0, inf)", "temperature", besides=", such as 1")

    def added(self, windows: int, length: int) -> int:
        """How many windows join so many of `length` tokens."""
        return max(1, min(round(self.share * windows), self.tokens // length))

    def working_bytes(self, model: Model, windows: int, length: int) -> int:
        """Of what is written at once."""
        pieces, piece = _pieces(length)
        return min(self.added(windows, length) * pieces, _at_once(model, piece)) * _piece_bytes(model, piece)

    def __call__(self, model: Model, tokens_NT: Tensor, meter: Meter, seed: int) -> Tensor:
        """Windows int64 [N, T] with those that the model writes, [N + M, T]. Raises RunError."""
        windows, length = tokens_NT.shape
        added, (pieces, piece) = self.added(windows, length), _pieces(length)
        generator = torch.Generator().manual_seed(seed)
        first_N = _first(tokens_NT, added * pieces, generator)
        drawn_TN = torch.rand(piece - 1, len(first_N), generator=generator)
        at_once = _at_once(model, piece)
        parts = list(zip(first_N.split(at_once), drawn_TN.split(at_once, dim=1), strict=True))
        total = len(parts) * (piece - 1)
        steps = iter(progress(range(total), "self-generated text", total, "tokens"))
        written = [_written(model, *part, self.temperature, steps) for part in parts]
        next(steps, None)  # the bar ends
        meter.forward += added / (windows + added)
        return _alternating(tokens_NT, torch.cat(written).reshape(added, -1)[:, :length])


def _pieces(length: int) -> tuple[int, int]:
    """How many pieces a window is made of, and the tokens of each: as few too many as even pieces allow."""
    pieces = -(-length // PIECE)
    return pieces, -(-length // pieces)


def _piece_bytes(model: Model, piece: int) -> int:
    return piece * model.kv_elements * model.dtype.itemsize + LOGIT * model.vocab_size


def _at_once(model: Model, piece: int) -> int:
    return max(1, ROOM // _piece_bytes(model, piece))


def _first(tokens_NT: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count] tokens to begin with."""
    if bool((tokens_NT[:, 0] == tokens_NT[0, 0]).all()):
        return tokens_NT[0, 0].repeat(count)
    return tokens_NT.flatten()[torch.randint(tokens_NT.numel(), (count,), generator=generator)]


@torch.no_grad()
def _written(model: Model, first_N: Tensor, drawn_TN: Tensor, temperature: float, steps: Iterator[int]) -> Tensor:
    """[N, 1 + T] tokens: `first_N`, and what follows by numbers from 0 to 1, one for each token."""
    tokens, name, cache = [first_N], cache_name(model.module), None
    for drawn_N, _ in zip(drawn_TN, steps, strict=False):
        output = model.module(tokens[-1][:, None].to(model.device), use_cache=True, **{name: cache})
        cache = getattr(output, name)
        shares_NV = (output.logits[:, -1].float() / temperature).softmax(-1).cumsum(-1)
        whole_N1 = shares_NV[:, -1:]
        if not bool(whole_N1.isfinite().all()):
            raise RunError("augmentation: the model's predictions are not finite; expected augmentation=none")
        reached_N1 = drawn_N[:, None].to(shares_NV) * whole_N1
        following_N = torch.searchsorted(shares_NV, reached_N1, right=True)[:, 0]
        tokens.append(following_N.clamp(max=shares_NV.shape[1] - 1).cpu())
    return torch.stack(tokens, dim=1)


def _alternating(given_NT: Tensor, written_NT: Tensor) -> Tensor:
    """All windows, in blocks of `BLOCK` of either origin, each origin spread evenly and in its order."""
    blocks = [
        ((number + 0.5) / len(split), block)
        for split in (given_NT.split(BLOCK), written_NT.split(BLOCK))
        for number, block in enumerate(split)
    ]
    return torch.cat([block for _, block in sorted(blocks, key=lambda each: each[0])])
