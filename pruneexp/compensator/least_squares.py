"""The out-projection fitted anew, in closed form, on the inputs that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from pruneexp.evidence import Gram, WantedOutput
from pruneexp.evidence.solve import check_ridge, fitted_, refitted_
from pruneexp.types import ConfigError, Site


@dataclass(frozen=True)
class LeastSquares:
    """The out-projection that comes nearest to a wanted output on the kept channels.

    Minimises, over W' [O,K] and b' [O],

        sum_t ||y_t - (W' x_t[keep] + b')||^2 + lambda ||W' - W[:,keep]||^2

    in closed form: W' = W[:,keep] + (S_yx - W[:,keep] S_xx) (S_xx + lambda I)^-1 with the covariances S of y and
    x[keep], b' from the means. lambda is `ridge` times the mean variance of x (with target=dense: of
    x[keep], all that is seen there); it holds back the change alone, so that what nothing is told about keeps its
    weights. Float64, Cholesky, rounded once to the out-projection's dtype. Where nothing leaves, weight and bias come
    back untouched.

    target=pruned: y = W x + b, what the unpruned out-projection gives on the same inputs; keeping everything is the
    identity.
    target=dense: y is what makes the hidden state behind the out-projection the dense model's, so that the
    out-projection also makes up for what was lost before it. The second walk then goes sublayer by sublayer, the dense
    model's hidden states beside the pruned one's: two plain passes and less than one more. Sequential by nature.

    Raises:
        RunError: S_xx + lambda I is singular (a ridge of 0 and constant or dependent channels).
    """

    adds_bias: ClassVar[bool] = True

    ridge: float
    target: Literal["pruned", "dense"]
    sequential: bool

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        if self.target == "dense" and not self.sequential:
            raise ConfigError("sequential=False: expected true with target=dense, which is sequential by nature")

    @property
    def evidence(self) -> type[Gram] | type[WantedOutput]:
        return WantedOutput if self.target == "dense" else Gram

    def working_bytes(self, site: Site, outputs: int) -> int:
        """What the channels that leave gave, 8 C O bytes; a `WantedOutput` has room for it."""
        return 8 * site.channels * outputs if self.target == "pruned" else 0

    def __call__(
        self, weight_OC: Tensor, bias_O: Tensor | None, evidence: Gram | WantedOutput, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Worked out in the memory of `evidence`, which is spent. Beside it 8 K O bytes are held for a `Gram`, the
        result alone for a `WantedOutput`."""
        if len(keep_C) == weight_OC.shape[1]:
            return weight_OC, bias_O
        device = weight_OC.device
        if isinstance(evidence, Gram):
            mean_C = evidence.mean_C.to(device)
            return refitted_(weight_OC, bias_O, evidence.covariance_().to(device), mean_C, keep_C, self.ridge)
        seen = evidence.narrowed(keep_C)
        mean_K, wanted_O, cov_KO = (t.to(device) for t in (seen.inputs.mean_C, seen.wanted_mean_O, seen.covariance_()))
        cov_KK = seen.inputs.covariance_().to(device)
        strength = self.ridge * cov_KK.trace() / max(1, len(keep_C))
        weight_OK = weight_OC[:, keep_C.to(device)]
        return fitted_(weight_OK, cov_KK, mean_K, cov_KO, wanted_O, strength, self.ridge)
