"""The command line of `pruneexp-export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pruneexp.cli.exit_codes import run_small_command
from pruneexp.export.write import Request, export

HELP = """\
usage: pruneexp-export RUN_FOLDER out=PATH [format=auto] [key=value ...]

Writes the pruned model of a finished run (or a checkpoint folder) to PATH in another form, reloads that with the
software it is for and compares it with the run's model.

arguments:
  RUN_FOLDER            a finished run's folder, or a folder with config.json and safetensors
  out=PATH              the new folder; with format=gguf also NAME.gguf, the file itself (NAME.gguf.json beside it tells
                        what export.json tells of a folder)
  format=auto           the simplest faithful form: stock where one can hold the model, else remote_code
  format=stock          a stock architecture; loads everywhere, without trust_remote_code
  format=remote_code    modeling_pruned.py beside the weights, each layer as narrow as it is
  format=padded         zeros up to the widest layer, then stock: exact, larger, loads everywhere
  format=gguf           model.gguf for llama.cpp, each layer as narrow as it is; of LLaMA-like models
  format=vllm           for vLLM's DeciLM, FFNs as narrow as they are; of LLaMA-like models, heads alike in all layers
  multiple=N            with format=padded, gguf or vllm: FFN widths rounded up to a multiple of N with zeros, which
                        change nothing. gguf: 32 unless given, for llama.cpp leaves narrower rows unquantised (256 for
                        K-quants such as Q4_K_M without fallbacks; 1: as they are); the others: 1
  dtype=NAME            with format=gguf: float32, bfloat16 or float16; the checkpoint's unless given
  stream=auto           true: one decoder layer in memory at a time (false: never); auto goes by the memory that is free
  prove=process         reload in a clean process (in_place: in this one, without llama.cpp; off: not at all); what is
                        streamed is proved layer by layer, or read back tensor by tensor (gguf, vllm); llama.cpp runs
                        a GGUF file, streamed or not, where the model in float32 fits beside it
  overwrite=false       true: replace an earlier export at PATH
  -h, --help

exit code: 0 done; 2 a request that cannot work; 1 an export that failed (nothing is left at PATH)"""

CHOICES = {
    "format": ("auto", "stock", "remote_code", "padded", "gguf", "vllm"),
    "dtype": ("float32", "bfloat16", "float16"),
    "prove": ("process", "in_place", "off"),
    "overwrite": ("true", "false"),
    "stream": ("auto", "true", "false"),
}
KEYS = ("format", "out", "overwrite", "prove", "multiple", "dtype", "stream")
WITH_FORMAT = {"multiple": ("padded", "gguf", "vllm"), "dtype": ("gguf",)}  # keys that some formats alone have


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Gives the exit code: 0 done, 2 a request that cannot work, 1 an export that failed."""
    return run_small_command("pruneexp-export", HELP, _command, argv)


def _command(argv: Sequence[str]) -> int:
    record = export(request(argv))
    print(f"format: {record['form']} ({record['why']})")
    for note in record.get("notes", ()):
        print(f"note: {note}")
    for what in ("logit", "log_probability"):
        if (difference := record.get(f"max_{what}_difference")) is not None:
            equal = record.get("greedy_tokens_equal")  # None: proved without generating
            same = "" if equal is None else f"; greedy tokens {'equal' if equal else 'differ'}"
            print(f"largest difference of a {what.replace('_', '-')}: {difference:.3g}{same}")
    print(f"The export is {record['out']}")
    return 0


def request(argv: Sequence[str]) -> Request:
    """Reads the command line. Raises ConfigError."""
    from pruneexp.cli.arguments import read_arguments
    from pruneexp.types import ConfigError

    folders, values = read_arguments(argv, "pruneexp-export", KEYS, CHOICES)
    if len(folders) != 1:
        given = " ".join(folders) or "none"
        raise ConfigError(f"RUN_FOLDER: expected one folder, got {given}; see pruneexp-export --help")
    if not values.get("out"):
        raise ConfigError("out is missing: expected out=PATH, the folder to write (with format=gguf also NAME.gguf)")
    multiple = values.get("multiple")
    if multiple is not None and (not multiple.isdecimal() or int(multiple) < 1):
        raise ConfigError(f"multiple={multiple}: expected an int >= 1")
    for key, own in WITH_FORMAT.items():
        if key in values and values.get("format") not in own:
            raise ConfigError(f"{key}={values[key]}: goes with format={' or '.join(own)} alone")
    if values["out"].endswith(".gguf") and values.get("format") != "gguf":
        raise ConfigError(f"out={values['out']}: one file for llama.cpp; expected it with format=gguf, or a folder")
    return Request(
        Path(folders[0]).expanduser(),
        Path(values["out"]).expanduser(),
        values.get("format", "auto"),
        values.get("prove", "process"),
        values.get("overwrite") == "true",
        None if multiple is None else int(multiple),
        values.get("dtype"),
        {"true": True, "false": False}.get(values.get("stream", "auto")),
    )
