"""Where the config files lie, what their comments say, and how messages name what is near to what was typed.

Reads them as text and plain YAML and imports nothing heavy, because `pruneexp --help` is made of it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
_SAFE_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class YamlLoader(_SAFE_LOADER):
    """Reads what OmegaConf's loader reads (1e-4 is a number), in C where PyYAML has that: several times as fast."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def conf_folder() -> Path:
    return _folder("conf")


def sweeps_folder() -> Path:
    return _folder("sweeps")


def _folder(name: str) -> Path:
    # An installed wheel has it inside the package, a source tree beside the package.
    inside = HERE / name
    return inside if inside.is_dir() else HERE.parent / name


def config_sections() -> set[str]:
    """The first names that keys can have: sections of the config, and groups."""
    content = yaml.load((conf_folder() / "config.yaml").read_text(), YamlLoader)
    groups = {path.name for path in conf_folder().iterdir() if path.is_dir()}
    return groups | {key for key in content if key not in ("defaults", "hydra")}


def choices(folder: Path) -> list[str]:
    """Names of the YAML files in `folder`."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def sweep_files() -> dict[str, Path]:
    """The ready sweeps by name. The folder also holds W&B sweep specs, which no Hydra header marks."""
    files = {path.stem: path for path in sorted(sweeps_folder().glob("*.yaml"))}
    return {name: path for name, path in files.items() if path.read_text().startswith("# @package _global_")}


def first_comment(path: Path) -> str:
    """What a config file says it is: its first comment line that is no Hydra header."""
    for line in path.read_text().splitlines():
        if line.startswith("#") and not re.match(r"#\s*@", line):
            return line.lstrip("# ").rstrip()
        if line.strip() and not line.startswith("#"):
            break
    return ""


def key_comments(path: Path) -> dict[str, str]:
    """The comment at the end of each line that sets a key, by dotted key."""
    comments: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in path.read_text().splitlines():
        if not (match := re.match(r"( *)([\w.]+):(?:\s.*?)??(?:\s#\s*(.*\S))?\s*$", line)):
            continue
        indent, key = len(match[1]), match[2]
        parents = [parent for parent in parents if parent[0] < indent]
        parents.append((indent, key))
        comments[".".join(key for _, key in parents)] = match[3] or ""
    return comments


def inherited(path: Path) -> list[Path]:
    """The file and, after it, the files of its group that its defaults list names, nearest first: those beside it or,
    for one of somebody's own, ours."""
    paths, group = [path], path.parent.name
    ours = sweeps_folder() if group == "sweep" else conf_folder() / group
    for name in _defaults(path):
        parents = [folder / f"{name}.yaml" for folder in (path.parent, ours)]
        if parent := next((file for file in parents if file != path and file.is_file()), None):
            paths += inherited(parent)
    return paths


def _defaults(path: Path) -> list[str]:
    """Names in the file's defaults list that are of its own group."""
    text = path.read_text(encoding="utf-8")
    try:
        content = yaml.load(text, YamlLoader) if "defaults" in text else None
    except yaml.YAMLError:  # Hydra says so where the file is asked for
        return []
    listed = content.get("defaults") if isinstance(content, dict) else None
    return [name for name in listed if isinstance(name, str) and "/" not in name] if isinstance(listed, list) else []


def option_content(path: Path) -> dict[str, Any]:
    """What the file sets, over what the files of its group set that its defaults list names."""
    content: dict[str, Any] = {}
    for each in reversed(inherited(path)):
        content |= yaml.load(each.read_text(encoding="utf-8"), YamlLoader) or {}
    return {key: value for key, value in content.items() if key != "defaults"}


def option_file(folders: Iterable[Path], group: str, choice: str) -> Path | None:
    """The file behind `group=choice`, from the first of the `folders` that has it."""
    paths = (folder / group / f"{choice}.yaml" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def override_parts(text: str) -> tuple[str, str]:
    """Key and value of an override, the key without Hydra's signs in front of it (+, ++, ~)."""
    key, _, value = text.partition("=")
    return key.lstrip("+~"), value


def typed_keys(overrides: Iterable[str]) -> set[str]:
    return {override_parts(text)[0] for text in overrides}


def typed_value(overrides: Iterable[str], key: str) -> str | None:
    """The last value that was typed for the key, which is the one that counts; None where there is none."""
    return dict(map(override_parts, overrides)).get(key)


def did_you_mean(word: str, known: Iterable[str], template: str = "{}") -> str:
    """'; did you mean ...?' for the nearest of the known words, "" where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {template.format(near[0])}?" if near else ""
