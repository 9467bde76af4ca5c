"""What a model writes after a prompt, before and after pruning."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pruneexp.dataset import (
    bos_token,
    check_takes_bos,
    check_vocabulary,
    encode,
    evaluation_windows,
    windows_of,
)
from pruneexp.dataset.files import existing_file, stem_of, text_of
from pruneexp.evaluator.once import once_per_tokenizer
from pruneexp.model.forward import cache_name, last_logits_only
from pruneexp.progress import progress
from pruneexp.types import ConfigError, Dataset, Measured, require_least, require_within

Tokens = list[int]
PROMPTS = "a UTF-8 text file, one prompt a line"


@dataclass(frozen=True)
class Generation:
    """Continuations of `samples` prompts: `new_tokens` tokens each, or up to the end of sequence that the model writes.

    Prompts are the first `prompt_tokens` tokens of windows of the dataset's evaluation split, evenly spread over it, or
    the lines of the file `prompts` that are not blank (the first `samples` of them, with what special tokens the
    tokenizer adds to any text). `bos`: each prompt begins with the beginning-of-sequence token, which counts among its
    tokens and is never there twice. `temperature` 0: the likeliest token each time. Above 0: drawn from
    softmax(logits / `temperature`) by inversion, with uniform numbers of `seed` that are the same for every model and
    any batch size.

    Figures, over the model's own tokens, that start where the prompt ends:

    - "distinct_1", "distinct_2", "distinct_3": different n-grams / all n-grams of all continuations (Li et al. 2016)
    - "seq_rep_4": 1 - different 4-grams / all 4-grams within a continuation, mean over continuations (Welleck et al.
      2020); 0 is no repetition
    - "exact_match": share of prompts whose continuation is, token by token, the dense model's; "common_prefix": tokens
      until the two part, mean over prompts. Of the pruned model only

    Named "<figure>/<dataset>@<prompt tokens>+<new tokens>", "t<temperature>" and "+bos" where they apply, then
    "[<prompts>]": "distinct_2/embedded@32+64[16]"; with a file of prompts "distinct_2/<file's stem>@+64[16]". Needs no
    tokenizer where the dataset has windows of tokens: they are then shown as they are.
    """

    dataset: Dataset
    prompts: str | None
    prompt_tokens: int
    samples: int
    new_tokens: int
    temperature: float
    seed: int
    batch_size: int
    bos: bool

    def __post_init__(self) -> None:
        require_least(self, 0, "seed")
        require_least(self, 1, "prompt_tokens", "samples", "batch_size")
        require_least(self, 4, "new_tokens")
        require_within(self, "[0, inf)", "temperature", besides="; 0 takes the likeliest token")
        if self.prompts is None:
            check_takes_bos(self.bos, self.dataset)

    def check(self) -> None:
        """The prompts' file, or the dataset's. Raises ConfigError."""
        if self.prompts is None:
            self.dataset.check(calibration=False)
        else:
            self._lines()

    def prepare(self, tokenizer: Any, vocabulary: int) -> None:
        """Makes the prompts, so that those that do not fit are found before weights load."""
        source = (
            self.dataset.key("evaluation") if self.prompts is None else f"evaluator.generation.prompts={self.prompts}"
        )
        for prompt_T in self._prompts(tokenizer):
            check_vocabulary(prompt_T[None], vocabulary, source)

    def lacks_bos(self, tokenizer: Any, token: int) -> bool:
        """Whether any prompt begins with another token."""
        return any(int(prompt_T[0]) != token for prompt_T in self._prompts(tokenizer))

    def longest(self, tokenizer: Any) -> int:
        """Tokens of the longest prompt and its continuation."""
        return max(len(prompt_T) for prompt_T in self._prompts(tokenizer)) + self.new_tokens

    def __call__(self, model: Any, tokenizer: Any) -> Measured:
        written = self._write(model, self._prompts(tokenizer))
        return Measured(self._named(text_figures(written), len(written)), seen=written)

    def against(self, dense: Measured, pruned: Measured, tokenizer: Any) -> Measured:
        """How far both wrote the same, and the texts side by side."""
        prompts = [prompt_T.tolist() for prompt_T in self._prompts(tokenizer)]
        table = side_by_side(tokenizer, prompts, dense.seen, pruned.seen)
        return Measured(self._named(agreement(dense.seen, pruned.seen), len(prompts)), {"md": table})

    @once_per_tokenizer
    def _prompts(self, tokenizer: Any) -> list[Tensor]:
        """int64 [T] each."""
        if self.prompts is not None:
            if tokenizer is None:
                raise ConfigError(
                    f"evaluator.generation.prompts={self.prompts}: text needs a tokenizer and the model has none; "
                    "expected null, and dataset=tokens"
                )
            bos = bos_token(tokenizer, "evaluator.generation.bos") if self.bos else None
            prompts = [encode(tokenizer, line, special_tokens=True) for line in self._lines()]
            return [windows_of(line_T, 0, bos, lambda text_T, _: text_T[None])[0] for line_T in prompts]
        windows_NT = evaluation_windows(self.dataset, tokenizer, None, self.bos)
        if self.prompt_tokens > windows_NT.shape[1]:
            wide = f"{windows_NT.shape[1]}, the width of the windows of {self.dataset.key('evaluation')}"
            raise ConfigError(f"evaluator.generation.prompt_tokens={self.prompt_tokens}: expected at most {wide}")
        chosen = torch.linspace(0, len(windows_NT) - 1, min(self.samples, len(windows_NT))).long()
        return list(windows_NT[chosen, : self.prompt_tokens])

    def _lines(self) -> list[str]:
        """The prompts of the file."""
        assert self.prompts is not None
        key = f"evaluator.generation.prompts={self.prompts}"
        text = text_of(existing_file(self.prompts, key, PROMPTS), key, PROMPTS)
        return [line for line in text.splitlines() if line.strip()][: self.samples]

    def _write(self, model: Any, prompts: Sequence[Tensor]) -> list[Tokens]:
        """The continuation of each prompt."""
        uniform_NS = torch.rand(
            len(prompts), self.new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed)
        )
        # Prompts of one length go together: without padding, what a batch holds changes nothing.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        alike = [list(group) for _, group in groupby(order, key=lambda i: len(prompts[i]))]
        batches = [group[i : i + self.batch_size] for group in alike for i in range(0, len(group), self.batch_size)]
        ends = end_tokens(model.module)
        written: dict[int, Tokens] = {}
        for batch in progress(batches, "generation", len(batches), "batches"):
            rows_BT = torch.stack([prompts[i] for i in batch]).to(model.device)
            new_BS = continued(model.module, rows_BT, self._choose(uniform_NS[batch]), self.new_tokens)
            written |= {i: up_to(row, ends) for i, row in zip(batch, new_BS.tolist(), strict=True)}
        return [written[i] for i in range(len(prompts))]

    def _choose(self, uniform_BS: Tensor) -> Callable[[Tensor, int], Tensor]:
        """(logits [B, V], step) -> tokens [B]."""
        if self.temperature == 0:
            return lambda logits_BV, step: logits_BV.argmax(-1)
        return lambda logits_BV, step: drawn(logits_BV.double() / self.temperature, uniform_BS[:, step])

    def _named(self, figures: dict[str, float], prompts: int) -> dict[str, float]:
        """Figures by names that carry the protocol."""
        source, prompt = self.dataset.name, str(self.prompt_tokens)
        if self.prompts is not None:
            source, prompt = stem_of(self.prompts, "prompts"), ""
        drawn_at = f"t{self.temperature:g}" if self.temperature else ""
        begun = "+bos" if self.bos else ""
        protocol = f"{source}@{prompt}+{self.new_tokens}{drawn_at}{begun}[{prompts}]"
        return {f"{name}/{protocol}": value for name, value in figures.items()}


@torch.inference_mode()
def continued(module: Any, prompt_BT: Tensor, choose: Callable[[Tensor, int], Tensor], steps: int) -> Tensor:
    """`steps` tokens after each prompt, on the KV cache: int64 [B, S] on the CPU."""
    name = cache_name(module)
    out = module(prompt_BT, use_cache=True, **last_logits_only(module))
    tokens = [choose(out.logits[:, -1], 0)]
    for step in range(1, steps):
        out = module(tokens[-1][:, None], use_cache=True, **{name: getattr(out, name)})
        tokens.append(choose(out.logits[:, -1], step))
    return torch.stack(tokens, dim=1).cpu()


def drawn(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which softmax's cumulative sum passes `uniform_B`, in [0, 1): int64 [B]."""
    passed_BV = logits_BV.softmax(-1).cumsum(-1)
    at_B1 = uniform_B.to(logits_BV.device)[:, None] * passed_BV[:, -1:]  # the sum is 1 up to rounding
    return torch.searchsorted(passed_BV, at_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)


def end_tokens(module: Any) -> frozenset[int]:
    """The tokens that end a text, as the model's own settings name them."""
    for config in (getattr(module, "generation_config", None), module.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def up_to(tokens: Tokens, ends: frozenset[int]) -> Tokens:
    """`tokens` in front of the first that is in `ends`."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def text_figures(texts: Sequence[Tokens]) -> dict[str, float]:
    """distinct_1 to distinct_3 and seq_rep_4, as Generation defines them; left out where no text is long enough."""
    figures = {}
    for n in (1, 2, 3):
        all_grams = [gram for text in texts for gram in ngrams(text, n)]
        if all_grams:
            figures[f"distinct_{n}"] = len(set(all_grams)) / len(all_grams)
    repeated = [1 - len(set(grams)) / len(grams) for grams in (ngrams(text, 4) for text in texts) if grams]
    if repeated:
        figures["seq_rep_4"] = sum(repeated) / len(repeated)
    return figures


def agreement(first: Sequence[Tokens], second: Sequence[Tokens]) -> dict[str, float]:
    """exact_match and common_prefix of texts in the same order."""
    pairs = list(zip(first, second, strict=True))
    return {
        "exact_match": sum(a == b for a, b in pairs) / len(pairs),
        "common_prefix": sum(common_prefix(a, b) for a, b in pairs) / len(pairs),
    }


def common_prefix(first: Tokens, second: Tokens) -> int:
    """Tokens until the texts part."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def side_by_side(tokenizer: Any, prompts: Sequence[Tokens], dense: Sequence[Tokens], pruned: Sequence[Tokens]) -> str:
    """A Markdown table with a row for each prompt; token ids where there is no tokenizer."""

    def text(tokens: Tokens) -> str:
        return _cell(" ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(tokens))

    lines = ["| prompt | dense | pruned | tokens alike |", "|---|---|---|---|"]
    for prompt, one, other in zip(prompts, dense, pruned, strict=True):
        alike = f"{common_prefix(one, other)} of {max(len(one), len(other))}"
        lines.append(f"| {text(prompt)} | {text(one)} | {text(other)} | {alike} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that Markdown and HTML take as it is, on one line."""
    escaped = re.sub(r"[|*_`~\\\[\]]", lambda match: f"&#{ord(match[0])};", html.escape(text, quote=False))
    return "<br>".join(escaped.splitlines())
