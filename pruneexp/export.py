"""`pruneexp-export`: a finished run's checkpoint in another form, proved to be the same model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from pruneexp.model import Model, ModelSource
    from pruneexp.surgery import Form, Padding

HELP = """\
usage: pruneexp-export RUN_FOLDER out=PATH [format=auto] [key=value ...]

Writes the pruned model of a finished run (or a checkpoint folder) to PATH in another form, reloads that with plain
transformers and compares it with the run's model.

arguments:
  RUN_FOLDER            a finished run's folder, or a folder with config.json and safetensors
  out=PATH              the new folder
  format=auto           the simplest faithful form: stock where one can hold the model, else remote_code
  format=stock          a stock architecture; loads everywhere, without trust_remote_code
  format=remote_code    modeling_pruned.py beside the weights, each layer as narrow as it is
  format=padded         zeros up to the widest layer, then stock: exact, larger, loads everywhere
  multiple=1            with format=padded: FFN widths rounded up to a multiple of this
  prove=process         reload in a clean process (in_place: in this one; off: not at all)
  overwrite=false       true: replace an earlier export at PATH
  -h, --help

exit code: 0 done; 2 a request that cannot work; 1 an export that failed (nothing is left at PATH)"""

CHOICES = {
    "format": ("auto", "stock", "remote_code", "padded"),
    "prove": ("process", "in_place", "off"),
    "overwrite": ("true", "false"),
}
KEYS = ("format", "out", "overwrite", "prove", "multiple")
RECORD = "export.json"
TOLERANCE = 1e-3  # of a logit, in float32
WINDOWS, LENGTH = 2, 48  # tokens of the proof


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    source: Path
    out: Path
    format: str = "auto"
    prove: str = "process"
    overwrite: bool = False
    multiple: int = 1


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Gives the exit code: 0 done, 2 a request that cannot work, 1 an export that failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "-h" in argv or "--help" in argv:
        print(HELP)
        return 0
    from pruneexp.types import ConfigError, RunError

    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        signal.signal(signal.SIGTERM, _terminated)
    try:
        record = export(request(argv))
    except ConfigError as error:
        return _ended(2, str(error))
    except RunError as error:
        return _ended(1, f"failed: {error}")
    except KeyboardInterrupt:
        return _ended(130, "interrupted")
    except Exception as error:
        return _ended(1, f"failed: {type(error).__name__}: {error}")
    print(f"format: {record['form']} ({record['why']})")
    if "max_logit_difference" in record:
        equal = record.get("greedy_tokens_equal")  # None: proved without generating
        same = "" if equal is None else f"; greedy tokens {'equal' if equal else 'differ'}"
        print(f"largest difference of a logit: {record['max_logit_difference']:.3g}{same}")
    print(f"The export is {record['out']}")
    return 0


def _terminated(signum: int, frame: Any) -> NoReturn:
    # An exception, so that what has been written is removed on the way out.
    raise SystemExit(128 + signum)


def _ended(code: int, line: str) -> int:
    print(f"pruneexp-export: {' '.join(line.split())}", file=sys.stderr)
    return code


def request(argv: Sequence[str]) -> Request:
    """Reads the command line. Raises ConfigError."""
    from pruneexp.explain import did_you_mean, known_keys
    from pruneexp.types import ConfigError

    folders, values = [], {}
    for text in argv:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]+", key):
            if text.startswith("-"):
                raise ConfigError(f"{text}: unknown option; expected key=value; see pruneexp-export --help")
            folders.append(text)
            continue
        known_keys([key], KEYS)
        if key in values:
            raise ConfigError(f"{text}: {key} is given twice")
        if key in CHOICES and value not in CHOICES[key]:
            near = did_you_mean(value, CHOICES[key], f"{key}={{}}")
            raise ConfigError(f"{text}: expected {', '.join(CHOICES[key][:-1])} or {CHOICES[key][-1]}{near}")
        values[key] = value
    if len(folders) != 1:
        found = " ".join(folders) or "none"
        raise ConfigError(f"RUN_FOLDER: expected one folder, got {found}; see pruneexp-export --help")
    if not values.get("out"):
        raise ConfigError("out is missing: expected out=PATH, the folder to write")
    multiple = values.get("multiple", "1")
    if not multiple.isdecimal() or int(multiple) < 1:
        raise ConfigError(f"multiple={multiple}: expected an int >= 1")
    if "multiple" in values and values.get("format") != "padded":
        raise ConfigError(f"multiple={multiple}: goes with format=padded alone")
    return Request(
        Path(folders[0]).expanduser(),
        Path(values["out"]).expanduser(),
        values.get("format", "auto"),
        values.get("prove", "process"),
        values.get("overwrite") == "true",
        int(multiple),
    )


def export(asked: Request) -> dict[str, Any]:
    """Writes the export and gives what its export.json says.

    Raises:
        ConfigError: what is asked for cannot be; nothing has been written then, and no weight loaded.
        RunError: it could not be written, did not reload or is another model; nothing is left of it.
    """
    checkpoint = _checkpoint(asked.source)
    _check_out(asked, checkpoint)
    source = _source(checkpoint)
    source.check()
    form, padding = _chosen(source.outline(), asked)
    _check_space(asked.out, checkpoint, source, padding)
    out = asked.out.absolute()
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        record = _written(asked, checkpoint, source, form, padding, aside)
        _replace(aside, out)
    except OSError as error:
        from pruneexp.types import RunError

        raise RunError(f"out={str(asked.out)!r}: cannot be written ({error.strerror or error})") from error
    finally:
        for left in (aside, aside.with_name(f"{aside.name}.partial")):
            shutil.rmtree(left, ignore_errors=True)
    return record


def _checkpoint(source: Path) -> Path:
    """The checkpoint's folder. Raises ConfigError where there is none that is finished."""
    from pruneexp.tracker import status_of
    from pruneexp.types import ConfigError

    where = repr(str(source))
    if not source.is_dir():
        raise ConfigError(f"RUN_FOLDER={where}: no such folder; expected a finished run's, or a checkpoint's")
    state = status_of(source)
    if state == "absent":
        if not (source / "config.json").is_file():
            raise ConfigError(
                f"RUN_FOLDER={where}: holds no run and no checkpoint; expected status.json or config.json"
            )
        folder = source
    elif state != "done":
        todo = "wait for its end" if state == "running" else "run it again with run.overwrite=true"
        raise ConfigError(f"RUN_FOLDER={where}: this run is {state}; expected a finished one: {todo}")
    else:
        folder = source / "model"
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"RUN_FOLDER={where}: this run saved no checkpoint; run it again with run.save=true run.overwrite=true"
            )
    if (folder / "adapter").exists():
        raise ConfigError(
            f"RUN_FOLDER={where}: its model has an adapter that is not merged; expected a run with recovery.merge=true"
        )
    return folder


def _check_out(asked: Request, checkpoint: Path) -> None:
    from pruneexp.types import ConfigError

    where, out = f"out={str(asked.out)!r}", asked.out.resolve()
    for folder in (asked.source.resolve(), checkpoint.resolve()):
        if out == folder or folder in out.parents:
            raise ConfigError(f"{where}: lies inside {str(asked.source)!r}; expected a folder elsewhere")
        if out in folder.parents:
            raise ConfigError(f"{where}: holds {str(asked.source)!r}; expected a folder of its own")
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{where}: is a file; expected a new folder")
    if not any(out.iterdir()):
        return
    if not asked.overwrite:
        raise ConfigError(f"{where}: exists; expected a new folder, or overwrite=true")
    if not (out / RECORD).is_file():
        raise ConfigError(f"{where}: holds no {RECORD}; overwrite=true replaces earlier exports alone")


def _check_space(out: Path, checkpoint: Path, source: ModelSource, padding: Padding | None) -> None:
    """Raises ConfigError where the disk has no room for the weights."""
    from pruneexp.model.checkpoint import safetensors_files
    from pruneexp.model.source import DTYPES
    from pruneexp.types import ConfigError

    if padding is None:
        needed = sum((checkpoint / name).stat().st_size for name in safetensors_files(checkpoint))
    else:
        needed = padding.params * DTYPES[source.dtype].itemsize
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"out={str(out)!r}: the export takes {needed / 2**30:.2f} GiB; {free / 2**30:.2f} GiB are free there"
        )


def _source(checkpoint: Path, dtype: str | None = None) -> ModelSource:
    """The checkpoint as it is stored: a CPU's own choice of precision is nothing to write down."""
    from pruneexp.model import ModelSource
    from pruneexp.model.source import DTYPES

    def source(dtype: str) -> ModelSource:
        return ModelSource("export", str(checkpoint), None, dtype, "cpu", False, False, 1)

    if dtype is None:
        config = source("auto").read_config(checkpoint)
        dtype = str(config.get("dtype") or config.get("torch_dtype"))
        dtype = dtype if dtype in DTYPES else "float32"
    return source(dtype)


def _chosen(model: Model, asked: Request) -> tuple[Form, Padding | None]:
    """The form, from the model's structure alone. Raises ConfigError where there is none of what was asked for."""
    from pruneexp.surgery import padding, remote_code_form, save_form
    from pruneexp.types import ConfigError

    if asked.format == "padded":
        found = padding(model, asked.multiple)
        return found.form, found
    if asked.format == "remote_code":
        return remote_code_form(model, "asked for"), None
    form = save_form(model)
    if asked.format == "stock" and form.kind != "stock":
        try:
            padding(model)
            instead = "format=padded or format=remote_code"
        except ConfigError:
            instead = "format=remote_code"
        reason = form.why if model.mixture else _uneven(model) or form.why
        raise ConfigError(f"format=stock: {reason}; expected {instead}")
    return form, None


def _uneven(model: Model) -> str:
    """Which layers' widths differ from the others', "" where all are alike."""
    from pruneexp.model import layer_structure

    structures = [layer_structure(layer, model.family, model.config) for layer in model.layers]
    what: dict[str, Callable[[Any], Any]] = {
        "heads": lambda s: (s.num_attention_heads, s.kept_heads),
        "FFN channels": lambda s: s.intermediate_size,
        "biases": lambda s: (s.attention_output_bias, s.mlp_output_bias),
    }
    found = []
    for name, of in what.items():
        values = [of(structure) for structure in structures]
        usual = max(values, key=values.count)
        odd = [index for index, value in enumerate(values) if value != usual]
        if odd:
            more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
            found.append(f"{name} in layers {', '.join(map(str, odd[:8]))}{more}")
    return f"widths differ between layers ({'; '.join(found)})" if found else ""


def _written(
    asked: Request, checkpoint: Path, source: ModelSource, form: Form, padding: Padding | None, aside: Path
) -> dict[str, Any]:
    """Writes and proves the export in `aside`."""
    from pruneexp.surgery import pad_, save
    from pruneexp.tracker import write_atomic

    model = source.load()
    if padding is not None:
        pad_(model, padding)
    save(model, aside, form)
    del model
    for name in ("plan.json", "generation_config.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, aside / name)
    record: dict[str, Any] = {
        "format": asked.format,
        "form": form.kind,
        "why": form.why,
        "source": str(asked.source.absolute()),
        "out": str(asked.out.absolute()),
        "prove": asked.prove,
    }
    if asked.prove != "off":
        record |= _proved(asked, checkpoint, source, aside)
    write_atomic(aside / RECORD, json.dumps(record, indent=1) + "\n")
    return record


def _proved(asked: Request, checkpoint: Path, source: ModelSource, aside: Path) -> dict[str, Any]:
    """Compares the export with its source, both in float32 (or more). Raises RunError where they differ."""
    import torch

    from pruneexp.surgery import prove_in_place, prove_in_process
    from pruneexp.types import RunError

    model = _source(checkpoint, "float64" if source.dtype == "float64" else "float32").load()
    length = min(LENGTH, model.max_length or LENGTH)
    rng = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(1, model.vocab_size, (WINDOWS, length), generator=rng)
    prove = prove_in_process if asked.prove == "process" else prove_in_place
    proof = prove(model, aside, tokens_BT)
    difference = proof["max_logit_difference"]
    if not difference <= TOLERANCE:  # NaN, too
        raise RunError(
            f"out={str(asked.out)!r}: the export computes something else: a logit differs by {difference:.3g}, "
            f"more than {TOLERANCE:g}; nothing was kept"
        )
    return proof


def _replace(aside: Path, out: Path) -> None:
    """Puts the finished export in its place, an earlier one out of the way first."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    try:
        aside.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
