"""How well a causal language model knows the embedded language."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pruneexp.embedded.language import Question


@torch.no_grad()
def token_nats(model: Any, tokens: np.ndarray, batch: int = 16) -> np.ndarray:
    """The model's -ln p of every token but each window's first: float64 [N, T-1]."""
    losses = []
    for chunk in torch.from_numpy(tokens).split(batch):
        logits = model(chunk).logits[:, :-1].double()
        losses.append(F.cross_entropy(logits.transpose(1, 2), chunk[:, 1:], reduction="none"))
    return torch.cat(losses).numpy()


def perplexity(model: Any, tokens: np.ndarray) -> float:
    """exp(mean nats) over all predicted tokens; a window's first token is not predicted."""
    return math.exp(token_nats(model, tokens).mean())


def best_perplexity(nats: np.ndarray) -> float:
    """The same of the true process, from its nats [N, T]: no model does better in the long run."""
    return math.exp(nats[:, 1:].mean())


@torch.no_grad()
def chosen(model: Any, tokenizer: Any, question: Question) -> int:
    """The choice with the highest log-likelihood after the context."""
    start = len(tokenizer.encode(question.context, add_special_tokens=False))
    texts = [f"{question.context} {choice}" for choice in question.choices]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    tokens = torch.tensor(rows)
    logprobs = model(tokens).logits[:, start - 1 : -1].double().log_softmax(-1)
    return int(logprobs.gather(2, tokens[:, start:, None]).sum((1, 2)).argmax())


def accuracy(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """The share answered right; chance is 0.25."""
    return sum(chosen(model, tokenizer, asked) == asked.answer for asked in questions) / len(questions)
