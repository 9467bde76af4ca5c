import csv
import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.types import RunMode
from PIL import Image

from pruneexp.__main__ import main
from pruneexp.cli.compose import compose_raw, open_hydra
from pruneexp.cli.report_command import main as main_report
from pruneexp.cli.sweep_end import hand_over
from pruneexp.tracker import LocalRun, Trackers, Wandb, status_of
from pruneexp.tracker.weights_and_biases import _histograms
from pruneexp.types import ConfigError, RunRecord
from tests.cases import each
from tests.tracker_samples import ATTENTION, CONFIG, METRICS, MLP, PLAN, SCORES, SITES, record


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """A user whom W&B has never heard of, with a home of their own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))  # whose font cache is no business of W&B's
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return home


def tracker(mode: str | None = None) -> Wandb:
    return Wandb(project="pruneexp", entity=None, mode=mode, tags=["probe"])


@each("field, value", [("project", ""), ("entity", 3), ("mode", "onlin"), ("tags", "probe"), ("tags", [1])])
def test_wandb_settings_that_cannot_work(field, value):
    settings = {"project": "p", "entity": None, "mode": None, "tags": [], field: value}
    with pytest.raises(ConfigError, match=rf"^{field}=.*: expected "):
        Wandb(**settings)


def read_back(folder: Path) -> tuple[dict, list[dict]]:
    """Summary and records of the one W&B run in `folder`, as the W&B library's own reader gives them."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    summary = subprocess.run([*read, "--summary"], check=True, capture_output=True, text=True).stdout
    records = subprocess.run(read, check=True, capture_output=True, text=True).stdout
    return json.loads(summary), [json.loads(line) for line in records.splitlines()]


@pytest.mark.slow
def test_an_offline_run_can_be_read_back(tmp_path, no_account):
    folder = tmp_path / "run"
    trackers = Trackers((LocalRun(False), tracker()))
    trackers.start(record(folder, group="sweep", name="probe"))
    trackers.log({"sparsity/decoder": 0.25})
    trackers.artifacts(PLAN, SCORES, SITES)
    (folder / "samples").mkdir()
    (folder / "samples" / "generation.md").write_text("| prompt |")
    trackers.finish(METRICS)
    run, records = read_back(folder)
    assert run["project"] == "pruneexp" and run["tags"] == ["probe"] and run["name"] == "probe"
    assert run["config"] == CONFIG and run["exit_code"] == 0
    assert METRICS.items() <= run["summary"].items()
    assert {"structure", "log10_scores/attention", "log10_scores/mlp"} <= run["summary"].keys()
    artifacts = json.dumps([record for record in records if "artifact" in record["type"]])
    assert '"plan"' in artifacts and '"samples"' in artifacts and "generation.md" in artifacts
    assert "could not" not in (folder / "log.txt").read_text()
    assert status_of(folder) == "done"
    written = [str(file) for file in no_account.rglob("*") if file.is_file() and file.suffix != ".log"]
    assert written == []  # nothing but W&B's own debug logs outside the run folder


JOB = {
    "recipe": "flap",
    "choices": {"criterion": "flap", "model": "opt_125m"},
    "overrides": ["model=opt_125m", "search=ul_um", "sparsity.ratio=0.3", "run.save=false", "seed=1"],
}


def asked_of_wandb(monkeypatch: pytest.MonkeyPatch, record: RunRecord) -> dict[str, Any]:
    """What `wandb.init` is called with for a run."""
    init_arguments = {}
    monkeypatch.setattr("wandb.init", lambda **arguments: init_arguments.update(arguments) or Broken())
    tracker("offline").start(record)
    return init_arguments


def test_ids_of_the_environment_are_one_runs(tmp_path, no_account, monkeypatch):
    """WANDB_RUN_ID names a single run; jobs of a sweep would all write into it."""
    folders = {name: tmp_path / name for name in ("aa", "bb")}
    kinds = [(tmp_path, "run"), (folders["aa"], "job"), (folders["bb"], "job"), (tmp_path, "summary")]

    def ids() -> list[str | None]:
        return [asked_of_wandb(monkeypatch, RunRecord(path, {}, "s", None, kind))["id"] for path, kind in kinds]

    assert ids() == [None] * 4
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert ids() == [None, "mine-aa", "mine-bb", "mine-summary"]
    monkeypatch.setenv("WANDB_SWEEP_ID", "x")  # an agent's, which starts a process for each of its runs
    assert ids() == [None] * 4


def test_a_run_has_a_name_and_its_choices_in_its_config(tmp_path, no_account, monkeypatch):
    config = {**CONFIG, "model": {"name": "facebook/opt"}, "sparsity": {"ratio": 0.3}}

    def capture(name: str | None = None) -> dict[str, Any]:
        return asked_of_wandb(monkeypatch, RunRecord(tmp_path, config, None, name, "run", JOB))

    assert capture()["config"] == {**config, "recipe": "flap", "choices": JOB["choices"]}
    assert capture()["name"] == "flap facebook/opt 0.3 search=ul_um seed=1"
    monkeypatch.setenv("WANDB_NAME", "theirs")
    assert (capture()["name"], capture("mine")["name"]) == ("theirs", "mine")


def test_scores_far_apart_do_not_share_a_bar():
    """A few channels score thousands of times what others do."""
    scores = {MLP.name: torch.logspace(-3, 3, 1000, dtype=torch.float64), ATTENTION.name: torch.tensor([-1.0, 1.0])}
    heads = {f"{name}.query_heads": torch.tensor([-1.0, 2.0]) for name in scores}
    drawn = _histograms({**scores, **heads, "none": torch.zeros(2)}, SITES)
    assert drawn.keys() == {"log10_scores/mlp", "scores/attention", "scores/query_heads", "scores/other"}
    counts = drawn["log10_scores/mlp"].histogram
    assert sum(counts) == 1000 and max(counts) < 20
    assert drawn["log10_scores/mlp"].bins[0] == pytest.approx(-3) and drawn["log10_scores/mlp"].bins[-1] == 3


def place(records: list[dict]) -> tuple[str, str]:
    """Group and job type of a W&B run."""
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    return run["run_group"], run["job_type"]


def logged_table(folder: Path) -> tuple[list[str], list[list]]:
    (file,) = folder.glob("wandb/offline-run-*/files/media/table/jobs_*.table.json")
    content = json.loads(file.read_text())
    return content["columns"], content["data"]


@pytest.mark.slow
def test_the_summary_of_a_sweep_can_be_read_back(tmp_path, no_account):
    header = ["job", "status", "search.steps", "pruned/ppl/stories@128"]
    rows = [["aa", "done", 3, 6.5], ["bb", "failed", "", ""], ["cc", "done", 4, 7]]
    png = BytesIO()
    Image.new("RGB", (7, 5)).save(png, "png")
    record = RunRecord(tmp_path, {}, "stories", "stories-summary", "summary")
    tracker().summarise(record, header, rows, {"perplexity": ("against the share removed", png.getvalue())})
    run, records = read_back(tmp_path)
    assert run["name"] == "stories-summary" and run["exit_code"] == 0 and place(records) == ("stories", "summary")
    assert logged_table(tmp_path) == (
        header,
        [["aa", "done", 3, 6.5], ["bb", "failed", None, None], ["cc", "done", 4, 7]],
    )
    picture = run["summary"]["figures/perplexity"]
    assert picture["caption"] == "against the share removed" and (picture["width"], picture["height"]) == (7, 5)


def test_agents_of_a_sweep_of_wandbs_own_add_no_summaries(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "x")
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("a run was started"))
    tracker().summarise(RunRecord(tmp_path, {}, "s", None, "summary"), ["job"], [["aa"]], {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_sweep_from_jobs_to_summary(tmp_path, no_account, monkeypatch):
    """One group holds every job, with its plan, and the summary: the table of summary.csv and the report's figures."""
    monkeypatch.chdir(tmp_path)
    small = ["dataset.samples=4", "dataset.length=32", "evaluator=[size,perplexity]", "evaluator.perplexity.samples=4"]
    assert main(["--multirun", "sparsity.ratio=0.2,0.3", *small, "tracker=wandb", "sweep.dir=ratios"]) == 0
    jobs = [path.parent for path in Path("ratios").glob("*/metrics.json")]
    assert len(jobs) == 2
    names = set()
    for job in jobs:
        run, records = read_back(job)
        assert place(records) == ("ratios", "job")
        assert run["config"]["recipe"] == "flap" and run["config"]["choices"]["search"] == "al_am"
        names.add(run["name"].partition(" dataset.")[0])
        assert '"plan.json"' in json.dumps([each for each in records if each["type"] == "artifact"])
    assert names == {"flap embedded-llama 0.2", "flap embedded-llama 0.3"}
    run, records = read_back(Path("ratios"))
    assert place(records) == ("ratios", "summary")
    columns, rows = logged_table(Path("ratios"))
    with Path("ratios/summary.csv").open() as file:
        assert [columns, *rows] == [[plain(cell) for cell in row] for row in csv.reader(file)]
    assert "pruned/ppl/embedded@32[4]" in columns and "sparsity.ratio" in columns
    figures = {key for key in run["summary"] if key.startswith("figures/")}
    assert main_report(["ratios", "out=report"]) == 0
    assert figures == {f"figures/{path.stem}" for path in Path("report/figures").glob("*.png")}


def plain(cell: str) -> float | str | None:
    """A cell of a CSV file, as W&B's table holds it."""
    try:
        return float(cell)
    except ValueError:
        return cell or None


def test_a_summary_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pruneexp.report.folders.find", broken)
    hand_over(compose_raw(open_hydra(), ["tracker=wandb"], RunMode.MULTIRUN), tmp_path, "s")
    assert capsys.readouterr().err == "pruneexp: no summary of the sweep for the tracker: disk full\n"


@pytest.mark.slow
def test_a_failed_run_is_failed_in_wandb(tmp_path, no_account):
    trackers = Trackers((LocalRun(False), tracker("offline")))
    trackers.start(record(tmp_path / "run"))
    trackers.fail("out of memory")
    run, _ = read_back(tmp_path / "run")
    assert run["exit_code"] == 1 and run["summary"]["failure"] == "out of memory"


class Broken:
    """A W&B run whose every method fails."""

    id, url, dir, offline = "x", None, "here", False

    def __getattr__(self, name: str):
        raise ConnectionError(f"no network for {name}")


@pytest.mark.parametrize("where", ["init", "after"])
def test_what_breaks_inside_wandb_never_breaks_the_run(tmp_path, monkeypatch, where, capsys):
    modes = []

    def init(**arguments):
        modes.append(arguments["mode"])
        if where == "init":
            raise ConnectionError("no network")
        return Broken()

    monkeypatch.setattr("wandb.init", init)
    trackers = Trackers((LocalRun(False), tracker("online")))
    trackers.start(record(tmp_path))
    trackers.log({"sparsity/decoder": 0.25})
    trackers.artifacts(PLAN, SCORES, SITES)
    trackers.finish(METRICS)
    assert status_of(tmp_path) == "done"
    assert modes == (["online", "offline"] if where == "init" else ["online"])
    assert capsys.readouterr().err.count("the run goes on: ConnectionError") == 1


def test_whoever_stops_waiting_for_an_upload_keeps_the_run(tmp_path, monkeypatch):
    class Slow(Broken):
        summary: dict = {}

        def finish(self, exit_code: int) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("wandb.init", lambda **_: Slow())
    trackers = Trackers((LocalRun(False), tracker("online")))
    trackers.start(record(tmp_path))
    trackers.finish(METRICS)
    assert status_of(tmp_path) == "done"


@pytest.mark.parametrize(
    "variables, login, mode, expected",
    [
        ({}, None, None, "offline"),
        ({"WANDB_MODE": "online"}, None, None, None),
        ({"WANDB_MODE": "disabled"}, None, None, None),
        ({"WANDB_API_KEY": "k"}, None, None, None),
        ({}, "api.wandb.ai", None, None),
        ({}, "elsewhere.org", None, "offline"),
        ({"WANDB_BASE_URL": "https://elsewhere.org"}, "elsewhere.org", None, None),
        ({"WANDB_API_KEY": "k"}, None, "offline", "offline"),
        ({}, None, "online", "online"),
    ],
)
def test_the_mode_follows_the_users_environment(tmp_path, no_account, monkeypatch, variables, login, mode, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if login:
        (no_account / ".netrc").write_text(f"machine {login} login user password k\n")
        (no_account / ".netrc").chmod(0o600)
    modes = []
    monkeypatch.setattr("wandb.init", lambda **arguments: modes.append(arguments["mode"]) or Broken())
    tracker(mode).start(record(tmp_path))
    assert modes == [expected]  # None: W&B reads its environment itself
