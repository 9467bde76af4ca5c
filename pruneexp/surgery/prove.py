"""Proof that a saved checkpoint is the model that was evaluated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneexp.files import scratch_folder
from pruneexp.model import Model, ModelSource
from pruneexp.model.half import plain_linear
from pruneexp.model.placement import AUTO
from pruneexp.progress import progress, waiting
from pruneexp.surgery.prove_source import POSITIONS, Dense, compare_in_place, not_loaded
from pruneexp.types import ConfigError, RunError

TOLERANCE = 1e-2  # of a logit's difference

# Runs in a process of its own, isolated from this package (-I: no working directory, no PYTHONPATH).
RELOAD = """
import json, os, shutil, sys, threading, time
folder, tokens_file, out_file, cache, dtype, source, positions, trust = sys.argv[1:9]
run = os.getppid()
def alone():  # where the run was killed, nobody waits for an answer, and nobody clears up
    while os.getppid() == run:
        time.sleep(0.2)
    shutil.rmtree(cache, ignore_errors=True)
    os._exit(1)
threading.Thread(target=alone, daemon=True).start()
os.environ["HF_MODULES_CACHE"] = cache
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
remote = "auto_map" in json.load(open(os.path.join(folder, "config.json")))
settings = {"experts_implementation": "eager"} if dtype == "float64" else {}  # experts' other ways know no float64
settings["dtype"] = getattr(torch, dtype)
tokens = load_file(tokens_file)["tokens"]
found, said = {}, {}
if source:  # gone before the pruned model comes
    try:
        dense = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust == "True", **settings).eval()
        with torch.no_grad():
            found["dense"] = dense(tokens).logits[:, -int(positions):].float().contiguous()
        del dense
    except Exception as error:
        said["dense"] = str(error) or type(error).__name__
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, **settings).eval()
with torch.no_grad():
    logits = model(tokens).logits
    generated = model.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
if os.path.exists(os.path.join(folder, "tokenizer.json")):
    AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
assert not any(m == "pruneexp" or m.startswith("pruneexp.") for m in sys.modules)
save_file({"logits": logits.float().contiguous(), "generated": generated.contiguous(), **found}, out_file)
json.dump({"class": type(model).__name__, **said}, open(out_file + ".json", "w"))
"""


def prove_in_process(model: Model, folder: Path, tokens_BT: Tensor, dense: Dense | None = None) -> dict[str, Any]:
    """Reloads `folder` in a clean process without this package, on the CPU, and compares logits and greedy tokens. With
    `dense`, the process also loads the model's source and compares that. `tolerance`: what rounding explains of the
    difference; where a GPU's half precision is compared with a CPU's, 5 % of the logits' root mean square.

    Raises RunError where it does not reload.
    """
    from safetensors.torch import load_file, save_file

    with scratch_folder() as scratch:
        tokens_file, out_file = str(Path(scratch, "tokens")), str(Path(scratch, "out"))
        save_file({"tokens": tokens_BT.contiguous()}, tokens_file)
        dtype = str(model.dtype).removeprefix("torch.")
        command = [sys.executable, "-I", "-c", RELOAD, str(folder.resolve()), tokens_file, out_file, scratch, dtype]
        command += ["", "", ""] if dense is None else [str(dense.folder), str(POSITIONS), str(dense.trust_remote_code)]
        with waiting("verifying the checkpoint in a clean process"):
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode < 0:
            raise RunError(
                f"{folder}: the clean process that reloads it was killed (signal {-done.returncode}); expected memory "
                "for the model once more, or run.prove=in_place or off"
            )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(f"{folder}: the saved checkpoint does not reload in a clean process ({reason})")
        reloaded = load_file(out_file)
        said = json.loads(Path(out_file + ".json").read_text())
    expected = logits_of(model, tokens_BT)
    generated = greedy_tokens(model, tokens_BT)
    rounded = model.device.type != "cpu" and model.dtype.itemsize == 2
    proof: dict[str, Any] = {
        "prove": "process",
        "tolerance": max(TOLERANCE, 0.05 * expected.square().mean().sqrt().item()) if rounded else TOLERANCE,
        "class": said["class"],
        "max_logit_difference": (reloaded["logits"] - expected).abs().max().item(),
        "greedy_tokens_equal": torch.equal(reloaded["generated"], generated.cpu()),
        "windows": list(tokens_BT.shape),
    }
    if dense is not None:
        proof["source"] = dense.compared(reloaded["dense"]) if "dense" in reloaded else not_loaded(said["dense"])
    return proof


def prove_in_place(model: Model, folder: Path, tokens_BT: Tensor, dense: Dense | None = None) -> dict[str, Any]:
    """Reloads `folder` here, with the modeling file of this package, and compares logits. With `dense`, plain
    transformers also loads the model's source, which is compared with that."""
    source = {} if dense is None else {"source": compare_in_place(dense, model.dtype)}
    reloaded = _reloaded(model, folder, stream=False)
    difference = (logits_of(reloaded, tokens_BT) - logits_of(model, tokens_BT)).abs().max().item()
    return {"prove": "in_place", "max_logit_difference": difference, "windows": list(tokens_BT.shape), **source}


class BlockProof:
    """Proof of a streamed checkpoint, layer by layer: what each shrunk layer computed on a few windows while it was at
    hand, against what the reloaded one computes on the same input."""

    def __init__(self, model: Model, tokens_BT: Tensor):
        self.model = model
        self.hidden_BTD, self.calls = model.enter(tokens_BT)
        self.tokens_BT = tokens_BT
        self.outputs: list[Tensor] = []

    def record(self, index: int) -> None:
        """Runs the shrunk layer `index`, which must be loaded."""
        call = self.calls[self.model.origin[index]]
        self.hidden_BTD = self.model.run_layer(self.model.layers[index], self.hidden_BTD, call)
        self.outputs.append(self.hidden_BTD)

    def restore(self, outputs: list[Tensor]) -> None:
        """Goes on behind layers that another process recorded."""
        self.outputs = [output.to(self.model.device) for output in outputs]
        self.hidden_BTD = self.outputs[-1]

    def compare(self, folder: Path) -> dict[str, Any]:
        """Reloads `folder` through its own config, one layer at a time, then the head."""
        reloaded = _reloaded(self.model, folder, stream=True)
        hidden, calls = reloaded.enter(self.tokens_BT)
        gaps = []
        for index, expected in enumerate(progress(self.outputs, "prove", unit="blocks")):
            with reloaded.loaded(index, index + 1) as layer:
                hidden = reloaded.run_layer(layer, hidden, calls[index])
            gaps.append((hidden - expected).abs().max().item())
        logits = [m.leave(self.tokens_BT, h).float() for m, h in ((reloaded, hidden), (self.model, self.outputs[-1]))]
        return {
            "prove": "block_by_block",
            "max_block_difference": max(gaps),
            "max_logit_difference": (logits[0] - logits[1]).abs().max().item(),
            "windows": list(self.tokens_BT.shape),
        }


def _reloaded(model: Model, folder: Path, stream: bool) -> Model:
    """The model that `folder` holds. Raises RunError where it holds none that loads: a run has written it."""
    source = ModelSource(
        name="proof",
        path=str(folder),
        revision=None,
        dtype=str(model.dtype).removeprefix("torch."),
        device=AUTO if len(model.devices) > 1 else str(model.device),
        stream=stream,
        trust_remote_code=False,
        batch_size=model.batch_size,
    )
    try:
        return source.load()
    except ConfigError as error:
        raise RunError(f"{folder}: the saved checkpoint does not reload ({error})") from error


@torch.no_grad()
def logits_of(model: Model, tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, V], multiplied as plain transformers does it."""
    with plain_linear():
        return model.module(tokens_BT.to(model.device)).logits.float().cpu()


@torch.no_grad()
def greedy_tokens(model: Model, tokens_BT: Tensor) -> Tensor:
    prompt = tokens_BT[:1, :8].to(model.device)
    with plain_linear():
        return model.module.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
