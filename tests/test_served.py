"""vLLM serves what is exported: the same greedy tokens as transformers gives for the pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pruneexp.export import main
from pruneexp.model import ModelSource
from pruneexp.surgery import save
from tests.llama_like import Kept, pruned_
from tests.tiny_families import TINY, random_model
from tests.vllm_process import need_vllm, served_tokens

pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12], [40]]
NEW = 12
SERVED = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 64,
}
LLAMA = {**TINY["llama_multi_query"][1], **SERVED}  # vLLM wants heads of 32 channels or more
GEMMA3 = {**TINY["gemma3"][1], **SERVED}
UNEVEN = ((1, 40), (0, 17), (2, 0))  # attention units and FFN channels that stay in each layer
CASES: dict[str, tuple[str, dict[str, Any], Kept, bool]] = {  # form -> the model, what stays, whether biases come
    "stock": ("Llama", LLAMA, ((1, 40), (1, 40), (1, 40)), False),
    "padded": ("Llama", LLAMA, UNEVEN, True),
    "remote_code": ("Llama", LLAMA, UNEVEN, True),
    "vllm": ("Llama", LLAMA, ((2, 40), (0, 17), (2, 0)), True),
    "vllm multiple=32": ("Llama", LLAMA, ((2, 40), (0, 17), (2, 0)), False),
    "remote_code of gemma3": ("Gemma3Text", GEMMA3, ((1, 40), (2, 17), (2, 33)), True),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Pruned checkpoints, as a run saves them, and their exports."""
    need_vllm()
    folders = {}
    for name, (prefix, values, kept, biases) in CASES.items():
        own = tmp_path_factory.mktemp("own")
        random_model(prefix, values).float().save_pretrained(own / "dense")
        model = ModelSource(name, str(own / "dense"), None, "float32", "cpu", False, False, 4).load()
        pruned_(model, kept, biases)
        save(model, own / "pruned")
        form, *more = name.split(" of ")[0].split()
        assert main([str(own / "pruned"), f"format={form}", *more, f"out={own / 'out'}", "prove=off"]) == 0
        folders[name] = (own / "pruned", own / "out")
    return folders


@pytest.fixture(scope="module")
def served(exported: dict[str, tuple[Path, Path]]) -> dict[Path, Any]:
    return served_tokens([out for _, out in exported.values()], PROMPTS, NEW)


def generated(folder: Path) -> list[list[int]]:
    """By transformers, from the pruned model's own folder."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
    greedy = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    inputs = [torch.tensor([prompt]) for prompt in PROMPTS]
    return [model.generate(tokens, **greedy)[0, tokens.shape[1] :].tolist() for tokens in inputs]


@pytest.mark.parametrize("name", CASES)
def test_vllm_gives_the_same_tokens(name: str, exported: dict[str, tuple[Path, Path]], served: dict[Path, Any]) -> None:
    pruned, out = exported[name]
    expected = generated(pruned)
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)  # they depend on the prompt
    assert served[out] == expected
