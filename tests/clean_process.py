"""The clean process of a proof, forked from one that has the imports done and knows as little of this package."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys, traceback
os.environ["HF_HUB_OFFLINE"] = "1"
import safetensors.torch, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, dynamic_module_utils
from transformers import BloomForCausalLM, LlamaForCausalLM, OPTForCausalLM
for line in sys.stdin:
    code, argv, said = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for number, file in ((0, os.devnull), (1, os.devnull), (2, said)):
                os.dup2(os.open(file, os.O_RDWR), number)
            dynamic_module_utils.HF_MODULES_CACHE = argv[3]  # its own: what the code sets, transformers has read before
            sys.argv = ["-c", *argv]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forking:
    """In the place of `subprocess`, where a proof asks for its process."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self, server: subprocess.Popen[str]):
        self.server = server

    def run(self, command: Sequence[str], **_settings: Any) -> subprocess.CompletedProcess[str]:
        assert list(command[:3]) == [sys.executable, "-I", "-c"], "a clean process"
        assert self.server.stdin is not None and self.server.stdout is not None
        with tempfile.NamedTemporaryFile() as said:
            self.server.stdin.write(json.dumps([command[3], list(command[4:]), said.name]) + "\n")
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            return subprocess.CompletedProcess(command, code, "", Path(said.name).read_text())


@contextmanager
def forking() -> Iterator[Forking]:
    """Ends with the tests: it reads what they ask for to its end."""
    command = [sys.executable, "-I", "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield Forking(server)
