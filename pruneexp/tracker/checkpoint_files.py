"""What a run has written into its `model/`, so that the next one in its folder knows what it may replace."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from pruneexp.files import BEING_WRITTEN, read_object

PROOF = "proof.json"  # its `files`: the list
# What comes when the list is written, and what a killed run leaves.
ALWAYS = ("adapter/adapter_*", *BEING_WRITTEN, *(f"adapter/{name}" for name in BEING_WRITTEN))
# What runs wrote there before they listed it.
CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "plan.json")
CHECKPOINT_FILES += ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*")
CHECKPOINT_FILES += ("merges.txt", "*.model", "modeling_*.py", "configuration_*.py")


def checkpoint_files(folder: Path) -> tuple[list[str], list[str]]:
    """Paths in a run's `model/`: what the run wrote, by its own list, and what it did not. Of folders, only empty ones
    are named. Nothing is named where `model/` is a link."""
    model = folder / "model"
    if model.is_symlink():
        return [], []
    listed = (read_object(folder / PROOF) or {}).get("files")
    own, foreign = [], []
    for path in sorted(model.rglob("*")):
        if path.is_dir() and not path.is_symlink() and (any(path.iterdir()) or path == model / "adapter"):
            continue
        name = path.relative_to(model).as_posix()
        known = name in listed if isinstance(listed, list) else "/" not in name and _fits(name, CHECKPOINT_FILES)
        (own if known or _fits(name, ALWAYS) else foreign).append(name)
    return own, foreign


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def clear_checkpoint(folder: Path) -> None:
    """Removes what the run in `folder` wrote into its `model/`, and what is empty then. Raises OSError."""
    model = folder / "model"
    for name in checkpoint_files(folder)[0]:
        (model / name).unlink()
    if model.is_dir() and not model.is_symlink():
        for path in (*sorted((p for p in model.rglob("*") if p.is_dir()), reverse=True), model):
            if not any(path.iterdir()):
                path.rmdir()
    (folder / PROOF).unlink(missing_ok=True)  # last: until then, what is left is known to be the run's
