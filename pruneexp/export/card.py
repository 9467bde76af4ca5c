"""The model card of an export: the checkpoint's own, as far as it is one of ours, with another way to load it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pruneexp.experiment.card import Card, Written, base_model, card_text, is_ours, license_of, reworded
from pruneexp.experiment.deliver import form_of, linear_names
from pruneexp.files import read_object
from pruneexp.model.companions import CARD
from pruneexp.model.modeling_pruned import FAMILIES


def card(source: Path, checkpoint: Path, folder: Path, form: str, padded: bool) -> str:
    """README.md of the export in `folder`, of the checkpoint of the run `source` (or of that folder itself). Where
    nothing has been pruned, the checkpoint's own; "" where it has none. `padded`: with zeros up to the widest layer."""
    how = replace(form_of(folder), padded=padded) if form in ("stock", "remote_code") else Written(form)
    file = checkpoint / CARD
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if is_ours(text):
        return reworded(text, how)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if not (checkpoint / "plan.json").is_file() and not config["model_type"].startswith("pruned_"):
        return text
    base = base_model(str(checkpoint) if source == checkpoint else _pruned_model(source), checkpoint)
    targets = linear_names(FAMILIES[config["model_type"].removeprefix("pruned_")])
    metrics = read_object(source / "metrics.json") or {}
    return card_text(Card(base, license_of(checkpoint), targets=targets, metrics=metrics), how)


def _pruned_model(run: Path) -> str:
    """What the run of an older version, which wrote no card, pruned."""
    import yaml

    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        return str(config["model"]["path"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return str(run)
