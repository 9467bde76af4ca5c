"""The out-projection fitted anew, in closed form, on the inputs that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from pruneexp.evidence import Gram, Halved, Halves, WantedOutput
from pruneexp.evidence.held_out import choosing_bytes, chosen_ridge
from pruneexp.evidence.solve import RidgePer, check_ridge, fitted_to_, refitted_
from pruneexp.types import ConfigError, Site


@dataclass(frozen=True)
class LeastSquares:
    """The out-projection that comes nearest to a wanted output on the kept channels.

    Minimises, over W' [O,K] and b' [O],

        sum_t ||y_t - (W' x_t[keep] + b')||^2 + tr(D L D^T), D = W' - W[:,keep]

    in closed form: W' = W[:,keep] + (S_yx - W[:,keep] S_xx) (S_xx + L)^-1 with the covariances S of y and x[keep], b'
    from the means. L is diagonal: `ridge` times each channel's own variance (ridge_per=channel), by which the fit does
    not depend on how channels are scaled, or times the mean variance of x (ridge_per=site; with target=dense: of
    x[keep], all that is seen there). It holds back the change alone, so that what nothing is told about keeps its
    weights. ridge=auto: each site's own, `chosen_ridge` of fits to one half of the windows, judged by the other; the
    weights are then fitted to all. Float64, Cholesky, rounded once to the out-projection's dtype. Where nothing leaves,
    weight and bias come back untouched.

    target=pruned: y = W x + b, what the unpruned out-projection gives on the same inputs; keeping everything is the
    identity.
    target=dense: y is what makes the hidden state behind the out-projection the dense model's, so that the
    out-projection also makes up for what was lost before it. The second walk then goes sublayer by sublayer, the dense
    model's hidden states beside the pruned one's: two plain passes and less than one more. Sequential by nature.
    target=auto: dense where it can be, which takes `sequential` and a model whose hidden states are plain sums of what
    out-projections give (no norm behind a sublayer, no mixture of experts); else pruned.

    Raises:
        RunError: S_xx + L is singular (a ridge of 0 and constant or dependent channels).
    """

    adds_bias: ClassVar[bool] = True

    ridge: float | Literal["auto"]
    target: Literal["auto", "pruned", "dense"]
    sequential: bool
    ridge_per: RidgePer

    def __post_init__(self) -> None:
        if not isinstance(self.ridge, str):
            check_ridge(self.ridge)
        if self.target == "dense" and not self.sequential:
            raise ConfigError("sequential=False: expected true with target=dense, which is sequential by nature")

    @property
    def evidence(self) -> Any:
        kind = WantedOutput if self.settled(True).target == "dense" else Gram
        return Halves(kind) if self.ridge == "auto" else kind

    def settled(self, sums: bool) -> LeastSquares:
        """With the target that it has for a model whose hidden states are such `sums`, or are none."""
        if self.target != "auto":
            return self
        return replace(self, target="dense" if sums and self.sequential else "pruned")

    def working_bytes(self, site: Site, outputs: int) -> int:
        """What the channels that leave gave, 8 C O bytes; a `WantedOutput` has room for it. ridge=auto: what
        choosing takes, too."""
        room = 8 * site.channels * outputs if self.target == "pruned" else 0
        return room + (choosing_bytes(site.channels, outputs) if self.ridge == "auto" else 0)

    def __call__(
        self, weight_OC: Tensor, bias_O: Tensor | None, evidence: Gram | WantedOutput | Halved, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Mapping[str, float]]:
        """Worked out in the memory of `evidence`, which is spent. Beside it 8 K O bytes are held for a `Gram`, the
        result alone for a `WantedOutput`."""
        if len(keep_C) == weight_OC.shape[1]:
            return weight_OC, bias_O
        if isinstance(self.ridge, str):
            assert isinstance(evidence, Halved)
            ridge = chosen_ridge(weight_OC, bias_O, evidence, keep_C, self.ridge_per)
            return *self._fitted(weight_OC, bias_O, evidence.whole, keep_C, ridge), {"ridge": ridge}
        assert not isinstance(evidence, Halved)
        return self._fitted(weight_OC, bias_O, evidence, keep_C, self.ridge)

    def _fitted(
        self, weight_OC: Tensor, bias_O: Tensor | None, evidence: Gram | WantedOutput, keep_C: Tensor, ridge: float
    ) -> tuple[Tensor, Tensor]:
        device = weight_OC.device
        if isinstance(evidence, Gram):
            mean_C, cov_CC = evidence.mean_C.to(device), evidence.covariance_().to(device)
            return refitted_(weight_OC, bias_O, cov_CC, mean_C, keep_C, ridge, self.ridge_per)
        return fitted_to_(evidence.narrowed(keep_C), weight_OC[:, keep_C.to(device)], ridge, self.ridge_per)
