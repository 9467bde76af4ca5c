"""Proof that a GGUF file is the model: read back tensor by tensor, and run by llama.cpp where that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneexp.experiment.forecast import available_memory
from pruneexp.export.checkpoint import TOLERANCE, check_difference, proof_tokens
from pruneexp.export.folders import exact_source, stored_source
from pruneexp.export.gguf_layout import GgufLayout, as_array, tensors
from pruneexp.export.gguf_run import GENERATED, Answer, installed, run_file
from pruneexp.export.gguf_vocabulary import stand_in, vocabulary
from pruneexp.export.llama_like import context_length
from pruneexp.files import scratch_folder
from pruneexp.model import Model
from pruneexp.surgery.prove import greedy_tokens, logits_of
from pruneexp.types import RunError

TOLERANCE_16_BIT = 0.05  # of the logits' root mean square: llama.cpp rounds what it multiplies 16-bit matrices by, too
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two  spaces, a\ttab,\n\na blank line and  three   more. ",
    "It's 3.14159 in 2024, 100000 times; don't we'LL see?!",
    "Ünïcödé: naïve façade, Привет мир, 你好世界, 🦙🦙 (x²+y²)/2 == z_i[0] // 7 #tag",
)


def prove_gguf(layout: GgufLayout, checkpoint: Path, how: str, stream: bool, file: Path) -> dict[str, Any]:
    """Compares the file with the checkpoint. The record's `prove` says how: "llama.cpp" or "read_back".

    Raises RunError where they differ, or llama.cpp does not load the file.
    """
    model = stored_source(checkpoint, stream=stream).load()
    record = read_back(layout, model, file)
    if how == "in_place":
        return record
    if not fits(model, file):
        return record | {"notes": [_not_run("the model to compare it with does not fit into memory")]}
    package = installed()
    if package is None:
        return record | {"notes": [_not_run("neither llama-cpp-python nor xllamacpp is installed")]}
    del model
    return record | _run(layout, checkpoint, file, package)


def fits(model: Model, file: Path) -> bool:
    """Whether the model in float32, and the file beside it, leave a tenth of the free memory."""
    return 4 * model.params + file.stat().st_size <= 0.9 * available_memory(torch.device("cpu"))


def _not_run(reason: str) -> str:
    return f"not run by llama.cpp ({reason}); the file was read back and every tensor in it compared"


def read_back(layout: GgufLayout, model: Model, file: Path) -> dict[str, Any]:
    """Every tensor of the file against the model's, to the bit. Raises RunError, naming one that differs."""
    from gguf import GGUFReader

    left = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    count = len(left)
    for name, tensor in tensors(model, layout.layers):
        expected, own = as_array(tensor, layout.dtype, name), left.pop(name, None)
        same_shape = own is not None and tuple(own.shape[::-1].tolist()) == expected.shape
        if own is None or not same_shape or own.data.tobytes() != expected.tobytes():
            raise RunError(f"{file.name}: tensor {name} is not the model's; nothing was kept")
    if left:
        raise RunError(f"{file.name}: holds tensor {next(iter(left))}, which the model has not; nothing was kept")
    return {"prove": "read_back", "tensors_equal": count}


def _run(layout: GgufLayout, checkpoint: Path, file: Path, package: str) -> dict[str, Any]:
    model = exact_source(checkpoint).load()
    words = vocabulary(model.tokenizer, model.vocab_size)
    tokens_BT = proof_tokens(model)[:, : context_length(model) - 1]  # a server wants room for an answer
    if tokens_BT.shape[1] < GENERATED:
        return {"notes": [_not_run(f"a context of {context_length(model)} tokens is too short to try it")]}
    texts = TEXTS if words.tokens else ()
    with scratch_folder() as scratch:
        if not words.tokens and package == "xllamacpp":  # its server wants words: a copy that has some, in its place
            words, file = stand_in(model.vocab_size), Path(scratch, file.name)
            layout.write(stored_source(checkpoint).load(), words, file)
        answer = run_file(package, file, tokens_BT, texts, words.plain)
    if isinstance(answer, str):
        return {"notes": [_not_run(answer)]}
    with torch.no_grad():  # the model's matrices get the values that they have in the file
        for parameter in model.module.parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.to(layout.dtype).to(parameter.dtype)
    return _compared(model, tokens_BT, answer, layout.dtype) | _compared_words(model, texts, answer)


def _compared(model: Model, tokens_BT: Tensor, answer: Answer, dtype: torch.dtype) -> dict[str, Any]:
    """Logits or, of a server, the log-probabilities of the likeliest tokens at every position, and greedy tokens."""
    logits, theirs = logits_of(model, tokens_BT), answer.tensors
    if "logits" in theirs:
        what, gap = "logit", theirs["logits"] - logits
    else:
        what = "log_probability"
        gap = theirs["log_probabilities"] - logits.log_softmax(-1).gather(-1, theirs["likeliest"])
    relative = (gap.square().mean() / logits.square().mean()).sqrt().item()
    difference = gap.abs().max().item()
    if dtype == torch.float32:
        tolerance = {"tolerance": TOLERANCE}
        check_difference(difference)
    else:
        tolerance = {"relative_tolerance": TOLERANCE_16_BIT}
        if not relative <= TOLERANCE_16_BIT:
            gap_text = f"logits differ by {relative:.3g} of their root mean square, more than {TOLERANCE_16_BIT:g}"
            raise RunError(f"the export computes something else: {gap_text}; nothing was kept")
    return {
        "prove": "llama.cpp",
        **tolerance,
        "run_by": f"{answer.package} {answer.version}",
        f"max_{what}_difference": difference,
        f"relative_{what}_difference": relative,
        "greedy_tokens_equal": torch.equal(theirs["generated"], greedy_tokens(model, tokens_BT).cpu()),
        "windows": list(tokens_BT.shape),
    }


def _compared_words(model: Model, texts: tuple[str, ...], answer: Answer) -> dict[str, Any]:
    if not texts:
        return {}
    own = [model.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    different = sum(ours != theirs for ours, theirs in zip(own, answer.words, strict=True))
    notes = {"notes": [f"llama.cpp splits {different} of {len(texts)} texts into other tokens"]} if different else {}
    return {"prompt_tokens_equal": not different} | notes
