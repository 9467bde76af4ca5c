"""A GGUF file as a model's source: transformers dequantises it into an ordinary checkpoint, which is kept."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib import metadata
from pathlib import Path
from typing import Any

from pruneexp.files import aside_of, give_usual_mode, sha256
from pruneexp.fingerprint import file_state
from pruneexp.model.companions import TOKENIZER_CONFIG
from pruneexp.model.gguf_header import Header, float32_tensor, gguf_header
from pruneexp.model.gguf_words import restore_split_
from pruneexp.model.refusal import refused
from pruneexp.progress import waiting
from pruneexp.types import ConfigError, RunError, one_line

logger = logging.getLogger("pruneexp")

SUFFIX = ".gguf"
CONVERSION = 3  # to be raised where this module makes another checkpoint of the same file
RECORD = "gguf.json"  # beside the weights: the file that they were dequantised from
# llama.cpp's names of the architectures that both transformers reads from GGUF files and a family here covers
ARCHITECTURES = "bloom falcon gemma2 gemma3 gpt2 llama phi3 qwen2 qwen3 qwen3moe stablelm".split()
STORED = {"auto": "bfloat16", "float64": "float32"}  # model.dtype -> what is kept, where that is another
WIDE_SCALES = (("gemma2", 46), ("gemma3", 62))  # layers of those of 27B, which scale queries by hidden size / heads
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX and os.path.isfile(path)


def check_gguf(file: Path, path: str, stream: bool) -> None:
    """Checks what the header tells, without transformers. `path`: what the user calls the file. Raises ConfigError."""
    if stream:
        raise ConfigError(
            "model.stream=true: expected false with a GGUF file, which is dequantised as a whole; to stream, give "
            "model.path the checkpoint that it was made from"
        )
    if importlib.util.find_spec("gguf") is None:
        raise refused(path, "needs the package gguf: pip install 'pruneexp[gguf]'")
    header = gguf_header(file, path)
    architecture = header.values.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise refused(
            path, f"holds a model of architecture {architecture!r}; expected one of {', '.join(ARCHITECTURES)}"
        )
    parts = header.values.get("split.count", 1)
    if parts > 1:
        raise refused(path, f"is one of {parts} files; expected the whole model in one: llama-gguf-split --merge")
    if architecture == "llama" and header.values.get("llama.expert_count", 0):
        raise refused(path, "a mixture of experts, which transformers does not read from GGUF")
    _rope(file, header, path)


def converted_folder(file: Path, dtype: str) -> Path:
    """Where the checkpoint of a GGUF file lies once it is made: beside the Hub's, under HF_HOME. `dtype`: as
    `model.dtype`."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = Path(os.environ.get("HF_HOME") or Path(caches, "huggingface")).expanduser()
    stored = STORED.get(dtype, dtype)
    made_by = [metadata.version("transformers"), metadata.version("gguf"), CONVERSION]
    key = hashlib.sha256(json.dumps([file_state(file.resolve()), made_by]).encode()).hexdigest()
    return home / "pruneexp" / "gguf" / f"{file.stem}-{stored}-{key[:12]}"


def convert(file: Path, path: str, dtype: str) -> Path:
    """The folder of an ordinary checkpoint with the file's weights, tokenizer and chat template; made where it is not
    there yet. In memory it takes four bytes a weight, and the checkpoint.

    Raises:
        ConfigError: transformers cannot.
        RunError: the folder cannot be written.
    """
    from filelock import FileLock

    folder = converted_folder(file, dtype)
    if (folder / "config.json").is_file():  # whole, and the disk may be read-only
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / "config.json").is_file():
                aside = aside_of(folder)
                try:
                    with waiting(f"dequantising {file.name}"):
                        _write(file, path, STORED.get(dtype, dtype), aside)
                    aside.rename(folder)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
                logger.info("model.path=%r: dequantised to %s", path, folder)
    except OSError as error:
        if not (folder / "config.json").is_file():  # else another machine, which our lock does not reach, was faster
            raise RunError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return folder


def _write(file: Path, path: str, dtype: str, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    header = gguf_header(file, path)
    settings: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # versions that can leave weights quantised
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _reading(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **settings)
        model, loading = loaded
        tokenizer = None
        if "tokenizer.ggml.model" in header.values:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            if header.values["tokenizer.ggml.model"] == "gpt2" and "tokenizer.ggml.pre" in header.values:
                restore_split_(tokenizer, header.values["tokenizer.ggml.pre"], path)
    lacking = sorted(loading["missing_keys"])
    if lacking:  # transformers fills them at random
        raise refused(path, f"holds no weights for {', '.join(lacking[:3])}")
    config = model.config
    for name in ("quantization_config", "_model_name_or_path"):  # it is dense now; a title is no model's id
        config.__dict__.pop(name, None)
    _complete_(config, header, _rope(file, header, path))
    with torch.device("meta"):
        plain = type(model)(config)  # one that may be saved
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig(**_special_tokens(header.values))
    folder.mkdir()
    plain.to(getattr(torch, dtype)).save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        give_usual_mode(weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        written = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        if written.get("tokenizer_class") == "TokenizersBackend":  # of no model's own: as transformers 4 calls it
            written["tokenizer_class"] = "PreTrainedTokenizerFast"
            (folder / TOKENIZER_CONFIG).write_text(json.dumps(written, indent=2) + "\n")
    (folder / "README.md").write_text(_card(header.values, file))
    made = f"dequantised by transformers {metadata.version('transformers')}, gguf {metadata.version('gguf')}"
    record = {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file), "made": made}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Inside, any error of transformers and gguf becomes one line, and their bars are not shown."""
    try:
        with redirect_stderr(io.StringIO()):
            yield
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        cannot = f"transformers {metadata.version('transformers')} cannot dequantise it"
        raise refused(path, f"{cannot} ({reason})") from error


def _rope(file: Path, header: Header, path: str) -> dict[str, Any]:
    """How rotary positions are scaled, as `rope_parameters` of a config; transformers does not read it from GGUF files.
    Raises ConfigError for a scaling that is neither linear nor LLaMA 3's."""
    values, tensors = header.values, [name for name in header.tensors if name.startswith("rope_")]
    architecture = values["general.architecture"]
    kind = values.get(f"{architecture}.rope.scaling.type", "none")
    factor = values.get(f"{architecture}.rope.scaling.factor", 1.0)
    if not tensors and kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1.0 else {}
    if (tensors, kind, architecture) == (["rope_freqs.weight"], "none", "llama"):
        factors = float32_tensor(file, header, tensors[0])
        parameters = None if factors is None else _llama3(factors, values.get("llama.rope.freq_base", 1e4))
        if parameters is not None:
            return parameters
    what = ", ".join([*tensors, *([f"rope.scaling.type={kind}"] if kind != "none" else [])])
    raise refused(
        path,
        f"stretches rotary positions ({what}) in a way that transformers does not read from GGUF; "
        "expected the checkpoint that it was made from",
    )


def _llama3(factors: Sequence[float], base: float) -> dict[str, Any] | None:
    """The parameters of LLaMA 3's scaling that give these factors, one for each pair of a head's channels; None where
    none do."""
    largest, low, high = max(factors), LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    expected = []
    for index in range(len(factors)):
        turns = LLAMA3["original_max_position_embeddings"] * base ** (-index / len(factors)) / (2 * math.pi)
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        expected.append(1 / ((1 - share) / largest + share))
    if any(abs(factor - wanted) > 1e-3 * wanted for factor, wanted in zip(factors, expected, strict=True)):
        return None
    return {} if largest == 1.0 else {"rope_type": "llama3", "factor": largest, **LLAMA3}


def _complete_(config: Any, header: Header, rope: dict[str, Any]) -> None:
    """Adds to a config what transformers does not read from the header. `rope`: as `_rope` gives it."""
    values = header.values
    architecture = values["general.architecture"]
    if rope:
        parameters = config.rope_parameters
        parameters.get("full_attention", parameters).update(rope)
    if config.model_type in ("mistral", "phi3"):  # whose own defaults are those of one checkpoint
        config.sliding_window = values.get(f"{architecture}.attention.sliding_window") or None
    if (architecture, config.num_hidden_layers) in WIDE_SCALES:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def _special_tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings: the first token, the padding, and where to stop: at the end of the text and of a turn."""
    ids = {name: values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    stops = list(dict.fromkeys(ids[name] for name in ("eos", "eot") if ids[name] is not None))
    stop = stops if len(stops) > 1 else next(iter(stops), None)
    return {"bos_token_id": ids["bos"], "eos_token_id": stop, "pad_token_id": ids["padding"]}


def _card(values: Mapping[str, Any], file: Path) -> str:
    """A model card with what the file says of where it comes from."""
    address = values.get("general.base_model.0.repo_url") or values.get("general.repo_url") or ""
    facts = {"base_model": address.removeprefix("https://huggingface.co/"), "license": values.get("general.license")}
    lines = [f"{key}: {json.dumps(value)}" for key, value in facts.items() if value]
    return "\n".join(["---", *lines, "---", "", f"The model in {file.name}, dequantised.", ""])
