"""Proof that the dense model is the one that its folder holds: what plain transformers makes of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneexp.model import Model, ModelSource
from pruneexp.model.given import GivenModel
from pruneexp.model.half import plain_linear
from pruneexp.types import RunError

logger = logging.getLogger("pruneexp")

POSITIONS = 8  # at the end of each window: logits are kept while the model is pruned
SMALL = 512 * 2**20  # bytes of weights up to which a model is loaded a second time in this process
# Of the logits' difference over the logits, root mean squares: what rounding explains. A head, a norm or a rotary base
# that is wrong gives 0.1 and more.
TOLERANCE, HALF, HALF_MIXTURE = 1e-3, 0.05, 0.2  # a router that rounds to the other side sends a token elsewhere


@dataclass(frozen=True)
class Dense:
    """The last logits [B, t, V] of a dense model for a few windows; `folder`: where it came from."""

    folder: Path
    trust_remote_code: bool
    tokens_BT: Tensor
    logits_BtV: Tensor
    tolerance: float

    def compared(self, plain_BtV: Tensor) -> dict[str, Any]:
        """What proof.json says of the source. `plain_BtV`: the same logits of plain transformers."""
        import transformers

        gap = plain_BtV - self.logits_BtV
        return {
            "compared": True,
            "with": f"plain transformers {transformers.__version__}",
            "max_logit_difference": gap.abs().max().item(),
            "relative_difference": (gap.square().mean() / plain_BtV.square().mean()).sqrt().item(),
            "tolerance": self.tolerance,
        }


def dense_logits(model: Model, source: ModelSource | GivenModel, tokens_BT: Tensor, prove: str) -> Dense | str:
    """What the dense model gives before anything leaves it, or why it is not compared. `prove`: as `run.prove`."""
    if prove == "off":
        return "run.prove=off"
    if model.streamed:
        return "the model is streamed; plain transformers would hold it whole"
    if isinstance(source, GivenModel):
        return "the model was given from Python: there is no source to compare it with"
    folder = source.folder()
    if not source.trust_remote_code and str(source.read_config(folder)["model_type"]).startswith("pruned_"):
        return "a pruned checkpoint, which transformers loads with the code beside it: model.trust_remote_code=true"
    if prove == "in_place" and model.params * model.dtype.itemsize > SMALL:
        return f"larger than {SMALL // 2**20} MiB: run.prove=process compares it in a process of its own"
    half = model.dtype.itemsize == 2
    tolerance = TOLERANCE if not half else HALF_MIXTURE if model.mixture else HALF
    return Dense(folder, source.trust_remote_code, tokens_BT, last_logits(model.module, tokens_BT), tolerance)


@torch.no_grad()
def last_logits(module: Any, tokens_BT: Tensor) -> Tensor:
    with plain_linear():  # what is compared is the model, not how this process multiplies
        return module(tokens_BT.to(module.device)).logits[:, -POSITIONS:].float().cpu()


def compare_in_place(dense: Dense, dtype: torch.dtype) -> dict[str, Any]:
    """Loads the source with plain transformers here, on the CPU, and compares logits."""
    from transformers import AutoModelForCausalLM

    # experts' other ways know no float64
    settings: dict[str, Any] = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    settings |= {"trust_remote_code": dense.trust_remote_code, "dtype": dtype}
    try:
        plain = AutoModelForCausalLM.from_pretrained(dense.folder, **settings).eval()
    except Exception as error:  # whatever a version of transformers has against this checkpoint
        return not_loaded(error)
    return dense.compared(last_logits(plain, dense.tokens_BT))


def not_loaded(error: object) -> dict[str, Any]:
    """What proof.json says where plain transformers does not load the source. `error`: what it said."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return {"compared": False, "why": f"plain transformers does not load it ({lines[0]})"}


def check_source(record: Mapping[str, Any], path: str) -> None:
    """Warns where plain transformers did not load the source. Raises RunError where it made another model of it.
    `record`: what proof.json says of the source; `path`: as `model.path`."""
    if record["compared"] and not record["relative_difference"] <= record["tolerance"]:  # NaN, too
        raise RunError(
            f"model.path={path!r}: the dense model is not what {record['with']} makes of it: logits differ by "
            f"{record['relative_difference']:.2g} of their size, more than {record['tolerance']:g}; so every figure of "
            "this run is another model's"
        )
    if not record["compared"] and "plain transformers does not" in record["why"]:
        logger.warning("model.path=%r: not compared with its source: %s", path, record["why"])
