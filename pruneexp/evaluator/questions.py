"""Multiple choice in the embedded language: the zero-shot task that needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pruneexp.dataset import bos_token, check_vocabulary, fingerprint
from pruneexp.types import ConfigError, require_least


@dataclass(frozen=True)
class Questions:
    """Share, in [0, 1], of questions whose right choice, of four, has the highest log-likelihood after the context.

    The log-likelihood is the sum over the choice's tokens, no normalisation by length; of equal ones the first counts.
    Always the same `samples` questions, whose stories are in no calibration or training text. Chance is 0.25. `bos`:
    the beginning-of-sequence token stands in front of each context. Named "acc/embedded_questions[<samples>]", with
    `bos` "acc/embedded_questions+bos[<samples>]".
    """

    samples: int
    batch_size: int
    bos: bool

    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_least(self, 1, "samples", "batch_size")

    def prepare(self, tokenizer: Any, vocabulary: int) -> None:
        """Raises ConfigError for a model without a tokenizer, or with one of another vocabulary."""
        rows_NT, _, _ = self._rows(tokenizer, None)
        check_vocabulary(rows_NT, vocabulary, "evaluator.questions")

    def lacks_bos(self, tokenizer: Any, token: int) -> bool:
        """Whether contexts begin with another token."""
        return not self.bos

    def measured_on(self, tokenizer: Any) -> str:
        """Fingerprint of the questions' tokens, of which of them are scored, and of the answers."""
        rows_NT, scored_NT, answers = self._rows(tokenizer, None)
        return f"{fingerprint(torch.where(scored_NT, rows_NT, -1 - rows_NT))} {fingerprint(torch.tensor(answers))}"

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
        rows_NT, scored_NT, answers = self._rows(tokenizer, model.max_length)
        losses_NT = model.token_losses(rows_NT, self.batch_size).double().cpu()
        # `where`, not a product: what a broken model makes of the padding must not count, even if it is not a number.
        nats_N = torch.where(scored_NT[:, 1:], losses_NT, 0.0).sum(dim=1)
        chosen = nats_N.reshape(len(answers), -1).argmin(dim=1)
        right = (chosen == torch.tensor(answers)).double().mean()
        return {f"acc/embedded_questions{'+bos' if self.bos else ''}[{self.samples}]": float(right)}

    def _rows(self, tokenizer: Any, max_length: int | None) -> tuple[Tensor, Tensor, list[int]]:
        """Every context with each of its choices, padded: ids int64 [4*Q, T], True where the choice's tokens are,
        bool [4*Q, T], and the right choices [Q]."""
        from pruneexp.embedded.language import EVALUATION, questions

        if tokenizer is None:
            raise ConfigError("evaluator.questions: needs a tokenizer and the model has none")
        drawn = questions(EVALUATION[1], self.samples)  # EVALUATION[0] is the dataset's
        begin = [bos_token(tokenizer, "evaluator.questions.bos")] if self.bos else []
        room = max_length and max_length - len(begin)
        rows = [_row(tokenizer, q.context, choice, room) for q in drawn for choice in q.choices]
        rows = [([*begin, *ids], n) for ids, n in rows]
        length = max(len(ids) for ids, _ in rows)
        # Padding stands on the right, where a causal model's earlier tokens cannot see it; it is never scored.
        rows_NT = torch.tensor([[*ids, *[ids[-1]] * (length - len(ids))] for ids, _ in rows])
        position_T = torch.arange(length)
        scored_NT = torch.stack([(position_T >= len(ids) - n) & (position_T < len(ids)) for ids, n in rows])
        return rows_NT, scored_NT, [q.answer for q in drawn]


def _row(tokenizer: Any, context: str, choice: str, max_length: int | None) -> tuple[list[int], int]:
    """Ids of context and choice, the oldest dropped where they are too many, and how many of them the choice is."""
    before = tokenizer.encode(context, add_special_tokens=False)
    ids = tokenizer.encode(f"{context} {choice}", add_special_tokens=False)
    choice_tokens = len(ids) - len(before)
    return ids[-max_length:] if max_length else ids, choice_tokens
