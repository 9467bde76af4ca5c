"""A model as the sizes that costs are counted from, and what a budget leaves of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pruneexp.model import Model
from pruneexp.pruning import Method
from pruneexp.pruning.budget import new_biases, searched_sites
from pruneexp.types import Budget, Cost, Site


@dataclass(frozen=True)
class Windows:
    """Windows of tokens and how they are run."""

    count: int  # N
    length: int  # T
    batch_size: int

    @property
    def tokens(self) -> int:
        return self.count * self.length

    @property
    def batches(self) -> int:
        return -(-self.count // self.batch_size)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. Parameters are counted once where they are tied."""

    layers: tuple[Cost, ...]  # of a whole decoder layer each: parameters, macs per token, KV elements per token
    sites: tuple[Site, ...]
    outside: int  # parameters outside the decoder layers: embeddings, positions, final norm, head
    hidden: int  # D
    vocabulary: int  # V
    scores: int  # query heads whose attention scores are written out, T x T each; 0 where they are not
    itemsize: int  # bytes of a number in the model's dtype

    @property
    def decoder(self) -> int:
        """Parameters of the decoder layers."""
        return sum(layer.params for layer in self.layers)

    @property
    def params(self) -> int:
        """Parameters of the whole model."""
        return self.decoder + self.outside

    @property
    def bytes(self) -> int:
        """Size of the whole model."""
        return self.params * self.itemsize

    @property
    def block_bytes(self) -> int:
        """Size of the largest decoder layer."""
        return max((layer.params for layer in self.layers), default=0) * self.itemsize

    @property
    def most_channels(self) -> int:
        """Inputs of the widest out-projection."""
        return max((site.channels for site in self.sites), default=0)

    def of_layer(self, index: int) -> list[Site]:
        return [site for site in self.sites if site.layer == index]


def shape_of(model: Model) -> Shape:
    """The sizes of a model whose tensors may all be on the meta device."""
    eager = getattr(model.module.config, "_attn_implementation", None) == "eager"
    return Shape(
        layers=tuple(model.whole_block(index).sites[0].cost for index in range(len(model.layers))),
        sites=model.sites(),
        outside=model.params - model.decoder_params,
        hidden=model.config.hidden_size,
        vocabulary=model.vocab_size,
        scores=model.config.num_attention_heads if eager else 0,
        itemsize=model.dtype.itemsize,
    )


def params_left(model: Model, method: Method, budget: Budget) -> tuple[int, int]:
    """Parameters of the whole model and of its decoder layers once `budget` has left.

    Exact, to the unit that a search rounds to, where the budget counts parameters. Where it counts something else, all
    sites are taken to lose the same share. Biases that compensation adds to every out-projection are counted: a budget
    in parameters or bytes of the decoder pays for them.
    """
    total, decoder = model.params, model.decoder_params
    sites = [site for site in searched_sites(model, method.search) if budget.price(site)]
    inner = [site for site in sites if site.kind != "block"] or sites
    wanted = replace(budget, added=0).remove
    if method.sparsity.of == "decoder":
        removed = wanted
    else:
        price = sum(budget.taken(site, site.units) for site in inner)
        removed = wanted * sum(site.units * site.cost.params for site in inner) / price if price else 0.0
    added = 0
    if method.compensator.adds_bias and budget.ratio > 0 and method.sparsity.of not in ("decoder", "bytes"):
        added = new_biases(model, inner)
    left = round(removed) - added
    return total - left, decoder - left
