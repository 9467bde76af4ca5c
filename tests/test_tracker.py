import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pruneexp.files import write_atomic
from pruneexp.tracker import Local, LocalRun, Trackers, flat_metrics, status_of
from pruneexp.tracker.environment import git_revision
from pruneexp.types import Plan, RunError
from tests.cases import each
from tests.tracker_samples import ATTENTION, CONFIG, METRICS, MLP, PLAN, SCORES, SITES, contents, finished, record

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
    assert status["plan_sha256"] == hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
    assert status_of(folder) == "done"


def test_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "tests"])
    run = LocalRun(False)
    run.start(record(tmp_path))
    run.environment({"sha256": "abc"}, {"windows": 8})
    known = json.loads((tmp_path / "environment.json").read_text())
    assert known["model"] == {"sha256": "abc"} and known["data"] == {"windows": 8}
    assert known["versions"]["torch"] == torch.__version__.split("+")[0] or known["versions"]["torch"]
    assert {"python", "pruneexp", "transformers", "hydra-core", "lm_eval"} <= set(known["versions"])
    assert known["cpus"] >= 1 and known["command"][1:] == sys.argv[1:]
    run.fail("enough")


@pytest.mark.parametrize(
    ("program", "typed"),
    [("/home/me/bin/pruneexp", ["pruneexp"]), ("/home/me/pruneexp/__main__.py", ["python", "-m", "pruneexp"])],
)
def test_a_record_names_neither_the_machine_nor_its_folders(tmp_path, monkeypatch, program, typed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.gethostname", lambda: "a-host-of-mine")
    monkeypatch.setattr(sys, "argv", [program, "seed=1"])
    finished(Path("run"))
    assert json.loads(Path("run/environment.json").read_text())["command"] == [*typed, "seed=1"]
    text = "".join(path.read_bytes().decode(errors="replace") for path in Path("run").iterdir())
    assert all(private not in text for private in ("a-host-of-mine", "/home/me", str(tmp_path)))


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
        assert (path.parent / "status.json").is_file()  # the claim comes before everything
        written.append(path.name)
        write_atomic(path, data)

    monkeypatch.setattr("pruneexp.tracker.local.write_atomic", record)
    finished(tmp_path)
    assert written[0] == "config.yaml" and written[-2:] == ["status.json", "metrics.json"]


def test_a_full_disk_names_the_folder_and_the_file(tmp_path, monkeypatch):
    run = LocalRun(False)
    run.start(record(tmp_path))

    def full(path: Path, data: bytes | str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pruneexp.tracker.local.write_atomic", full)
    with pytest.raises(RunError, match=r"^run.dir=.*: cannot write plan.json: No space left on device"):
        run.artifacts(PLAN, SCORES, SITES)
    run.fail("full")  # says so and raises nothing: the reason must reach the user


@each("value", [float("nan"), float("inf"), "1.0", None, torch.ones(2)])
def test_a_metric_that_is_no_finite_number_is_refused_by_name(tmp_path, value):
    other = Recorder([])
    trackers = Trackers((LocalRun(False), other))
    trackers.start(record(tmp_path))
    with pytest.raises(RunError, match=r"^pruned/ppl/x@8=.*: expected a finite number"):
        trackers.finish({"pruned/ppl/x@8": value})
    assert "finish" not in other.calls and status_of(tmp_path) == "running"
    trackers.fail("a metric that is no number")
    assert status_of(tmp_path) == "failed"


def test_metrics_become_plain_numbers():
    flat = flat_metrics({"b": torch.tensor(2.5), "a": torch.tensor(3), "c": True})
    assert list(flat.items()) == [("a", 3), ("b", 2.5), ("c", 1)] and type(flat["a"]) is int and type(flat["c"]) is int


def test_a_failed_run_says_why(tmp_path, capsys):
    run = LocalRun(False)
    run.start(record(tmp_path))
    run.fail("out of memory", "Traceback (most recent call last):\n  deep inside")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed" and status["reason"] == "out of memory" and status["ended"]
    assert "out of memory" in (tmp_path / "log.txt").read_text()
    assert "deep inside" in (tmp_path / "log.txt").read_text()
    assert "deep inside" not in capsys.readouterr().err
    assert status_of(tmp_path) == "failed" and not (tmp_path / "metrics.json").exists()


# Log


def test_the_log_holds_its_own_run_only_and_warnings_reach_stderr(tmp_path, capsys):
    logger = logging.getLogger("pruneexp")
    before = (list(logger.handlers), logger.level)
    for name in ("a", "b"):
        run = LocalRun(False)
        run.start(record(tmp_path / name))
        logging.getLogger("pruneexp.calibrate").info("quiet %s", name)
        logger.warning("loud %s", name)
        run.log({"sparsity/decoder": 0.5, "dense/params": 12345678})
        run.finish(METRICS)
    assert (logger.handlers, logger.level) == before
    log, stderr = (tmp_path / "a" / "log.txt").read_text(), capsys.readouterr().err
    assert "quiet a" in log and "WARNING loud a" in log and "loud b" not in log
    assert "sparsity/decoder = 0.5" in log and "dense/params = 12345678" in log
    assert stderr == "WARNING: loud a\nWARNING: loud b\n"


# Several trackers


class Recorder:
    def __init__(self, log: list[str], name: str = "") -> None:
        self.calls, self._name = log, name

    def __getattr__(self, method: str):
        return lambda *arguments: self.calls.append(f"{self._name}{method}")


def test_trackers_start_first_to_last_and_end_last_to_first():
    calls: list[str] = []
    trackers = Trackers((Recorder(calls, "a."), Recorder(calls, "b."), Local()))
    trackers.start(record(Path(), group="g"))
    trackers.log({})
    trackers.artifacts(PLAN, SCORES, SITES)
    trackers.finish({})
    trackers.fail("x")
    assert calls == [f"{who}.{m}" for m in ("start", "log", "artifacts") for who in "ab"] + [
        f"{who}.{m}" for m in ("finish", "fail") for who in "ba"
    ]


@pytest.mark.slow
def test_trackers_cost_no_import_before_they_start():
    code = (
        "import sys; from pruneexp.tracker import Local, Wandb; import pruneexp.report, pruneexp.progress;"
        "Local(); Wandb(project='p', entity=None, mode=None, tags=[]);"
        "heavy = {'wandb', 'matplotlib', 'rich', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
