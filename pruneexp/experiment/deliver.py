"""What a run hands over: the pruned checkpoint with its card, its adapter if there is one, proof that it reloads."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pruneexp.experiment.card import Card, Written, base_model, card_text, license_of
from pruneexp.experiment.settings import Experiment
from pruneexp.files import check_writable, files_in, read_object, write_atomic, write_json
from pruneexp.model import Model
from pruneexp.model.companions import CARD
from pruneexp.model.given import GivenModel
from pruneexp.model.modeling_pruned import FAMILIES, Family
from pruneexp.model.source import EMBEDDED
from pruneexp.pruning import Pruned
from pruneexp.pruning.notes import Notes
from pruneexp.recovery import Adapter
from pruneexp.surgery import (
    BlockProof,
    Dense,
    Form,
    StreamedSave,
    check_source,
    dense_logits,
    period_warning,
    prove_in_place,
    prove_in_process,
    save,
    vllm_note,
)
from pruneexp.tracker import CHOSEN, NOTES, PROOF, SCORED, clear_unfinished
from pruneexp.types import ConfigError, Plan, RemovalPath, RunError

logger = logging.getLogger("pruneexp")

ADAPTER = "adapter"  # folder in the checkpoint's
PROOF_WINDOWS, PROOF_LENGTH = 2, 64  # tokens on which a saved checkpoint is compared


@dataclass(frozen=True)
class Delivery:
    """The checkpoint of a run before it is written. `folder`: the run's; None: none is written. `prove`: as
    `run.prove`, on the windows `probe_BT`. `dense`: what plain transformers is to make of the source, or why that is
    not compared. `streamed`: what is written while the model is pruned."""

    folder: Path | None
    prove: str
    probe_BT: Tensor
    dense: Dense | str
    streamed: StreamedSave | None

    def clear(self) -> None:
        """Removes a checkpoint that nobody asked for: where a streamed model lies until the run ends."""
        if self.streamed is not None and self.streamed.folder.name == "streamed":
            shutil.rmtree(self.streamed.folder, ignore_errors=True)


def prepare_delivery(
    experiment: Experiment, model: Model, folder: Path | None, tokens_NT: Tensor, identity: str
) -> tuple[Delivery, Notes]:
    """What must be there before the model is pruned, and the notes of how far a streamed run has come. `identity`: a
    hash of what the run's results depend on."""
    probe_BT = tokens_NT[:PROOF_WINDOWS, :PROOF_LENGTH]
    prove = experiment.run.prove if experiment.run.save else "off"
    dense = dense_logits(model, experiment.model, probe_BT, prove)
    if folder is None or not model.streamed:
        if folder is not None:
            clear_unfinished(folder)  # of a streamed run that came before
        return Delivery(folder if experiment.run.save else None, prove, probe_BT, dense, None), Notes(None)
    target = folder / ("model" if experiment.run.save else "streamed")
    streamed = StreamedSave(model, target, BlockProof(model, probe_BT), keep=take_up(folder, identity))
    return Delivery(folder, prove, probe_BT, dense, streamed), Notes(folder / NOTES, streamed, model.devices)


def take_up(run: Path, key: str) -> bool:
    """Whether a streamed run of the identity `key` that has died left notes in its folder `run`, from which this one
    goes on. Another run's notes are removed, with what it had written of a checkpoint, and a place is made for new
    ones. Raises RunError where that cannot be done."""
    file = run / NOTES / "identity"
    try:
        if file.is_file() and file.read_text() == key:
            return True
        clear_unfinished(run)
        file.parent.mkdir()
        write_atomic(file, key)
    except OSError as error:
        raise RunError(f"{file.parent}: cannot be written ({error.strerror or error})") from error
    return False


def deliver(delivery: Delivery, model: Model, adapter: Adapter | None, path: str) -> dict[str, float]:
    """Writes the run folder's `model/`, compares it with the model, writes proof.json, and gives what was measured.
    `path`: as `model.path`. A checkpoint that differs costs a warning, not the run.

    Raises RunError where the dense model computes something else than its source: everything was then measured on
    another model."""
    if delivery.folder is None:
        return {}
    proof = _proof(delivery, delivery.folder, model, adapter)
    write_json(delivery.folder / PROOF, proof)
    difference = proof.get("max_logit_difference")
    if difference is not None and difference > proof.get("tolerance", 1e-2):
        logger.warning("the reloaded checkpoint's logits differ by up to %g", difference)
    check_source(proof["source"], path)
    return {} if difference is None else {"proof/max_logit_difference": difference}


def _proof(delivery: Delivery, folder: Path, model: Model, adapter: Adapter | None) -> dict[str, Any]:
    """Writes the checkpoint, of a streamed model what was written as it was pruned, and compares it."""
    target, dense, streamed = folder / "model", delivery.dense, delivery.streamed
    completed = _completed(folder)
    _warn(save(model, target, complete=completed) if streamed is None else streamed.finish(completed))
    proof: dict[str, Any] = read_object(folder / PROOF) or {}  # what there is to say of the checkpoint as written
    if streamed is not None:
        proof |= {"prove": "off", "source": {"compared": False, "why": str(dense)}}
        return proof | streamed.prove() if delivery.prove != "off" else proof
    proof["prove"] = delivery.prove
    if adapter is not None:
        adapter.save(target / ADAPTER, target)
        proof["adapter"] = f"model/{ADAPTER}: the evaluated model has it on top of the checkpoint, the proof has not"
    if delivery.prove != "off":
        known = None if isinstance(dense, str) else dense
        with nullcontext() if adapter is None else adapter.off():
            verify = prove_in_process if delivery.prove == "process" else prove_in_place
            proof |= verify(model, target, delivery.probe_BT, known)
    if isinstance(dense, str):
        proof["source"] = {"compared": False, "why": dense}
    return proof


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
        write_json(run / PROOF, {"form": form.kind, "why": form.why, "files": files})

    return complete


def card_of(experiment: Experiment, model: Model, pruned: Pruned, adapter: bool) -> Card:
    """What the card of a pruned model says, but for figures."""
    path, recipe = experiment.model.path, experiment.job["recipe"]
    overrides = None if isinstance(experiment.model, GivenModel) else experiment.job["overrides"]  # no command has it
    base, targets = base_model(path, model.source_folder), linear_names(model.family)
    terms = license_of(model.source_folder) or ({"license": "apache-2.0"} if path.startswith(EMBEDDED) else {})
    return Card(base, terms, recipe, overrides, targets, adapter, pruned.plan, pruned.sites)


def write_card(card: Card, folder: Path) -> None:
    """Writes the card of the checkpoint in `folder`, which has its config.json. Raises OSError."""
    write_atomic(folder / CARD, card_text(card, form_of(folder)))


def chosen_by_site(experiment: Experiment, pruned: Pruned) -> Mapping[str, Mapping[str, Any]]:
    """What compensation chose for each site that it fitted: what its `auto` settings came to for this model, and what
    it chose for the site by itself."""
    own, typed = experiment.compensator, experiment.config["compensator"]
    autos = [key for key, value in typed.items() if value == "auto" and hasattr(own, key)]
    settled = {key: getattr(own, key) for key in autos if getattr(own, key) != "auto"}
    if not settled:
        return pruned.chosen
    plans = {site.name: pruned.plan.sites[site.name] for site in pruned.sites if pruned.plan.changes(site)}
    return {name: {**settled, **pruned.chosen.get(name, {})} for name, plan in plans.items() if plan.kept}


def finish_folder(folder: Path, card: Card, experiment: Experiment, pruned: Pruned) -> None:
    """Writes the card of what was saved, and what the criterion and compensation chose; notes of the way go."""
    if experiment.run.save:
        write_card(card, folder / "model")
    scored = {n: dict(s.chosen) for n, s in pruned.scores.items() if isinstance(s, RemovalPath) and s.chosen}
    for name, chosen in ((CHOSEN, chosen_by_site(experiment, pruned)), (SCORED, scored)):
        if chosen:
            write_json(folder / name, chosen)
    shutil.rmtree(folder / NOTES, ignore_errors=True)


def check_new_folder(folder: Path) -> None:
    """Raises ConfigError where a checkpoint cannot be written to `folder`, or where it is not empty."""
    check_writable(folder, f"folder={str(folder)!r}")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"folder={str(folder)!r}: is not empty; expected a new folder")
    place = folder.resolve()
    aside = place.with_name(f"{place.name}.partial")
    if aside.exists():
        raise ConfigError(f"folder={str(folder)!r}: is made as {aside}, which is there; expected no such folder")


def save_checkpoint(model: Model, plan: Plan, adapter: Adapter | None, card: Card | None, folder: Path) -> None:
    """Writes what a run has in its model/: weights, config, tokenizer, plan, adapter and card. Raises ConfigError where
    `folder` is there already and not empty, RunError where it cannot be written."""
    check_new_folder(folder)

    def complete(form: Form, aside: Path) -> None:
        write_atomic(aside / "plan.json", plan.to_json() + "\n")
        if adapter is not None:
            adapter.save(aside / ADAPTER, folder)
        if card is not None:
            write_card(card, aside)

    _warn(save(model, folder.resolve(), complete=complete))  # a link to a folder stays, an empty folder is replaced


def form_of(folder: Path) -> Written:
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
    paths = [*(in_projection.path for in_projection in family.attention_in), family.attention_out]
    if family.experts is None:
        paths += [*(in_projection.path for in_projection in family.mlp_in), family.mlp_out]
    return tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths))
