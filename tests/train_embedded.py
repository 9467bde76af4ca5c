"""Trains the tokenizer and the embedded models: `python -m tests.train_embedded --family all`.

Step i draws its windows from training seed i + 1 (the tokenizer has seed 0). With `--steps` a run is fixed,
up to the machine's arithmetic; `--minutes` runs the same schedule by the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

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

from pruneexp.embedded import FOLDER, language
from tests import embedded_process as process

FAMILIES = ("llama", "opt", "bloom")
SPECIAL: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
CONTEXT = 512
# short windows first; then all lengths, so that every position is trained
EARLY_LENGTHS, LATE_LENGTHS, LATE = (128,), (256, 128, 256, 512), 0.5
EARLY_TOKENS, LATE_TOKENS = 1024, 2048
# the loss weighs tokens that the story decides this more at first, 1 at last: recall is learnt sooner, and
# as the weight depends on the prefix alone, the true process stays the optimum
DECIDED = 3.0
SEED = 0
TOKENIZER_STORIES = 4000
EVALUATION_WINDOWS, EVALUATION_QUESTIONS = 256, 400


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
    tokenizer.train_from_iterator([process.text(language.TRAINING[0], TOKENIZER_STORIES)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def config(family: str, vocabulary: int) -> Any:
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common = {"vocab_size": vocabulary, **special}
    if family == "llama":
        return LlamaConfig(
            hidden_size=128, intermediate_size=344, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=4, head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            initializer_range=0.08, **common,
        )  # fmt: skip
    if family == "opt":
        return OPTConfig(
            hidden_size=128, word_embed_proj_dim=128, ffn_dim=488, num_hidden_layers=6, num_attention_heads=4,
            max_position_embeddings=CONTEXT, do_layer_norm_before=True, dropout=0.0, attention_dropout=0.0,
            init_std=0.08, **common,
        )  # fmt: skip
    return BloomConfig(
        hidden_size=128, n_layer=6, n_head=4, hidden_dropout=0.0, attention_dropout=0.0,
        initializer_range=0.08, **common,
    )  # fmt: skip


Record = dict[str, Any]


def read(path: Path) -> Record:
    return json.loads(path.read_text())


class Limit(NamedTuple):
    """Training ends at whichever comes first; the schedule follows the share that is done."""

    steps: int
    minutes: float

    def progress(self, step: int, seconds: float) -> float:
        return max(step / self.steps, seconds / 60 / self.minutes)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 4 % of the run, then a cosine down to 1 % of the peak."""
    if progress < 0.04:
        return peak * (progress + 0.001) / 0.041
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (progress - 0.04) / 0.96)) / 2)


def _batch(tokenizer: Any, step: int, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [N, T] and the true process's nats [N, T-1] of the tokens they predict."""
    lengths, budget = (EARLY_LENGTHS, EARLY_TOKENS) if progress < LATE else (LATE_LENGTHS, LATE_TOKENS)
    length = lengths[step % len(lengths)]
    tokens, nats = process.windows(tokenizer, language.TRAINING[1 + step], budget // length, length)
    if step % 8 == 0:  # a leading <s> is known too, should someone put one
        tokens[:, 1:], nats[:, 2:] = tokens[:, :-1].copy(), nats[:, 1:-1].copy()
        nats[:, 1] = nats[:, 0]
        tokens[:, 0] = tokenizer.bos_token_id
    return torch.from_numpy(tokens), torch.from_numpy(nats[:, 1:]).float()


def optimizer_for(model: Any, peak: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, biases and norms do not."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-9)


def begin(family: str, vocabulary: int) -> tuple[Any, Record]:
    """A new model, and the record of what was spent on it so far."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config(family, vocabulary), dtype=torch.float32)
    return model, {"family": family, "seed": SEED, "legs": 0, "steps": 0, "tokens": 0, "seconds": 0}


def train(tokenizer: Any, model: Any, record: Record, limit: Limit, peak: float) -> Record:
    """Trains in place; the record with this leg added. A later leg runs the schedule from `LATE` on."""
    family, first, start = record["family"], record["steps"], LATE if record["legs"] else 0.0
    model.train()
    optimizer = optimizer_for(model, peak)
    began, step, seen, excess = time.monotonic(), 0, 0, 0.0
    while (share := limit.progress(step, time.monotonic() - began)) < 1:
        progress = start + (1 - start) * share
        tokens, nats = _batch(tokenizer, first + step, progress)
        weights = torch.where(nats == 0, DECIDED + (1 - DECIDED) * progress, 1.0)
        logits = model(tokens, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        optimizer.zero_grad()
        (losses * weights).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak) * min(1, (step + 1) / 40)
        optimizer.step()
        step, seen = step + 1, seen + tokens.numel()
        excess += ((losses - nats).mean().item() - excess) / min(step, 50)
        if step % 50 == 0:
            spent, decided = time.monotonic() - began, losses[nats == 0].mean().item()
            figures = f"{excess:.3f} nats above the process, {decided:.3f} where the story decides"
            print(f"{family} step {step} ({progress:.0%}): {figures}, {spent:.0f} s", flush=True)
    model.eval()
    spent = {"legs": 1, "steps": step, "tokens": seen, "seconds": round(time.monotonic() - began)}
    seeds = [language.TRAINING[0], language.TRAINING[first + step]]
    return record | {key: record[key] + more for key, more in spent.items()} | {"training_seeds": seeds}


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """An ordinary checkpoint folder, weights in float16; its config names no path."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # a class name that every version of transformers knows
    changes = {"config.json": {}, "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    for name, change in changes.items():
        settings = read(folder / name) | change
        settings.pop("_name_or_path", None)
        (folder / name).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def stored(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def evaluate(folder: Path) -> Record:
    """Held-out figures of the folder as stored, computed in float32."""
    model, tokenizer = stored(folder), AutoTokenizer.from_pretrained(folder)
    figures: dict[str, float] = {}
    for length in (128, 256):
        tokens, nats = process.windows(tokenizer, language.EVALUATION[0], EVALUATION_WINDOWS, length)
        figures[f"perplexity@{length}"] = process.perplexity(model, tokens)
        figures[f"process_perplexity@{length}"] = process.best_perplexity(nats)
    questions = language.questions(language.EVALUATION[1], EVALUATION_QUESTIONS)
    figures["question_accuracy"] = process.accuracy(model, tokenizer, questions)
    for kind in language.KINDS:
        mine = [question for question in questions if question.kind == kind]
        figures[f"question_accuracy/{kind}"] = process.accuracy(model, tokenizer, mine)
    protocol = (
        f"float16 weights computed in float32; {EVALUATION_WINDOWS} windows per length, each from a story's "
        f"beginning, first token not predicted; {EVALUATION_QUESTIONS} questions, chance 0.25"
    )
    seeds = [language.EVALUATION[0], language.EVALUATION[1]]
    return {"protocol": protocol, "seeds": seeds, **{key: round(value, 4) for key, value in figures.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=[*FAMILIES, "all"], default="all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="holds one folder per family")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--resume", action="store_true", help="train what is in --out further")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer()  # the same every time
    print(f"{len(tokenizer)} tokens in the vocabulary", flush=True)
    for family in FAMILIES if args.family == "all" else [args.family]:
        folder = args.out / family
        if args.resume:
            model, record = stored(folder), read(folder / "training.json")
        else:
            model, record = begin(family, len(tokenizer))
        record = train(tokenizer, model, record, Limit(args.steps, args.minutes), args.rate)
        save(model, tokenizer, folder)
        record |= {"peak_learning_rate": args.rate, "evaluation": evaluate(folder)}
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        print(json.dumps(record, indent=2), flush=True)


if __name__ == "__main__":
    main()
