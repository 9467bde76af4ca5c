"""`quantise=gguf`: the model as a GGUF file of fewer bits, measured where it will run, in llama.cpp."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.evaluator import Latency
from pruneexp.export.folders import GGUF_FILE
from pruneexp.export.gguf_engine import Engine, engine
from pruneexp.export.gguf_file import GgufExporter, gguf_exporter
from pruneexp.export.gguf_layout import BLOCK
from pruneexp.export.llama_like import context_length
from pruneexp.files import scratch_folder, written_aside
from pruneexp.fingerprint import version_of
from pruneexp.model import Model
from pruneexp.types import ConfigError, Evaluator, Measured, RunError

logger = logging.getLogger("pruneexp")

K_BLOCK = 256  # numbers that a K-quant takes together
Kind = Literal[
    "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "Q3_K_L", "Q3_K_M",
    "Q3_K_S", "Q2_K",
]  # fmt: skip


@dataclass(frozen=True)
class GgufQuantise:
    """The dense and the pruned model, exported as `pruneexp-export format=gguf` does it, quantised to `type` by
    llama.cpp, and measured by it: perplexities, and speed where `latency` is asked for. Both models stay as they are;
    evaluators measure them in transformers besides.

    FFN widths are filled up with zeros to multiples of what is quantised together: 256 numbers for K-quants, else 32.
    Rows that are no such multiple all the same (of a hidden size) get another type from llama.cpp; the log counts them.

    Figures have "/gguf-<type>" behind their names: "ppl/wikitext2@512/gguf-q4_k_m", by the evaluators' own windows,
    keys and values cached in float16; "latency/...", of one prompt at a time; "bytes", of all tensors in the file,
    zeros, too; "bits/param", these of a parameter of the model.
    """

    applies: ClassVar[bool] = True

    type: Kind

    def note(self) -> str:
        return f"the dense and the pruned model as GGUF files of type {self.type}, by llama.cpp, beside transformers'"

    def check(self) -> None:
        engine()

    def prepare(self, model: Model) -> None:
        """Raises ConfigError for a model that the file cannot hold."""
        self._exporter(model)

    def scratch_bytes(self, model: Model) -> int:
        """The plain file, and beside it the one of fewer bits: some matrices have up to two more than its name says."""
        plain, bits = self._exporter(model), int("".join(filter(str.isdigit, self.type.split("_")[0])))
        return plain.bytes + plain.bytes * min(bits + 2, 16) // (8 * plain.layout.dtype.itemsize)

    def measured_on(self, model: Model, evaluators: Mapping[str, Evaluator]) -> Any:
        """None where speeds are asked for, which differ each time."""
        of_text = _of_text(evaluators, model.tokenizer)
        inputs = {name: [version_of(each), each.measured_on(model.tokenizer)] for name, each in of_text.items()}
        if _of_speed(evaluators) or any(own is None for _, own in inputs.values()):
            return None
        return {"engine": engine().version, "gguf": version("gguf"), "evaluators": inputs}

    def __call__(
        self, model: Model, when: str, evaluators: Mapping[str, Evaluator], folder: Path | None
    ) -> dict[str, float]:
        """`folder`: keeps the file, as model.gguf. Raises RunError."""
        exporter = self._exporter(model)
        with scratch_folder() as scratch:
            file, plain = Path(folder or scratch, GGUF_FILE), Path(scratch, "plain")
            llama = engine()
            try:
                for note in exporter.write(model, plain):
                    logger.info("%s model: %s", when, note)
                with written_aside(file) as aside:
                    llama.quantise(plain / GGUF_FILE, aside, self.type)
            except OSError as error:
                where = error.filename or plain
                raise RunError(f"quantise=gguf: cannot write {where}: {error.strerror or error}") from error
            (plain / GGUF_FILE).unlink()
            size, kinds = contents(file)
            logger.info("%s model: GGUF %s, %s; matrices: %s", when, self.type, exporter.why, kinds)
            figures = {"bytes": size, "bits/param": 8 * size / model.params}
            figures |= perplexities(InEngine(llama, file, model), evaluators, model.tokenizer)
            for each in _of_speed(evaluators):
                if when == "dense" and list(each.batch_sizes) != [1]:
                    logger.warning("evaluator.latency.batch_sizes=%s: llama.cpp runs 1 alone", list(each.batch_sizes))
                figures |= llama.speeds(file, model.vocab_size, each.prompts(model, model.tokenizer, 1), each)
        return {f"{name}/gguf-{self.type.lower()}": value for name, value in figures.items()}

    def _exporter(self, model: Model) -> GgufExporter:
        try:
            return gguf_exporter(model, None, K_BLOCK if "_K" in self.type else BLOCK)
        except ConfigError as error:
            reason, _, expected = str(error).removeprefix("format=gguf: ").partition("; expected ")
            instead = expected if expected.startswith("pip") else "quantise=int8, int4 or none"
            raise ConfigError(f"quantise=gguf: {reason}; expected {instead}") from None


@dataclass(frozen=True)
class InEngine:
    """A file as evaluators of text see a model."""

    engine: Engine
    file: Path
    of: Model

    @property
    def vocab_size(self) -> int:
        return self.of.vocab_size

    @property
    def max_length(self) -> int | None:
        return context_length(self.of)

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def token_losses(self, windows_NT: Tensor, batch_size: int, stage: str = "losses") -> Tensor:
        return self.engine.losses(self.file, windows_NT, self.vocab_size, stage)

    def broken_layer(self, windows_NT: Tensor) -> None:
        """llama.cpp does not say."""


def perplexities(model: InEngine, evaluators: Mapping[str, Evaluator], tokenizer: Any) -> dict[str, float]:
    """The figures of the evaluators that want losses of windows and nothing else of a model."""
    figures: dict[str, float] = {}
    for evaluator in _of_text(evaluators, tokenizer).values():
        answer = evaluator(model, tokenizer)
        figures |= answer.figures if isinstance(answer, Measured) else answer
    return figures


def _of_text(evaluators: Mapping[str, Evaluator], tokenizer: Any) -> dict[str, Evaluator]:
    return {name: each for name, each in evaluators.items() if each.streams and each.windows(tokenizer) is not None}


def _of_speed(evaluators: Mapping[str, Evaluator]) -> list[Latency]:
    return [each for each in evaluators.values() if isinstance(each, Latency)]


def contents(file: Path) -> tuple[int, str]:
    """Bytes of a file's tensors, and how many matrices are of which type."""
    from gguf import GGUFReader

    tensors = GGUFReader(file).tensors
    kinds = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1 and min(tensor.shape) > 1)
    return sum(int(t.n_bytes) for t in tensors), ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
