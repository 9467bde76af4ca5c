"""LLM-BIP: the score as its formula, and as a bound on what the block's output really loses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from pruneexp.criterion import LlmBip
from pruneexp.evidence import AbsoluteMoments, Moments
from pruneexp.types import Block
from tests.cases import each
from tests.toy_sites import HIDDEN, activations, block

BLOCK = block()
ATTENTION, MLP = BLOCK.sites
HEADS = activations(ATTENTION, 5, 7)
EVIDENCE = {"l1": AbsoluteMoments, "l2": Moments}


def size(x: Tensor, tokens: str) -> Tensor:
    return x.abs().mean(0) if tokens == "l1" else x.square().mean(0).sqrt()


def seen(tokens: str, ffn: Tensor) -> dict:
    kind = EVIDENCE[tokens]
    return {ATTENTION.name: kind.empty(ATTENTION).update_(HEADS), MLP.name: kind.empty(MLP).update_(ffn)}


@each("gate, norm, tokens", itertools.product(["up", "up_plus_gate"], ["ignore", "scale"], ["l1", "l2"]))
def test_the_formula_with_explicit_matrices(tokens: str, gate: str, norm: str) -> None:
    scale = torch.linspace(-2, 2, HIDDEN, dtype=torch.float64)
    normed = Block(BLOCK.name, 0, BLOCK.sites, BLOCK.weights, {MLP.name: scale})
    x = activations(MLP, 5, 7)
    scores = LlmBip(tokens, gate, norm, False)(normed, seen(tokens, x))
    ffn, out_projection = BLOCK.weights[MLP.name], BLOCK.weights[ATTENTION.name].out_projection
    up = ffn.in_projections["up"][:, 0].abs() + (
        ffn.in_projections["gate"][:, 0].abs() if gate == "up_plus_gate" else 0
    )
    up = up * scale.abs() if norm == "scale" else up
    through = torch.eye(HIDDEN, dtype=torch.float64) + ffn.out_projection.abs() @ up
    attention_C = size(HEADS.flatten(0, 1), tokens) * (through @ out_projection.abs()).sum(0)
    mlp_C = size(x.flatten(0, 1), tokens) * ffn.out_projection.abs().sum(0)
    torch.testing.assert_close(scores[ATTENTION.name].columns_C, attention_C, rtol=1e-10, atol=0)
    torch.testing.assert_close(scores[ATTENTION.name].scores_U, attention_C.reshape(4, -1).sum(1), rtol=1e-10, atol=0)
    torch.testing.assert_close(scores[MLP.name].columns_C, mlp_C, rtol=1e-10, atol=0)


def test_the_score_bounds_the_true_change_of_a_relu_block_without_norm() -> None:
    out_projection, ffn = BLOCK.weights[ATTENTION.name].out_projection, BLOCK.weights[MLP.name]
    residual = activations(MLP, 5, 7, seed=3)[..., :HIDDEN]

    def inner(z: Tensor) -> Tensor:
        return torch.relu(z @ ffn.in_projections["up"][:, 0].T)

    def output(heads: Tensor, without: int | None = None) -> Tensor:
        z = residual + heads @ out_projection.T
        h = inner(z)
        if without is not None:
            h = h.index_fill(-1, torch.tensor(without), 0)
        return z + h @ ffn.out_projection.T

    whole = output(HEADS)
    for tokens in ("l1", "l2"):
        scores = LlmBip(tokens, "up", "ignore", False)(BLOCK, seen(tokens, inner(residual + HEADS @ out_projection.T)))
        for j in range(ATTENTION.channels):
            changed = (output(HEADS.index_fill(-1, torch.tensor(j), 0)) - whole).abs().sum(-1).flatten()
            assert 0 < size(changed, tokens) <= scores[ATTENTION.name].columns_C[j]
        for j in range(MLP.channels):  # there is nothing behind the FFN, one output at a time the bound is exact
            changed = (output(HEADS, without=j) - whole).abs().sum(-1).flatten()
            torch.testing.assert_close(size(changed, tokens), scores[MLP.name].columns_C[j], rtol=1e-9, atol=1e-12)


def test_attention_without_an_ffn_behind_it_reaches_the_output_by_the_residual_path() -> None:
    expected = size(HEADS.flatten(0, 1), "l2") * BLOCK.weights[ATTENTION.name].out_projection.abs().sum(0)
    alone, beside = Block(BLOCK.name, 0, (ATTENTION,), BLOCK.weights), replace(BLOCK, side_by_side=True)
    for without in (alone, beside):
        scores = LlmBip("l2", "up", "ignore", False)(without, seen("l2", activations(MLP, 5, 7)))
        torch.testing.assert_close(scores[ATTENTION.name].columns_C, expected, rtol=1e-10, atol=0)
