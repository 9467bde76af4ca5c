"""What can be told of a checkpoint from its config and its files' headers: what is damaged, quantised or impossible."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneexp.model import modeling_pruned
from pruneexp.model.refusal import refused
from pruneexp.model.weights import tied_names
from pruneexp.types import ConfigError, one_line

if TYPE_CHECKING:
    from pruneexp.model.checkpoint import Checkpoint

HUB_ID = re.compile(r"\w[\w.-]*/\w(?:[\w.-]*\w)?", re.ASCII)
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
QUANTISERS = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "bitsandbytes": "bitsandbytes"}
COUNTS = (  # config attributes that count something; absent or None where an architecture has none
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip


def check_hub_id(path: str, is_file: bool) -> None:
    """Raises ConfigError where `path`, which is no folder, cannot be the name of a model on the Hub either."""
    if is_file or not HUB_ID.fullmatch(path) or "--" in path or ".." in path or path.endswith((".git", ".gguf")):
        what = "is a file" if is_file else "no such file" if path.endswith(".gguf") else "no such folder"
        expected = "a folder with config.json and *.safetensors, a GGUF file (*.gguf), or a Hub id, owner/name"
        raise refused(path, f"{what}; expected {expected}")


def read_config(folder: Path, path: str) -> dict[str, Any]:
    """config.json as it stands, checked: a supported family, not quantised. `path`: what the user calls the folder.

    Raises:
        ConfigError: one line that names what is wrong with it.
    """
    file = folder / "config.json"
    if not file.is_file():
        a_run = (folder / "model" / "config.json").is_file()  # its own folder in the place of the checkpoint's
        near = f"; did you mean {path.rstrip('/')}/model?" if a_run else ""
        raise refused(path, f"holds no model; expected a folder with config.json{near}")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise refused(path, f"config.json is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise refused(path, f"config.json holds a {type(config).__name__}; expected an object")
    model_type = str(config.get("model_type"))
    if model_type.removeprefix("pruned_") not in modeling_pruned.FAMILIES:
        families = ", ".join(sorted(modeling_pruned.FAMILIES))
        if config.get("model_type") is None:
            raise refused(path, f"config.json names no model_type; expected one of {families}")
        raise refused(path, f"model_type {model_type!r} is not supported; expected one of {families}")
    if config.get("quantization_config"):
        how = _quantised_how(config["quantization_config"])
        raise refused(path, f"is quantised{how}; expected the full-precision checkpoint that it was made from")
    return config


def _quantised_how(settings: Any) -> str:
    """How a checkpoint is quantised, as its config says: " (GPTQ, 4 bits)"."""
    if not isinstance(settings, Mapping):
        return ""
    method = settings.get("quant_method")
    bits = settings.get("bits") or next((n for n in (4, 8) if settings.get(f"load_in_{n}bit")), None)
    words = [QUANTISERS.get(str(method), str(method))] if method else []
    words += [f"{bits} bits"] if bits else []
    return f" ({', '.join(words)})" if words else ""


def check_counts(config: Any, path: str) -> None:
    """Raises ConfigError, naming the value, where a count in the config is below one, or the query heads are no
    multiple of the key/value heads."""
    called = getattr(config, "attribute_map", {})
    for name in COUNTS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            raise refused(path, f"config.json says {called.get(name, name)}={value}; expected an integer >= 1")
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise refused(
            path, f"config.json says num_attention_heads={heads}, which is no multiple of num_key_value_heads={shared}"
        )


@contextmanager
def building(path: str, model_type: str) -> Iterator[None]:
    """Inside, every error becomes a ConfigError that names the version of transformers: its class may not know all that
    the config says."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        import transformers

        reason = one_line(f"{type(error).__name__}: {error}")
        raise refused(
            path,
            f"transformers {transformers.__version__} cannot make a {model_type} model of this config.json ({reason})",
        ) from error


def check_tensors(module: Any, checkpoint: Checkpoint, path: str) -> None:
    """Raises ConfigError, naming tensors, where checkpoint and config do not fit or weights are quantised."""
    tied = tied_names(module)
    expected = [name for name in module.state_dict() if name not in tied]
    missing = [name for name in expected if name not in checkpoint]
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items() if name in checkpoint}
    misshapen = [name for name, shape in shapes.items() if checkpoint.shape(name) != shape]
    ignored = [*(module._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"attn\.(masked_)?bias$"]
    beside = checkpoint.names_beside([*expected, *tied])
    extra = [name for name in beside if not any(re.search(pattern, name) for pattern in ignored)]
    extra = [name for name in extra if 0 not in checkpoint.shape(name)]  # of sublayers that older versions had emptied
    needless = set(beside) - set(extra)
    for name, kind in checkpoint.dtypes().items():
        if kind not in FLOATS and name not in needless:  # integers, or floats of eight bits, whatever the config says
            raise refused(
                path,
                f"{name} is stored as {kind}: the checkpoint is quantised; expected the "
                f"full-precision checkpoint that it was made from ({', '.join(FLOATS)})",
            )
    problems = [
        f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in (("lacks", missing), ("has besides", extra), ("has in another shape", misshapen))
        if names
    ]
    if problems:
        raise refused(path, f"the checkpoint does not fit its config: it {' and '.join(problems)}")


def precisions(stored: Mapping[str, str]) -> str:
    """ "290 tensors as BF16, 1 as F32"; "" where all floats are stored alike."""
    counts = Counter(kind for kind in stored.values() if kind in FLOATS).most_common()
    if len(counts) < 2:
        return ""
    (most, number), *others = counts
    return ", ".join([f"{number} tensors as {most}", *(f"{count} as {kind}" for kind, count in others)])
