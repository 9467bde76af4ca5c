"""The command line of `pruneexp-report`, and the writing of what it makes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pruneexp.cli.exit_codes import run_small_command

if TYPE_CHECKING:
    from pruneexp.report.folders import RunsRead
    from pruneexp.report.page import Report

HELP = """\
usage: pruneexp-report FOLDER... [out=PATH] [key=value ...]

Builds one HTML page from finished runs, which opens without a network: their figures, perplexity against the share
removed with intervals over seeds, Pareto fronts against latency and bytes, kept widths, main effects, published figures
beside ours, configs and their differences. With it come the tables as CSV, Markdown and LaTeX, and the figures as SVG
and PNG.

arguments:
  FOLDER                a run's folder, a sweep's, or one that holds such, at any depth
  out=PATH              the new folder; without it, report/ in the first FOLDER
  versions=same         runs of this version of pruneexp alone (any: of other versions as well)
  overwrite=false       true: replace an earlier report at PATH
  -h, --help

Folders of runs that failed, are not finished, or were edited are listed in the page with the reason, and left out.

exit code: 0 done; 2 a request that cannot work; 1 a report that failed (nothing is left at PATH)"""

CHOICES = {"versions": ("same", "any"), "overwrite": ("true", "false")}
KEYS = ("out", *CHOICES)
RECORD = "report.json"


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    folders: tuple[Path, ...]
    out: Path
    versions: str
    overwrite: bool


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Gives the exit code: 0 done, 2 a request that cannot work, 1 a report that failed."""
    return run_small_command("pruneexp-report", HELP, _command, argv)


def _command(argv: Sequence[str]) -> int:
    from pruneexp.report.tables import count

    options = request(argv)
    read = write_report(options)
    for one in (*read.skipped, *read.repeats):
        print(f"left out: {one.name}: {one.reason}")
    for hashed, why in read.conflicts.items():
        print(f"same config, another result ({hashed}): {why}")
    print(f"{count(len(read.runs), 'run')}; the report is {options.out / 'index.html'}")
    return 0


def request(argv: Sequence[str]) -> Request:
    """Reads the command line. Raises ConfigError."""
    from pruneexp.cli.arguments import read_arguments
    from pruneexp.types import ConfigError

    typed, values = read_arguments(argv, "pruneexp-report", KEYS, CHOICES)
    folders = [Path(text).expanduser() for text in typed]
    if values.get("out") == "":
        raise ConfigError("out=: expected a folder to write")
    if not folders:
        raise ConfigError("FOLDER is missing: expected run or sweep folders; see pruneexp-report --help")
    out = Path(values["out"]).expanduser() if "out" in values else folders[0] / "report"
    return Request(tuple(folders), out, values.get("versions", "same"), values.get("overwrite") == "true")


def write_report(options: Request) -> RunsRead:
    """Writes the report and gives what was found.

    Raises:
        ConfigError: what is asked for cannot be; nothing has been written then.
        RunError: it could not be written; nothing is left of it.
    """
    from pruneexp.cli.arguments import made_aside
    from pruneexp.files import replace_folder
    from pruneexp.report.folders import find
    from pruneexp.types import ConfigError

    read = find(options.folders, options.versions)
    if not read.runs:
        where = ", ".join(repr(str(folder)) for folder in options.folders)
        left = [f"{one.name}: {one.reason}" for one in read.skipped]
        why = f"; the first of {len(left)} left out: {left[0]}" if left else ""
        raise ConfigError(f"FOLDER={where}: no finished run there{why}")
    _check_out(options, [run.folder for run in read.runs])

    from pruneexp.report.contents import report

    made = report(read, options.folders)
    place = options.out.resolve()  # a link stays
    with made_aside(options.out, place) as aside:
        _write(made, read, aside)
        _check_out(options, [run.folder for run in read.runs])  # it may be there by now
        replace_folder(aside, place)
    return read


def _check_out(options: Request, runs: Sequence[Path]) -> None:
    from pruneexp.files import check_replaceable
    from pruneexp.types import ConfigError

    where, out = f"out={str(options.out)!r}", options.out.resolve()
    for folder in (*options.folders, *runs):
        if out == folder.resolve() or out in folder.resolve().parents:
            raise ConfigError(f"{where}: holds {str(folder)!r}; expected a folder of its own")
    check_replaceable(options.out, RECORD, "report", options.overwrite)


def _write(made: Report, read: RunsRead, folder: Path) -> None:
    from pruneexp.files import files_in, write_json
    from pruneexp.progress import progress
    from pruneexp.report.figures import as_png
    from pruneexp.report.page import page
    from pruneexp.report.tables import as_csv, as_latex, as_markdown

    (folder / "tables").mkdir(parents=True)
    (folder / "figures").mkdir()
    for table in made.tables:
        for suffix, text in (("csv", as_csv(table)), ("md", as_markdown(table)), ("tex", as_latex(table))):
            (folder / "tables" / f"{table.name}.{suffix}").write_text(text, encoding="utf-8")
    for picture in progress(made.pictures, "draw", unit="figures"):
        (folder / "figures" / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
        (folder / "figures" / f"{picture.name}.png").write_bytes(as_png(picture.figure))
    (folder / "index.html").write_text(page(made), encoding="utf-8")
    record = {
        "runs": {run.name: run.hash for run in read.runs},
        "left_out": {one.name: one.reason for one in (*read.skipped, *read.repeats)},
        "conflicts": dict(read.conflicts),
        "files": [*files_in(folder), RECORD],
    }
    write_json(folder / RECORD, record)


if __name__ == "__main__":
    sys.exit(main())
