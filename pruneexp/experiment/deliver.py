"""What a run hands over: the pruned checkpoint with its card, its adapter if there is one, proof that it reloads."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from pruneexp.experiment.card import Card, Written, base_model, card_text, license_of
from pruneexp.files import files_in, read_object, write_atomic
from pruneexp.model import Model
from pruneexp.model.companions import CARD
from pruneexp.model.modeling_pruned import FAMILIES, Family
from pruneexp.model.source import EMBEDDED
from pruneexp.pruning import Pruned
from pruneexp.recovery import Adapter
from pruneexp.surgery import (
    Dense,
    Form,
    StreamedSave,
    period_warning,
    prove_in_place,
    prove_in_process,
    save,
    vllm_note,
)
from pruneexp.tracker import PROOF

logger = logging.getLogger("pruneexp")

ADAPTER = "adapter"  # folder in the checkpoint's


def deliver(
    model: Model, folder: Path, prove: str, probe_BT: Tensor, adapter: Adapter | None, dense: Dense | str
) -> dict[str, Any]:
    """Writes and proves the run folder's `model/`; returns what proof.json is to say. `dense`: what plain transformers
    is to make of the source, or why that is not compared."""
    target = folder / "model"
    _warn(save(model, target, complete=_completed(folder)))
    proof = {**_begun(folder), "prove": prove}
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
    _warn(streamed.finish(_completed(folder)))
    proof = {**_begun(folder), "prove": "off", "source": {"compared": False, "why": why}}
    return proof | streamed.prove() if prove else proof


def _warn(form: Form) -> None:
    if form.kind == "stock" and (warning := period_warning(form.config)):
        logger.warning("model/: %s", warning)
    if note := vllm_note(form.config):
        logger.info("model/: %s", note)


def _completed(run: Path) -> Callable[[Form, Path], None]:
    """Gives a run's checkpoint its plan, and lists in proof.json, before it is in its place, what is in it."""

    def complete(form: Form, folder: Path) -> None:
        write_atomic(folder / "plan.json", (run / "plan.json").read_bytes())
        files = sorted({*files_in(folder), CARD})  # the card comes once there are figures
        proof = {"form": form.kind, "why": form.why, "files": files}
        write_atomic(run / PROOF, json.dumps(proof, indent=1) + "\n")

    return complete


def _begun(run: Path) -> dict[str, Any]:
    """What proof.json says when the checkpoint has been written."""
    return read_object(run / PROOF) or {}


def card_of(path: str, model: Model, pruned: Pruned, job: Mapping[str, Any], adapter: bool) -> Card:
    """What the card of a pruned model says, but for figures. `path`: what the dense one was read from."""
    own = {"license": "apache-2.0"} if path.startswith(EMBEDDED) else {}
    return Card(
        base_model(path, model.source_folder),
        license_of(model.source_folder) or own,
        job["recipe"],
        job["overrides"],
        linear_names(model.family),
        adapter,
        pruned.plan,
        pruned.sites,
    )


def write_card(card: Card, folder: Path) -> None:
    """Writes the card of the checkpoint in `folder`, which has its config.json. Raises OSError."""
    write_atomic(folder / CARD, card_text(card, written(folder)))


def written(folder: Path) -> Written:
    """How a checkpoint is written down, by its config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = FAMILIES[config["model_type"].removeprefix("pruned_")]
    architecture, layers = config["architectures"][0], (config.get("per_layer_config") or {}).values()
    if "auto_map" not in config:
        return Written("stock", architecture, family.since)
    gone = [layer.get("attention_removed") or layer.get("num_attention_heads") == 0 for layer in layers]
    gone += [0 in (layer.get("intermediate_size"), *layer.get("expert_sizes", ())) for layer in layers]
    return Written("remote_code", architecture, family.pruned_since, any(gone))


def linear_names(family: Family) -> tuple[str, ...]:
    """What the linear layers of a decoder layer are called, for adapters; of a mixture, those of attention."""
    paths = [*(writer.path for writer in family.attention_writers), family.attention_reader]
    if family.experts is None:
        paths += [*(writer.path for writer in family.mlp_writers), family.mlp_reader]
    return tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths))
