"""Exports of models that do not fit into memory: written and proved one decoder layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneexp.experiment.forecast import available_memory
from pruneexp.export.folders import exact_source
from pruneexp.model import Model
from pruneexp.model.weights import tied_names
from pruneexp.progress import progress
from pruneexp.surgery import BlockProof, Form, Padding
from pruneexp.surgery.pad import padded_layer, stock_layers
from pruneexp.surgery.save import STREAMED_SHARD_BYTES, ShardWriter, write_description, zero_biases


def wants_streaming(model: Model) -> bool:
    """Whether holding the model takes more than half of the memory that is free: once as it is stored or, for the
    proof, twice in float32."""
    return model.params * max(model.dtype.itemsize, 2 * 4) > available_memory(torch.device("cpu")) / 2


def save_streamed(model: Model, folder: Path, form: Form, padding: Padding | None) -> None:
    """Writes a streamed model in `form`, padded where asked: what lies outside the layers, then layer by layer."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, model.family.stored_as, shard_bytes=STREAMED_SHARD_BYTES)
    tied = tied_names(model.module)
    writer.add({n: t for n, t in model.module.state_dict().items() if not t.is_meta and n not in tied})
    fresh = stock_layers(model) if padding is not None else None
    for index in progress(range(len(model.layers)), "export", len(model.layers), "blocks"):
        with model.loaded(index) as own:
            layer: Any = own
            if padding is not None and fresh is not None:
                layer = padded_layer(model, index, padding.structure, fresh[index])
            part = {**layer.state_dict(), **dict(zero_biases(layer, form, model.dtype))}
            writer.add({f"{model.layers_path}.{index}.{name}": tensor for name, tensor in part.items()})
            layer.to("meta")  # a padded one holds weights of its own
    writer.close()
    write_description(model, form, folder)


def prove_streamed(checkpoint: Path, tokens_BT: Tensor, folder: Path) -> dict[str, Any]:
    """Compares what every layer computes, and the logits, in float32 (or more); each side holds one layer at a time."""
    model = exact_source(checkpoint, stream=True).load()
    proof = BlockProof(model, tokens_BT)
    for index in range(len(model.layers)):
        with model.loaded(index):
            proof.record(index)
    return proof.compare(folder)
