"""`format=gguf`: one file for llama.cpp."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pruneexp.export.folders import GGUF_FILE
from pruneexp.export.gguf_layout import BLOCK, FILE_TYPES, GgufLayout, deci_layers, stored_dtype, tensors
from pruneexp.export.gguf_proof import prove_gguf
from pruneexp.export.gguf_vocabulary import vocabulary
from pruneexp.export.llama_like import check_llama_like, rounded_note, window_note
from pruneexp.model import Model
from pruneexp.model.source import DTYPES
from pruneexp.types import ConfigError


def gguf_exporter(model: Model, dtype: str | None, multiple: int | None) -> GgufExporter:
    """What writes the file, made of the model's structure alone. `dtype`: that of the matrices; None: the model's,
    float32 for float64. `multiple`: what FFN widths are rounded up to; None: BLOCK.

    Raises ConfigError where `deci` cannot hold the model, or the package gguf is not there.
    """
    if find_spec("gguf") is None:
        raise ConfigError("format=gguf: needs the package gguf; expected pip install 'pruneexp[gguf]'")
    check_llama_like(model, "gguf")
    chosen = DTYPES[dtype] if dtype else model.dtype
    chosen = chosen if chosen in FILE_TYPES else torch.float32
    multiple = BLOCK if multiple is None else multiple
    layers = tuple(deci_layers(model, multiple))
    contents = tuple((name, tuple(t.shape), stored_dtype(t, chosen)) for name, t in tensors(model, layers))
    return GgufExporter(GgufLayout(layers, chosen, contents), rounded_note(model, layers, multiple))


@dataclass(frozen=True)
class GgufExporter:
    """`rounded`: what is said of FFN widths that were rounded up."""

    layout: GgufLayout
    rounded: str
    form: str = "gguf"

    @property
    def why(self) -> str:
        layers, dtype = len(self.layout.layers), str(self.layout.dtype).removeprefix("torch.")
        return f"architecture deci, {layers} layers, {dtype}{self.rounded}"

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self.layout.contents)

    def write(self, model: Model, folder: Path) -> list[str]:
        folder.mkdir(parents=True)
        ends = getattr(model.module.generation_config, "eos_token_id", None)  # as the generation settings name them
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        words = vocabulary(model.tokenizer, model.vocab_size, ends)
        self.layout.write(model, words, folder / GGUF_FILE)
        return [*window_note(model), *words.notes]

    def prove(self, checkpoint: Path, how: str, stream: bool, folder: Path) -> dict[str, Any]:
        return prove_gguf(self.layout, checkpoint, how, stream, folder / GGUF_FILE)
