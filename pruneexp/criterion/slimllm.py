"""Heads by what attention's output is without them, channels by the principal directions of the output: SlimLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruneexp.criterion.common import of_columns, wide
from pruneexp.evidence import Gram, InputMoments
from pruneexp.types import Block, ColumnScores, RemovalPath, Score, Sequential, Site, SiteWeights

_STEP = 1e-12  # by which costs rise at least, so that they keep the order


@dataclass(frozen=True)
class SlimLlm:
    """SlimLLM's importance of heads and of FFN channels (Guo et al., ICML 2025), after the released code (commit
    24881bf): the paper's text could not be read.

    Heads. With o_u = W_u x_u what head u gives, y = sum_u o_u and y_S what the heads S give together, what is lost
    without the others is 1 - mean_d |corr_t(y_S,d, y_d)|, d the hidden channels. The head whose absence costs least
    leaves, and again: a `RemovalPath`. The correlations follow from the covariance of x.
    Departs: there as many heads as are to leave are taken by their own costs at once, and then each of them is put in
    the place of each that stays, while that helps. Where one head leaves a layer, both are the same.

    Channels. With h the FFN's input, x the out-projection's, y = W x its output, v_k and l_k the eigenvectors and
    eigenvalues of the covariance of y, channel j scores, for each in-projection V,

        sum_V sqrt(sum_d (V_jd rms_t(h_d))^2) + rms_t(x_j) sqrt(sum_k (w_k v_k . W_:j)^2),  w_k = sigmoid(l_k / mean l)

    Departs: that code keeps the lowest 1 % of a layer's channels and takes those that come next.
    Gram-based, as `Obs`: 8 C^2 bytes a site. `sequential` is for local searches, which `LayerShares` is not.
    """

    evidence: ClassVar[tuple[type[Gram], type[InputMoments]]] = (Gram, InputMoments)
    few_tokens: ClassVar[bool] = True  # of a model with 344 channels a layer, 512 choose 94 % of those that 16,384 do

    sequential: Sequential

    def working_bytes(self, site: Site, outputs: int) -> int:
        """Covariances of inputs and outputs, or of the heads' outputs with each other, and what these are made of."""
        own = outputs**2 * 3 if site.kind == "mlp" else outputs * site.units**2
        return 8 * (site.channels**2 + 2 * site.channels * outputs + own)

    def __call__(self, block: Block, evidence: Mapping[str, tuple[Gram, InputMoments]]) -> dict[str, Score]:
        return {s.name: self._score(s, block.weights[s.name], *evidence[s.name]) for s in block.sites}

    def _score(self, site: Site, weights: SiteWeights, gram: Gram, read: InputMoments) -> Score:
        if site.kind == "mlp":
            return _channels(site, weights, gram, read)
        weight_OC = weights.out_projection.double()
        order_U, cost_U = removed_by_correlation(_between_units(site, weight_OC, gram))
        return RemovalPath(order_U, cost_U)


def _channels(site: Site, weights: SiteWeights, gram: Gram, read: InputMoments) -> ColumnScores:
    weight_OC = weights.out_projection.double()
    device = weight_OC.device
    cov_OO = weight_OC @ gram.covariance_CC.to(device) @ weight_OC.T
    values_O, vectors_OO = torch.linalg.eigh(cov_OO)
    values_O = values_O.abs()
    weight_O = (values_O / values_O.mean().clamp_min(1e-300)).sigmoid()
    given_C = torch.linalg.vector_norm((vectors_OO.T @ weight_OC) * weight_O[:, None], dim=0)
    score_C = given_C * (gram.gram_CC.diagonal() / gram.n).to(device).clamp_min(0).sqrt()
    square_D = read.mean_square_C.to(device)
    for rows_URD in weights.in_projections.values():
        rows_CD = wide(rows_URD.flatten(0, 1))
        score_C += (rows_CD.square() @ square_D.to(rows_CD.dtype)).sqrt()
    return of_columns(site, score_C)


def _between_units(site: Site, weight_OC: Tensor, gram: Gram) -> Tensor:
    """Covariances of what units give to each output: float64 [O, U, U]."""
    cov_CC = gram.covariance_CC.to(weight_OC.device)
    weight_OUW = weight_OC.view(-1, site.units, site.width)
    found_OUU = weight_OC.new_empty(len(weight_OC), site.units, site.units)
    for unit in range(site.units):
        columns = slice(unit * site.width, (unit + 1) * site.width)
        seen_OUW = (weight_OC[:, columns] @ cov_CC[columns]).view_as(weight_OUW)
        found_OUU[:, unit] = (seen_OUW * weight_OUW).sum(-1)
    return found_OUU


def removed_by_correlation(between_OUU: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which units leave, int64 [U], and what is lost with the first 1, 2, ... of them, float64 [U], in
    [0, 1]: each time the unit without which the output is most correlated with what all units give."""
    units = between_OUU.shape[1]
    whole_O, with_all_OU = between_OUU.sum((1, 2)), between_OUU.sum(2)
    left, order, costs = list(range(units)), [], []
    total_O, own_O = whole_O.clone(), whole_O.clone()  # cov(y_S, y) and var(y_S) of what is left
    while left:
        inside_OU = between_OUU[:, :, left].sum(2)[:, left]
        total_OU = total_O[:, None] - with_all_OU[:, left]
        own_OU = own_O[:, None] - 2 * inside_OU + between_OUU.diagonal(dim1=1, dim2=2)[:, left]
        loss_U = 1 - _correlation(total_OU, own_OU, whole_O[:, None]).mean(0)
        least = int(loss_U.argmin())
        total_O, own_O = total_OU[:, least], own_OU[:, least]
        costs.append(loss_U[least].item() if len(left) > 1 else 1.0)
        order.append(left.pop(least))
    steps_U = _STEP * torch.arange(units, dtype=torch.float64)  # what is lost may be less with one more
    return torch.tensor(order), torch.tensor(costs, dtype=torch.float64).cummax(0).values + steps_U


def _correlation(covariance: Tensor, variance: Tensor, whole: Tensor) -> Tensor:
    """Sizes of correlations; 1 where the output never changes, 0 where only what is left does not."""
    scale = (variance.clamp_min(0) * whole).sqrt()
    size = covariance.abs() / scale.clamp_min(1e-300)
    return torch.where(whole > 0, torch.where(scale > 0, size, 0.0), 1.0).clamp_max(1.0)
