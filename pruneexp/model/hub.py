"""A model's files, had from the Hub."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pruneexp.model import companions
from pruneexp.model.checkpoint import conversion, pickled_among
from pruneexp.model.refusal import refused


def download(path: str, revision: str | None, weights: bool) -> Path:
    """The folder of what the Hub calls `path`, with its weights or without. Raises ConfigError, without weights also
    where the repository is seen to have pickled ones alone."""
    from huggingface_hub import snapshot_download

    patterns = (*companions.FETCHED, *(companions.WEIGHTS if weights else ()))
    wanted = {"allow_patterns": list(patterns), "ignore_patterns": list(companions.TWICE)}
    try:
        folder = Path(snapshot_download(path, revision=revision, **wanted))
    except Exception as error:  # the Hub's client raises many kinds: offline, gated, not found
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise refused(path, f"no such folder, and not had from the Hub ({reason})") from error
    if not any(folder.glob("*.safetensors")):
        names = _listed(path, revision)
        pickled = () if any(name.endswith(".safetensors") for name in names) else pickled_among(names)
        if weights or pickled:
            why = (
                "its repository has no safetensors that transformers reads" if names else "no safetensors came with it"
            )
            why += f" but pickled weights ({pickled[0]}), which can run code when loaded" if pickled else ""
            expected = "a model.revision that has some (on the Hub often refs/pr/N), or a folder"
            raise refused(path, f"{why}; expected {expected}; to make one: {conversion(path)}")
    return folder


@lru_cache(maxsize=4)
def _listed(path: str, revision: str | None) -> tuple[str, ...]:
    """The repository's own files, not those in its folders; none where the Hub does not tell."""
    from huggingface_hub import list_repo_files

    try:
        return tuple(name for name in list_repo_files(path, revision=revision) if "/" not in name)
    except Exception:  # the Hub's client raises many kinds
        return ()
