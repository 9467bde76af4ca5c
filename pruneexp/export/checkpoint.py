"""Exports that transformers loads: stock, padded, or with the modeling file beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneexp.export.folders import exact_source, stored_source
from pruneexp.export.streamed import prove_streamed, save_streamed
from pruneexp.model import Model
from pruneexp.surgery import (
    Form,
    Padding,
    pad_,
    padding,
    period_warning,
    prove_in_place,
    prove_in_process,
    remote_code_form,
    save,
    save_form,
)
from pruneexp.types import ConfigError, RunError

TOLERANCE = 1e-3  # of a logit, in float32
WINDOWS, LENGTH = 2, 48  # tokens of the proof


def checkpoint_exporter(model: Model, format: str, multiple: int) -> CheckpointExporter:
    """What writes `format`, chosen by the model's structure alone. Raises ConfigError where the model has no such
    form."""
    size = model.dtype.itemsize
    if format == "padded":
        zeros = padding(model, multiple)
        return CheckpointExporter(zeros.form, zeros, zeros.params * size)
    if format == "remote_code":
        return CheckpointExporter(remote_code_form(model, "asked for"), None, model.params * size)
    form = save_form(model)
    if format == "stock" and form.kind != "stock":
        instead = "format=padded or format=remote_code" if can_pad(model) else "format=remote_code"
        reason = form.why if model.mixture else uneven(model) or form.why
        raise ConfigError(f"format=stock: {reason}; expected {instead}")
    return CheckpointExporter(form, None, model.params * size)


def can_pad(model: Model) -> bool:
    try:
        padding(model)
    except ConfigError:
        return False
    return True


@dataclass(frozen=True)
class CheckpointExporter:
    """A folder of config.json and safetensors. `bytes`: room that the weights take."""

    own_form: Form
    padding: Padding | None
    bytes: int

    @property
    def form(self) -> str:
        return self.own_form.kind

    @property
    def why(self) -> str:
        return self.own_form.why

    def write(self, model: Model, folder: Path) -> list[str]:
        warning = period_warning(self.own_form.config) if self.own_form.kind == "stock" else ""
        if model.streamed:
            save_streamed(model, folder, self.own_form, self.padding)
        else:
            if self.padding is not None:
                pad_(model, self.padding)
            save(model, folder, self.own_form)
        return [warning] if warning else []

    def prove(self, checkpoint: Path, how: str, stream: bool, folder: Path) -> dict[str, Any]:
        """Compares the export with its source, both in float32 (or more). Raises RunError where they differ."""
        if stream:
            proof = prove_streamed(checkpoint, proof_tokens(stored_source(checkpoint).outline()), folder)
        else:
            model = exact_source(checkpoint).load()
            prove = prove_in_process if how == "process" else prove_in_place
            proof = prove(model, folder, proof_tokens(model))
        check_difference(proof["max_logit_difference"])
        return proof | {"tolerance": TOLERANCE}


def proof_tokens(model: Model) -> Tensor:
    """Windows of random tokens: int64 [B, T]."""
    length = min(LENGTH, model.max_length or LENGTH)
    return torch.randint(1, model.vocab_size, (WINDOWS, length), generator=torch.Generator().manual_seed(0))


def check_difference(difference: float) -> None:
    """Raises RunError where the largest difference of a logit is more than `TOLERANCE`."""
    if not difference <= TOLERANCE:  # NaN, too
        raise RunError(
            f"the export computes something else: a logit differs by {difference:.3g}, more than {TOLERANCE:g}; "
            "nothing was kept"
        )


def uneven(model: Model) -> str:
    """Which layers' widths differ from the others', "" where all are alike."""
    what: dict[str, Callable[[Any], Any]] = {
        "heads": lambda s: (s.num_attention_heads, s.kept_heads),
        "FFN channels": lambda s: s.intermediate_size,
        "biases": lambda s: (s.attention_output_bias, s.mlp_output_bias),
    }
    differences = []
    for name, of in what.items():
        values = [of(structure) for structure in model.structures]
        usual = max(values, key=values.count)
        if odd := [index for index, value in enumerate(values) if value != usual]:
            differences.append(f"{name} in {layers_text(odd)}")
    return f"widths differ between layers ({'; '.join(differences)})" if differences else ""


def layers_text(layers: Sequence[int]) -> str:
    """ "layers 1, 4", of very many the first ones."""
    more = f" and {len(layers) - 8} more" if len(layers) > 8 else ""
    return f"layers {', '.join(map(str, layers[:8]))}{more}"
