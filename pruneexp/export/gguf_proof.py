"""Proof that a GGUF file is the model: read back tensor by tensor, and run by llama.cpp where that is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pruneexp.export.checkpoint import TOLERANCE, check_difference, exact_model, proof_tokens
from pruneexp.export.folders import stored_source
from pruneexp.export.gguf_vocabulary import vocabulary
from pruneexp.export.llama_like import context_length
from pruneexp.model import Model
from pruneexp.progress import waiting
from pruneexp.surgery.prove import greedy_tokens, logits_of
from pruneexp.types import RunError

if TYPE_CHECKING:
    from pruneexp.export.gguf_file import GgufExporter

TOLERANCE_16_BIT = 0.05  # of the logits' root mean square: llama.cpp rounds what it multiplies 16-bit matrices by, too
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two  spaces, a\ttab,\n\na blank line and  three   more. ",
    "It's 3.14159 in 2024, 100000 times; don't we'LL see?!",
    "Ünïcödé: naïve façade, Привет мир, 你好世界, 🦙🦙 (x²+y²)/2 == z_i[0] // 7 #tag",
)

# Runs in a process of its own: llama.cpp ends the process when it meets what it does not expect.
RUN = """
import json, sys
file, tokens_file, out_file, texts_file = sys.argv[1:5]
try:
    import llama_cpp
except Exception as error:
    print(f"llama-cpp-python does not import: {error}", file=sys.stderr)
    sys.exit(3)
import numpy
from safetensors.numpy import load_file, save_file
windows = load_file(tokens_file)["tokens"]
texts = json.load(open(texts_file))
llama = llama_cpp.Llama(
    file, n_ctx=windows.shape[1] + 16, logits_all=True, verbose=False, seed=0, n_threads=1, n_threads_batch=1,
    type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
)
logits = []
for window in windows:
    llama.reset()
    llama.eval(window.tolist())
    logits.append(llama.scores[: len(window)].copy())
llama.reset()
tokens = windows[0, :8].tolist()
llama.eval(tokens)
for _ in range(8):
    tokens.append(int(llama.scores[len(tokens) - 1].argmax()))
    llama.eval(tokens[-1:])
words = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
save_file({"logits": numpy.stack(logits), "generated": numpy.array([tokens])}, out_file)
json.dump({"version": llama_cpp.__version__, "words": words}, open(out_file + ".json", "w"))
"""


def prove_gguf(exporter: GgufExporter, checkpoint: Path, how: str, stream: bool, file: Path) -> dict[str, Any]:
    """Compares the file with the checkpoint. The record's `prove` says how: "llama.cpp" or "read_back".

    Raises RunError where they differ, or llama.cpp does not load the file.
    """
    record = read_back(exporter, stored_source(checkpoint, stream=stream).load(), file)
    if how == "in_place":
        return record
    if stream:
        return record | {"notes": [_not_run("the model to compare it with does not fit into memory")]}
    if find_spec("llama_cpp") is None:
        return record | {"notes": [_not_run("llama-cpp-python is not installed")]}
    return record | _run(exporter, checkpoint, file)


def _not_run(reason: str) -> str:
    return f"not run by llama.cpp ({reason}); the file was read back and every tensor in it compared"


def read_back(exporter: GgufExporter, model: Model, file: Path) -> dict[str, Any]:
    """Every tensor of the file against the model's, to the bit. Raises RunError, naming one that differs."""
    from gguf import GGUFReader

    from pruneexp.export.gguf_file import as_array, tensors

    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    count = 0
    for name, tensor in tensors(model, exporter.layers):
        expected = as_array(tensor, exporter.dtype, name)
        own = found.pop(name, None)
        same_shape = own is not None and tuple(own.shape[::-1].tolist()) == expected.shape
        if own is None or not same_shape or own.data.tobytes() != expected.tobytes():
            raise RunError(f"{file.name}: tensor {name} is not the model's; nothing was kept")
        count += 1
    if found:
        raise RunError(f"{file.name}: holds tensor {next(iter(found))}, which the model has not; nothing was kept")
    return {"prove": "read_back", "tensors_equal": count}


def _run(exporter: GgufExporter, checkpoint: Path, file: Path) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file

    model = exact_model(checkpoint)
    _round_(model, exporter.dtype)
    tokens_BT = proof_tokens(model)[:, : context_length(model)]
    texts = TEXTS if vocabulary(model.tokenizer, model.vocab_size).tokens else ()
    with tempfile.TemporaryDirectory() as scratch:
        tokens_file, out_file, texts_file = (str(Path(scratch, name)) for name in ("tokens", "out", "texts"))
        save_file({"tokens": tokens_BT.contiguous()}, tokens_file)
        Path(texts_file).write_text(json.dumps(texts))
        command = [sys.executable, "-c", RUN, str(file.resolve()), tokens_file, out_file, texts_file]
        with waiting("running the file with llama.cpp"):
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if done.returncode == 3:
            return {"notes": [_not_run(reason)]}
        if done.returncode:
            raise RunError(f"llama.cpp does not run {file.name} ({reason}); nothing was kept")
        answer = load_file(out_file)
        told = json.loads(Path(out_file + ".json").read_text())
    return _compared(model, tokens_BT, answer, exporter.dtype) | _compared_words(model, texts, told)


def _compared(model: Model, tokens_BT: Tensor, answer: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    expected = logits_of(model, tokens_BT)
    gap = answer["logits"] - expected
    relative = (gap.square().mean() / expected.square().mean()).sqrt().item()
    difference = gap.abs().max().item()
    if dtype == torch.float32:
        check_difference(difference, TOLERANCE)
    elif not relative <= TOLERANCE_16_BIT:
        raise RunError(
            f"the export computes something else: logits differ by {relative:.3g} of their root mean square, more than "
            f"{TOLERANCE_16_BIT:g}; nothing was kept"
        )
    tolerance = {"tolerance": TOLERANCE} if dtype == torch.float32 else {"relative_tolerance": TOLERANCE_16_BIT}
    return {
        "prove": "llama.cpp",
        **tolerance,
        "max_logit_difference": difference,
        "relative_logit_difference": relative,
        "greedy_tokens_equal": torch.equal(answer["generated"], greedy_tokens(model, tokens_BT).cpu()),
        "windows": list(tokens_BT.shape),
    }


def _compared_words(model: Model, texts: tuple[str, ...], told: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"llama_cpp_python": told["version"]}
    if texts:
        own = [model.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        different = [text for text, ours, theirs in zip(texts, own, told["words"], strict=True) if ours != theirs]
        record["prompt_tokens_equal"] = not different
        if different:
            record["notes"] = [f"llama.cpp splits {len(different)} of {len(texts)} texts into other tokens"]
    return record


@torch.no_grad()
def _round_(model: Model, dtype: torch.dtype) -> None:
    """Gives the model's matrices the values that they have in the file."""
    for parameter in model.module.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
