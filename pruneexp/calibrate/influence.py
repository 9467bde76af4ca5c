"""How the loss answers to gates on units when weights are tuned anew: second derivatives, in a model held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pruneexp.calibrate.bookmark import Meter
from pruneexp.calibrate.gradients import differentiable, site_modules
from pruneexp.evidence import BatchDerivatives, Influence
from pruneexp.model import Model
from pruneexp.model.sites import site_parts
from pruneexp.progress import progress
from pruneexp.types import RunError, Site

Loss = Callable[[Tensor, Tensor], Tensor]  # gates [B, U] and a batch of B windows -> their mean loss
Spend = Callable[[float, float], None]  # forward and backward passes
Tensors = list[Tensor]


def influence_evidence(model: Model, tokens_NT: Tensor, kind: Influence, meter: Meter) -> dict[str, Any]:
    """Evidence for every site, by name. No weight is written to, and `requires_grad` is as before.

    Passes over the windows looked at, for H along one direction: two forward and two backward by finite differences;
    one forward and three backward by differentiating twice (the second backward pass goes through both). together:
    that twice, and once more for every step of conjugate gradients; apart: once, and once more for every step, for
    every unit. Memory: beside the model seven times the weights w, five with inverse=damping.

    Raises:
        RunError: a streamed model, a loss that is NaN or Inf, half precision with finite differences.
    """
    if model.streamed:
        raise RunError("second derivatives need the whole model in memory: expected model.stream=false")
    if kind.wide and model.dtype not in (torch.float32, torch.float64):
        raise RunError(
            f"model.dtype={str(model.dtype).removeprefix('torch.')}: its rounding hides finite differences; "
            "expected float32 or float64, or criterion.hessian=exact"
        )
    sites = model.sites()
    weights = _weights(model, kind)
    survivors = _survivors(model, sites, weights)
    evidence = {site.name: kind.empty(site) for site in sites}
    chosen_NT = tokens_NT[: kind.windows]
    parts = chosen_NT.tensor_split(min(kind.batches, len(chosen_NT)))

    def spend(share: float, forward: float, backward: float) -> None:
        meter.forward += share * forward
        meter.backward += share * backward

    with differentiable(weights), torch.enable_grad(), _gated(model, sites) as loss:
        for part_NT in parts:
            batches = part_NT.split(model.batch_size)
            used = partial(spend, len(part_NT) / len(tokens_NT))
            units = sum(site.units for site in sites)
            landscape = Landscape(loss, batches, weights, units, kind, model.device, used)
            derivatives = landscape.together() if kind.directions == "together" else landscape.apart(survivors)
            start = 0
            for site in sites:
                evidence[site.name] = evidence[site.name].update_(derivatives.part(start, site.units))
                start += site.units
    return evidence


class Landscape:
    """A mean loss over windows around gates of 1 and the weights as they are: L(m, w)."""

    def __init__(
        self,
        loss: Loss,
        batches: Sequence[Tensor],
        weights: Sequence[Tensor],
        units: int,
        kind: Influence,
        device: torch.device,
        spend: Spend,
    ):
        self.loss, self.batches, self.weights, self.units = loss, batches, list(weights), units
        self.kind, self.device, self.spend = kind, device, spend
        self.windows = sum(len(batch) for batch in batches)
        self.wide = torch.promote_types(self.weights[0].dtype, torch.float32)

    def together(self) -> BatchDerivatives:
        """Row sums: the derivatives along a move of all gates at once."""
        _, u, slopes_NU = self.along(gates_U=torch.ones(self.units, dtype=self.wide, device=self.device))
        retraining_U, _, _ = self.along(weights=self._answer(u, None))
        curvature_U = slopes_NU.square().sum(0) * self.windows  # each window's slope is its share of the mean's
        return BatchDerivatives(slopes_NU.sum(0), curvature_U, retraining_U.double().cpu())

    def apart(self, survivors: Callable[[int, Tensors], None]) -> BatchDerivatives:
        """Diagonals: gate by gate. `survivors(unit, tensors)` sets the unit's own entries of tensors like w to 0."""
        derivatives: list[tuple[Tensor, Tensor, Tensor]] = []
        for unit in progress(range(self.units), "second derivatives", self.units, "units"):
            along_U = torch.zeros(self.units, dtype=self.wide, device=self.device)
            along_U[unit] = 1
            hessian_U, u, slopes_NU = self.along(gates_U=along_U)
            mask = partial(survivors, unit)
            mask(u)
            derivatives.append((slopes_NU.sum(0)[unit], hessian_U[unit], _dot(u, self._answer(u, mask))))
        slope_U, curvature_U, retraining_U = (
            torch.stack(each).double().cpu() for each in zip(*derivatives, strict=True)
        )
        return BatchDerivatives(slope_U, curvature_U, retraining_U)

    def along(self, gates_U: Tensor | None = None, weights: Tensors | None = None) -> tuple[Tensor, Tensors, Tensor]:
        """H times a direction of the gates or of the weights: its gates [U], its weights, and each window's share of
        dL/dm, float64 [N, U] on the CPU (of a direction of the gates, else without meaning)."""
        size = _norm([gates_U] if weights is None else weights)
        if size == 0:
            zero = torch.zeros(self.units, dtype=self.wide, device=self.device)
            return zero, [torch.zeros_like(w, dtype=self.wide) for w in self.weights], torch.zeros(1, self.units)
        if self.kind.hessian == "exact":
            return self._twice(gates_U, weights)
        move = self.kind.step / size
        ends = []
        for sign in (1, -1):
            gates = None if gates_U is None else 1 + sign * move * gates_U
            with _moved(self.weights, weights, sign * move):
                ends.append(self._gradient(gates))
        (up_NU, up), (down_NU, down) = ends
        for a, b in zip(up, down, strict=True):
            a.sub_(b).div_(2 * move)
        found_U = (up_NU - down_NU).sum(0) / (2 * move)
        return found_U.to(self.device, self.wide), up, (up_NU + down_NU) / 2

    def _gradient(self, gates_U: Tensor | None) -> tuple[Tensor, Tensors]:
        slopes, total = [], [torch.zeros_like(w, dtype=self.wide) for w in self.weights]
        for number in range(len(self.batches)):
            gates_BU, loss = self._loss(number, gates_U)
            slope_BU, *gradients = torch.autograd.grad(loss, [gates_BU, *self.weights], materialize_grads=True)
            slopes.append(slope_BU.double().cpu())
            for sum_, each in zip(total, gradients, strict=True):
                sum_.add_(each)
        self.spend(1, 1)
        return torch.cat(slopes), total

    def _twice(self, gates_U: Tensor | None, weights: Tensors | None) -> tuple[Tensor, Tensors, Tensor]:
        found_U = torch.zeros(self.units, dtype=self.wide, device=self.device)
        slopes, total = [], [torch.zeros_like(w, dtype=self.wide) for w in self.weights]
        for number in range(len(self.batches)):
            with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
                gates_BU, loss = self._loss(number, None)
                by = [gates_BU] if weights is None else self.weights
                first = torch.autograd.grad(loss, by, create_graph=True, materialize_grads=True)
                towards = [gates_U] if gates_U is not None else weights or ()
                slopes_ = [(g * d).sum().to(self.device) for g, d in zip(first, towards, strict=True)]
                slope = torch.stack(slopes_).sum()
                second_BU, *second = torch.autograd.grad(slope, [gates_BU, *self.weights], materialize_grads=True)
            slopes.append((first[0] if weights is None else torch.zeros_like(gates_BU)).detach().double().cpu())
            found_U += second_BU.sum(0)
            for sum_, each in zip(total, second, strict=True):
                sum_.add_(each)
        self.spend(1, 3)
        return found_U, total, torch.cat(slopes)

    def _loss(self, number: int, gates_U: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gates of their own for each window of a batch, and the batch's part of the mean loss."""
        batch = self.batches[number]
        base_U = torch.ones(self.units, dtype=self.wide, device=self.device) if gates_U is None else gates_U
        gates_BU = base_U.expand(len(batch), -1).clone().requires_grad_(True)
        loss = self.loss(gates_BU, batch) * (len(batch) / self.windows)
        if not torch.isfinite(loss):
            raise RunError(f"the calibration loss is NaN or Inf (batch {number})")
        return gates_BU, loss

    def _answer(self, u: Tensors, mask: Callable[[Tensors], None] | None) -> Tensors:
        """(H_ww + lambda I)^-1 u, on the entries of w that `mask` leaves."""
        if self.kind.inverse == "damping":
            return [each / self.kind.damping for each in u]
        answer, left = [torch.zeros_like(each) for each in u], [each.clone() for each in u]
        towards, lost = [each.clone() for each in u], _dot(u, u)
        enough, damping = 1e-20 * lost, None  # of the squared residual
        for _ in range(self.kind.steps):
            if lost <= enough:
                break
            _, bent, _ = self.along(weights=towards)
            if mask is not None:
                mask(bent)
            curvature, length = _dot(towards, bent), _dot(towards, towards)
            damping = self.kind.damping * abs(curvature) / length if damping is None else damping
            curvature = curvature + damping * length
            if curvature <= 0:
                break
            stride = lost / curvature
            before, lost = lost, torch.zeros_like(lost)
            for a, r, p, h in zip(answer, left, towards, bent, strict=True):
                a.add_(p * stride)
                r.sub_((h + damping * p) * stride)
                lost += r.double().square().sum().cpu()
            for r, p in zip(left, towards, strict=True):
                p.mul_(lost / before).add_(r)
        return answer


def _dot(a: Tensors, b: Tensors) -> Tensor:
    """Float64, on the CPU: tensors of a model over several devices lie where their layers do."""
    return torch.stack([(x.double() * y.double()).sum().cpu() for x, y in zip(a, b, strict=True)]).sum()


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return sum(t.double().square().sum().item() for t in tensors if t is not None) ** 0.5


@contextmanager
def _moved(weights: Sequence[Tensor], by: Tensors | None, step: float) -> Iterator[None]:
    """Moved copies stand in for the weights, which are never written to: afterwards they are the same to the bit."""
    own = [w.data for w in weights]
    try:
        if by is not None:
            for weight, each in zip(weights, by, strict=True):
                weight.data = weight.data + (step * each).to(weight.dtype)
        yield
    finally:
        for weight, data in zip(weights, own, strict=True):
            weight.data = data


@contextmanager
def _gated(model: Model, sites: Sequence[Site]) -> Iterator[Loss]:
    """The model's loss as a function of gates on all units, window by window."""
    gates: list[Tensor] = []

    def scale(start: int, site: Site, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x, own_BU = args[0], gates[0][:, start : start + site.units].to(args[0])
        x_BTC = x.reshape(len(own_BU), -1, x.shape[-1])  # OPT flattens windows in front of its FFN
        return ((x_BTC * own_BU.repeat_interleave(site.width, 1)[:, None]).reshape(x.shape),)

    def loss(gates_BU: Tensor, tokens_BT: Tensor) -> Tensor:
        gates[:] = [gates_BU]
        try:
            return model.mean_loss(tokens_BT)
        finally:
            gates.clear()

    with ExitStack() as hooks:
        start = 0
        for site in sites:
            out_projection = model.layers[site.layer].get_submodule(site_parts(model.family, site)[1])
            hooks.enter_context(out_projection.register_forward_pre_hook(partial(scale, start, site)))
            start += site.units
        yield loss


def _weights(model: Model, kind: Influence) -> list[nn.Parameter]:
    coupled, layers = kind.weights == "coupled", range(len(model.layers))
    weights = [m.get_parameter("weight") for index in layers for _, m in site_modules(model, index, coupled)]
    return list({id(weight): weight for weight in weights}.values())


def _survivors(model: Model, sites: Sequence[Site], weights: Sequence[Tensor]) -> Callable[[int, Tensors], None]:
    """What sets the entries of one unit (counted over all sites) to 0, in tensors that stand for `weights`."""
    owned = [(site, unit) for site in sites for unit in range(site.units)]

    def silence(number: int, tensors: Tensors) -> None:
        site, unit = owned[number]
        by_parameter = {id(w): each for w, each in zip(weights, tensors, strict=True)}
        block = model.block(site.layer, read=lambda p: by_parameter.get(id(p), torch.zeros(p.shape)))
        own = block.weights[site.name]
        own.out_projection[:, unit * site.width : (unit + 1) * site.width] = 0
        for rows_URD in own.in_projections.values():
            rows_URD[unit] = 0

    return silence
