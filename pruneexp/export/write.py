"""An export, from the checkpoint's folder to the new one: chosen, written aside, proved, put in its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pruneexp.export.folders import (
    GGUF_FILE,
    RECORD,
    check_out,
    check_space,
    checkpoint_folder,
    place_file,
    stored_source,
)

if TYPE_CHECKING:
    from pruneexp.model import Model


@dataclass(frozen=True)
class Request:
    """What `pruneexp-export` is asked for."""

    source: Path
    out: Path
    format: str = "auto"
    prove: str = "process"
    overwrite: bool = False
    multiple: int | None = None  # None: the format's own
    dtype: str | None = None  # None: the checkpoint's
    stream: bool | None = None  # None: by the memory that is free

    @property
    def single_file(self) -> bool:
        """Whether `out` is the file itself, not a folder for it."""
        return self.format == "gguf" and self.out.suffix == ".gguf"


class Exporter(Protocol):
    """One format, for one model whose structure it can hold."""

    @property
    def form(self) -> str: ...

    @property
    def why(self) -> str: ...

    @property
    def bytes(self) -> int:
        """Room that the weights take."""
        ...

    def write(self, model: Model, folder: Path) -> list[str]:
        """Makes `folder` and everything in it. Gives what the user should know."""
        ...

    def prove(self, checkpoint: Path, how: str, stream: bool, folder: Path) -> dict[str, Any]:
        """Compares `folder` with the checkpoint; `stream`: without holding either. Raises RunError where it is another
        model."""
        ...


def export(request: Request) -> dict[str, Any]:
    """Writes the export and gives what its export.json says.

    Raises:
        ConfigError: what is asked for cannot be; nothing has been written then, and no weight loaded.
        RunError: it could not be written, did not reload or is another model; nothing is left of it.
    """
    from pruneexp.cli.arguments import made_aside
    from pruneexp.export.streamed import wants_streaming
    from pruneexp.files import replace_folder

    checkpoint = checkpoint_folder(request.source)
    check_out(request.out, request.source, checkpoint, request.overwrite, request.single_file)
    source = stored_source(checkpoint)
    source.check()
    outline = source.outline()
    exporter = chosen(outline, request)
    place = request.out.absolute() if request.single_file else request.out.resolve()  # a link to a folder stays
    check_space(request.out, place, exporter.bytes)
    stream = wants_streaming(outline) if request.stream is None else request.stream
    with made_aside(request.out, place) as aside:
        record = _written(request, checkpoint, stream, exporter, aside)
        # it may be there by now
        check_out(request.out, request.source, checkpoint, request.overwrite, request.single_file)
        if request.single_file:
            place_file(aside / GGUF_FILE, place, record)
        else:
            replace_folder(aside, place)
    return record


def chosen(model: Model, request: Request) -> Exporter:
    """What writes the format that was asked for, from the model's structure alone.

    Raises ConfigError where the format cannot hold the model; the message names what can.
    """
    if request.format == "gguf":
        from pruneexp.export.gguf_file import gguf_exporter

        return gguf_exporter(model, request.dtype, request.multiple)
    if request.format == "vllm":
        from pruneexp.export.vllm import vllm_exporter

        return vllm_exporter(model, request.multiple or 1)
    from pruneexp.export.checkpoint import checkpoint_exporter

    return checkpoint_exporter(model, request.format, request.multiple or 1)


def _written(request: Request, checkpoint: Path, stream: bool, exporter: Exporter, aside: Path) -> dict[str, Any]:
    """Writes and proves the export in `aside`."""
    from pruneexp.export.card import card
    from pruneexp.files import files_in, write_atomic, write_json
    from pruneexp.model.companions import CARD, GENERATION, LEGAL, copy_files

    model = stored_source(checkpoint, stream=stream).load()
    notes = exporter.write(model, aside)
    del model
    copy_files(checkpoint, aside, ("plan.json", GENERATION, *LEGAL))
    if text := card(request.source, checkpoint, aside, exporter.form, request.format == "padded"):
        write_atomic(aside / CARD, text)
    record: dict[str, Any] = {
        "format": request.format,
        "form": exporter.form,
        "why": exporter.why,
        "source": str(request.source.absolute()),
        "out": str(request.out.absolute()),
        "streamed": stream,
        "prove": request.prove,
    }
    if request.prove != "off":
        proof = exporter.prove(checkpoint, request.prove, stream, aside)
        notes += proof.pop("notes", [])
        record |= proof
    if notes:
        record["notes"] = notes
    record["files"] = [*files_in(aside), RECORD]
    write_json(aside / RECORD, record)
    return record
