import json
import logging
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pruneexp.tracker import (
    Local,
    LocalRun,
    Trackers,
    Wandb,
    flat_metrics,
    run_folder,
    status_of,
    write_atomic,
)
from pruneexp.tracker.environment import git_revision
from pruneexp.types import ConfigError, Cost, Plan, RemovalPath, RunError, Site, SitePlan

NOW = datetime(2026, 1, 2, 3, 4, 5)
CONFIG = {"criterion": {"_target_": "x.Y", "metric": "WIFV", "ridge": "1e-5"}, "seed": 0, "list": [1, None]}
METRICS = {"sparsity/decoder": 0.25, "dense/params": 100, "pruned/ppl/stories@128": 6.5}
ATTENTION = Site("model.layers.0.self_attn", "attention", 0, 4, 2, Cost(80, 80, 4))
MLP = Site("model.layers.0.mlp", "mlp", 0, 6, 1, Cost(24, 24, 0))
SITES = (ATTENTION, MLP)
PLAN = Plan(
    {ATTENTION.name: SitePlan("attention", 4, (0, 2)), MLP.name: SitePlan("mlp", 6, tuple(range(6)))}, {"ratio": 0.25}
)
SCORES = {
    ATTENTION.name: torch.arange(8, dtype=torch.float64)[::2],
    MLP.name: RemovalPath(torch.tensor([5, 4, 3, 2, 1, 0]), torch.arange(6.0)),
}


def finished(folder: Path, overwrite: bool = False) -> None:
    run = LocalRun(overwrite)
    run.start(folder, CONFIG)
    run.artifacts(PLAN, SCORES, SITES)
    run.finish(METRICS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# The run folder


def test_a_finished_run_holds_what_the_contract_says(tmp_path):
    folder = tmp_path / "new" / "run"
    finished(folder)
    assert sorted(contents(folder)) == [
        "config.yaml",
        "environment.json",
        "log.txt",
        "metrics.json",
        "plan.json",
        "scores.safetensors",
        "status.json",
        "structure.png",
    ]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == CONFIG
    assert Plan.from_json((folder / "plan.json").read_text()) == PLAN
    scores = load_file(folder / "scores.safetensors")
    assert scores[ATTENTION.name].tolist() == [0, 2, 4, 6] and scores[MLP.name].tolist() == [5, 4, 3, 2, 1, 0]
    assert all(s.dtype == torch.float32 for s in scores.values())
    assert list(json.loads((folder / "metrics.json").read_text()).items()) == sorted(METRICS.items())
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "done" and status["reason"] is None and status["pid"] == os.getpid()
    assert status["started"] <= status["ended"]
    assert status_of(folder) == "done"


def test_environment(tmp_path):
    run = LocalRun(False)
    run.start(tmp_path, CONFIG)
    run.environment({"sha256": "abc"}, {"windows": 8})
    known = json.loads((tmp_path / "environment.json").read_text())
    assert known["model"] == {"sha256": "abc"} and known["data"] == {"windows": 8}
    assert known["versions"]["torch"] == torch.__version__.split("+")[0] or known["versions"]["torch"]
    assert {"python", "pruneexp", "transformers", "hydra-core", "lm_eval"} <= set(known["versions"])
    assert known["cpus"] >= 1 and known["command"] == sys.argv
    run.fail("enough")


def test_git_revision_of_the_packages_own_checkout_only(tmp_path):
    def git(*arguments: str) -> None:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    assert git_revision(package) is None
    git("init")
    assert git_revision(package) is None  # a file that is not tracked: installed inside another project's checkout
    git("add", ".")
    git("commit", "-m", "x")
    revision = git_revision(package)
    assert revision is not None and len(revision["commit"]) == 40 and revision["dirty"] is False
    (package / "__init__.py").write_text("x = 1")
    changed = git_revision(package)
    assert changed is not None and changed["dirty"] is True


def test_metrics_are_the_last_thing_written(tmp_path, monkeypatch):
    written: list[str] = []

    def record(path: Path, data: bytes | str) -> None:
        written.append(path.name)
        write_atomic(path, data)

    monkeypatch.setattr("pruneexp.tracker.local.write_atomic", record)
    finished(tmp_path)
    assert written[0] == "status.json" and written[-2:] == ["status.json", "metrics.json"]


def test_a_finished_run_is_refused_and_nothing_of_it_is_lost(tmp_path):
    finished(tmp_path)
    before = contents(tmp_path)
    run = LocalRun(overwrite=False)
    with pytest.raises(ConfigError, match=r"^run.dir=.*holds a finished run; expected .* or run.overwrite=true"):
        run.start(tmp_path, CONFIG)
    run.fail("the refusal")  # a runner that reports every error must not mark the old run failed
    assert contents(tmp_path) == before


def test_overwrite_removes_the_runs_files_and_no_others(tmp_path):
    finished(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "model" / "notes.md").write_text("mine")
    (tmp_path / "paper.pdf").write_text("mine")
    run = LocalRun(overwrite=True)
    run.start(tmp_path, CONFIG)
    assert sorted(contents(tmp_path)) == [
        "config.yaml",
        "environment.json",
        "log.txt",
        "model/notes.md",
        "paper.pdf",
        "status.json",
    ]
    assert status_of(tmp_path) == "running"
    run.finish(METRICS)
    assert status_of(tmp_path) == "done"


def test_somebody_elses_files_are_not_taken_for_a_runs(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: true")
    with pytest.raises(ConfigError, match=r"^run.dir=.*holds config.yaml, from no run"):
        LocalRun(False).start(tmp_path, CONFIG)
    assert (tmp_path / "config.yaml").read_text() == "mine: true"


def test_a_folder_that_another_run_writes_to_is_refused_even_with_overwrite(tmp_path):
    run = LocalRun(False)
    run.start(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match=rf"^run.dir=.*process {os.getpid()} is still writing"):
        LocalRun(True).start(tmp_path, CONFIG)
    run.fail("over")
    finished(tmp_path)  # a failed run makes room without being asked


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^run.dir='.*file': expected a folder, found a file"):
        LocalRun(False).start(tmp_path / "file", CONFIG)
    with pytest.raises(RunError, match=r"^run.dir='.*file/run': cannot write there: "):
        LocalRun(False).start(tmp_path / "file" / "run", CONFIG)


def test_a_full_disk_names_the_folder_and_the_file(tmp_path, monkeypatch):
    run = LocalRun(False)
    run.start(tmp_path, CONFIG)

    def full(path: Path, data: bytes | str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pruneexp.tracker.local.write_atomic", full)
    with pytest.raises(RunError, match=r"^run.dir=.*: cannot write plan.json: No space left on device"):
        run.artifacts(PLAN, SCORES, SITES)
    run.fail("full")  # says so and raises nothing: the reason must reach the user


def test_write_atomic_keeps_the_old_file_when_it_cannot_write_the_new_one(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a.json", "old")

    def broken(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no"):
        write_atomic(tmp_path / "a.json", b"new")
    assert contents(tmp_path) == {"a.json": b"old"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1.0", None, torch.ones(2)])
def test_a_metric_that_is_no_finite_number_is_refused_by_name(tmp_path, value):
    other = Recorder([])
    trackers = Trackers((LocalRun(False), other))
    trackers.start(tmp_path, CONFIG)
    with pytest.raises(RunError, match=r"^pruned/ppl/x@8=.*: expected a finite number"):
        trackers.finish({"pruned/ppl/x@8": value})
    assert "finish" not in other.calls and status_of(tmp_path) == "running"
    trackers.fail("a metric that is no number")
    assert status_of(tmp_path) == "failed"


def test_metrics_become_plain_numbers():
    flat = flat_metrics({"b": torch.tensor(2.5), "a": torch.tensor(3), "c": True})
    assert list(flat.items()) == [("a", 3), ("b", 2.5), ("c", 1)] and type(flat["a"]) is int and type(flat["c"]) is int


# Status


def test_a_failed_run_says_why(tmp_path, capsys):
    run = LocalRun(False)
    run.start(tmp_path, CONFIG)
    run.fail("out of memory", "Traceback (most recent call last):\n  deep inside")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed" and status["reason"] == "out of memory" and status["ended"]
    assert "out of memory" in (tmp_path / "log.txt").read_text()
    assert "deep inside" in (tmp_path / "log.txt").read_text()
    assert "deep inside" not in capsys.readouterr().err
    assert status_of(tmp_path) == "failed" and not (tmp_path / "metrics.json").exists()


def test_a_killed_run_counts_as_interrupted(tmp_path):
    code = (
        "import sys, time; from pruneexp.tracker import LocalRun; LocalRun(False).start(sys.argv[1], {});"
        "print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    assert status_of(tmp_path) == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "running"
    assert status_of(tmp_path) == "interrupted"
    finished(tmp_path)
    assert status_of(tmp_path) == "done"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to tell processes apart")
def test_a_process_number_used_again_is_not_the_run(tmp_path):
    run = LocalRun(False)
    run.start(tmp_path, CONFIG)
    status = json.loads((tmp_path / "status.json").read_text())
    write_atomic(tmp_path / "status.json", json.dumps({**status, "process": "another boot:1"}))
    assert status_of(tmp_path) == "interrupted"
    write_atomic(tmp_path / "status.json", json.dumps({**status, "host": "elsewhere", "pid": 1}))
    assert status_of(tmp_path) == "running"
    run.fail("over")


def test_status_of_a_folder_without_a_run(tmp_path):
    assert status_of(tmp_path / "none") == status_of(tmp_path) == "absent"
    (tmp_path / "status.json").write_text("[]")
    assert status_of(tmp_path) == "absent"


# Log


def test_the_log_holds_its_own_run_only_and_warnings_reach_stderr(tmp_path, capsys):
    logger = logging.getLogger("pruneexp")
    before = (list(logger.handlers), logger.level)
    for name in ("a", "b"):
        run = LocalRun(False)
        run.start(tmp_path / name, CONFIG)
        logging.getLogger("pruneexp.calibrate").info("quiet %s", name)
        logger.warning("loud %s", name)
        run.log({"sparsity/decoder": 0.5, "dense/params": 12345678})
        run.finish(METRICS)
    assert (logger.handlers, logger.level) == before
    log, stderr = (tmp_path / "a" / "log.txt").read_text(), capsys.readouterr().err
    assert "quiet a" in log and "WARNING loud a" in log and "loud b" not in log
    assert "sparsity/decoder = 0.5" in log and "dense/params = 12345678" in log
    assert stderr == "WARNING: loud a\nWARNING: loud b\n"


# Names


def test_run_folder_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("somewhere/else", "flap", None, NOW) == Path("somewhere/else")
    assert run_folder(None, "flap", None, NOW) == Path("outputs/flap/2026-01-02_03-04-05")
    assert run_folder(None, "flap", None, NOW) == Path("outputs/flap/2026-01-02_03-04-05-2")
    assert run_folder(None, "flap", None, NOW) == Path("outputs/flap/2026-01-02_03-04-05-3")
    assert run_folder(None, "flap", "probe", NOW) == Path("outputs/flap/2026-01-02_03-04-05_probe")
    assert not Path("somewhere").exists() and Path("outputs/flap/2026-01-02_03-04-05-3").is_dir()
    for name in ("a/b", "..", ""):
        with pytest.raises(ConfigError, match=r"^run.name=.*: expected a plain name"):
            run_folder(None, "flap", name, NOW)


def test_run_folder_where_nothing_can_be_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").touch()
    with pytest.raises(RunError, match=r"^run.dir='outputs/flap/.*': cannot create it: "):
        run_folder(None, "flap", None, NOW)


# Several trackers


class Recorder:
    def __init__(self, log: list[str], name: str = "") -> None:
        self.calls, self._name = log, name

    def __getattr__(self, method: str):
        return lambda *arguments: self.calls.append(f"{self._name}{method}")


def test_trackers_start_first_to_last_and_end_last_to_first():
    calls: list[str] = []
    trackers = Trackers((Recorder(calls, "a."), Recorder(calls, "b."), Local()))
    trackers.start(Path(), {}, group="g")
    trackers.log({})
    trackers.artifacts(PLAN, SCORES, SITES)
    trackers.finish({})
    trackers.fail("x")
    assert calls == [f"{who}.{m}" for m in ("start", "log", "artifacts") for who in "ab"] + [
        f"{who}.{m}" for m in ("finish", "fail") for who in "ba"
    ]


# Weights & Biases


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """A user whom W&B has never heard of, with a home of their own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return home


def tracker(mode: str | None = None) -> Wandb:
    return Wandb(project="pruneexp", entity=None, mode=mode, tags=["probe"])


@pytest.mark.parametrize(
    "field, value",
    [("project", ""), ("entity", 3), ("mode", "onlin"), ("tags", "probe"), ("tags", [1])],
)
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


def test_an_offline_run_can_be_read_back(tmp_path, no_account):
    folder = tmp_path / "run"
    trackers = Trackers((LocalRun(False), tracker()))
    trackers.start(folder, CONFIG, group="sweep", name="probe", job_type="run")
    trackers.log({"sparsity/decoder": 0.25})
    trackers.artifacts(PLAN, SCORES, SITES)
    trackers.finish(METRICS)
    run, records = read_back(folder)
    assert run["project"] == "pruneexp" and run["tags"] == ["probe"] and run["name"] == "probe"
    assert run["config"] == CONFIG and run["exit_code"] == 0
    assert METRICS.items() <= run["summary"].items()
    assert {"structure", "scores/attention", "scores/mlp"} <= run["summary"].keys()
    assert '"plan"' in json.dumps([record for record in records if "artifact" in record["type"]])
    assert "could not" not in (folder / "log.txt").read_text()
    assert status_of(folder) == "done"
    written = [str(file) for file in no_account.rglob("*") if file.is_file() and file.suffix != ".log"]
    assert written == []  # nothing but W&B's own debug logs outside the run folder


def test_a_failed_run_is_failed_in_wandb(tmp_path, no_account):
    trackers = Trackers((LocalRun(False), tracker("offline")))
    trackers.start(tmp_path / "run", CONFIG)
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
    trackers.start(tmp_path, CONFIG)
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
    trackers.start(tmp_path, CONFIG)
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
    asked = []
    monkeypatch.setattr("wandb.init", lambda **arguments: asked.append(arguments["mode"]) or Broken())
    tracker(mode).start(tmp_path, CONFIG)
    assert asked == [expected]  # None: W&B reads its environment itself


def test_trackers_cost_no_import_before_they_start():
    code = (
        "import sys; from pruneexp.tracker import Local, Wandb; import pruneexp.report, pruneexp.progress;"
        "Local(); Wandb(project='p', entity=None, mode=None, tags=[]);"
        "heavy = {'wandb', 'matplotlib', 'rich', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
