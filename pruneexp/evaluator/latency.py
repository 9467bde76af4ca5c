"""How fast a model reads a prompt and writes new tokens on the machine at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruneexp.dataset import bos_token
from pruneexp.latency.measure import now
from pruneexp.model.forward import cache_name, last_logits_only
from pruneexp.model.half import plain_linear
from pruneexp.types import ConfigError, require_least

SEED = 0  # of the prompts: the figures must not depend on which random tokens a run drew


@dataclass(frozen=True)
class Latency:
    """Tokens per second: prefill (a prompt in one pass) and decode (new tokens one by one, on the KV cache).

    Prompts are random token ids, the same in every run; with `bos` the first is the beginning-of-sequence token.
    Decoding takes the likeliest token and never stops early. At each batch size: `warmup` unmeasured rounds, then
    `repeats` measured ones. "latency/prefill_tok_s@b1x128" and "latency/decode_tok_s@b1x128+32" (batch x prompt + new
    tokens) are medians over the repeats; ".../iqr" the interquartile range. All rows of the batch are counted.
    """

    prompt: int
    new_tokens: int
    batch_sizes: list[int]
    repeats: int
    warmup: int
    bos: bool

    def __post_init__(self) -> None:
        require_least(self, 0, "warmup")
        require_least(self, 1, "prompt", "new_tokens", "repeats")
        if not self.batch_sizes or any(batch < 1 for batch in self.batch_sizes):
            raise ConfigError(f"batch_sizes={list(self.batch_sizes)!r}: expected ints >= 1")

    def longest(self, tokenizer: Any) -> int:
        """Tokens of a prompt and what is written after it."""
        return self.prompt + self.new_tokens

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
        figures: dict[str, float] = {}
        for batch in self.batch_sizes:
            prompt_BT = self.prompts(model, tokenizer, batch)
            rounds = [self._round(model, prompt_BT) for _ in range(self.warmup + self.repeats)][self.warmup :]
            prefill, decode = torch.tensor(rounds, dtype=torch.float64).T
            size = f"@b{batch}x{self.prompt}"
            figures |= summary(f"latency/prefill_tok_s{size}", batch * self.prompt / prefill)
            figures |= summary(f"latency/decode_tok_s{size}+{self.new_tokens}", batch * self.new_tokens / decode)
        return figures

    def prompts(self, model: Any, tokenizer: Any, batch: int) -> Tensor:
        """Token ids of `batch` prompts, int64 [B, T]."""
        prompt_BT = torch.randint(
            model.vocab_size, (batch, self.prompt), generator=torch.Generator().manual_seed(SEED)
        ).to(model.device)
        if self.bos:  # where there is no tokenizer, the token that the model's config names
            named = model.config if tokenizer is None else tokenizer
            prompt_BT[:, 0] = bos_token(named, "evaluator.latency.bos")
        return prompt_BT

    def _round(self, model: Any, prompt_BT: Tensor) -> tuple[float, float]:
        """Seconds of one prefill and of the decoding after it."""
        module, last, name = model.module, last_logits_only(model.module), cache_name(model.module)
        with torch.inference_mode(), plain_linear():
            start = now(model.device)
            out = module(prompt_BT, use_cache=True, **last)
            token_B1 = out.logits[:, -1:].argmax(-1)
            middle = now(model.device)
            for _ in range(self.new_tokens):
                out = module(token_B1, use_cache=True, **{name: getattr(out, name)})
                token_B1 = out.logits[:, -1:].argmax(-1)
            return middle - start, now(model.device) - middle


def summary(name: str, rates: Tensor) -> dict[str, float]:
    """The median of tokens per second over repeats, and the interquartile range."""
    low, median, high = torch.quantile(rates, torch.tensor([0.25, 0.5, 0.75], dtype=rates.dtype)).tolist()
    return {name: median, f"{name}/iqr": high - low}
