"""Decoder layers as sites and tensors, without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from pruneexp.types import Block, Cost, Site, SiteWeights

HIDDEN, HEAD = 24, 6
HEAD_COST, CHANNEL_COST = 4 * HIDDEN * HEAD, 3 * HIDDEN


def layer_sites(layer: int, heads: int = 4, channels: int = 40) -> tuple[Site, Site]:
    head, channel = Cost(HEAD_COST, HEAD_COST, 2 * HEAD), Cost(CHANNEL_COST, CHANNEL_COST, 0)
    return (
        Site(f"model.layers.{layer}.self_attn", "attention", layer, heads, HEAD, head),
        Site(f"model.layers.{layer}.mlp", "mlp", layer, channels, 1, channel),
    )


def model_sites(layers: int, heads: int = 4, channels: int = 40) -> list[Site]:
    return [site for layer in range(layers) for site in layer_sites(layer, heads, channels)]


def params(sites: list[Site]) -> int:
    return sum(site.units * site.cost.params for site in sites)


def block(layer: int = 0, dtype: torch.dtype = torch.float64, seed: int = 0) -> Block:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    sites = layer_sites(layer)
    weights = {}
    for site, roles in zip(sites, (("query", "key", "value"), ("gate", "up")), strict=True):
        in_projections = {role: draw(site.units, site.width, HIDDEN) for role in roles}
        weights[site.name] = SiteWeights(in_projections, {}, draw(HIDDEN, site.channels), None)
    return Block(f"model.layers.{layer}", layer, sites, weights)


def activations(site: Site, windows: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Channels with scales and offsets of their own: [windows, tokens, C]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(windows, tokens, site.channels, generator=generator, dtype=torch.float64)
    scale, offset = torch.rand(2, site.channels, generator=generator, dtype=torch.float64).unbind()
    return (x * (0.1 + scale) + 3 * offset).to(dtype)
