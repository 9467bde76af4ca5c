"""The pruned model as a checkpoint, in the simplest form that is faithful, and the proof that it reloads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.files import BEING_WRITTEN, save_tensors
from pruneexp.model import Checkpoint, Model
from pruneexp.model.checkpoint import INDEX, SINGLE, safetensors_files, stored_name
from pruneexp.model.companions import carry
from pruneexp.model.modeling_pruned import number_caches_, resize_layer_
from pruneexp.model.tensor_file import places
from pruneexp.model.weights import tied_names
from pruneexp.surgery.forms import REMOTE_CODE, Form, save_form
from pruneexp.surgery.old_keys import with_old_keys
from pruneexp.surgery.prove import BlockProof
from pruneexp.types import RunError

SHARD_BYTES = 4 * 2**30
STREAMED_SHARD_BYTES = 2**26  # what waits to be written counts as memory, so that a large layer is a shard


Complete = Callable[[Form, Path], None]  # adds to a checkpoint before it is put in its place


def _as_it_is(form: Form, folder: Path) -> None:
    """Nothing is added."""


def save(model: Model, folder: Path, form: Form | None = None, complete: Complete = _as_it_is) -> Form:
    """Writes weights, config and what lies beside them to `folder`, aside first, then renamed. `form`: another one than
    `save_form` chooses.

    Raises:
        RunError: `folder` cannot be written (read-only, disk full); nothing is left of it then.
    """
    form = form or save_form(model)
    aside = folder.with_name(folder.name + ".partial")
    with _writing(folder, aside, BaseException):  # nobody goes on from what an interrupted run had written
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _finish(ShardWriter(aside, model.family.stored_as), _tensors(model, form), model, form, complete)
        aside.rename(folder)
    return form


def _finish(
    writer: ShardWriter, tensors: Iterable[tuple[str, Tensor]], model: Model, form: Form, complete: Complete
) -> None:
    """Writes these tensors and what lies beside the weights."""
    for name, tensor in tensors:
        writer.add({name: tensor})
    writer.close()
    write_description(model, form, writer.folder)
    complete(form, writer.folder)


def write_description(model: Model, form: Form, folder: Path) -> None:
    """Everything of a checkpoint but its weights."""
    config = deepcopy(form.config)
    config.dtype = model.dtype
    if form.kind == "remote_code":
        shutil.copyfile(REMOTE_CODE, folder / REMOTE_CODE.name)
    config.save_pretrained(folder)
    file = folder / "config.json"
    written = with_old_keys(json.loads(file.read_text()))
    if form.kind == "remote_code":
        written = _readable(written, config.attribute_map, len(model.layers))
    file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    carry(model.source_folder, model.tokenizer, model.module.generation_config, folder)


def _readable(written: dict[str, Any], stock_names: Mapping[str, str], layers: int) -> dict[str, Any]:
    """The config.json so that it is no error to readers of `per_layer_config` without our code (AutoTokenizer): they
    count layers by this name, want what only some layers name as the model's own, too, and look at rotations.
    `stock_names`: what the stock class calls such values, GPT-2 `n_head`."""
    named = {name for own in written["per_layer_config"].values() for name in own}
    whole = {name: written[own] for name, own in stock_names.items() if name in named and own in written}
    written = {"num_hidden_layers": layers, **whole, **written}
    written.pop("rope_scaling", None)  # our code makes it where it is wanted
    if (written.get("rope_parameters") or {}).get("rope_type") == "longrope":  # checked by the model's number of heads
        written["allow_global_per_layer_attribute_access"] = True
    return written


def _tensors(model: Model, form: Form) -> Iterable[tuple[str, Tensor]]:
    """Every tensor to store, as the modules call it; tied ones once, and the zero biases that a stock class insists
    on."""
    tied = tied_names(model.module)
    for name, tensor in model.module.state_dict().items():
        if name not in tied:
            yield name, tensor
    for index, layer in enumerate(model.layers):
        for name, zeros in zero_biases(layer, form, model.dtype):
            yield f"{model.layers_path}.{index}.{name}", zeros


def zero_biases(layer: nn.Module, form: Form, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The biases of a decoder layer that only its stock class wants, by their names below the layer."""
    for path in form.zero_biases:
        linear: Any = layer.get_submodule(path)
        if linear.bias is None:
            yield f"{path}.bias", torch.zeros(linear.out_features, dtype=dtype)


class StreamedSave:
    """A checkpoint written layer by layer, while each shrunk layer is at hand; aside first, renamed when finished.

    `keep`: what an earlier process had written of it stays, until `restore` says whether it is of use.
    """

    def __init__(self, model: Model, folder: Path, proof: BlockProof, keep: bool = False):
        self.model, self.folder, self.proof = model, folder, proof
        self.aside = folder.with_name(folder.name + ".partial")
        self.finished = False  # it was in its place already when the process that wrote it died
        if not keep:
            self._begin()
        self.writer = ShardWriter(self.aside, model.family.stored_as, shard_bytes=STREAMED_SHARD_BYTES)

    def _begin(self) -> None:
        try:
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{self.folder}: the checkpoint cannot be written ({error.strerror or error})") from error

    def layer(self, index: int) -> None:
        """Takes up decoder layer `index` as it stands."""
        prefix = f"{self.model.layers_path}.{index}."
        layer = self.model.layers[index]
        self.proof.record(index)
        with _writing(self.folder, self.aside):
            self.writer.add({prefix + name: tensor for name, tensor in layer.state_dict().items()})

    def state(self) -> dict[str, Any]:
        """The layers so far: what they look like, where they are written, what waits to be written, what they compute.
        Together with the files, enough for another process to go on."""
        return {
            "structures": self.model.structures[: len(self.proof.outputs)],
            "shards": self.writer.shards,
            "waiting": self.writer.pending,
            "outputs": self.proof.outputs,
        }

    def restore(self, state: dict[str, Any] | None) -> bool:
        """Goes on from `state`, in a model that holds the layers as they were, where the files that it speaks of are
        there and whole; begins anew otherwise, and returns that."""
        self.finished = (self.folder / "config.json").is_file()
        if state is None or not self._there(state["shards"]):
            self.finished = False
            self._begin()
            return False
        if not self.finished:
            self.writer.restore(state["shards"], state["waiting"])
        self.proof.restore(state["outputs"])
        for layer, own, wanted in zip(self.model.layers, self.model.structures, state["structures"], strict=False):
            if own != wanted:
                resize_layer_(layer, self.model.family, wanted, self.model.head_layout)
        number_caches_(self.model.layers, self.model.family, self.model.configs)
        return True

    def _there(self, shards: list[list[str]]) -> bool:
        if self.finished:
            return all(tensors_of(self.folder / name) is not None for name in safetensors_files(self.folder))
        return all(tensors_of(self.writer.file(i)) == set(names) for i, names in enumerate(shards))

    def finish(self, complete: Complete = _as_it_is) -> Form:
        """Writes the rest and puts the checkpoint in its place; the model streams from it from here on."""
        form = save_form(self.model)
        with _writing(self.folder, self.aside):
            if self.finished:
                complete(form, self.folder)
            else:
                tensors = ((name, tensor) for name, tensor in _tensors(self.model, form) if not tensor.is_meta)
                _finish(self.writer, tensors, self.model, form, complete)
                self.aside.rename(self.folder)
        family = self.model.family
        self.model.checkpoint = Checkpoint(self.folder, self.model.module.base_model_prefix, family.stored_as)
        self.model.origin = list(range(len(self.model.layers)))
        return form

    def prove(self) -> dict[str, Any]:
        """Reloads the checkpoint layer by layer, by its own config, and compares what each layer computes."""
        return self.proof.compare(self.folder)


@contextmanager
def _writing(folder: Path, aside: Path, ended: type[BaseException] = Exception) -> Iterator[None]:
    """Inside, an error of the kind `ended` leaves nothing behind. A full or read-only disk becomes one clear line."""
    try:
        yield
    except ended as error:
        shutil.rmtree(aside, ignore_errors=True)
        # safetensors reports the disk's errors as a kind of its own, with the system's words in the message
        if isinstance(error, OSError) or "os error" in str(error).lower() or "No space left" in str(error):
            raise RunError(f"{folder}: the checkpoint cannot be written ({error})") from error
        raise


def tensors_of(file: Path) -> set[str] | None:
    """Names of the tensors in a safetensors file; None where it is not there, or not whole."""
    try:
        return set(places(file))
    except ValueError:
        return None


class ShardWriter:
    """Writes tensors as they come into safetensors shards of about 4 GiB, and the index when closed. `stored_as`: the
    family's, which gives tensors the names that checkpoints of the stock class have."""

    def __init__(self, folder: Path, stored_as: Sequence[tuple[str, str]] = (), shard_bytes: int = SHARD_BYTES):
        self.folder, self.stored_as, self.shard_bytes = folder, stored_as, shard_bytes
        self.pending: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []  # the tensors in each
        self._bytes = self._pending_bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.pending[stored_name(name, self.stored_as)] = tensor.detach().cpu().contiguous()
            self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending as one shard, down to the disk."""
        if not self.pending:
            return
        file = self.file(len(self.shards))
        save_tensors(self.pending, file, {"format": "pt"})
        with open(file, "rb+") as written:
            os.fsync(written.fileno())
        self.shards.append(list(self.pending))
        self._bytes += self._pending_bytes
        self.pending, self._pending_bytes = {}, 0

    def file(self, number: int) -> Path:
        """The file of a shard, until the writer is closed."""
        return self.folder / f"shard-{number:05d}"

    def restore(self, shards: list[list[str]], pending: dict[str, Tensor]) -> None:
        """Goes on behind shards that are written. What was written after them leaves, whole or not."""
        self.shards = [*shards]
        written = {self.file(i) for i in range(len(shards))}
        later = {path for pattern in ("shard-*", *BEING_WRITTEN) for path in self.folder.glob(pattern)} - written
        for path in later:
            path.unlink()
        self._bytes = sum(place.size for i in range(len(shards)) for place in places(self.file(i)).values())
        self.pending = dict(pending)
        self._pending_bytes = sum(tensor.numel() * tensor.element_size() for tensor in pending.values())

    def close(self) -> None:
        """Names the shards as transformers expects them."""
        self.flush()
        count = len(self.shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
        for index, name in enumerate(names):
            self.file(index).rename(self.folder / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self.shards, strict=True) for tensor in shard}
            index_json = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index_json, indent=1))
