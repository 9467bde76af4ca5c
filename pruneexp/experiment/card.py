"""The model card: what somebody who finds the pruned checkpoint must know of it, in the Hub's form."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pruneexp.conf_files import override_parts, typed_keys
from pruneexp.experiment.summary_table import change_text, figure_text, summary
from pruneexp.fingerprint import __version__
from pruneexp.types import Plan, Site

TAG = "pruneexp"
EMBEDDED = "embedded:"  # models inside the package
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
FOLDERS = ("checkpoint", "checkpoints", "data", "home", "model", "models", "outputs", "results", "runs", "tmp")
LICENSE_KEYS = ("license", "license_name", "license_link")
ELSEWHERE = ("run", "sweep", "cache", "tracker", "hydra")  # sections of where a run works and reports
LOADING, COMMAND, ADAPTING = "## Loading it", "## The command that made it", "## Fine-tuning it"
METRICS = {  # first part of a metric's name -> what it is
    "ppl": "`ppl/TEXT@T`: perplexity over TEXT's windows of T tokens, exp of the mean loss of a token; lower is better",
    "acc": "`acc...`: share of questions answered rightly; higher is better",
}
LIBRARIES = {"gguf": "gguf", "vllm": "vllm"}  # of forms that transformers does not load
LOADERS = {
    "stock": """\
It is a stock architecture (`{architecture}`): transformers {since} or newer loads it, without code of its own.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"  # or its id on the Hub
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
```
""",
    "remote_code": """\
Its layers differ in width, which no stock architecture can say: `modeling_pruned.py`, one file beside the weights that
needs torch and transformers alone ({since} or newer), builds it. Hence `trust_remote_code=True`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"  # or its id on the Hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # needs none, and asks for none
```
""",
    "gguf": """\
It is one file for llama.cpp, each layer as narrow as it is.

```sh
llama-cli -m model.gguf -p "Once upon a time"
```
""",
    "vllm": """\
It is a checkpoint of vLLM's class for LLaMAs whose layers differ (`DeciLMForCausalLM`); remote code is the config's.

```sh
vllm serve path/to/this/folder --trust-remote-code
```
""",
}

PADDED = """
Zeros fill every layer up to the widest one: this form computes the same, but is larger and slower than the figures
below, which are those of the model without them.
"""


@dataclass(frozen=True)
class Written:
    """A checkpoint as its readers meet it. `form`: a key of LOADERS; `since`: the first transformers that reads it;
    `hollow`: some layers lost a whole sublayer and have no linear layers there; `padded`: zeros fill layers up to the
    widest one."""

    form: str
    architecture: str = ""
    since: str = ""
    hollow: bool = False
    padded: bool = False


@dataclass(frozen=True)
class Card:
    """What a card says. `base_model`: an id on the Hub, or a name; `license`: as in the source's own card; `targets`:
    names of the linear layers, for adapters; `overrides`: of the command that made the model, None where that is not
    known; `quantised`: what is to be said of fewer bits."""

    base_model: str
    license: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = "custom"
    overrides: Sequence[str] | None = None
    targets: Sequence[str] = ()
    adapter: bool = False
    plan: Plan = field(default_factory=lambda: Plan({}))
    sites: Sequence[Site] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    quantised: str = ""


def card_text(card: Card, written: Written) -> str:
    """README.md of a checkpoint: metadata, then Markdown."""
    name = card.base_model.rpartition("/")[2]
    linked = f"[{name}](https://huggingface.co/{card.base_model})" if "/" in card.base_model else name
    recipe = "" if card.recipe == "custom" else f" (recipe `{card.recipe}`)"
    tags = [TAG, "pruned", "structured-pruning", *([card.recipe] if recipe else [])]
    metadata = {"base_model": card.base_model, **card.license, "library_name": _library(written)}
    metadata |= {"pipeline_tag": "text-generation", "tags": tags}
    parts = [
        f"# {name}, pruned\n\n{linked}, made smaller by pruneexp {__version__}{recipe}: whole attention "
        "heads, FFN channels or layers have left it, and what remains is an ordinary, smaller model.\n",
        loading(written),
        *([f"## In fewer bits\n\n{card.quantised}\n"] if card.quantised else []),
        *_removed(card),
        *_figures(card.metrics),
        *([] if card.overrides is None else [f"{COMMAND}\n\n```sh\n{command(card.overrides)}\n```\n"]),
        *([_adapting(card, written)] if written.form not in LIBRARIES and card.targets else []),
        "## Uploading it\n\n```sh\nhf upload YOUR_NAME/MODEL_NAME path/to/this/folder\n```\n",
    ]
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n".join(parts)


def reworded(text: str, written: Written) -> str:
    """A card of ours for the same model in another form."""
    head, *sections = re.split(r"(?m)^(?=## )", text)
    head = re.sub(r"(?m)^library_name: .*$", f"library_name: {_library(written)}", head, count=1)
    kept = [s for s in sections if not (s.startswith(ADAPTING) and written.form in LIBRARIES)]
    return head + "".join(loading(written) + "\n" if s.startswith(LOADING) else s for s in kept)


def is_ours(text: str) -> bool:
    """Whether a card is one of these."""
    return TAG in (front_matter(text).get("tags") or ()) and f"\n{LOADING}\n" in text


def loading(written: Written) -> str:
    how = LOADERS[written.form].format(architecture=written.architecture, since=written.since)
    return f"{LOADING}\n\n{how}{PADDED if written.padded else ''}"


def _library(written: Written) -> str:
    return LIBRARIES.get(written.form, "transformers")


def _removed(card: Card) -> list[str]:
    """What left, as a table."""
    rows = [row for row in summary(card.metrics, card.plan, card.sites) if row.group == "removed"]
    cells = [(row.what, row.dense, row.pruned, row.change) for row in rows]
    return [f"## What was removed\n\n{_table(('', 'before', 'after', 'change'), cells)}"] if cells else []


def _figures(metrics: Mapping[str, float]) -> list[str]:
    """What was measured before and after, by the names that say how."""
    rows = []
    for key, pruned in metrics.items():
        side, _, name = key.partition("/")
        dense = metrics.get(f"dense/{name}")
        if side == "pruned" and dense is not None and not name.startswith("params") and "/iqr" not in name:
            change = change_text("accuracy" if "acc" in name.split("/")[0] else "", dense, pruned)
            rows.append((f"`{name}`", figure_text(name, dense), figure_text(name, pruned), change))
    if not rows:
        return []
    measured = [what for prefix, what in METRICS.items() if any(row[0].startswith(f"`{prefix}") for row in rows)]
    legend = "".join(f"\n- {what}" for what in measured) + "\n" * bool(measured)
    return [f"## Figures\n\n{_table(('figure', 'dense', 'pruned', 'change'), rows)}{legend}"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ("---", *("---:" for _ in header[1:])), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _adapting(card: Card, written: Written) -> str:
    there = (
        "The folder `adapter/` holds one that was trained after pruning, and the figures are with it:\n"
        '`PeftModel.from_pretrained(model, folder + "/adapter")`. Another one:\n'
        if card.adapter
        else "With LoRA, for example:\n"
    )
    targets = "all-linear" if written.hollow else list(card.targets)
    return (
        f"{ADAPTING}\n\n{there}\n```python\nfrom peft import LoraConfig, get_peft_model\n\n"
        f'config = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules={json.dumps(targets)})\n'
        "model = get_peft_model(model, config)\n```\n"
    )


def command(overrides: Sequence[str]) -> str:
    """What to type for the same model; of folders and files on this machine, their names alone. A job's sweep stays:
    its file may choose the rest."""
    own = ("sweep", "run.save") if "sweep" in typed_keys(overrides) else ()  # jobs are saved where that is asked for
    keys = {text: override_parts(text)[0] for text in overrides}
    kept = [text for text, key in keys.items() if key in own or key.partition(".")[0] not in ELSEWHERE]
    return shlex.join(["pruneexp", *map(_without_folders, kept)])


def _without_folders(override: str) -> str:
    key, equals, value = override.partition("=")
    plain = value.strip("'\"")
    if plain and os.path.exists(os.path.expanduser(plain)):
        return key + equals + Path(plain).name
    # whatever begins like a path, also within a list: its last part
    paths = r"(?<![\w.:/}-])(?:~[^/\s]*|\.{1,2})?/[^\s,'\"\])}]*"
    return key + equals + re.sub(paths, lambda match: Path(match[0]).name, value)


def base_model(path: str, folder: Path | None) -> str:
    """The Hub id, or else the name, of the model that was read from `path`; never a path. `folder`: where it lies."""
    if path.startswith(EMBEDDED):
        return f"{TAG}-embedded-{path.removeprefix(EMBEDDED)}"
    place = Path(os.path.expanduser(path))
    if not place.exists() and re.fullmatch(rf"{HUB_ID}|[A-Za-z0-9][\w.-]*", path):
        return path
    place = place.resolve()
    if cached := re.search(r"/models--([\w.-]+)/snapshots", place.as_posix()):
        return cached[1].replace("--", "/", 1)
    text = _read(folder / "README.md") if folder is not None else ""
    if is_ours(text) and isinstance(front_matter(text).get("base_model"), str):
        return front_matter(text)["base_model"]  # pruned once more
    name = place.name.removesuffix(".gguf")
    own = rf"(?i)(?:(?<=huggingface\.co/)|(?<![\w./-]))([A-Z0-9][\w.-]*)/({re.escape(name)})(?![\w-])"
    for owner, spelled in re.findall(own, text):
        if owner not in FOLDERS:
            return f"{owner}/{spelled}"
    config = json.loads(_read(folder / "config.json") or "{}") if folder is not None else {}
    said = config.get("_name_or_path")
    if isinstance(said, str) and re.fullmatch(HUB_ID, said) and said.partition("/")[0] not in FOLDERS:
        return said
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "unknown"


def license_of(folder: Path | None) -> dict[str, Any]:
    """What the card of the model in `folder` says of its license."""
    metadata = front_matter(_read(folder / "README.md")) if folder is not None else {}
    return {key: metadata[key] for key in LICENSE_KEYS if isinstance(metadata.get(key), (str, list))}


def front_matter(text: str) -> dict[str, Any]:
    """A card's metadata; empty where it has none that can be read."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
