"""The small files that lie beside a checkpoint's weights: which of them travel with the model, and how.

The one list of those that travel: fetched from the Hub, taken along by a saved model and by an export.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pruneexp.types import one_line

logger = logging.getLogger("pruneexp")

CARD = "README.md"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = (
    "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "*.spm", "tekken.json", "*.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
PROCESSOR = ("*processor_config.json",)
LEGAL = tuple(
    "".join(f"[{letter.upper()}{letter.lower()}]" if letter.isalpha() else letter for letter in word) + "*"
    for word in ("license", "licence", "notice", "copying", "use_policy")
)
TRAVELS = (*TOKENIZER, GENERATION, *PROCESSOR, *LEGAL)
FETCHED = ("config.json", CARD, *TRAVELS)  # without weights
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TWICE = ("consolidated*", "*/*.safetensors")  # the same weights once more, as their authors' own code reads them


def matching_files(folder: Path, patterns: Sequence[str] = TRAVELS) -> list[str]:
    """The files in `folder` that match the patterns, as paths in it."""
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in files)


def copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> list[str]:
    """Copies the files in `source` that match, byte for byte; returns their paths in the folder. Raises OSError."""
    names = matching_files(source, patterns)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)  # not its permissions: those of a new file
    return names


def generation_settings(folder: Path) -> Any:
    """The folder's generation settings, as transformers reads them; None where it has none that can be read."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder) if (folder / GENERATION).is_file() else None
    except (OSError, ValueError) as error:
        logger.warning("%s: not read (%s)", folder / GENERATION, one_line(error))
        return None


def carry(source: Path | None, tokenizer: Any, generation: Any, folder: Path) -> None:
    """Copies what lies beside the weights in `source` to the checkpoint in `folder`, which has its config.json already.

    `tokenizer`, `generation`: the model's own in memory (None: it has none). transformers writes them where there is no
    source, and the tokenizer also where the source's files give another one. Raises OSError.
    """
    if source is None:
        if generation is not None:
            # as `save_pretrained` writes it, which refuses what it only warns of on reading: a temperature alone, say
            generation.to_json_file(folder / GENERATION, keys_to_pop=["compile_config"])
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return
    copy_files(source, folder, (GENERATION, *PROCESSOR, *LEGAL))
    names = copy_files(source, folder, TOKENIZER)
    if tokenizer is None or _adapted(source, tokenizer, folder):
        return
    logger.info("the tokenizer is not the one of the model's folder: written anew")
    for name in names:
        (folder / name).unlink()
    tokenizer.save_pretrained(folder)


def _adapted(source: Path, tokenizer: Any, folder: Path) -> bool:
    """Adapts the tokenizer's files in `folder`, copied from `source`, to the config.json there, as far as they must be.
    Returns whether they give this tokenizer then."""
    file = folder / TOKENIZER_CONFIG
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    own = type(tokenizer).__name__
    named = {"tokenizer_class": "PreTrainedTokenizerFast" if own == "TokenizersBackend" else own}  # 4.x's name of it
    settings = {key: value for key, value in before.items() if key != "auto_map"}  # of code that does not travel
    if not before.get("tokenizer_class") and _model_type(folder) != _model_type(source):
        settings |= named  # it went by the model's type
    for changes in ({}, named):
        settings |= changes
        if settings != before:
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if _reads_as(folder, tokenizer):
            return True
    return False


def _model_type(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")


def _reads_as(folder: Path, tokenizer: Any) -> bool:
    """Whether somebody without our code finds this tokenizer in `folder`."""
    from transformers import AutoTokenizer

    try:
        read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each class of tokenizers checks its files in its own way
        logger.debug("%s: no tokenizer is read there (%s)", folder, error)
        return False
    return _state(read) == _state(tokenizer)


def _state(tokenizer: Any) -> dict[str, Any]:
    """What decides a tokenizer's answers; not how it was told to truncate and to pad when it was last called."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    called = ("truncation", "padding")
    return {
        "spec": {key: value for key, value in spec.items() if backend is None or key not in called},
        "special": tokenizer.special_tokens_map,
        "added": tokenizer.get_added_vocab(),
        "chat": tokenizer.chat_template,
        "length": tokenizer.model_max_length,
    }
