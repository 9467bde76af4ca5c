"""The text of `pruneexp --help`: made from the config files, so that it cannot disagree with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pruneexp.conf_files import choices, conf_folder, first_comment, key_comments, option_file, sweep_files
from pruneexp.fingerprint import __version__

USAGE = """\
usage: pruneexp [group=choice ...] [key=value ...] [options]

Composes a run from one choice of each group, prunes the model, measures what that did and writes a run folder.
Without arguments: recipe=flap on the small model that travels with the package, offline."""

OPTIONS = """\
options:
  -m, --multirun        run every combination of comma lists: sparsity.ratio=0.2,0.3 search=al_am,ul_um
  -c, --cfg job         print the composed config and stop (job, hydra or all; with --resolve, --package KEY)
  --info WHAT           how the config was composed (defaults, defaults-tree, config, plugins, searchpath, all)
  --config-dir DIR      look for configs of your own in DIR too: DIR/criterion/mine.yaml is criterion=mine
  --shell-completion    install=SHELL or uninstall=SHELL: tab completion for bash, zsh, fish
  --version, -h, --help"""

EXAMPLES = """\
examples:
  pruneexp
  pruneexp recipe=wanda_sp sparsity.ratio=0.3
  pruneexp model=hf model.path=DIR_OR_HUB_ID dataset=wikitext2 recipe=flap_official
  pruneexp recipe=flap search=ul_um compensator=none run.name=ablation
  pruneexp --multirun sparsity.ratio=0.2,0.3,0.5 recipe=magnitude,wanda_sp,flap

exit code: 0 done; 2 a config that cannot work; 1 a run that failed (the reason is in its status.json)"""


def text(config_dir: str | None = None) -> str:
    """`config_dir`: a folder of the user's, whose choices are listed, too."""
    own = [] if config_dir is None else [Path(config_dir)]
    config = yaml.safe_load((conf_folder() / "config.yaml").read_text())
    title = f"pruneexp {__version__}: structured, training-free pruning of language models"
    listed = _groups(config["defaults"], [conf_folder(), *own])
    groups = "\n".join(["groups (* default; a list of evaluators is evaluator=[a,b]):", *listed])
    of_own = {name: folder / "sweep" / f"{name}.yaml" for folder in own for name in choices(folder / "sweep")}
    sweeps = [_line(name, path) for name, path in (sweep_files() | of_own).items()]
    ready = "\n".join(["ready sweeps (+sweep=NAME):", *sweeps])
    keys = "\n".join(["keys (those of a group's choice: pruneexp --cfg job):", *_keys(config)])
    return "\n\n".join([title, USAGE, groups, ready, keys, OPTIONS, EXAMPLES])


def _groups(defaults: list[Any], folders: Sequence[Path]) -> Iterator[str]:
    """Every choice of every group, of several files of one name the first folder's."""
    chosen = {group: choice for entry in defaults if isinstance(entry, dict) for group, choice in entry.items()}
    chosen = {group: choice for group, choice in chosen.items() if not group.startswith("override ")}
    for group in ["recipe", *(group for group in chosen if group != "recipe")]:
        default = chosen[group]
        yield f"  {group}"
        for name in sorted({name for folder in folders for name in choices(folder / group)}):
            mark = "*" if name == default or (isinstance(default, list) and name in default) else " "
            yield _line(name, option_file(folders, group, name), mark)


def _line(name: str, path: Path | None, mark: str = "") -> str:
    """A choice and what its file says it is."""
    about = "" if path is None else first_comment(path)
    return f"  {f'{mark} ' if mark else ''}{name:<18} {about}".rstrip()


def _keys(config: dict[str, Any]) -> Iterator[str]:
    comments = key_comments(conf_folder() / "config.yaml")
    for section, value in config.items():
        if section in ("defaults", "hydra"):
            continue
        for key, default in value.items() if isinstance(value, dict) else [(None, value)]:
            name = section if key is None else f"{section}.{key}"
            shown = yaml.safe_dump(default).removesuffix("...\n").strip()
            yield f"  {f'{name}={shown}':<21} {comments[name]}".rstrip()
