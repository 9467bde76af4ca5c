"""What a run hands over: the pruned checkpoint, its adapter where there is one, and the proof that it reloads."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from pruneexp.model import Model
from pruneexp.recovery import Adapter
from pruneexp.surgery import Dense, StreamedSave, prove_in_place, prove_in_process, save
from pruneexp.tracker import write_atomic

ADAPTER = "adapter"  # folder in the checkpoint's


def deliver(
    model: Model, folder: Path, prove: str, probe_BT: Tensor, adapter: Adapter | None, dense: Dense | str
) -> dict[str, Any]:
    """Writes and proves the run folder's `model/`; returns what proof.json is to say. `dense`: what plain transformers
    is to make of the source, or why that is not compared."""
    target = folder / "model"
    form = save(model, target)
    write_atomic(target / "plan.json", (folder / "plan.json").read_bytes())
    proof: dict[str, Any] = {"form": form.kind, "why": form.why, "prove": prove}
    if adapter is not None:
        adapter.save(target / ADAPTER, target)
        proof["adapter"] = f"model/{ADAPTER}: the evaluated model has it on top of the checkpoint, the proof has not"
    if prove != "off":
        known = None if isinstance(dense, str) else dense
        with nullcontext() if adapter is None else adapter.off():
            proof |= (prove_in_process if prove == "process" else prove_in_place)(model, target, probe_BT, known)
    if isinstance(dense, str):
        proof["source"] = {"compared": False, "why": dense}
    return proof


def deliver_streamed(streamed: StreamedSave, folder: Path, prove: bool, why: str) -> dict[str, Any]:
    """The same of a model that was written as it was pruned; `why` its source is not compared."""
    form = streamed.finish()
    write_atomic(streamed.folder / "plan.json", (folder / "plan.json").read_bytes())
    proof: dict[str, Any] = {"form": form.kind, "why": form.why, "prove": "off"}
    proof["source"] = {"compared": False, "why": why}
    return proof | streamed.prove() if prove else proof
