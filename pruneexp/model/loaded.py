"""A model that can be run layer by layer, in memory or streamed from its checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.model.architecture import stock_of
from pruneexp.model.checkpoint import Checkpoint
from pruneexp.model.forward import forward_replaced
from pruneexp.model.losses import mean_next_token_loss, next_token_losses
from pruneexp.model.modeling_pruned import Family, LayerStructure, experts_of, family_of, head_layout
from pruneexp.model.sites import (
    as_whole,
    block_site,
    decoder_layer_block,
    experts_sites,
    layer_sites,
    layer_structure,
)
from pruneexp.model.weights import check_finite, give_back_memory, load_into_, stored_tensors
from pruneexp.progress import progress
from pruneexp.types import Block, Site, Times


@dataclass(frozen=True)
class Call:
    """What the model hands to one decoder layer beside the hidden states: masks, positions, slopes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Model:
    """A Hugging Face causal LM (`module`) with its table, its tokenizer and, when streamed, its checkpoint.

    Streamed, the decoder layers live on the meta device and hold weights only inside `loaded(index)`; everything
    else (embeddings, final norm, head) stays in memory. Spread over several devices (`placement`: each layer's),
    everything else lies on `device`, and hooks bring a layer's inputs to it. `dtype`: of most of the layers' tensors.
    """

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        *,
        name: str,
        device: torch.device,
        batch_size: int,
        checkpoint: Checkpoint | None = None,
        placement: Sequence[torch.device] | None = None,
    ):
        self.module, self.tokenizer = module, tokenizer
        self.name, self.device, self.batch_size, self.checkpoint = name, device, batch_size, checkpoint
        self.config = stock_of(module.config)
        self.family = family_of(self.config)
        self.head_layout = head_layout(self.family, self.config)  # of the original model
        self.source_folder: Path | None = None  # where it was read, with all that lies beside the weights
        self._ahead: tuple[int, Future] | None = None  # the layer that is being read, and its tensors by name
        self.layers_path = f"{module.base_model_prefix}.{self.family.layers}"
        self.dtype = Counter(p.dtype for p in self.layers.parameters()).most_common(1)[0][0]
        self.stored_bytes: dict[str, int] = {}  # of a parameter that is quantised, by its path
        self.origin = list(range(len(self.layers)))  # the checkpoint's index of each layer: layers may be gone
        self.times: Times | None = None  # of its sublayers, once they are measured
        self._placement = placement or [device] * len(self.layers)  # of the checkpoint's layers

    @property
    def streamed(self) -> bool:
        return self.checkpoint is not None

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where it lies: its own device first, then those of other decoder layers."""
        return tuple(dict.fromkeys((self.device, *self._placement)))

    def layer_device(self, index: int) -> torch.device:
        """Where decoder layer `index` lies."""
        return self._placement[self.origin[index]]

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.module.get_submodule(self.layers_path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def structures(self) -> list[LayerStructure]:
        """The widths of every decoder layer."""
        return [layer_structure(layer, self.family, self.config) for layer in self.layers]

    @property
    def configs(self) -> tuple[Any, ...]:
        """The configs that the model goes by: its stock one, and what its module and base model hold."""
        held = (self.config, self.module.config, self.module.base_model.config)
        return tuple({id(config): config for config in held}.values())

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int | None:
        """Longest window that the position embeddings allow; None where they set no limit (ALiBi)."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def kv_elements(self) -> int:
        """KV-cache elements per token, over all layers."""
        return 2 * self.head_layout.size * sum(own.num_key_value_heads for own in self.structures)

    @property
    def params(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def decoder_params(self) -> int:
        """Parameters in the decoder layers, every tensor counted."""
        return sum(p.numel() for p in self.layers.parameters())

    @property
    def bytes(self) -> int:
        """Bytes of all parameters, tied ones once: in their own dtype, or as they are quantised."""
        own: dict[str, int] = {name: p.numel() * p.element_size() for name, p in self.module.named_parameters()}
        return sum({**own, **self.stored_bytes}.values())

    def sites(self) -> tuple[Site, ...]:
        """All prunable sites, in layer order."""
        return tuple(site for index in range(len(self.layers)) for site in self.layer_sites(index))

    def _layer(self, index: int) -> tuple[nn.Module, int, Family, Any, str]:
        """Decoder layer `index` as the functions of `sites` take it."""
        return self.layers[index], index, self.family, self.config, f"{self.layers_path}.{index}"

    def layer_sites(self, index: int) -> tuple[Site, ...]:
        """The sites of decoder layer `index`, with their units' times where there is a table."""
        sites = layer_sites(*self._layer(index))
        return sites if self.times is None else tuple(self.times.priced(self.origin[index], site) for site in sites)

    def whole_experts(self, index: int) -> tuple[Site, ...]:
        """The experts of decoder layer `index` as one site whose units they are; none where its FFN is no mixture.
        Raises ConfigError where they differ in width."""
        return experts_sites(*self._layer(index))

    def experts_origin(self, index: int) -> tuple[int, ...]:
        """Which of the original experts decoder layer `index` has; none where its FFN is no mixture."""
        experts = experts_of(self.layers[index], self.family)
        return () if experts is None else experts.origin

    @property
    def mixture(self) -> bool:
        """Whether any FFN is a mixture of experts."""
        return any(experts_of(layer, self.family) is not None for layer in self.layers)

    def whole_block(self, index: int, kinds: Collection[str] = ("block",)) -> Block:
        """Decoder layer `index` as sites of one unit, without its tensors: those of `kinds`, "attention" and "mlp"
        being whole sublayers."""
        sites = [as_whole(site) for site in self.layer_sites(index) if site.kind in kinds]
        if "block" in kinds:
            whole = block_site(*self._layer(index))
            if self.times is not None:
                time = self.times.total(self.origin[index], self.layer_sites(index))
                whole = replace(whole, cost=replace(whole.cost, picoseconds=time))
            sites.append(whole)
        return Block(f"{self.layers_path}.{index}", index, tuple(sites), {})

    def block(self, index: int, read: Callable[[Tensor], Tensor] = Tensor.detach) -> Block:
        """Decoder layer `index` as tensors; streamed, only inside `loaded(index)`. `read`: what stands for a
        parameter of a site, of its shape."""
        return decoder_layer_block(*self._layer(index), self.layer_sites(index), read)

    @contextmanager
    def loaded(self, index: int, then: int | None = None) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights. Raises RunError where they are not finite (held ones are checked when
        they are loaded).

        `then`: the layer that is wanted next, read on another thread meanwhile; what goes wrong there is raised when it
        is asked for. One that is not asked for next is let go, and so is one whose forerunner ends in an error.
        """
        layer, checkpoint = self.layers[index], self.checkpoint
        if checkpoint is None:
            yield layer
            return
        try:
            prefix = self._checkpoint_prefix(index)
            load_into_(layer, self._read(checkpoint, index), prefix, self.device, self.dtype)
            if then is not None and then < len(self.layers):
                self._read_ahead(checkpoint, then)
            check_finite(layer, prefix)
            yield layer
        except BaseException:
            self._ahead = None
            raise
        finally:
            layer.to("meta")
            give_back_memory()

    def _checkpoint_prefix(self, index: int) -> str:
        return f"{self.layers_path}.{self.origin[index]}."

    def _read(self, checkpoint: Checkpoint, index: int) -> dict[str, Tensor]:
        """The tensors of decoder layer `index` by their names in the model: those read ahead, if they are of it."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            return ahead[1].result()
        return stored_tensors(self.layers[index], checkpoint, self._checkpoint_prefix(index))

    def _read_ahead(self, checkpoint: Checkpoint, index: int) -> None:
        reader = ThreadPoolExecutor(1, "read-ahead")
        prefix = self._checkpoint_prefix(index)
        self._ahead = index, reader.submit(stored_tensors, self.layers[index], checkpoint, prefix)
        reader.shutdown(wait=False)  # its thread ends with the layer

    @torch.no_grad()
    def enter(self, tokens_BT: Tensor, **how: Any) -> tuple[Tensor, list[Call]]:
        """Hidden states [B, T, D] in front of the first decoder layer, and what each layer is called with. `how`: what
        else the model is called with, a KV cache say."""
        calls: list[Call] = []
        entered: list[Tensor] = []  # one and the same, as layers hand it on

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            entered.append(hidden)
            calls.append(Call(args, kwargs))
            return self.as_output(hidden)

        with ExitStack() as stand_ins:
            for layer in self.layers:
                stand_ins.enter_context(forward_replaced(layer, record))
            self.module.base_model(input_ids=tokens_BT.to(self.device), **{"use_cache": False, **how})
        return entered[0], calls

    def enter_all(self, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Call]]]:
        """`enter` of every batch. Those of one size share their calls, which may hold masks of T x T."""
        hidden, calls, by_size = [], [], {}
        for batch in batches:
            entered, made = self.enter(batch)
            hidden.append(entered)
            calls.append(by_size.setdefault(len(batch), made))
        return hidden, calls

    @torch.no_grad()
    def run_layer(self, layer: nn.Module, hidden_BTD: Tensor, call: Call) -> Tensor:
        """One decoder layer's output [B, T, D]."""
        output = layer(hidden_BTD, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def leave(self, tokens_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] from the hidden states behind the last decoder layer: final norm, head, caps."""
        output = self.as_output(hidden_BTD)
        with ExitStack() as stand_ins:
            for layer in self.layers:
                stand_ins.enter_context(forward_replaced(layer, lambda *args, **kwargs: output))
            return self.module(input_ids=tokens_BT.to(self.device), use_cache=False).logits

    @torch.no_grad()
    def token_losses(self, tokens_NT: Tensor, batch_size: int, stage: str = "losses") -> Tensor:
        """Nats of every predicted token, float64 [N, T-1] on the CPU. Streamed: one walk through the layers."""
        batches = tokens_NT.split(batch_size)
        if not self.streamed:
            shown = progress(batches, stage, len(batches), "batches")
            return torch.cat([next_token_losses(self._logits(batch), batch) for batch in shown])
        hidden, calls = self.enter_all(batches)
        for index in progress(range(len(self.layers)), stage, len(self.layers), "blocks"):
            with self.loaded(index, index + 1) as layer:
                hidden = [self.run_layer(layer, h, c[index]) for h, c in zip(hidden, calls, strict=True)]
        return torch.cat([next_token_losses(self.leave(b, h), b) for h, b in zip(hidden, batches, strict=True)])

    def _logits(self, tokens_BT: Tensor) -> Tensor:
        return self.module(tokens_BT.to(self.device), use_cache=False).logits

    @torch.no_grad()
    def broken_layer(self, tokens_BT: Tensor) -> str | None:
        """The first decoder layer whose output for these windows holds NaN or Inf; None where all are finite."""
        hidden, calls = self.enter(tokens_BT)
        for index in range(len(self.layers)):
            with self.loaded(index, index + 1) as layer:
                hidden = self.run_layer(layer, hidden, calls[index])
            if not torch.isfinite(hidden).all():
                return f"{self.layers_path}.{index}"
        return None

    def mean_loss(self, tokens_BT: Tensor) -> Tensor:
        """Mean next-token loss in nats, differentiable; of a model in memory."""
        return mean_next_token_loss(self._logits(tokens_BT), tokens_BT)

    def as_output(self, hidden: Tensor) -> Any:
        """What a decoder layer returns that computed these hidden states."""
        return (hidden, None) if self.family.returns_tuple else hidden
