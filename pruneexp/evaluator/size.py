"""What a model weighs and what a token costs, counted from its shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Counts; they need shapes only, so that a streamed model's (on the meta device) do.

    - "params": all parameters, tied ones once; "params/decoder": those of the decoder blocks, every tensor counted
    - "bytes": all parameters, tied ones once, in their own dtype
    - "macs/token": multiply-accumulates per token in the weight matrices of the blocks and in the output projection
      (tied to the embeddings or not); biases, norms and attention over the context are not counted
    - "kv_bytes/token": what the KV cache grows by per token, all layers, in the model's dtype
    """

    streams: ClassVar[bool] = True

    def check(self) -> None:
        """Needs no files."""

    def prepare(self, tokenizer: Any, vocabulary: int) -> None:
        """Needs no windows."""

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
        parameters = list(model.module.parameters())  # PyTorch yields a shared parameter once
        decoder = {id(p): p for layer in model.layers for p in layer.parameters()}
        head = model.module.get_output_embeddings()
        return {
            "params": sum(p.numel() for p in parameters),
            "params/decoder": sum(p.numel() for p in decoder.values()),
            "bytes": sum(p.numel() * p.element_size() for p in parameters),
            "macs/token": _matrices(model.layers) + head.weight.numel(),
            "kv_bytes/token": model.kv_elements * model.dtype.itemsize,
        }


def _matrices(layers: Iterable[nn.Module]) -> int:
    """Elements of the weight matrices: one multiply-accumulate each per token."""
    weights = [getattr(module, "weight", None) for layer in layers for module in layer.modules()]
    return sum(weight.numel() for weight in weights if isinstance(weight, Tensor) and weight.ndim == 2)
