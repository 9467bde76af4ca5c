"""The command line: compose, build, check, run; every way it can end has its exit code and at most one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NoReturn

from pruneexp.cli.exit_codes import run_command

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Gives the exit code: 0 done, 2 a config that cannot work, 1 a run that failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return run_command("pruneexp", lambda: _help(argv) if {"-h", "--help"} & {*argv} else _command(_arguments(argv)))


def _help(argv: Sequence[str]) -> int:
    from pruneexp.cli.help import text

    parser = _Parser("pruneexp", add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    config_dir = parser.parse_known_args(argv)[0].config_dir
    if config_dir is not None and not os.path.isdir(config_dir):
        from pruneexp.cli.compose import open_hydra

        open_hydra(config_dir)  # which says what is wrong with it
    print(text(config_dir))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pruneexp: {message}; see pruneexp --help\n")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    from pruneexp.fingerprint import __version__

    parser = _Parser("pruneexp", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--version", action="version", version=f"pruneexp {__version__}")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--package", "-p")
    parser.add_argument("--resolve", action="store_true")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--multirun", "-m", action="store_true")
    what.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    what.add_argument("--info", "-i", choices=INFO, nargs="?", const="all")
    what.add_argument("--shell-completion", "-sc", action="store_true")
    if key := _dashed(argv):
        parser.error(f"{key}: settings have no dashes; expected {key.lstrip('-').replace(' ', '=')}")
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.package or arguments.resolve) and not arguments.cfg:
        parser.error("--package and --resolve go with --cfg")
    return arguments


def _dashed(argv: Sequence[str]) -> str:
    """The first setting that is written as an option, `--recipe flap` or `--recipe=flap`; "" where none is."""
    from pruneexp.conf_files import config_sections

    sections = config_sections() if any(text.startswith("--") for text in argv) else ()
    for text, value in zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, _ = text.removeprefix("--").partition("=")
        if text.startswith("--") and name.partition(".")[0] in sections:
            return text if equals else f"{text} {value if value and not value.startswith('-') else '...'}"
    return ""


def _command(arguments: argparse.Namespace) -> int:
    from pruneexp.cli.compose import open_hydra

    hydra, overrides = open_hydra(arguments.config_dir), arguments.overrides
    if arguments.cfg or arguments.info or arguments.shell_completion:
        return _show(hydra, arguments)
    from pruneexp.cli.single import asked_for_one, single_experiment

    config = asked_for_one(hydra, overrides, arguments.multirun)
    if config is not None:
        from pruneexp.experiment.run import run_experiment

        run_experiment(single_experiment(hydra, config))
        return 0
    from pruneexp.cli.sweep import multirun

    return 1 if multirun(hydra, overrides).failed else 0


def _show(hydra: Hydra, arguments: argparse.Namespace) -> int:
    from pruneexp.cli.explain import explained

    try:
        if arguments.shell_completion:
            hydra.shell_completion("config", arguments.overrides)
        elif arguments.cfg:
            hydra.show_cfg("config", arguments.overrides, arguments.cfg, arguments.package, arguments.resolve)
        else:
            hydra.show_info(arguments.info, "config", arguments.overrides)
    except Exception as error:
        raise explained(error, hydra, arguments.overrides) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
