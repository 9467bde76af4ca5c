"""Loss probes of masked structures: the oracle that searches are lent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pruneexp.calibrate.bookmark import Meter
from pruneexp.model import Call, Model, divergences, next_token_losses
from pruneexp.model.sites import experts_name
from pruneexp.progress import progress
from pruneexp.surgery import masked_layer
from pruneexp.types import Candidate, Objective, Plan, Site

MOST_APART = 8  # of the predictions, one in so many is compared at least


class Probe:
    """The oracle lent to searches: losses of candidate structures on `tokens_NT`, by masking the model in place.

    Candidates that begin alike share the layers they have in common: each layer is run once for all candidates that are
    the same up to it, batch by batch. `passes` counts what was run so far, in plain passes of all decoder layers over
    the calibration windows, of which there are `windows` (None: these are all). objective=kl: the divergence from the
    predictions of the model as it stands, whose last hidden states are kept on the CPU once a batch is asked for; where
    an output head costs more than all layers (a small model of a large vocabulary), not every prediction is compared,
    so that it costs no more. `fits`: what `trial` asks. The windows are split into `least_batches` or more, where there
    are as many.
    """

    def __init__(
        self,
        model: Model,
        tokens_NT: Tensor,
        meter: Meter,
        objective: Objective = "next_token",
        windows: int | None = None,
        fits: Callable[[Plan, float], Candidate] | None = None,
        least_batches: int = 1,
    ):
        self.model, self.tokens_NT, self.meter = model, tokens_NT, meter
        self.batch_size = at_once(len(tokens_NT), model.batch_size, least_batches)
        self.objective, self.windows, self.fits = objective, windows or len(tokens_NT), fits
        self.passes, self._expected, self._shown = 0.0, 0.0, 0
        self._bar: Iterator[int] = iter(())
        self.apart = predictions_apart(model) if objective == "kl" else 1
        self._dense: dict[int, Tensor] = {}  # last hidden states of the model as it stands, by batch

    def show(self, stage: str, passes: float) -> None:
        """Shows from here on how far `stage` has come, which spends about so many passes, until `close`."""
        self._expected, self._bar = passes, iter(progress(range(100), stage, 100, "%"))

    def close(self) -> None:
        """Takes the progress bar away."""
        self._expected, self._bar = 0.0, iter(())

    @property
    def batches(self) -> int:
        """How many batches `losses(batch=...)` can choose from."""
        return -(-len(self.tokens_NT) // self.batch_size)

    def trial(self, plan: Plan, share: float) -> Candidate:
        """The structure as the run will compensate it, fitted to a share of the windows that do not decide."""
        if self.fits is None:
            return Candidate(plan)
        before = self.meter.forward
        candidate = self.fits(plan, share)
        self.passes += self.meter.forward - before
        self._show()
        return candidate

    @torch.no_grad()
    def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
        """Mean loss in nats per token of each candidate, float64 [len(candidates)]."""
        batches, sites = self.tokens_NT.split(self.batch_size), self.model.sites()
        keys = [self._layer_keys(candidate, sites) for candidate in candidates]
        sums, windows = torch.zeros(len(candidates), dtype=torch.float64), 0
        for number in range(len(batches)) if batch is None else [batch]:
            tokens_BT = batches[number]
            hidden_BTD, calls = self.model.enter(tokens_BT)
            dense_BTV = self._predicted(number, tokens_BT, hidden_BTD, calls) if self.objective == "kl" else None
            runs = self._run(candidates, keys, calls, hidden_BTD)
            del hidden_BTD
            for alike, last_BTD in runs:
                sums[alike] += self._loss(self._logits(tokens_BT, last_BTD), tokens_BT, dense_BTV)
                del last_BTD  # before the next ones are made
            windows += len(tokens_BT)
        return sums / windows

    def _run(
        self, candidates: Sequence[Candidate], keys: Sequence[Sequence[Any]], calls: list[Call], hidden_BTD: Tensor
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Last hidden states, of a batch, of the candidates that are the same in all layers. Of candidates that are the
        same up to a layer, it is run once for each of its variants, which their `keys` tell apart; the states in front
        of it are held until the last of these has run."""
        model = self.model
        waiting = [(0, hidden_BTD, _alike(keys, 0, range(len(candidates))))] if candidates else []
        while waiting:
            index, hidden_BTD, variants = waiting[-1]
            same = variants.pop(0)
            if not variants:
                waiting.pop()
            first = candidates[same[0]]
            with masked_layer(model, index, first.plan, first.out_projections) as layer:
                hidden_BTD = model.run_layer(layer, hidden_BTD, calls[index])
            self._spend(len(hidden_BTD) / len(model.layers))
            if index + 1 < len(model.layers):
                waiting.append((index + 1, hidden_BTD, _alike(keys, index + 1, same)))
            else:
                yield same, hidden_BTD
            del hidden_BTD

    def _predicted(self, number: int, tokens_BT: Tensor, hidden_BTD: Tensor, calls: list[Call]) -> Tensor:
        """Logits of the model as it stands."""
        if number not in self._dense:
            for index, layer in enumerate(self.model.layers):
                hidden_BTD = self.model.run_layer(layer, hidden_BTD, calls[index])
            self._spend(len(tokens_BT))
            self._dense[number] = hidden_BTD.cpu()
        return self._logits(tokens_BT, self._dense[number].to(hidden_BTD.device))

    def _logits(self, tokens_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Of the predictions that are compared."""
        return self.model.leave(tokens_BT[:, :: self.apart], hidden_BTD[:, :: self.apart])

    @staticmethod
    def _loss(logits_BTV: Tensor, tokens_BT: Tensor, dense_BTV: Tensor | None) -> float:
        """Sum over windows of their mean loss."""
        if dense_BTV is None:
            return next_token_losses(logits_BTV, tokens_BT).mean(1).sum().item()
        return sum(divergences(*of_window).mean().item() for of_window in zip(logits_BTV, dense_BTV, strict=True))

    def _spend(self, windows: float) -> None:
        """Counts whole passes of so many windows."""
        self.passes += windows / self.windows
        self.meter.forward += windows / self.windows
        self._show()

    def _show(self) -> None:
        while self._expected and self._shown < min(99, 100 * self.passes / self._expected):
            self._shown += 1
            next(self._bar, None)

    def _layer_keys(self, candidate: Candidate, sites: Sequence[Site]) -> list[Any]:
        """What tells a candidate's layers from another's: units kept, and the very tensors of its out-projections."""
        keys: list[list[Any]] = [[] for _ in self.model.layers]
        for index, own in enumerate(keys):
            block = candidate.plan.sites.get(f"{self.model.layers_path}.{index}")
            if block is not None and not block.kept:
                own.append("removed")
            experts = candidate.plan.sites.get(experts_name(self.model.family, f"{self.model.layers_path}.{index}"))
            own.append(experts and experts.kept)
        for site in sites:
            plan = candidate.plan.sites.get(site.name)
            out_projection = candidate.out_projections.get(site.name)
            keys[site.layer].append((plan, out_projection and (id(out_projection[0]), id(out_projection[1]))))
        return [tuple(own) for own in keys]


def _alike(keys: Sequence[Sequence[Any]], index: int, numbers: Iterable[int]) -> list[list[int]]:
    """The candidates of these numbers, those of one variant of a layer together."""
    variants: dict[Any, list[int]] = {}
    for number in numbers:
        variants.setdefault(keys[number][index], []).append(number)
    return list(variants.values())


def at_once(windows: int, batch_size: int, least_batches: int) -> int:
    """Windows in a batch, where there are to be so many batches of them."""
    return max(1, min(batch_size, windows // least_batches))


def predictions_apart(model: Model) -> int:
    """1: all predictions are compared, 2: every second one, ...: the fewest that leave the output head no dearer than
    all layers, in multiplications, or an eighth of them."""
    head = model.vocab_size * model.config.hidden_size
    return min(MOST_APART, max(1, -(-head // max(1, model.decoder_params))))
