"""Beginning-of-sequence tokens: which runs put them in front of what a model reads, told from the config alone.

`bos: auto` is true for models whose family needs it. That is decided before anything is hashed or built, by the model's
config.json and nothing heavier, so that config.yaml says what was done; what was asked stands there under `asked`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pruneexp.dataset.offline import unreachable
from pruneexp.fingerprint import ASKED, PERPLEXITY, bos_nodes, is_inner, with_bos
from pruneexp.model.modeling_pruned import FAMILIES
from pruneexp.types import ConfigError

AUTO = "auto"
AS_THEY_ARE = "pruneexp.dataset.tokens"  # windows in front of which nothing is put
DATASETS = tuple(f"pruneexp.dataset.{name}" for name in ("HubText", "text", "documents", "Embedded", "Mixed"))
EVALUATORS = (
    PERPLEXITY,
    *(f"pruneexp.evaluator.{name}" for name in ("Generation", "Latency", "Questions", "Zeroshot")),
)
GGUF_FAMILIES = {"gemma3": "gemma3_text"}  # called otherwise in GGUF files


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every `bos: auto` as what it becomes, and what was asked as `asked`, {"dataset.bos": "auto"}. A
    resolved one stays as it is. A sweep's file may set `bos` of evaluators that are not chosen: those are left out.
    Never raises."""
    evaluators = config.get("evaluator")
    if isinstance(evaluators, Mapping):
        chosen = {k: v for k, v in evaluators.items() if not (isinstance(v, Mapping) and set(v) == {"bos"})}
        config = {**config, "evaluator": chosen}
    known = {key: node for key, node in bos_nodes(config) if "bos" in node}
    needed = AUTO in [node["bos"] for node in known.values()] and _needs(config.get("model"))
    decided = {
        key: needed and not _as_they_are(node) if node["bos"] == AUTO else node["bos"] for key, node in known.items()
    }
    typed = {f"{key}.bos": node["bos"] for key, node in known.items() if not is_inner(key)}
    before = config.get(ASKED, {})
    typed = {key: value if value == AUTO else before.get(key, value) for key, value in typed.items()}
    return {**with_bos(config, decided), ASKED: typed}


def check_asked(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a `bos` of ours that is none."""
    for key, value in config.get(ASKED, {}).items():
        if value != AUTO and not isinstance(value, bool):
            raise ConfigError(f"{key}={value!r}: expected auto, true or false")


def _as_they_are(node: Mapping[str, Any]) -> bool:
    """Whether a dataset's windows, or those that an evaluator reads, are used as they are."""
    if node.get("_target_") in EVALUATORS:
        dataset = node.get("dataset")
        return isinstance(dataset, Mapping) and not node.get("prompts") and _as_they_are(dataset)
    return node.get("_target_") == AS_THEY_ARE or (node.get("_target_") not in DATASETS and "bos" not in node)


def _needs(model: Any) -> bool:
    """Whether the family of the config's model needs a beginning-of-sequence token; False where that cannot be told:
    what is wrong with the model, later checks say."""
    path, revision = (model.get(key) if isinstance(model, Mapping) else None for key in ("path", "revision"))
    if not isinstance(path, str) or path.startswith("embedded:"):
        return False
    try:
        local = Path(os.path.expanduser(path))
        if local.is_dir():
            kind = _model_type((local / "config.json").read_text())
        elif local.is_file():
            from pruneexp.model.gguf_header import gguf_header

            architecture = str(gguf_header(local, path).values["general.architecture"])
            kind = GGUF_FAMILIES.get(architecture, architecture)
        else:
            kind = _on_hub(path, None if revision is None else str(revision))
    except Exception:
        return False
    family = FAMILIES.get(kind.removeprefix("pruned_"))
    return family is not None and family.needs_bos


def _model_type(config: str) -> str:
    return str(json.loads(config).get("model_type"))


@lru_cache(maxsize=256)
def _on_hub(path: str, revision: str | None) -> str:
    """The model_type of a model on the Hub, from the local cache or asked for once; "" where it cannot be had."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    cached = try_to_load_from_cache(path, "config.json", revision=revision)
    if isinstance(cached, str):
        return _model_type(Path(cached).read_text())
    if constants.HF_HUB_OFFLINE or unreachable(constants.ENDPOINT):
        return ""
    shown = not are_progress_bars_disabled()
    try:
        disable_progress_bars()
        return _model_type(Path(hf_hub_download(path, "config.json", revision=revision)).read_text())
    except Exception:  # gated, not there, no JSON
        return ""
    finally:
        if shown:
            enable_progress_bars()
