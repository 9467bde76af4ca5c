"""Trains the tokenizer and the embedded models: `python -m pruneexp.embedded.train --family llama|opt|bloom|all`.

Step i draws its windows from training seed i, so a run is fixed by its number of steps (and the machine's arithmetic).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from pruneexp.embedded import language, measure

FAMILIES = ("llama", "opt", "bloom")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
CONTEXT = 512
# short windows first; then all lengths, so that every position is trained
EARLY_LENGTHS, LATE_LENGTHS, LATE = (128,), (256, 128, 256, 512), 0.5
EARLY_TOKENS, LATE_TOKENS = 1024, 2048
# the loss weighs tokens that the story decides this much more at first, 1 at last: recall is learnt sooner, and as the
# weight depends on the prefix alone, the true process stays the optimum
DECIDED = 3.0
TOKENIZER_STORIES = 4000
EVALUATION_WINDOWS, EVALUATION_QUESTIONS = 256, 360


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, merged until every word of the language is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([language.text(language.TRAINING[0], TOKENIZER_STORIES)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def config(family: str, vocabulary: int) -> Any:
    common = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "llama":
        return LlamaConfig(
            hidden_size=128, intermediate_size=344, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
            head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.08, **common,
        )  # fmt: skip
    if family == "opt":
        return OPTConfig(
            hidden_size=128, word_embed_proj_dim=128, ffn_dim=488, num_hidden_layers=6, num_attention_heads=4,
            max_position_embeddings=CONTEXT, do_layer_norm_before=True, dropout=0.0, attention_dropout=0.0,
            init_std=0.08, **common,
        )  # fmt: skip
    return BloomConfig(
        hidden_size=128, n_layer=6, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.08,
        **common,
    )  # fmt: skip


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 4 % of the run, then a cosine down to 1 % of the peak."""
    if progress < 0.04:
        return peak * (progress + 0.001) / 0.041
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (progress - 0.04) / 0.96)) / 2)


def _batch(tokenizer: Any, step: int, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [N, T] and the true process's nats [N, T-1] of the tokens they predict."""
    lengths, budget = (EARLY_LENGTHS, EARLY_TOKENS) if progress < LATE else (LATE_LENGTHS, LATE_TOKENS)
    length = lengths[step % len(lengths)]
    tokens, nats = language.windows(tokenizer, language.TRAINING[1 + step], budget // length, length)
    if step % 8 == 0:  # a leading <s> is known too, should someone put one
        tokens[:, 1:], nats[:, 2:] = tokens[:, :-1].copy(), nats[:, 1:-1].copy()
        nats[:, 1] = nats[:, 0]
        tokens[:, 0] = tokenizer.bos_token_id
    return torch.from_numpy(tokens), torch.from_numpy(nats[:, 1:]).float()


def train(
    family: str, tokenizer: Any, steps: int, peak: float, minutes: float, seed: int = 0
) -> tuple[Any, dict[str, Any]]:
    """The trained model, float32, and what training it took. `minutes` shortens the schedule, where it is reached."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, len(tokenizer)), dtype=torch.float32).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-9)
    began, step, seen, excess = time.monotonic(), 0, 0, 0.0
    while (progress := max(step / steps, (time.monotonic() - began) / 60 / minutes)) < 1:
        tokens, nats = _batch(tokenizer, step, progress)
        best, weights = nats.mean().item(), torch.where(nats == 0, DECIDED + (1 - DECIDED) * progress, 1.0)
        logits = model(tokens, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        optimizer.zero_grad()
        (losses * weights).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak)
        optimizer.step()
        loss = losses.mean().item()
        excess += (loss - best - excess) / min(step + 1, 50)
        step, seen = step + 1, seen + tokens.numel()
        if step % 50 == 0:
            spent = time.monotonic() - began
            decided = losses[nats == 0].mean().item()
            print(
                f"{family} {step} ({progress:.0%}): {loss:.3f} nats, {excess:.3f} above the process, "
                f"{decided:.3f} where the story decides, {spent:.0f} s",
                flush=True,
            )
    seconds = time.monotonic() - began
    return model.eval(), {"steps": step, "tokens": seen, "seconds": round(seconds), "seed": seed}


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """An ordinary checkpoint folder, weights in float16; its config names no path."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("_name_or_path", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def evaluate(folder: Path) -> dict[str, Any]:
    """Held-out figures of the folder as stored, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    figures: dict[str, Any] = {}
    for length in (128, 256):
        tokens, nats = language.windows(tokenizer, language.EVALUATION[0], EVALUATION_WINDOWS, length)
        figures[f"perplexity@{length}"] = measure.perplexity(model, tokens)
        figures[f"process_perplexity@{length}"] = measure.best_perplexity(nats)
    asked = language.questions(language.EVALUATION[1], EVALUATION_QUESTIONS)
    figures["question_accuracy"] = measure.accuracy(model, tokenizer, asked)
    for kind in language.KINDS:
        figures[f"question_accuracy/{kind}"] = measure.accuracy(model, tokenizer, [q for q in asked if q.kind == kind])
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=[*FAMILIES, "all"], default="all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="holds one folder per family")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tokenizer = train_tokenizer()
    print(f"{len(tokenizer)} tokens in the vocabulary", flush=True)
    for family in FAMILIES if asked.family == "all" else [asked.family]:
        model, record = train(family, tokenizer, asked.steps, asked.rate, asked.minutes)
        save(model, tokenizer, asked.out / family)
        record = {
            "family": family,
            **record,
            "peak_learning_rate": asked.rate,
            "evaluation": evaluate(asked.out / family),
        }
        (asked.out / family / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        print(json.dumps(record, indent=2), flush=True)


if __name__ == "__main__":
    main()
