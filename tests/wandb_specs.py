"""The W&B sweep specs in sweeps/wandb, made from the sweeps: `python -m tests.wandb_specs` writes them anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pruneexp.conf_files import first_comment, sweep_files, sweeps_folder


def parameters(path: Path) -> dict[str, list[str]]:
    """What a sweep varies, its parents' included: key -> values as Hydra is given them."""
    content = yaml.safe_load(path.read_text())
    parents = [each for each in content.get("defaults", []) if isinstance(each, str) and each != "_self_"]
    varied: dict[str, list[str]] = {}
    for parent in parents:
        varied |= parameters(sweep_files()[parent])
    own = content.get("hydra", {}).get("sweeper", {}).get("params", {})
    return varied | {key: _split(str(values)) for key, values in own.items()}


def _split(values: str) -> list[str]:
    """At the commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in values:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def spec(name: str) -> str:
    """The spec of one sweep: the agent pins every parameter, so that each of its runs is one job of that sweep."""
    path = sweep_files()[name]
    content: dict[str, Any] = {
        "name": name,
        "program": "pruneexp",
        "method": "grid",
        "command": ["pruneexp", f"+sweep={name}", "tracker=wandb", "${args_no_hyphens}"],
        "parameters": {
            key: {"values": [yaml.safe_load(v) if v[0] != "[" else v for v in values]}
            for key, values in parameters(path).items()
        },
    }
    about = first_comment(path).partition(": pruneexp")[0]
    return f"# {about}: wandb sweep sweeps/wandb/{name}.yaml\n{yaml.safe_dump(content, sort_keys=False)}"


def main() -> None:
    folder = sweeps_folder() / "wandb"
    folder.mkdir(exist_ok=True)
    for name in sweep_files():
        (folder / f"{name}.yaml").write_text(spec(name))


if __name__ == "__main__":
    main()
