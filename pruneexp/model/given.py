"""A model that is in memory already: given from Python, not read from a checkpoint."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pruneexp.model import modeling_pruned
from pruneexp.model.architecture import stock_of
from pruneexp.model.checks import check_counts
from pruneexp.model.loaded import Model
from pruneexp.model.modeling_pruned import (
    Expert,
    Experts,
    Family,
    NoChannels,
    OutputBias,
    RemovedAttention,
    RemovedFFN,
    experts_of,
    family_of,
    split_experts_,
)
from pruneexp.model.placement import connect_
from pruneexp.model.source import DTYPES, Described
from pruneexp.model.weights import check_finite
from pruneexp.types import ConfigError, one_line

PLACEMENT = "accelerate."  # package whose hooks only bring inputs to their device
OBSERVERS = "transformers."  # package whose hooks only look
LINEARS = ("torch", "transformers", "transformers_modules", "pruneexp")  # packages whose linear layers are plain ones
PARTS = (OutputBias, NoChannels, RemovedFFN, RemovedAttention, Expert, Experts)  # of a pruned model alone
QUANTISERS = ("torchao.", "torch.ao.nn.")  # packages whose quantised weights say that their dtype is a float's


@dataclass(frozen=True, eq=False)
class GivenModel:
    """What `ModelSource` is to a checkpoint. `in_place`: `load` hands out the very module, not a copy. `batch_size`:
    windows per forward pass."""

    module: Any
    tokens_of: Any  # its tokenizer
    batch_size: int
    in_place: bool

    stream: ClassVar[bool] = False
    trust_remote_code: ClassVar[bool] = False
    revision: ClassVar[None] = None

    @property
    def path(self) -> str:
        """What it was read from, as far as its config says."""
        return str(getattr(self.module.config, "_name_or_path", "") or type(self.module).__name__)

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def dtype(self) -> str:
        return str(self.module.dtype).removeprefix("torch.")

    def check(self, weights: bool = True) -> None:
        """Raises ConfigError where the module cannot be pruned."""
        check_module(self.module)

    def local_folder(self) -> None:
        """None: it lies in memory."""

    def describe(self) -> Described:
        config = stock_of(self.module.config)
        limit, family = getattr(config, "max_position_embeddings", None), family_of(config)
        return Described(self.tokens_of, config.vocab_size, limit, family.learned_positions, family)

    def outline(self) -> Model:
        """Its structure, every tensor on the meta device."""
        meta: dict[int, Any] = {}
        for parameter in self.module.parameters():
            meta[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for buffer in self.module.buffers():
            meta[id(buffer)] = torch.empty_like(buffer, device="meta")
        try:
            copied = copy.deepcopy(self.module, meta)
        except Exception as error:  # tensors that are computed, or what else somebody hung on it
            why = one_line(f"{type(error).__name__}: {error}")
            raise ConfigError(f"model: cannot be copied ({why}); expected a model as transformers loads it") from error
        return self._model(copied)

    def load(self, tokenizer: Any = None) -> Model:
        """The model, ready to run: evaluation mode, no gradients. Raises RunError for weights that are not finite."""
        module = self.module if self.in_place else copy.deepcopy(self.module)
        module.requires_grad_(False)
        check_finite(module, "")
        return self._model(module)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where the module lies."""
        return self._wrapped(self.module).devices

    @contextmanager
    def on_a_device(self) -> Iterator[GivenModel]:
        """The source itself: the module stays on its device."""
        yield self

    def reference(self) -> Model:
        """The model that a pruned one is compared with: the very module, to be read only. Not with `in_place`."""
        return self._wrapped(self.module)

    def fingerprint(self) -> dict[str, Any]:
        """SHA-256 over config, names and contents of all tensors."""
        digest = hashlib.sha256(self.module.config.to_json_string(use_diff=False).encode())
        for name, tensor in self.module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return {"name": self.name, "path": self.path, "files": {"given": {"sha256": digest.hexdigest()}}}

    def _model(self, module: Any) -> Model:
        _adopt_parts_(module)
        config = stock_of(module.config)
        family = family_of(config)
        head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
        tied = head is not None and head.weight is embedding.weight
        if bool(config.tie_word_embeddings) != tied:
            config.tie_word_embeddings = module.config.tie_word_embeddings = tied
            if tied:
                module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=False)
        layers = module.get_submodule(f"{module.base_model_prefix}.{family.layers}")
        for layer in layers:
            _split_experts_(layer, family)
        made = self._wrapped(module)
        placement = [made.layer_device(index) for index in range(len(layers))]
        if hooks := sys.modules.get("accelerate.hooks"):  # theirs would bring inputs to where layers were before
            hooks.remove_hook_from_module(module, recurse=True)
        if len(made.devices) > 1:
            connect_(module, layers, placement, made.device)
        return made

    def _wrapped(self, module: Any) -> Model:
        """A `Model` of the module as it is."""
        layers = module.get_submodule(f"{module.base_model_prefix}.{family_of(stock_of(module.config)).layers}")
        home = next(module.get_input_embeddings().parameters()).device
        placement = [next((p.device for p in layer.parameters()), home) for layer in layers]
        settings: dict[str, Any] = {"device": home, "placement": placement, "batch_size": self.batch_size}
        return Model(module, self.tokens_of, name=self.name, **settings)


def check_module(module: Any) -> None:
    """Raises ConfigError, naming what was found and what was expected, for what cannot be pruned as it is."""
    if problem := next(_problems(module), None):
        raise ConfigError(f"model: {problem[0]}; expected {problem[1]}")
    config = stock_of(module.config)
    check_counts(config, "model")
    family = family_of(config)
    for name, value in family.impossible:
        if getattr(module.config, name) == value:
            raise ConfigError(f"model: {name}={value} is not supported; expected another model")


def _problems(module: Any) -> Iterator[tuple[str, str]]:
    if isinstance(module, type):
        yield f"is the class {module.__name__}", "a model of it, as from_pretrained gives it"
        return
    kind, parts = type(module).__name__, [*module.modules()] if isinstance(module, nn.Module) else []
    if any(type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None for part in parts):
        yield "is compiled", "the model as it was before torch.compile"
    if type(module).__module__.split(".")[0] == "peft":
        yield f"is a {kind}", "the model with its adapters merged, as model.merge_and_unload() gives it"
    config = getattr(module, "config", None)
    if not isinstance(module, nn.Module) or not hasattr(config, "model_type"):
        yield f"is a {kind}", "a transformers PreTrainedModel for causal language modelling"
    model_type = str(config.model_type).removeprefix("pruned_")  # type: ignore[union-attr]
    if model_type not in modeling_pruned.FAMILIES:
        yield f"model_type {model_type!r} is not supported", f"one of {', '.join(sorted(modeling_pruned.FAMILIES))}"
    family = modeling_pruned.FAMILIES[model_type]
    if kind not in (family.stock_class, f"Pruned{family.stock}ForCausalLM"):
        yield f"is a {kind}", family.stock_class
    floats = {*DTYPES.values()}
    odd = any(p.dtype not in floats for p in module.parameters())
    packed = any(type(each).__module__.startswith(QUANTISERS) for each in (*module.parameters(), *parts))
    if getattr(config, "quantization_config", None) or getattr(module, "is_quantized", False) or odd or packed:
        yield "is quantised", "the full-precision model that it was made from"
    if any(p.is_meta for p in module.parameters()):
        yield "has weights on the meta device, or offloaded", "a model that is in memory with all its weights"
    if part := next(_changed_parts(module), None):
        yield f"has a part of somebody else's: {part}", "the parts that transformers makes, adapters merged"
    if any(part.training for part in parts):
        yield "is in training mode", "model.eval()"
    if hook := next(_foreign_hooks(module), None):
        yield f"has a hook of somebody else's on {hook}", "a model without hooks (accelerate's placement may stay)"


def _changed_parts(module: nn.Module) -> Iterator[str]:
    """Linear layers that compute something else, parametrised weights, a `forward` put on one part."""
    for name, part in module.named_modules():
        kind, own = type(part), part.__dict__.get("forward")
        placed = hasattr(part, "_hf_hook") or getattr(own, "__func__", None) is kind.forward  # where a hook was
        linear = isinstance(part, nn.Linear) and kind.__module__.partition(".")[0] not in LINEARS
        if linear or hasattr(part, "base_layer") or parametrize.is_parametrized(part) or (own and not placed):
            yield f"{kind.__name__} at {name or 'the top'}"


def _foreign_hooks(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        backward = [*part._backward_hooks.values(), *part._backward_pre_hooks.values()]
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values(), *backward]
        for hook in hooks:
            home = getattr(hook, "__module__", None) or ""
            if not (_is_ours(home) or home.startswith((PLACEMENT, OBSERVERS, "pruneexp."))):
                yield name or "the model"


def _is_ours(home: str) -> bool:
    """Whether a Python module is the modeling file that lies beside a pruned checkpoint's weights."""
    return home.startswith("transformers_modules.") and home.endswith(".modeling_pruned")


def _adopt_parts_(module: nn.Module) -> None:
    """Gives what stands for removed parts and for experts, where it comes of a checkpoint's own modeling file, the
    classes of that name here, by which the code knows them."""
    kinds = {kind.__name__: kind for kind in PARTS}
    for part in module.modules():
        if _is_ours(type(part).__module__) and type(part).__name__ in kinds:
            part.__class__ = kinds[type(part).__name__]


def _split_experts_(layer: nn.Module, family: Family) -> None:
    """Gives fused experts linear layers of their own, with their weights."""
    fused = experts_of(layer, family)
    if fused is None or isinstance(fused, Experts):
        return
    split_experts_(layer, family)
    own = experts_of(layer, family)
    for expert, gate_up, down in zip(own, fused.gate_up_proj, fused.down_proj, strict=True):
        weights: tuple[Tensor, ...] = (*gate_up.detach().chunk(2), down.detach())
        for name, weight in zip(expert.names, weights, strict=True):
            expert.get_submodule(name).weight = nn.Parameter(weight.clone(), requires_grad=False)
    own.eval()
