"""The manual: its files, the parts of them that are made from the code, and the commands that they tell users to type.

    python -m tests.manual

writes those parts anew, each between `<!-- made by tests.manual: NAME -->` and `<!-- end -->`. `test_manual` holds
every part to what is made here, `test_readme` every command to what the programs take.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pruneexp import evidence
from pruneexp.cli.report_command import HELP as REPORT_HELP
from pruneexp.conf_files import (
    YamlLoader,
    choices,
    conf_folder,
    first_comment,
    inherited,
    key_comments,
    option_content,
    sweep_files,
)
from pruneexp.export import HELP as EXPORT_HELP
from pruneexp.types import ConfigError
from tests.test_layering import PACKAGE, ranks

ROOT = Path(__file__).parents[1]
FILES = (
    "README.md",
    "conf/README.md",
    "conf/COMPARING.md",
    "pruneexp/README.md",
    "pruneexp/evaluator/README.md",
    "pruneexp/export/README.md",
    "sweeps/README.md",
    "outputs/README.md",
    "tests/benchmarks/README.md",
)
PART = re.compile(r"(<!-- made by tests\.manual: ([\w-]+) -->\n)((?:(?!<!-- ).)*)(<!-- end -->)", re.DOTALL)
GRANULARITIES = ("heads", "query_heads", "channels", "attention", "ffn", "blocks", "experts")
UNITS = {"heads", "query_heads", "channels", "experts"}
MIXED = {"units and sublayers": ["channels", "ffn"], "blocks and others": ["channels", "blocks"]}


def text(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def commands(file: str, program: str) -> Iterator[list[str]]:
    """What a file tells users to give to a program: lines that begin with it, indented or fenced; \\ goes on."""
    inside = False
    for line in text(file).replace("\\\n", " ").splitlines():
        inside ^= line.startswith("```")
        if (inside or line.startswith("    ")) and re.match(rf"\s*{re.escape(program)} ", line):
            yield shlex.split(line, comments=True)[1:]


# Tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def shown(value: Any) -> str:
    """A config's value as it is typed."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[^\s\"']+", value) else json.dumps(value)
    return json.dumps(value) if isinstance(value, (dict, float)) else str(yaml.safe_dump(value)).split("\n")[0]


def content(path: Path) -> dict[str, Any]:
    """What a choice sets, with the files of its folder that it builds on."""
    return {key: value for key, value in option_content(path).items() if key != "_target_"}


def comments(path: Path) -> dict[str, str]:
    of_keys: dict[str, str] = {}
    for each in reversed(inherited(path)):
        of_keys |= {key: comment for key, comment in key_comments(each).items() if comment}
    return of_keys


def groups() -> list[str]:
    """As `pruneexp --help` orders them: recipe first, then as config.yaml's defaults."""
    entries = yaml.safe_load((conf_folder() / "config.yaml").read_text())["defaults"]
    named = [key for entry in entries if isinstance(entry, dict) for key in entry if not key.startswith("override")]
    return ["recipe", *(name for name in named if name != "recipe")]


def default_of(group: str) -> list[str]:
    entries = yaml.safe_load((conf_folder() / "config.yaml").read_text())["defaults"]
    (default,) = (entry[group] for entry in entries if isinstance(entry, dict) and group in entry)
    return default if isinstance(default, list) else [default]


# Parts


def group_choices(group: str) -> str:
    default = default_of(group)
    rows = []
    for name in choices(conf_folder() / group):
        path = conf_folder() / group / f"{name}.yaml"
        own = [f"`{content(path)['path']}`"] if group == "model" and name != "hf" else ["typed"] * (group == "model")
        rows.append([f"`{name}`{' (default)' if name in default else ''}", *own, first_comment(path)])
    head = f"`{group}=`" if group != "evaluator" else "`evaluator=[...]`"
    return table([head, *["`model.path`"] * (group == "model"), "what it is"], rows)


def group_keys(group: str) -> str:
    """A row for each key and meaning; where choices differ, the defaults of each. Names and paths of models are in the
    table of choices."""
    names = choices(conf_folder() / group)
    names.sort(key=lambda name: group != "model" or name != "hf")  # the file that other models build on, first
    having: dict[tuple[str, str], dict[str, str]] = {}
    for name in names:
        path = conf_folder() / group / f"{name}.yaml"
        about = comments(path)
        for key, value in content(path).items():
            if group == "model" and key in ("name", "path") and name != "hf":
                continue
            having.setdefault((key, about.get(key, "")), {})[name] = shown(value)
    rows, order = [], list(dict.fromkeys(key for key, _ in having))
    for (key, about), values_of in sorted(having.items(), key=lambda item: order.index(item[0][0])):
        values = list(dict.fromkeys(values_of.values()))
        of = {value: [name for name in values_of if values_of[name] == value] for value in values}
        everywhere = len(values) == 1 and len(values_of) == len(names)
        cells = [f"`{value}`{'' if everywhere else f' ({_names(of[value], names)})'}" for value in values]
        prefix = "evaluator.NAME" if group == "evaluator" else group
        rows.append([f"`{prefix}.{key}`", "; ".join(cells), about])
    return table(["key", "default", "meaning"], rows) if rows else ""


def _names(having: Sequence[str], names: Sequence[str]) -> str:
    left = [name for name in names if name not in having]
    if len(left) < len(having) - 2:
        return f"all but {', '.join(left)}" if left else "all"
    return ", ".join(having)


def run_keys() -> str:
    path = conf_folder() / "config.yaml"
    about, rows = key_comments(path), []
    for section, value in yaml.load(path.read_text(), YamlLoader).items():
        if section in ("defaults", "hydra"):
            continue
        for key, default in value.items() if isinstance(value, dict) else [("", value)]:
            name = f"{section}.{key}" if key else section
            rows.append([f"`{name}`", f"`{shown(default)}`", about[name]])
    return table(["key", "default", "meaning"], rows)


def reference() -> str:
    """Every group with its choices and keys."""
    parts = []
    for group in groups():
        keys = "" if group == "recipe" else group_keys(group)
        parts += [f"### {group}", group_choices(group), *([keys] if keys else [])]
    return "\n\n".join(parts)


def takes(name: str, granularity: Sequence[str], **settings: Any) -> bool:
    """Whether the search of this name can be built with what may leave."""
    own = {**content(conf_folder() / "search" / f"{name}.yaml"), "granularity": list(granularity), **settings}
    if "starts" in own:
        own["starts"] = {}  # which names become criteria as an experiment is built
    try:
        _search(name)(**own)
    except ConfigError:
        return False
    return True


def _search(name: str) -> Any:
    """The class of the search of this name."""
    path = conf_folder() / "search" / f"{name}.yaml"
    target = next(own["_target_"] for each in inherited(path) if "_target_" in (own := _yaml(each)))
    module, _, kind = target.rpartition(".")
    return getattr(importlib.import_module(module), kind)


def _yaml(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(), YamlLoader) or {}


def search_granularity() -> str:
    """From the classes: what each can be built with."""
    rows = []
    for name in choices(conf_folder() / "search"):
        default = content(conf_folder() / "search" / f"{name}.yaml").get("granularity")
        if default is None:  # no key: the class says it
            fixed = set(_search(name).granularity)
            mixed = (bool(fixed & UNITS) and bool(fixed & wholes) for wholes in ({"attention", "ffn"}, {"blocks"}))
            there = [*(each in fixed for each in GRANULARITIES), *mixed]
            rows.append([f"`{name}`", *("fixed" if each else "–" for each in there)])
            continue
        cells = [_taken(name, [each], each in default) for each in GRANULARITIES]
        rows.append([f"`{name}`", *cells, *(_taken(name, each, False) for each in MIXED.values())])
    return table(["search", *(f"`{name}`" for name in GRANULARITIES), *MIXED], rows)


def _taken(name: str, granularity: list[str], default: bool) -> str:
    if takes(name, granularity):
        return "default" if default else "yes"
    joint = "budgets" in content(conf_folder() / "search" / f"{name}.yaml") and takes(
        name, granularity, budgets="joint"
    )
    return "`budgets=joint`" if joint else "–"


def sweep_list() -> str:
    """Every ready sweep with all that its file says of it."""
    rows = []
    for name, path in sweep_files().items():
        lines = [line for line in path.read_text().splitlines() if line.startswith("# ") and not line.startswith("# @")]
        about = " ".join(line.removeprefix("# ") for line in lines).replace(f": pruneexp +sweep={name}", ".", 1)
        rows.append([f"`{name}`", about.replace("..", ".")])
    return table(["`+sweep=`", "what it is"], rows)


def first_sentence(doc: str | None) -> str:
    paragraph = " ".join((doc or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s(?=[A-Z`])", paragraph)[0].rstrip(":")


def entries() -> str:
    """Modules and packages of pruneexp/, from the highest rank down; each imports those of lower ranks alone."""
    rows = []
    for entry, rank in sorted(ranks().items(), key=lambda item: (-item[1], item[0])):
        path = PACKAGE / entry / "__init__.py" if (PACKAGE / entry).is_dir() else PACKAGE / f"{entry}.py"
        rows.append([str(rank), f"`{entry}`", first_sentence(ast.get_docstring(ast.parse(path.read_text())))])
    return table(["rank", "entry", "what it is"], rows)


def protocols() -> str:
    """Members of every protocol, as protocols.py and windows.py declare them."""
    lines = []
    files = (PACKAGE / "types" / f"{name}.py" for name in ("protocols", "windows"))
    for node in (node for file in files for node in ast.parse(file.read_text()).body):
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases):
            lines += [node.name, *(f"    {line}" for line in _members(node))]
    return "\n".join(["```text", *lines, "```"])


def _members(node: ast.ClassDef) -> Iterator[str]:
    for member in node.body:
        if isinstance(member, ast.AnnAssign):
            yield ast.unparse(member)
        elif isinstance(member, ast.FunctionDef):
            given = ast.unparse(member.args).removeprefix("self, ").removeprefix("cls, ")
            given = "" if given in ("self", "cls") else given
            yield f"{member.name}({given})" + (f" -> {ast.unparse(member.returns)}" if member.returns else "")


def statistics() -> str:
    """What calibration can collect, with the source that feeds it."""
    rows = []
    for name, kind in sorted(vars(evidence).items()):
        if inspect.isclass(kind) and isinstance(vars(kind).get("source"), str):
            rows.append([f"`{name}`", f'"{kind.source}"', first_sentence(kind.__doc__)])
    return table(["statistics", "source", "what it is"], rows)


def stock_biases() -> str:
    """Behind which sublayers each family's stock classes hold the biases that compensators add: asked of the code that
    writes checkpoints, with tiny models that have no weights."""
    from pruneexp.model.modeling_pruned import FAMILIES

    places = {(True, True): "attention and FFN", (True, False): "attention alone"}
    places |= {(False, True): "the FFN alone", (False, False): "neither"}
    families: dict[str, list[str]] = {place: [] for place in places.values()}
    for name in sorted(FAMILIES):
        families[places[_biases_held(name)]].append(f"`{name}`")
    rows = [[place, ", ".join(names)] for place, names in families.items() if names]
    return table(["added biases stay stock behind", "families"], rows)


def _biases_held(name: str) -> tuple[bool, bool]:
    """Whether a stock class has a place for an added bias behind the attention, and behind the FFN."""
    from pruneexp.model.given import GivenModel
    from pruneexp.model.modeling_pruned import resize_layer_
    from pruneexp.surgery.forms import original_structure, uniform_form
    from tests.export_matrix import model_of

    model = GivenModel(model_of(name), None, 1, in_place=True).outline()
    if model.mixture:
        return False, False
    before = original_structure(model)

    def holds(**biases: bool) -> bool:
        structure, layer = replace(before, **biases), deepcopy(model.layers[0])
        resize_layer_(layer, model.family, structure, model.head_layout)
        return uniform_form(model, structure, layer) is not None

    if holds(attention_output_bias=True, mlp_output_bias=True):  # one flag may say both
        return True, True
    return holds(attention_output_bias=True), holds(mlp_output_bias=True)


def fenced(words: str) -> str:
    return f"```text\n{words}\n```"


PARTS: Mapping[str, Callable[[], str]] = {
    "run-keys": run_keys,
    "groups": reference,
    "search-granularity": search_granularity,
    "evaluators": lambda: group_choices("evaluator"),
    "sweeps": sweep_list,
    "export-help": lambda: fenced(EXPORT_HELP),
    "report-help": lambda: fenced(REPORT_HELP),
    "entries": entries,
    "protocols": protocols,
    "statistics": statistics,
    "stock-biases": stock_biases,
}


def parts(file: str) -> dict[str, str]:
    """Name -> what stands between its marks."""
    return {match[2]: match[3] for match in PART.finditer(text(file))}


def written(file: str) -> str:
    """The file with its parts as the code has them now."""
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[4]}", text(file))


def main() -> None:
    for file in FILES:
        if (new := written(file)) != text(file):
            (ROOT / file).write_text(new, encoding="utf-8")
            print(f"{file}: written anew")


if __name__ == "__main__":
    main()
