"""Language models whose decoder layers differ in width: the one file that travels beside a pruned checkpoint.

Self-contained on purpose (torch and transformers only): `save` copies it next to the weights, and
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs nothing else. The same functions shrink
the model in memory, so what was evaluated and what is reloaded are built by one piece of code.

A checkpoint's `config.json` keeps the *original* model's global values, its own `model_type` ("pruned_llama"), and the
structure in the `per_layer_config` schema of transformers: head counts and FFN width of every layer, whether its two
out-projections own a bias, and, where attention carries ALiBi slopes, which of the original heads are left. Of a
mixture of experts: every expert's width and whether its out-projection owns a bias, and
which of the original experts are left.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class UnitRows:
    """A linear layer (or a norm's weight) whose output rows belong to units; `roles` are the parts of the rows, in
    order: within each unit, or `by_part`: all units' rows of the first part, then all of the second, ..."""

    path: str  # below the decoder layer
    roles: tuple[str, ...]
    by_part: bool = False


Variant = tuple[dict[str, Any], dict[str, Any]]  # config values (a tuple: any of them) -> fields of the family


@dataclass(frozen=True)
class Family:
    """Where a decoder-only architecture keeps its parts. Paths are relative to the decoder layer but for `layers`.

    `family_of(config)` gives a model's own table: `variants` replace fields where the config's values say so.
    """

    stock: str  # prefix of the stock classes: Llama -> LlamaConfig, LlamaForCausalLM, LlamaModel
    layers: str  # the list of decoder layers, below the base model
    attention: str
    attention_in: tuple[UnitRows, ...]
    attention_out: str
    attention_norm: str | None  # in front of the sublayer; the same path twice: one norm in front of both
    mlp: str  # the FFN's own module, or its out-projection where it has none
    mlp_in: tuple[UnitRows, ...]
    mlp_out: str
    mlp_norm: str | None
    experts: str | None = None  # below `mlp` where that is a mixture: the list of experts, FFNs made like `mlp`
    router: str = "gate"  # below `mlp`, beside the experts
    attention_post_norm: str | None = None  # of the sublayer's output alone, before it is added
    mlp_post_norm: str | None = None
    head_norms: tuple[UnitRows, ...] = ()  # norms of queries and keys with a weight, or a module, of each head's own
    causal_lm: str | None = None  # the stock class, where it is not called ...ForCausalLM
    since: str = "4.46"  # the release of transformers that brought the stock classes
    pruned_since: str = "4.57"  # the one from which on the classes of this file are known to work
    key_value_heads: str | int | None = "num_key_value_heads"  # config attribute, number, or None: as query heads
    stored_as: tuple[tuple[str, str], ...] = ()  # parts of names in the modules -> what checkpoints call them instead
    shared_roles: tuple[str, ...] = ()  # set by `family_of`: rows that serve all units and belong to none
    reads_config: bool = False  # attention asks its config for the number of heads while it runs
    adds_residual: bool = False  # the sublayers take the residual as second argument and add it themselves
    side_by_side: bool = False  # the FFN reads what attention reads, not what attention has added to it
    returns_tuple: bool = False  # the decoder layer returns (hidden states, ...)
    alibi: bool = False  # attention receives `alibi`, one slope a head
    learned_positions: bool = False  # positions are looked up in a table: beyond its end there is no answer
    norm_offset: float = 0.0  # what norms add to their weight
    adds_up: bool = True  # an out-projection gives what is added to the hidden states (times `residual_scale`)
    residual_scale: str | None = None  # config attribute
    needs_bos: bool = False  # trained so that text without a beginning-of-sequence token in front is foreign to it
    impossible: tuple[tuple[str, Any], ...] = ()  # config values for which this table is wrong
    variants: tuple[Variant, ...] = ()

    @property
    def stock_class(self) -> str:
        """The name of the stock class for causal language modelling."""
        return self.causal_lm or f"{self.stock}ForCausalLM"


_QKV = ("query", "key", "value")
LLAMA = Family(
    stock="Llama",
    layers="layers",
    attention="self_attn",
    attention_in=(
        UnitRows("self_attn.q_proj", ("query",)),
        UnitRows("self_attn.k_proj", ("key",)),
        UnitRows("self_attn.v_proj", ("value",)),
    ),
    attention_out="self_attn.o_proj",
    attention_norm="input_layernorm",
    mlp="mlp",
    mlp_in=(UnitRows("mlp.gate_proj", ("gate",)), UnitRows("mlp.up_proj", ("up",))),
    mlp_out="mlp.down_proj",
    mlp_norm="post_attention_layernorm",
)
MISTRAL = replace(LLAMA, stock="Mistral")
GRANITE = replace(LLAMA, stock="Granite", residual_scale="residual_multiplier")
QWEN2 = replace(LLAMA, stock="Qwen2")
QWEN3 = replace(LLAMA, stock="Qwen3", since="4.51")
QWEN3_MOE = replace(QWEN3, stock="Qwen3Moe", since="5.0", pruned_since="5.14", experts="experts")
MIXTRAL = replace(
    MISTRAL,
    stock="Mixtral",
    since="5.0",
    pruned_since="5.14",
    stored_as=((".mlp.", ".block_sparse_moe."),),
    mlp_in=(UnitRows("mlp.w1", ("gate",)), UnitRows("mlp.w3", ("up",))),
    mlp_out="mlp.w2",
    experts="experts",
)
SEED_OSS = replace(LLAMA, stock="SeedOss", since="4.56")
SMOLLM3 = replace(LLAMA, stock="SmolLM3", since="4.53")
ERNIE4_5 = replace(LLAMA, stock="Ernie4_5", since="4.54")
HUNYUAN = replace(LLAMA, stock="HunYuanDenseV1", since="4.56")
HELIUM = replace(LLAMA, stock="Helium", since="4.49")
OLMO = replace(LLAMA, stock="Olmo")
STARCODER2 = replace(LLAMA, stock="Starcoder2", mlp_in=(UnitRows("mlp.c_fc", ("up",)),), mlp_out="mlp.c_proj")
ARCEE = replace(LLAMA, stock="Arcee", since="4.53", mlp_in=(UnitRows("mlp.up_proj", ("up",)),))
NEMOTRON = replace(ARCEE, stock="Nemotron", since="4.46", norm_offset=1.0)
APERTUS = replace(
    ARCEE,
    stock="Apertus",
    since="4.56",
    pruned_since="5.14",  # 4.57 keeps the activation's own weights in bfloat16
    attention_norm="attention_layernorm",
    mlp_norm="feedforward_layernorm",
)
_ONE_NORM = replace(LLAMA, mlp_norm="input_layernorm", side_by_side=True)
COHERE = replace(_ONE_NORM, stock="Cohere", impossible=(("use_qk_norm", True),))  # a norm with rows for each head
COHERE2 = replace(_ONE_NORM, stock="Cohere2", since="4.48")
PHI = replace(
    _ONE_NORM,
    stock="Phi",
    attention_out="self_attn.dense",
    mlp_in=(UnitRows("mlp.fc1", ("up",)),),
    mlp_out="mlp.fc2",
)
GEMMA = replace(LLAMA, stock="Gemma", norm_offset=1.0, needs_bos=True)
GEMMA2 = replace(
    GEMMA,
    stock="Gemma2",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    adds_up=False,
)
GEMMA3 = replace(GEMMA2, stock="Gemma3Text", causal_lm="Gemma3ForCausalLM", since="4.50")
OLMO2 = replace(
    GEMMA2,
    stock="Olmo2",
    since="4.47",
    attention_norm=None,
    mlp_norm=None,
    head_norms=(UnitRows("self_attn.q_norm", ("query",)), UnitRows("self_attn.k_norm", ("key",))),
    norm_offset=0.0,
    needs_bos=False,
)
OLMO3 = replace(OLMO2, stock="Olmo3", since="4.57")
EXAONE4 = replace(OLMO2, stock="Exaone4", since="4.54", head_norms=())
PHI3 = replace(
    LLAMA,
    stock="Phi3",
    attention_in=(UnitRows("self_attn.qkv_proj", _QKV, by_part=True),),
    mlp_in=(UnitRows("mlp.gate_up_proj", ("gate", "up"), by_part=True),),
    reads_config=True,
)
GLM4 = replace(
    LLAMA,
    stock="Glm4",
    since="4.52",
    attention_post_norm="post_self_attn_layernorm",
    mlp_in=PHI3.mlp_in,
    mlp_post_norm="post_mlp_layernorm",
    adds_up=False,
)
_QK_LAYERNORMS = (UnitRows("self_attn.q_layernorm", ("query",)), UnitRows("self_attn.k_layernorm", ("key",)))
STABLELM = replace(
    LLAMA,
    stock="StableLm",
    pruned_since="5.14",
    variants=(
        ({"use_parallel_residual": True}, {"mlp_norm": "input_layernorm", "side_by_side": True}),
        ({"qk_layernorm": True}, {"head_norms": _QK_LAYERNORMS}),
    ),
)
_NORMALISED_BEHIND = {"attention_norm": None, "mlp_norm": None, "adds_up": False}
OPT = replace(
    LLAMA,
    stock="OPT",
    layers="decoder.layers",
    attention_out="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    mlp="fc2",
    mlp_in=(UnitRows("fc1", ("up",)),),
    mlp_out="fc2",
    mlp_norm="final_layer_norm",
    key_value_heads=None,
    learned_positions=True,
    variants=(({"do_layer_norm_before": False}, _NORMALISED_BEHIND),),
)
BLOOM = Family(
    stock="Bloom",
    layers="h",
    attention="self_attention",
    attention_in=(UnitRows("self_attention.query_key_value", _QKV),),
    attention_out="self_attention.dense",
    attention_norm="input_layernorm",
    mlp="mlp",
    mlp_in=(UnitRows("mlp.dense_h_to_4h", ("up",)),),
    mlp_out="mlp.dense_4h_to_h",
    mlp_norm="post_attention_layernorm",
    key_value_heads=None,
    adds_residual=True,
    returns_tuple=True,
    alibi=True,
    variants=(({"apply_residual_connection_post_layernorm": True}, _NORMALISED_BEHIND),),
)
_MULTI_QUERY = {
    "attention_in": (UnitRows("self_attention.query_key_value", _QKV, by_part=True),),
    "key_value_heads": 1,
}
FALCON = replace(
    BLOOM,
    stock="Falcon",
    pruned_since="5.14",  # with slopes; without, 4.57 would do
    adds_residual=False,
    alibi=False,
    variants=(
        ({"alibi": True}, {"alibi": True}),
        ({"parallel_attn": True}, {"mlp_norm": "input_layernorm", "side_by_side": True}),
        ({"multi_query": True, "new_decoder_architecture": False}, _MULTI_QUERY),
        ({"new_decoder_architecture": True}, {"key_value_heads": "num_kv_heads", "side_by_side": True}),
        (
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": (None, 2)},
            {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"},
        ),
    ),
)
GPT_NEOX = replace(
    BLOOM,
    stock="GPTNeoX",
    layers="layers",
    attention="attention",
    attention_in=(UnitRows("attention.query_key_value", _QKV),),
    attention_out="attention.dense",
    stored_as=(("lm_head.", "embed_out."),),
    adds_residual=False,
    returns_tuple=False,
    alibi=False,
    variants=(({"use_parallel_residual": True}, {"side_by_side": True}),),
)
GPT2 = Family(
    stock="GPT2",
    causal_lm="GPT2LMHeadModel",
    layers="h",
    attention="attn",
    attention_in=(UnitRows("attn.c_attn", _QKV, by_part=True),),
    attention_out="attn.c_proj",
    attention_norm="ln_1",
    mlp="mlp",
    mlp_in=(UnitRows("mlp.c_fc", ("up",)),),
    mlp_out="mlp.c_proj",
    mlp_norm="ln_2",
    key_value_heads=None,
    learned_positions=True,
    impossible=(("add_cross_attention", True), ("scale_attn_by_inverse_layer_idx", True)),
)
FAMILIES = {  # by stock model_type
    "apertus": APERTUS,
    "arcee": ARCEE,
    "bloom": BLOOM,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "ernie4_5": ERNIE4_5,
    "exaone4": EXAONE4,
    "falcon": FALCON,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "glm4": GLM4,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "granite": GRANITE,
    "helium": HELIUM,
    "hunyuan_v1_dense": HUNYUAN,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "nemotron": NEMOTRON,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "opt": OPT,
    "phi": PHI,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "seed_oss": SEED_OSS,
    "smollm3": SMOLLM3,
    "stablelm": STABLELM,
    "starcoder2": STARCODER2,
}


def family_of(config: Any) -> Family:
    """The table of a model, from its stock (or pruned) config: its family's, with the variants that apply."""
    family = FAMILIES[config.model_type.removeprefix("pruned_")]
    for wanted, fields in family.variants:
        if all(getattr(config, k) in (v if isinstance(v, tuple) else (v,)) for k, v in wanted.items()):
            family = replace(family, **fields)
    heads, kv_heads = config.num_attention_heads, _key_value_heads(family, config)
    return replace(family, shared_roles=("key", "value")) if kv_heads == 1 < heads else family


def _key_value_heads(family: Family, config: Any) -> int:
    named = family.key_value_heads
    return (getattr(config, named) if isinstance(named, str) else named) or config.num_attention_heads


@dataclass(frozen=True)
class HeadLayout:
    """How attention heads make up units: a unit is a key/value head and its query heads. Where one key/value head
    serves all (multi-query), a unit is a query head, and the shared head stays as long as any of them."""

    size: int  # channels of a head
    group: int  # query heads of a unit
    shared: bool

    @property
    def rows(self) -> dict[str, int]:
        """Rows of a unit in each part; of the shared parts, all rows."""
        return {"query": self.group * self.size, "key": self.size, "value": self.size}

    def key_value_heads(self, heads: int) -> int:
        """How many of them so many query heads have."""
        assert heads % self.group == 0, "the heads of a group leave together"
        return min(heads, 1) if self.shared else heads // self.group


def head_layout(family: Family, config: Any) -> HeadLayout:
    """The layout of a stock config, which tells the original numbers of heads."""
    group = config.num_attention_heads // _key_value_heads(family, config)
    shared = bool(family.shared_roles)
    return HeadLayout(head_size(config), 1 if shared else group, shared)


FFN_ROWS = {"gate": 1, "up": 1}
SERVERS = ("vllm", "sglang")  # attention implementations that keep caches of their own


def split_parts(rows: Tensor, own: UnitRows, units: int, sizes: dict[str, int], shared: tuple[str, ...]) -> Any:
    """An in-projection's weight or bias [rows, ...] by role: views [U, R, ...]; of shared roles [1, R, ...]."""
    if own.by_part or len(own.roles) == 1:
        counts = [1 if role in shared else units for role in own.roles]
        parts = rows.split([n * sizes[role] for n, role in zip(counts, own.roles, strict=True)])
        parts = [part.unflatten(0, (n, -1)) if n else part for n, part in zip(counts, parts, strict=True)]
    else:
        parts = rows.unflatten(0, (units, -1)).split([sizes[role] for role in own.roles], dim=1)
    return dict(zip(own.roles, parts, strict=True))


def join_parts(parts: dict[str, Tensor], in_projection: UnitRows) -> Tensor:
    """The inverse of `split_parts`."""
    if in_projection.by_part or len(in_projection.roles) == 1:
        return torch.cat([part.flatten(0, 1) for part in parts.values()])
    return torch.cat(list(parts.values()), dim=1).flatten(0, 1)


@dataclass(frozen=True)
class LayerStructure:
    """Widths of one decoder layer, as they stand in `per_layer_config`."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int  # of a mixture: all experts' together
    attention_output_bias: bool
    mlp_output_bias: bool  # of a mixture: of any expert
    kept_heads: tuple[int, ...] | None = None  # original query-head indices, where they matter (ALiBi)
    expert_sizes: tuple[int, ...] | None = None  # of a mixture: each expert's intermediate size
    expert_output_biases: tuple[bool, ...] | None = None
    kept_experts: tuple[int, ...] | None = None  # original expert indices, where some have left

    def to_config(self, layout: HeadLayout) -> dict[str, Any]:
        """As it stands in `per_layer_config`. A layer without attention says so, and has the heads of one unit, because
        servers make room for some."""
        own = asdict(self) | {"attention_removed": self.num_attention_heads == 0}
        if self.num_attention_heads == 0:
            own |= {"num_attention_heads": layout.group, "num_key_value_heads": 1}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in own.items() if v is not None}


class LayerConfig:
    """The model's config, seen by one layer with other numbers of heads."""

    def __init__(self, config: Any, **own: Any):
        self.__dict__.update(own, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # while it is being copied
            raise AttributeError(name)
        return getattr(self._config, name)


class OutputBias(nn.Module):
    """An out-projection without inputs: all that it gives is its bias, zeros where it owns none. No linear layer,
    because quantisers and kernels cannot do with an empty one."""

    def __init__(self, outputs: int, bias: nn.Parameter | None):
        super().__init__()
        self.in_features, self.out_features = 0, outputs
        self.register_parameter("bias", bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output = hidden_states.new_zeros(*hidden_states.shape[:-1], self.out_features)
        bias: Any = self.bias
        return output if bias is None else output + bias


class NoChannels(nn.Module):
    """An in-projection without outputs."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[..., :0]


class RemovedFFN(nn.Module):
    """An FFN (or an expert) that lost all its channels: what it still adds is its output bias, if it owns one."""

    def __init__(self, out_name: str, out_projection: nn.Module, adds_residual: bool):
        super().__init__()
        self.out_name, self.adds_residual = out_name, adds_residual
        self.add_module(out_name, out_projection)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.get_submodule(self.out_name)(hidden_states[..., :0])
        if self.adds_residual:
            output = output + (args[0] if args else kwargs["residual"])
        return output


class RemovedAttention(RemovedFFN):
    """Attention that lost all its heads: what it still adds is its output bias, if it owns one.

    vLLM gives every layer a cache and an attention of its own, told by `config` and `layer_idx`, where it finds a call
    of the attention interface in `forward`, and refuses models with layers that have none. Here is one, never run.
    """

    config: Any = None
    layer_idx: int | None = None
    dispatches = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        output = super().forward(hidden_states, *args, **kwargs)
        if self.dispatches:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            attention_interface(self, output, output, output, None)
        return output, None


class Expert(nn.Module):
    """One FFN of a mixture: down(act(gate(x)) * up(x)), each layer called as in checkpoints. Uninitialised; `down`: a
    weight [hidden, width] like its out-projection's."""

    def __init__(self, names: tuple[str, str, str], down: Tensor, act_fn: nn.Module):
        super().__init__()
        self.names, self.act_fn = names, act_fn
        for name, shape in zip(names, (down.T.shape, down.T.shape, down.shape), strict=True):
            self.add_module(name, _blank_linear(down.new_empty(shape)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.act_fn(gate(hidden_states)) * up(hidden_states))


def _blank_linear(weight: Tensor) -> nn.Linear:
    """A linear layer without bias around a weight. Its constructor would draw one first: half a minute for thousands of
    experts, even without memory."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight)
    linear.register_parameter("bias", None)
    return linear


class Experts(nn.ModuleList):
    """A layer's experts, each on the tokens that are routed to it, in the place of the stock class's fused weights."""

    def __init__(self, experts: Iterable[Expert]):
        super().__init__(experts)
        self.origin = tuple(range(len(self)))  # which of the original experts these are

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Hidden states [N, D], each token's experts and their weights [N, K] -> [N, D]."""
        output, weights = torch.zeros_like(hidden_states), top_k_weights.flatten()
        chosen = top_k_index.flatten()
        counts = chosen.bincount(minlength=len(self)).tolist()
        for expert, places in zip(self, chosen.argsort(stable=True).split(counts), strict=True):
            if len(places):
                tokens = places // top_k_index.shape[1]
                given = expert(hidden_states[tokens]) * weights[places, None]
                output.index_add_(0, tokens, given.to(output.dtype))
        return output


def experts_of(layer: nn.Module, family: Family) -> Any:
    """The experts of a decoder layer, which may be fused still; None where its FFN is no mixture."""
    return None if family.experts is None else getattr(layer.get_submodule(family.mlp), family.experts, None)


def router_of(layer: nn.Module, family: Family) -> Any:
    """The router of a mixture: its weight has a row for every expert."""
    return getattr(layer.get_submodule(family.mlp), family.router)


def expert_path(family: Family, path: str, expert: int) -> str:
    """The path of a layer's part in one of its experts, from that in an FFN."""
    return f"{family.mlp}.{family.experts}.{expert}{path.removeprefix(family.mlp)}"


def split_experts_(layer: nn.Module, family: Family) -> None:
    """Replaces fused experts by uninitialised ones of their own linear layers; without any, does nothing."""
    fused = experts_of(layer, family)
    if fused is None or isinstance(fused, Experts):
        return
    number = len(fused.down_proj)
    paths = (*(in_projection.path for in_projection in family.mlp_in), family.mlp_out)
    gate, up, down = (path.rpartition(".")[-1] for path in paths)
    experts = Experts(Expert((gate, up, down), fused.down_proj[0], fused.act_fn) for _ in range(number))
    setattr(layer.get_submodule(family.mlp), str(family.experts), experts.train(fused.training))


def keep_experts_(layer: nn.Module, family: Family, kept: Sequence[int]) -> None:
    """Only the experts `kept` stay, and their rows of the router."""
    experts, router = experts_of(layer, family), router_of(layer, family)
    assert len(kept) >= router.top_k, "a token needs as many experts as it is routed to"
    left = Experts(experts[index] for index in kept)
    left.origin = tuple(experts.origin[index] for index in kept)
    setattr(layer.get_submodule(family.mlp), str(family.experts), left.train(experts.training))
    rows = torch.tensor(kept, device=router.weight.device)
    router.weight = nn.Parameter(router.weight.detach()[rows], requires_grad=router.weight.requires_grad)
    router.num_experts = len(kept)


def _resize_experts_(layer: nn.Module, family: Family, structure: LayerStructure) -> None:
    assert structure.expert_sizes is not None and structure.expert_output_biases is not None
    if len(experts_of(layer, family)) > len(structure.expert_sizes):
        keep_experts_(layer, family, range(len(structure.expert_sizes)))
        experts_of(layer, family).origin = structure.kept_experts
    shapes = zip(structure.expert_sizes, structure.expert_output_biases, strict=True)
    for index, (size, bias) in enumerate(shapes):
        own = replace(
            family,
            mlp=expert_path(family, family.mlp, index),
            mlp_in=tuple(replace(w, path=expert_path(family, w.path, index)) for w in family.mlp_in),
            mlp_out=expert_path(family, family.mlp_out, index),
        )
        _resize_ffn_(layer, own, size, bias)


def _resize_ffn_(layer: nn.Module, family: Family, channels: int, bias: bool) -> None:
    _resize_(layer, family.mlp_out, inputs=channels, bias=bias)
    if channels:
        for in_projection in family.mlp_in:
            _resize_(layer, in_projection.path, outputs=channels * len(in_projection.roles))
    elif family.mlp == family.mlp_out:  # no module of its own: the layer still calls its parts
        for in_projection in family.mlp_in:
            layer.set_submodule(in_projection.path, NoChannels())
    else:
        _remove_(layer, family.mlp, family.mlp_out, RemovedFFN, family.adds_residual)


def _remove_(layer: nn.Module, path: str, out_path: str, kind: type[RemovedFFN], adds_residual: bool) -> None:
    """Puts what is left of a sublayer in its place."""
    out_projection, name, old = layer.get_submodule(out_path), out_path.rpartition(".")[-1], layer.get_submodule(path)
    left: Any = kind(name, out_projection, adds_residual).train(old.training)
    if isinstance(left, RemovedAttention):
        # the last two for the layers of Gemma 3 and the model of OLMo 3 in transformers 4
        for what in ("config", "layer_idx", "is_sliding", "attention_type"):
            setattr(left, what, getattr(old, what, None))
    layer.set_submodule(path, left)


def resize_layer_(layer: nn.Module, family: Family, structure: LayerStructure, layout: HeadLayout) -> None:
    """Gives the decoder layer `structure`'s widths. Resized weights are uninitialised: load them afterwards.

    A sublayer that keeps no unit leaves only its out-projection's bias; its norms go too, where they serve nothing
    else.
    """
    heads, kv_heads = structure.num_attention_heads, structure.num_key_value_heads
    _resize_(layer, family.attention_out, inputs=heads * layout.size, bias=structure.attention_output_bias)
    if structure.expert_sizes is not None:
        _resize_experts_(layer, family, structure)
    else:
        _resize_ffn_(layer, family, structure.intermediate_size, structure.mlp_output_bias)
    if heads == 0:
        _remove_(layer, family.attention, family.attention_out, RemovedAttention, family.adds_residual)
    else:
        counts = {"query": heads, "key": kv_heads, "value": kv_heads}
        for in_projection in family.attention_in:
            _resize_(layer, in_projection.path, outputs=layout.size * sum(counts[role] for role in in_projection.roles))
        for norm in family.head_norms:
            _resize_norm_(layer.get_submodule(norm.path), counts[norm.roles[0]], layout.size)
        attention: Any = layer.get_submodule(family.attention)
        if structure.kept_heads is not None and structure.kept_heads != slope_heads(attention, family):
            _keep_slopes_(attention, structure.kept_heads)
        _tell_heads_(attention, family, heads, kv_heads, layout.size)
    _drop_norms_(layer, family, structure)


def _tell_heads_(attention: Any, family: Family, heads: int, kv_heads: int, size: int) -> None:
    """Sets the attributes by which attention modules know how many heads they have."""
    counts = {"num_heads": heads, "num_key_value_heads": kv_heads, "num_kv_heads": kv_heads}
    counts |= {"num_key_value_groups": heads // kv_heads, "split_size": heads * size}
    for name, number in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, number)
    if family.reads_config:
        config = getattr(attention.config, "_config", attention.config)
        attention.config = LayerConfig(config, num_attention_heads=heads, num_key_value_heads=kv_heads)


def _drop_norms_(layer: nn.Module, family: Family, structure: LayerStructure) -> None:
    """Takes out the norms that have nothing left to normalise."""
    attention_gone = structure.num_attention_heads == 0
    mlp_gone = structure.intermediate_size == 0 and structure.expert_sizes is None  # a router reads the norm still
    in_front = ((family.attention_norm, attention_gone), (family.mlp_norm, mlp_gone))
    for path, _ in in_front:
        if path is not None and all(gone for other, gone in in_front if other == path):
            layer.set_submodule(path, nn.Identity())
    if family.attention_post_norm and attention_gone and not structure.attention_output_bias:
        layer.set_submodule(family.attention_post_norm, nn.Identity())
    if family.mlp_post_norm and mlp_gone and not structure.mlp_output_bias:
        layer.set_submodule(family.mlp_post_norm, nn.Identity())


def number_caches_(layers: nn.ModuleList, family: Family, configs: tuple[Any, ...]) -> bool:
    """Numbers the layers' attention so that the KV cache's first entry, and the first of each kind (full, sliding),
    exists: a cache tells its length by those. Returns whether any attention is left. Servers have caches of their own,
    one for every layer, and are left the layers' own order.

    Without removed layers that is the layers' own order. Kinds are told by `configs`' `layer_types`; there, a layer
    that has no attention takes the kind of the next one that has, so that it holds no kind's first place.
    """
    if configs[0]._attn_implementation in SERVERS:
        return True
    attentions = [layer.get_submodule(family.attention) for layer in layers]
    present = [not isinstance(attention, RemovedAttention) for attention in attentions]
    if not any(present):
        return False
    kinds = list(getattr(configs[0], "layer_types", None) or ["full_attention"] * len(layers))
    last = max(index for index, here in enumerate(present) if here)
    for index in reversed(range(len(kinds))):
        if not present[index]:
            kinds[index] = kinds[index + 1 if index < last else last]
    places = {kind: iter([i for i, other in enumerate(kinds) if other == kind]) for kind in kinds}
    for attention, here, kind in zip(attentions, present, kinds, strict=True):
        if here:
            attention.layer_idx = next(places[kind])  # pyright: ignore[reportArgumentType]
    for config in configs:
        if getattr(config, "layer_types", None):
            config.layer_types = list(kinds)
    return True


def head_size(config: Any) -> int:
    """Channels of one attention head, from a stock config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def linear_sizes(linear: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, of what is left of one, or of GPT-2's Conv1D."""
    ours = isinstance(linear, (nn.Linear, OutputBias))
    return (linear.in_features, linear.out_features) if ours else (linear.nx, linear.nf)


def as_matrix(linear: nn.Module, weight: Tensor) -> Tensor:
    """`weight` of (the shape of) `linear` as [outputs, inputs]: Conv1D holds it the other way round. A view, and its
    own inverse."""
    return weight if isinstance(linear, nn.Linear) else weight.T


def _resize_(
    layer: nn.Module, path: str, *, inputs: int | None = None, outputs: int | None = None, bias: bool | None = None
) -> None:
    """Replaces the linear layer at `path` by an uninitialised one where its shape or bias differs; without inputs, its
    bias alone stays."""
    old: Any = layer.get_submodule(path)
    had = (*linear_sizes(old), old.bias is not None)
    inputs, outputs = had[0] if inputs is None else inputs, had[1] if outputs is None else outputs
    bias = had[2] if bias is None else bias
    if (inputs, outputs, bias) == had:
        return
    weight: Tensor = old.weight
    empty = {"device": weight.device, "dtype": weight.dtype}
    own_bias = nn.Parameter(torch.zeros(outputs, **empty), requires_grad=weight.requires_grad) if bias else None
    if inputs == 0:
        layer.set_submodule(path, OutputBias(outputs, own_bias).train(old.training))
        return
    transposed = not isinstance(old, nn.Linear)
    with torch.device("meta"):  # skips the random initialisation
        new: Any = type(old)(outputs, inputs) if transposed else type(old)(inputs, outputs, bias=bias)
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    new.weight = nn.Parameter(torch.empty(shape, **empty), requires_grad=weight.requires_grad)
    new.bias = own_bias
    layer.set_submodule(path, new.train(old.training))


def _resize_norm_(norm: Any, heads: int, size: int) -> None:
    """A norm over all heads' channels gets an uninitialised weight of so many; of a list of norms, so many stay."""
    if hasattr(norm, "norms"):
        norm.norms = norm.norms[:heads]
        norm.num_heads = heads
    elif norm.weight.shape[0] != heads * size:
        norm.weight = nn.Parameter(norm.weight.new_empty(heads * size), requires_grad=norm.weight.requires_grad)


def slope_heads(attention: nn.Module, family: Family) -> tuple[int, ...] | None:
    """Original indices of the heads whose ALiBi slopes this attention uses; None for families without ALiBi."""
    if not family.alibi:
        return None
    kept_heads = getattr(attention, "kept_heads", None)
    return tuple(range(getattr(attention, "num_heads", 0))) if kept_heads is None else kept_heads


def _keep_slopes_(attention: nn.Module, kept_heads: tuple[int, ...]) -> None:
    """Each kept head keeps its own ALiBi slope: the model hands all of the original heads' slopes to every layer."""
    if not hasattr(attention, "kept_heads"):
        attention.register_forward_pre_hook(_select_slopes, with_kwargs=True)
    attention.kept_heads = kept_heads  # pyright: ignore[reportArgumentType]


def _select_slopes(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook by a name of its own, so that it can be pickled."""
    kept, alibi, mask = list(module.kept_heads), kwargs["alibi"], kwargs["attention_mask"]
    if alibi.ndim == 4:  # Falcon's, which its mask holds too
        return args, {**kwargs, "alibi": alibi[:, kept], "attention_mask": mask[:, kept]}
    by_head = alibi.view(args[0].shape[0], -1, *alibi.shape[1:])
    return args, {**kwargs, "alibi": by_head[:, kept].flatten(0, 1)}


def stock_config(config: Any) -> Any:
    """The original model's config: the pruned one without its structure."""
    model_type = config.model_type.removeprefix("pruned_")
    stock = getattr(importlib.import_module("transformers"), FAMILIES[model_type].stock + "Config")
    values = {k: v for k, v in config.to_dict().items() if k not in ("per_layer_config", "model_type", "auto_map")}
    copied = stock(**values)
    copied._attn_implementation = config._attn_implementation
    return copied


_BESIDE = ("rope_theta", "partial_rotary_factor")  # in `rope_parameters` now, beside `rope_scaling` then


def old_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `rope_parameters` of a config.json as transformers 4 called them: `rope_theta`, `rope_scaling`, and what else
    there was. Where these differ between kinds of layers (Gemma 3), the full ones' come under these names, and the
    sliding ones' base is `rope_local_base_freq`."""
    old: dict[str, Any] = {}
    rope = config.get("rope_parameters") or {}
    if "sliding_attention" in rope and "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope.get("rope_theta") is not None:
        old.update({name: rope[name] for name in _BESIDE if rope.get(name) is not None})
        if rope.get("rope_type", "default") != "default":
            old["rope_scaling"] = _old_scaling(rope, config)
        if config.get("model_type", "").endswith("gpt_neox"):
            old.update({"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]})
    return old


def _old_scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("model_type", "").endswith("phi3"):  # its class took these three, and no more
        return {"type": rope["rope_type"], "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return {name: value for name, value in rope.items() if name not in _BESIDE}


def _old_init_of(stock_class: type) -> Any:
    """The `__init__` of a config's class before transformers 5. `rope_scaling` is not in the config.json of pruned
    layers: beside `rope_theta` today's transformers takes it up before it knows the longest window, and fails, where it
    reads a tokenizer without this file."""

    def __init__(self, **values):
        stock_class.__init__(self, **{**old_rope(values), **values})  # type: ignore[misc]

    return __init__


def _layer_configs(config: Any) -> Iterable[Any]:
    """The config as each layer sees it, where transformers knows of `per_layer_config` and where it does not."""
    values = config.per_layer_config
    if not isinstance(values, dict):
        return values
    own = {int(index): layer for index, layer in values.items()}
    return [LayerConfig(config, **own.get(index, {})) for index in range(config.num_hidden_layers)]


def layer_structures(config: Any, layout: HeadLayout) -> list[LayerStructure]:
    """The structure of every layer, read from `per_layer_config`."""
    structures = []
    for layer in _layer_configs(config):
        kept_heads = getattr(layer, "kept_heads", None)
        heads = 0 if getattr(layer, "attention_removed", False) else layer.num_attention_heads
        kv_heads = min(heads, getattr(layer, "num_key_value_heads", None) or layout.key_value_heads(heads))
        of_experts = {}
        for name in ("expert_sizes", "expert_output_biases", "kept_experts"):
            values = getattr(layer, name, None)  # beside a mixture's layers, others have empty lists
            of_experts[name] = tuple(values) if values else None
        structures.append(
            LayerStructure(
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                intermediate_size=layer.intermediate_size,
                attention_output_bias=layer.attention_output_bias,
                mlp_output_bias=layer.mlp_output_bias,
                kept_heads=None if kept_heads is None else tuple(kept_heads),
                **of_experts,
            )
        )
    return structures


def _check_version(family: Family) -> None:
    """Raises ImportError where transformers is older than what this file is known to work with."""
    installed = importlib.import_module("transformers").__version__
    if [int(part) for part in installed.split(".")[:2]] < [int(part) for part in family.pruned_since.split(".")]:
        raise ImportError(
            f"{family.stock} models with pruned layers need transformers >= {family.pruned_since}; {installed} is "
            f"installed: pip install 'transformers>={family.pruned_since}'"
        )


def _init_pruned(model: Any, stock_class: type, config: Any, *args: Any, **kwargs: Any) -> None:
    stock = stock_config(config)
    family = family_of(stock)
    _check_version(family)
    stock_class.__init__(model, stock, *args, **kwargs)  # type: ignore[misc]
    base = model.base_model if model.base_model is not model else getattr(model, "model", model)  # Gemma 3's, once
    layers, layout = base.get_submodule(family.layers), head_layout(family, stock)
    for layer, structure in zip(layers, layer_structures(config, layout), strict=True):
        split_experts_(layer, family)
        resize_layer_(layer, family, structure, layout)
    if family.experts and type(model.base_model) is not type(model):  # a stock one would have its checkpoint fused
        model.base_model.__class__ = __getattr__(f"Pruned{family.stock}Model")
    if not number_caches_(layers, family, (stock, config)):
        config.use_cache = stock.use_cache = False
    config._attn_implementation = stock._attn_implementation  # chosen when the stock model is made
    model.config = config


def _init_of(stock_class: type) -> Any:
    """The `__init__` of a class with pruned layers. Without annotations: servers compare arguments with them, and in
    this file they are strings."""

    def __init__(self, config, *args, **kwargs):
        _init_pruned(self, stock_class, config, *args, **kwargs)

    return __init__


def _register_names(class_name: str, family: Family) -> None:
    """Tells transformers what checkpoints of the class call their tensors, where the modules call them otherwise."""
    if not family.stored_as or importlib.util.find_spec("transformers.conversion_mapping") is None:
        return
    renaming = importlib.import_module("transformers.core_model_loading").WeightRenaming
    conversions = importlib.import_module("transformers.conversion_mapping")
    renamings = [renaming(stored, own) for own, stored in family.stored_as]
    conversions.register_checkpoint_conversion_mapping(class_name, renamings, overwrite=True)


AUTO_CLASSES = {  # of transformers -> what the classes of an architecture are called that they make
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
}


@cache
def __getattr__(name: str) -> type:
    """PrunedLlamaConfig, PrunedLlamaForCausalLM, PrunedLlamaModel ...: made from the stock class when asked for, where
    there is one."""
    if not name.startswith("Pruned"):  # Python itself asks for names like __path__: no reason to import transformers
        raise AttributeError(name)
    transformers = importlib.import_module("transformers")
    families = {family.stock: model_type for model_type, family in FAMILIES.items()}
    for suffix in ("Config", *AUTO_CLASSES.values()):
        stock = name.removeprefix("Pruned").removesuffix(suffix)
        if name != f"Pruned{stock}{suffix}" or stock not in families:
            continue
        own_name = FAMILIES[families[stock]].causal_lm if suffix == "ForCausalLM" else None
        stock_class = getattr(transformers, own_name or stock + suffix, None)
        if stock_class is None:
            break
        body: dict[str, Any] = {"__module__": __name__, "__doc__": f"{stock_class.__name__} with pruned layers."}
        if suffix == "Config":
            body["model_type"] = f"pruned_{families[stock]}"
            # heads need not divide the hidden size here, and Phi-3 asks how many there are, which differs by layer
            body["validate_architecture"] = body["validate_rope"] = lambda self: None
            checked = is_dataclass(stock_class)  # since transformers 5
            if not checked:
                body["__init__"] = _old_init_of(stock_class)
            made = type(name, (stock_class,), body)
            return importlib.import_module("huggingface_hub.dataclasses").strict(made) if checked else made
        family = FAMILIES[families[stock]]
        body["config_class"] = __getattr__(f"Pruned{stock}Config")
        body["__init__"] = _init_of(stock_class)
        if family.experts:  # how many tokens an expert gets is known only while it runs
            body["_can_compile_fullgraph"] = False
        _register_names(name, family)
        return type(name, (stock_class,), body)
    raise AttributeError(name)
