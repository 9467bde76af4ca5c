"""Where a model comes from: a folder, the Hub, or the one that travels with the package."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pruneexp.fingerprint import FileState, file_state
from pruneexp.model import checks, companions, hub, modeling_pruned, tensor_file
from pruneexp.model.architecture import model_class_of, skeleton, stock_of
from pruneexp.model.checkpoint import Checkpoint, changes, fingerprints, holds_weights
from pruneexp.model.free_gpu import held_gpu
from pruneexp.model.gguf_source import RECORD, check_gguf, convert, converted_folder, is_gguf
from pruneexp.model.loaded import Model
from pruneexp.model.placement import AUTO, connect_, devices_of, free_bytes, placed
from pruneexp.model.ties import settle_ties_
from pruneexp.model.weights import check_finite, load_into_, load_outside_, stored_tensors
from pruneexp.progress import progress
from pruneexp.types import ConfigError, RunError, require_least

logger = logging.getLogger("pruneexp")

EMBEDDED = "embedded:"  # path prefix of the models inside the package
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Described:
    """A model as its texts see it. `max_length`: the longest window it was made for (None: any); `hard_limit`: longer
    ones have no positions at all."""

    tokenizer: Any  # None where the checkpoint has none
    vocab_size: int
    max_length: int | None
    hard_limit: bool
    family: modeling_pruned.Family


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint and how to hold it.

    `path`: a folder with config.json and safetensors, a GGUF file, a Hub id, or "embedded:NAME". `dtype` "auto": the
    one that config.json names, float32 where it names none, and for float16 on a CPU (which computes that slowly and
    badly). `device` "auto": the decoder layers in order over all visible GPUs (the CPU where there is none);
    "cuda:any": see `on_a_device`. `stream`: the decoder layers are read from their files one at a time instead of being
    held. `batch_size`: windows per forward pass.
    """

    name: str
    path: str
    revision: str | None
    dtype: str
    device: str
    stream: bool
    trust_remote_code: bool
    batch_size: int

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r}: expected auto or one of {', '.join(DTYPES)}")
        require_least(self, 1, "batch_size")
        if self.device == AUTO:
            if self.stream:
                raise ConfigError(
                    "device='auto': expected cpu, cuda, cuda:N or cuda:any with model.stream=true, which needs one"
                )
        elif not re.fullmatch(r"cpu|cuda(:(\d+|any))?", self.device):
            raise ConfigError(f"device={self.device!r}: expected cpu, cuda, cuda:N, cuda:any or auto")

    def check(self, weights: bool = True) -> None:
        """Everything that can be told from files and the machine without loading a weight, or transformers. `weights`:
        they must be there; those that are there must be whole. Raises ConfigError."""
        device, count = devices_of(self.device)[0], torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            has = f"{count} CUDA device{'' if count == 1 else 's'}"
            expected = "cpu" if count == 0 else f"cpu, auto, cuda:any or cuda:0 to cuda:{count - 1}"
            raise ConfigError(f"model.device={self.device!r}: this machine has {has}; expected {expected}")
        folder = self.local_folder()
        if folder is None:
            return
        self.read_config(folder)
        if weights or holds_weights(folder):
            Checkpoint(folder)  # reads the files' headers: what is damaged or cut short is found here

    def local_folder(self) -> Path | None:
        """The checkpoint's folder where it is there: None for a Hub id, and for a GGUF file that no run has read."""
        if self.path.startswith(EMBEDDED):
            folder = Path(__file__).parent.parent / "embedded" / self.path.removeprefix(EMBEDDED)
        else:
            folder = Path(os.path.expanduser(self.path))
        if self.path and os.path.isdir(folder):  # unlike Path's own, False for whatever can be none
            return folder
        if is_gguf(folder):
            check_gguf(folder, self.path, self.stream)
            made = converted_folder(folder, self.dtype)
            return made if made.is_dir() else None
        checks.check_hub_id(self.path, os.path.isfile(folder))
        return None

    def read_config(self, folder: Path) -> dict[str, Any]:
        """config.json as it stands, checked. Raises ConfigError."""
        return checks.read_config(folder, self.path)

    def describe(self) -> Described:
        """What a run must know of the model to prepare its texts, without a weight."""
        folder = self.folder(weights=False)
        config = self.stock_config(folder)
        family = modeling_pruned.FAMILIES[config.model_type]
        limit = getattr(config, "max_position_embeddings", None)
        return Described(self.tokenizer(folder), config.vocab_size, limit, family.learned_positions, family)

    def outline(self) -> Model:
        """The model's structure, from the config alone: every tensor on the meta device. Where weights lie in the
        folder, their headers are held against it. One object as long as no file there changes: to be read only. Raises
        ConfigError."""
        local = self.local_folder()
        folder = local or self.folder(weights=False)
        return _outline(self, folder, local is not None and holds_weights(local), _file_states(folder))

    def folder(self, weights: bool = True) -> Path:
        """The checkpoint's folder; what a Hub id names is downloaded first, with its weights or without, and a GGUF
        file is dequantised."""
        folder, file = self.local_folder(), Path(os.path.expanduser(self.path))
        if folder is None and is_gguf(file):
            _quiet_transformers()
            return convert(file, self.path, self.dtype)
        return folder or hub.download(self.path, self.revision, weights)

    def stock_config(self, folder: Path) -> Any:
        """The config of the stock architecture: a pruned checkpoint's, without its structure."""
        _, config, _ = model_class_of(folder, self.read_config(folder)["model_type"])
        return stock_of(config)

    def tokenizer(self, folder: Path) -> Any:
        """The folder's tokenizer, None where it has none: one object as long as no file there changes, so that what was
        made with it is known to be."""
        return _tokenizer(self, folder, _file_states(folder))

    def fingerprint(self) -> dict[str, Any]:
        """Where the weights came from and what identifies them: SHA-256 of config.json and of every weight file,
        of files over 256 MiB the header, the size and the time of the last change alone; and of the GGUF file that they
        were dequantised from."""
        folder = self.folder()
        known = {"name": self.name, "path": self.path, "revision": self.revision, "files": fingerprints(folder)}
        return {**known, "gguf": json.loads((folder / RECORD).read_text())} if (folder / RECORD).is_file() else known

    def load(self, tokenizer: Any = None) -> Model:
        """The model, ready to run: evaluation mode, no gradients. `tokenizer`: the one of `describe`, if at hand.
        Raises RunError where somebody else writes the checkpoint meanwhile."""
        folder = self.folder()
        config_json, before = self.read_config(folder), changes(folder)
        dtype = self._dtype(config_json)
        _quiet_transformers()
        model_class, config, family = model_class_of(folder, config_json["model_type"])
        checkpoint = Checkpoint(folder, model_class.base_model_prefix, family.stored_as)
        head = settle_ties_(model_class, config, checkpoint)
        if head is not None:
            logger.info("model.path=%r: %s is another than the embedding, whatever its config says", self.path, head)
        with checks.building(self.path, config_json["model_type"]):
            module = skeleton(model_class, config, family, dtype)
        checks.check_tensors(module, checkpoint, self.path)
        self._tell_precision(config_json, checkpoint.dtypes(), dtype)
        model = self._model(module, tokenizer, family, dtype, checkpoint if self.stream else None)
        load_outside_(module, model.layers_path, checkpoint, model.device, dtype)
        if not self.stream:
            for index, layer in enumerate(progress(model.layers, "load", len(model.layers), "blocks")):
                prefix = f"{model.layers_path}.{index}."
                load_into_(layer, stored_tensors(layer, checkpoint, prefix), prefix, model.layer_device(index), dtype)
                check_finite(layer, prefix)
        if changes(folder) != before:  # parts of two models, or another than its fingerprint will be of
            raise RunError(f"model.path={self.path!r}: changed while it was read; expected files that nobody writes")
        module.eval().requires_grad_(False)
        if len(model.devices) > 1:
            placement = [model.layer_device(i) for i in range(len(model.layers))]
            connect_(module, model.layers, placement, model.device)
            counts = Counter(placement)
            logger.info("decoder layers: %s", ", ".join(f"{n} on {device}" for device, n in counts.items()))
        if tokenizer is None:
            model.tokenizer = self.tokenizer(folder)
        model.source_folder = folder
        module.generation_config = companions.generation_settings(folder) or module.generation_config
        return model

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return devices_of(self.device)

    @contextmanager
    def on_a_device(self) -> Iterator[ModelSource]:
        """The source with its device held: for `cuda:any`, a GPU that no other run has meanwhile."""
        with held_gpu(self.device) as device:
            yield replace(self, device=device)

    def reference(self) -> Model:
        """What a pruned model is compared with: the model as it is stored, its decoder layers loaded one at a time."""
        device = str(self.devices[0])
        return replace(self, path=str(self.folder()), device=device, stream=True).load(self.describe().tokenizer)

    def _model(
        self,
        module: Any,
        tokenizer: Any,
        family: modeling_pruned.Family,
        dtype: torch.dtype,
        checkpoint: Checkpoint | None,
    ) -> Model:
        home, *others = devices = self.devices
        placement = None
        if others:
            layers = module.get_submodule(f"{module.base_model_prefix}.{family.layers}")
            sizes = [dtype.itemsize * sum(p.numel() for p in layer.parameters()) for layer in layers]
            whole = dtype.itemsize * sum(p.numel() for p in module.parameters())
            free = [free_bytes(device) for device in devices]
            placement = placed(sizes, whole - sum(sizes), devices, free)
        settings: dict[str, Any] = {"name": self.name, "device": home, "batch_size": self.batch_size}
        return Model(module, tokenizer, checkpoint=checkpoint, placement=placement, **settings)

    def _tell_precision(self, config: dict[str, Any], stored: Mapping[str, str], held: torch.dtype) -> None:
        """Logs where the weights in the files are of several precisions, or of another than `auto` could know."""
        mixed, floats = checks.precisions(stored), {kind for kind in stored.values() if kind in checks.FLOATS}
        if mixed:
            logger.info("model.path=%r: stored in mixed precision (%s), held as %s", self.path, mixed, held)
        elif (
            self.dtype == "auto" and not _named_dtype(config) and {tensor_file.DTYPES[kind] for kind in floats} - {held}
        ):
            what = "config.json names no dtype: stored as %s, held as %s (model.dtype)"
            logger.info("model.path=%r: " + what, self.path, *floats, held)

    def _dtype(self, config: dict[str, Any]) -> torch.dtype:
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        stored = DTYPES.get(str(_named_dtype(config)), torch.float32)
        on_cpu = self.devices[0].type == "cpu"
        return torch.float32 if on_cpu and stored == torch.float16 else stored


def _named_dtype(config: dict[str, Any]) -> Any:
    """The dtype that a config.json names, under its new name or its old one."""
    return config.get("dtype") or config.get("torch_dtype")


@lru_cache(maxsize=1)
def _outline(source: ModelSource, folder: Path, weights: bool, files: tuple[FileState, ...]) -> Model:
    config_json = source.read_config(folder)
    dtype = source._dtype(config_json)
    model_class, config, family = model_class_of(folder, config_json["model_type"])
    checkpoint = Checkpoint(folder, model_class.base_model_prefix, family.stored_as) if weights else None
    if checkpoint is not None:
        settle_ties_(model_class, config, checkpoint)
    with checks.building(source.path, config_json["model_type"]):
        module = skeleton(model_class, config, family, dtype)
        outline = source._model(module, None, family, dtype, None)
        outline.sites()
    if checkpoint is not None:
        checks.check_tensors(module, checkpoint, source.path)
    return outline


def _file_states(folder: Path) -> tuple[FileState, ...]:
    return tuple(sorted(file_state(path) for path in folder.iterdir() if path.is_file()))


@lru_cache(maxsize=4)
def _tokenizer(source: ModelSource, folder: Path, files: tuple[FileState, ...]) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    config = source.stock_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    token = getattr(config, "bos_token_id", None)
    if modeling_pruned.FAMILIES[config.model_type].needs_bos and tokenizer.bos_token_id is None and token is not None:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(token)  # what it needs, its config knows, too
    return tokenizer


def _quiet_transformers() -> None:
    """Its load reports and progress bars would drown ours; what they say, `check_tensors` finds."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
