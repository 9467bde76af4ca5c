"""A tiny LLaMA with everything beside its weights that real checkpoints have, and some that does not travel."""

from __future__ import annotations

import json
from pathlib import Path

import torch

EMBEDDED = Path(__file__).parent.parent / "pruneexp" / "embedded" / "llama"
GENERATION = """{
  "eos_token_id": [2, 7,   9, 11],
  "do_sample": true, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.3
}
"""
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
BESIDE = {
    "generation_config.json": GENERATION,
    "chat_template.jinja": TEMPLATE,
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "tokenizer.model": "pieces",
    "LICENSE": "the license",
    "LICENSE-2.txt": "another",
    "license.md": "a third",
    "NOTICE": "a notice",
    "USE_POLICY.md": "a policy",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{ }",
}
OTHERS = {"training.json": "{}", "notes.md": "mine", "original/params.json": "{}", "pytorch_model.bin": "pickled"}


TRAVELLING = sorted([*BESIDE, "tokenizer.json", "tokenizer_config.json"])


def furnish(folder: Path) -> Path:
    """Puts everything that may lie beside weights into `folder`, and what does not travel."""
    for name, text in {**BESIDE, **OTHERS}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EMBEDDED / name).read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({"clean": None, **settings}, indent=7))
    return folder


def furnished_folder(folder: Path) -> Path:
    """Makes it there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=886,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return furnish(folder)
