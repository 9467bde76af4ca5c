"""The pruned model as a checkpoint, in the simplest form that is faithful, and the proof that it reloads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneexp.model import Checkpoint, Model
from pruneexp.model.checkpoint import stored_name
from pruneexp.surgery.forms import REMOTE_CODE, Form, save_form
from pruneexp.surgery.prove import BlockProof
from pruneexp.types import RunError

SHARD_BYTES = 4 * 2**30
STREAMED_SHARD_BYTES = 2**26  # what waits to be written counts as memory, so that a large layer is a shard


def save(model: Model, folder: Path, form: Form | None = None) -> Form:
    """Writes weights, config, tokenizer and generation settings to `folder`, aside first, then renamed. `form`: another
    one than `save_form` chooses.

    Raises:
        RunError: `folder` cannot be written (read-only, disk full); nothing is left of it then.
    """
    form = form or save_form(model)
    aside = folder.with_name(folder.name + ".partial")
    with _writing(folder, aside):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        writer = ShardWriter(aside, model.family.stored_as)
        for name, tensor in _tensors(model, form):
            writer.add({name: tensor})
        writer.close()
        write_description(model, form, aside)
        aside.rename(folder)
    return form


def write_description(model: Model, form: Form, folder: Path) -> None:
    """Everything of a checkpoint but its weights."""
    config = deepcopy(form.config)
    config.dtype = model.dtype
    if form.kind == "remote_code":
        shutil.copyfile(REMOTE_CODE, folder / REMOTE_CODE.name)
    config.save_pretrained(folder)
    if form.kind == "remote_code":  # readers of `per_layer_config` without our code (AutoTokenizer) count by this name
        file = folder / "config.json"
        written = {"num_hidden_layers": len(model.layers), **json.loads(file.read_text())}
        file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    if model.module.generation_config is not None:
        model.module.generation_config.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def _tensors(model: Model, form: Form) -> Iterable[tuple[str, Tensor]]:
    """Every tensor to store, as the modules call it; tied ones once, and the zero biases that a stock class insists
    on."""
    tied = set(model.module.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    for name, tensor in model.module.state_dict().items():
        if name not in tied:
            yield name, tensor
    for index, layer in enumerate(model.layers):
        for path in form.zero_biases:
            linear: Any = layer.get_submodule(path)
            if linear.bias is None:
                zeros = torch.zeros(linear.out_features, dtype=model.dtype)
                yield f"{model.layers_path}.{index}.{path}.bias", zeros


class StreamedSave:
    """A checkpoint written layer by layer, while each shrunk layer is at hand; aside first, renamed when finished."""

    def __init__(self, model: Model, folder: Path, proof: BlockProof):
        self.model, self.folder, self.proof = model, folder, proof
        self.aside = folder.with_name(folder.name + ".partial")
        try:
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{folder}: the checkpoint cannot be written ({error.strerror or error})") from error
        self.writer = ShardWriter(self.aside, model.family.stored_as, shard_bytes=STREAMED_SHARD_BYTES)

    def layer(self, index: int) -> None:
        """Takes up decoder layer `index` as it stands."""
        prefix = f"{self.model.layers_path}.{index}."
        layer = self.model.layers[index]
        self.proof.record(index)
        with _writing(self.folder, self.aside):
            self.writer.add({prefix + name: tensor for name, tensor in layer.state_dict().items()})

    def finish(self) -> Form:
        """Writes the rest and puts the checkpoint in its place; the model streams from it from here on."""
        form = save_form(self.model)
        with _writing(self.folder, self.aside):
            for name, tensor in _tensors(self.model, form):
                if not tensor.is_meta:
                    self.writer.add({name: tensor})
            self.writer.close()
            write_description(self.model, form, self.aside)
            self.aside.rename(self.folder)
        family = self.model.family
        self.model.checkpoint = Checkpoint(self.folder, self.model.module.base_model_prefix, family.stored_as)
        self.model.origin = list(range(len(self.model.layers)))
        return form

    def discard(self) -> None:
        """Removes what has been written of a checkpoint that will not be finished."""
        shutil.rmtree(self.aside, ignore_errors=True)

    def prove(self) -> dict[str, Any]:
        """Reloads the checkpoint block by block, by its own config, and compares what each block computes."""
        return self.proof.compare(self.folder)


@contextmanager
def _writing(folder: Path, aside: Path) -> Iterator[None]:
    """Whatever goes wrong while writing leaves nothing behind; a full or read-only disk becomes one clear line."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        # safetensors reports the disk's errors as a kind of its own, with the system's words in the message
        if isinstance(error, OSError) or "os error" in str(error).lower() or "No space left" in str(error):
            raise RunError(f"{folder}: the checkpoint cannot be written ({error})") from error
        raise


class ShardWriter:
    """Writes tensors as they come into safetensors shards of about 4 GiB, and the index when closed. `stored_as`: as
    the family's, for the names to be those of the stock class's checkpoints."""

    def __init__(self, folder: Path, stored_as: Sequence[tuple[str, str]] = (), shard_bytes: int = SHARD_BYTES):
        self.folder, self.stored_as, self.shard_bytes = folder, stored_as, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self._pending_bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._pending[stored_name(name, self.stored_as)] = tensor.detach().cpu().contiguous()
            self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending as one shard."""
        from safetensors.torch import save_file

        if not self._pending:
            return
        save_file(self._pending, self.folder / f"shard-{len(self._shards):05d}", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Names the shards as transformers expects them."""
        self.flush()
        count = len(self._shards)
        names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        for index, name in enumerate(names):
            (self.folder / f"shard-{index:05d}").rename(self.folder / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            index_json = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1))
