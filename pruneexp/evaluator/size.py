"""What a model weighs and what a token costs, counted from its shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pruneexp.model.modeling_pruned import Family, experts_of, router_of


@dataclass(frozen=True)
class Size:
    """Counts; they need shapes only, so that a streamed model's (on the meta device) do.

    - "params": all parameters, tied ones once; "params/decoder": those of the decoder layers, every tensor counted
    - "bytes": all parameters, tied ones once, in their own dtype, or as they are quantised
    - "macs/token": multiply-accumulates per token in the weight matrices of the layers and in the output projection
      (tied to the embeddings or not); biases, norms and attention over the context are not counted. Of a mixture's
      experts, the share that a token is routed to
    - "kv_bytes/token": what the KV cache grows by per token, all layers, in the model's dtype
    """

    streams: ClassVar[bool] = True

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
        head = model.module.get_output_embeddings()
        return {
            "params": model.params,
            "params/decoder": model.decoder_params,
            "bytes": model.bytes,
            "macs/token": round(sum(_matrices(layer, model.family) for layer in model.layers)) + head.weight.numel(),
            "kv_bytes/token": model.kv_elements * model.dtype.itemsize,
        }


def _matrices(layer: nn.Module, family: Family) -> float:
    """Elements of the weight matrices: one multiply-accumulate each per token; an expert's, as often as it is run were
    all chosen equally often."""
    experts = experts_of(layer, family)
    if experts is None:
        return _elements(layer)
    share = router_of(layer, family).top_k / len(experts)
    return _elements(layer) - (1 - share) * _elements(experts)


def _elements(module: nn.Module) -> int:
    weights = [getattr(part, "weight", None) for part in module.modules()]
    return sum(weight.numel() for weight in weights if isinstance(weight, Tensor) and weight.ndim == 2)
