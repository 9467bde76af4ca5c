"""How much a fit is to be held back: chosen on tokens that the fit has not seen."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pruneexp.evidence.gram import Gram, WantedOutput
from pruneexp.evidence.halves import Halved
from pruneexp.evidence.solve import RidgePer, fitted_to_

RIDGES = tuple(10 ** (power / 2) for power in range(-8, 5))  # 1e-4, 3.2e-4, ..., 100
START = RIDGES.index(10**-0.5)
MIXTURES = 128  # random sums of outputs that stand for all of them where ridges are compared


def chosen_ridge(weight_OC: Tensor, bias_O: Tensor | None, evidence: Halved, keep_C: Tensor, per: RidgePer) -> float:
    """Half of the one of RIDGES whose fits err least on the half of the windows that they have not seen (both halves in
    turn):

        sum_t ||y_t - W' x_t[keep] - b'||^2 = sum_t ||y_t||^2 + tr(W' G W'^T) - 2 tr(W' X) + 2 b' (W' s - y) + n b' b'

    with G = sum x x^T, X = sum x y^T, s = sum x and y = sum y_t of the other half; the first term is the same for all.
    It is halved since the fit that follows is to twice as many tokens: what is best falls with their number. The error
    has one minimum over the ridge in practice: the search goes downhill from 0.3, at a handful of solves. Of more than
    MIXTURES outputs, so many sums with random signs are fitted in their place, at a fraction of the time: what they err
    is on average what all outputs err, and all ridges are compared by the same sums. Halves of an expert that saw fewer
    than two tokens say nothing, nor does a site that keeps no channel: 0.16.
    """
    parts = (evidence.first, evidence.second)
    if not len(keep_C) or min(half.n if isinstance(half, Gram) else half.inputs.n for half in parts) < 2:
        return RIDGES[START] / 2
    mixing_PO = _mixing(len(weight_OC)).to(weight_OC.device)
    weight_PC, bias_P = mixing_PO @ weight_OC.double(), None if bias_O is None else mixing_PO @ bias_O.double()
    halves = [_wanted(half, weight_PC, bias_P, keep_C, mixing_PO) for half in parts]
    weight_PK = weight_PC[:, keep_C.to(weight_OC.device)]
    errors: dict[int, float] = {}

    def error(place: int) -> float:
        if place not in errors:
            ridge = RIDGES[place]
            fits = [fitted_to_(half.copy(), weight_PK, ridge, per, mean) for half, mean in halves]
            errors[place] = sum(_error(fit, half) for fit, (half, _) in zip(fits, reversed(halves), strict=True))
        return errors[place]

    last, place, best = len(RIDGES) - 1, -1, START
    while best != place:
        place = best
        best = min((place, max(place - 1, 0), min(place + 1, last)), key=error)
    return RIDGES[place] / 2


def choosing_bytes(channels: int, outputs: int) -> int:
    """What `chosen_ridge` holds beside the evidence: one fit, 8 C^2 bytes and 8 C for each output that is fitted."""
    return 8 * channels * (channels + min(outputs, MIXTURES))


def _mixing(outputs: int) -> Tensor:
    """Signs over the root of MIXTURES [P, O], always the same; the identity of no more outputs than that."""
    if outputs <= MIXTURES:
        return torch.eye(outputs, dtype=torch.float64)
    drawn = torch.randint(2, (MIXTURES, outputs), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (2 * drawn - 1) / MIXTURES**0.5


def _wanted(
    half: Gram | WantedOutput, weight_PC: Tensor, bias_P: Tensor | None, keep_C: Tensor, mixing_PO: Tensor
) -> tuple[WantedOutput, Tensor | None]:
    """A half as evidence of the kept channels and their wanted output, mixed, which for a `Gram` is that of the whole
    weight; and the mean variance that a ridge may be relative to, None for that of the kept channels."""
    device = weight_PC.device
    if isinstance(half, WantedOutput):
        own, mixing_PO = half.narrowed(keep_C), mixing_PO.to(half.wanted_O.device)
        return replace(own, wanted_O=mixing_PO @ own.wanted_O, cross_KO=own.cross_KO @ mixing_PO.T), None
    sum_C, keep_C = half.sum_C.to(device), keep_C.to(device)
    bias_P = weight_PC.new_zeros(len(weight_PC)) if bias_P is None else bias_P
    gram_CC = half.gram_CC.to(device)
    cross_KP = gram_CC[keep_C] @ weight_PC.T + torch.outer(sum_C[keep_C], bias_P)
    inputs = Gram(half.n, sum_C[keep_C], gram_CC[keep_C][:, keep_C])
    wanted = WantedOutput(keep_C, inputs, weight_PC @ sum_C + half.n * bias_P, cross_KP)
    variance_C = (half.gram_CC.diagonal() - half.sum_C.square() / max(1, half.n)) / max(1, half.n - 1)
    return wanted, variance_C.mean().to(device)


def _error(fit: tuple[Tensor, Tensor], half: WantedOutput) -> float:
    """Mean squared error of a fit on tokens of its own, less what is the same for every fit."""
    weight_OK, bias_O = fit
    gram_KK, sum_K, wanted_O, cross_KO = (
        t.to(bias_O.device) for t in (half.inputs.gram_CC, half.inputs.sum_C, half.wanted_O, half.cross_KO)
    )
    quadratic = ((weight_OK @ gram_KK) * weight_OK).sum() - 2 * (weight_OK * cross_KO.T).sum()
    shift = 2 * bias_O @ (weight_OK @ sum_K - wanted_O) + half.inputs.n * bias_O @ bias_O
    return float(quadratic + shift) / half.inputs.n
