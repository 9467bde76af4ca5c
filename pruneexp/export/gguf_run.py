"""A GGUF file run by llama.cpp, through whichever of its Python packages is installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from pruneexp.files import scratch_folder
from pruneexp.progress import waiting
from pruneexp.types import RunError

NO_IMPORT = 3  # exit code of a script whose package is there and does not import

# The scripts run in processes of their own: llama.cpp ends the process when it meets what it does not expect.
_BEGIN = """
import importlib, json, sys, urllib.request
package, file, tokens_file, out_file, texts_file, plain = *sys.argv[1:6], int(sys.argv[6])
try:
    engine = importlib.import_module(package)
except Exception as error:
    print(f"{package} does not import: {error}", file=sys.stderr)
    sys.exit(3)
import numpy
from safetensors.numpy import load_file, save_file
windows = load_file(tokens_file)["tokens"]
texts = json.load(open(texts_file))
"""
_LLAMA_CPP = """
llama = engine.Llama(
    file, n_ctx=windows.shape[1] + 16, logits_all=True, verbose=False, seed=0, n_threads=1, n_threads_batch=1,
    type_k=engine.GGML_TYPE_F32, type_v=engine.GGML_TYPE_F32,
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
json.dump({"version": engine.__version__, "words": words}, open(out_file + ".json", "w"))
"""
# A server answers with the 256 likeliest next tokens of a prompt: one prompt for every position, each prefix kept from
# the one before. It leaves the probabilities out where what it draws ends the text or is a part of a character, so it
# is made to draw a plain token. `no_extra_bufts`: nothing is repacked for a processor's matrix unit, which has crashed
# on virtual machines.
_XLLAMACPP = """
params = engine.CommonParams()
params.model.path = file
params.n_ctx, params.n_parallel, params.n_gpu_layers = windows.shape[1] + 16, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = int(engine.ggml_type.GGML_TYPE_F32)
params.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.no_extra_bufts, params.fit_params, params.warmup, params.verbosity = True, False, False, 0
params.cache_ram_mib = params.n_ctx_checkpoints = 0
server = engine.Server(params)

def likeliest(tokens, count):
    asked = {"prompt": tokens, "n_predict": 1, "n_probs": count, "cache_prompt": True, "logit_bias": [[plain, 1e4]]}
    answer = server.handle_completions(asked)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return [token["id"] for token in found], [token["logprob"] for token in found]

def words_of(text):
    asked = {"content": text, "add_special": False, "parse_special": False}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + "/tokenize", json.dumps(asked).encode(), headers)
    here = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return json.load(here.open(request))["tokens"]

rows = [[likeliest(w[: end + 1].tolist(), 256) for end in range(len(w))] for w in windows]
tokens = windows[0, :8].tolist()
for _ in range(8):
    tokens.append(likeliest(tokens, 1)[0][0])
found = {
    "likeliest": numpy.array([[ids for ids, _ in row] for row in rows]),
    "log_probabilities": numpy.array([[values for _, values in row] for row in rows], dtype=numpy.float32),
    "generated": numpy.array([tokens]),
}
save_file(found, out_file)
told = {"version": engine.__version__, "words": [words_of(text) for text in texts]}
json.dump(told, open(out_file + ".json", "w"))
"""
GENERATED = 16  # tokens of the text that both scripts continue, 8 of which are given
SCRIPTS = {"llama_cpp": _BEGIN + _LLAMA_CPP, "xllamacpp": _BEGIN + _XLLAMACPP}  # by module; the first gives all logits


@dataclass(frozen=True)
class Answer:
    """What llama.cpp gives for windows of tokens [B, T]: `tensors` holds `generated` [1, 16] and either `logits`
    [B, T, V] or, of the likeliest tokens, `likeliest` and `log_probabilities` [B, T, N]."""

    package: str
    version: str
    tensors: dict[str, Tensor]
    words: list[list[int]]  # the tokens of each text


def installed() -> str | None:
    """The module that runs llama.cpp here."""
    return next((name for name in SCRIPTS if find_spec(name) is not None), None)


def run_file(package: str, file: Path, tokens_BT: Tensor, texts: Sequence[str], plain: int) -> Answer | str:
    """Runs the file; gives the reason where the package does not import. `plain`: a token that stands for ASCII text.

    Raises RunError where the file does not run.
    """
    from safetensors.torch import load_file, save_file

    with scratch_folder() as scratch:
        tokens_file, out_file, texts_file = (str(Path(scratch, name)) for name in ("tokens", "out", "texts"))
        save_file({"tokens": tokens_BT.contiguous()}, tokens_file)
        Path(texts_file).write_text(json.dumps(texts))
        files = [str(file.resolve()), tokens_file, out_file, texts_file]
        command = [sys.executable, "-c", SCRIPTS[package], package, *files, str(plain)]
        env = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        with waiting("running the file with llama.cpp"):
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, env=env
            )
        reason = reason_of(done)
        if done.returncode == NO_IMPORT:
            return reason
        if done.returncode:
            raise RunError(f"llama.cpp does not run {file.name} ({reason}); nothing was kept")
        said = json.loads(Path(out_file + ".json").read_text())
        return Answer(package, said["version"], load_file(out_file), said["words"])


def reason_of(done: subprocess.CompletedProcess[str]) -> str:
    """One line: the last that was said; of a process that a signal ended, the signal, too."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = lines[-1] if lines else f"exit code {done.returncode}"
    if done.returncode >= 0:
        return said
    name = signal.Signals(-done.returncode).name
    return f"{name}: {said}" if lines else f"ended by {name}"
