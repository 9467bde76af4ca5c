"""Jobs that take a free GPU each: pretended ones, real locks, real processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock

from pruneexp.__main__ import main
from pruneexp.model import free_gpu
from pruneexp.model.free_gpu import held_gpu
from pruneexp.tracker import structure
from pruneexp.types import ConfigError
from tests.golden import VARYING
from tests.pretended_gpus import pretended_gpus
from tests.processes import forked

ROOT = Path(__file__).parents[1]

# A model on a GPU of two. A job that holds one waits until as many processes ask for one as TOGETHER says.
SOURCE = """
import json, os, time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
import torch
from pruneexp.model import ModelSource, free_gpu
from pruneexp.tracker import structure
from tests.pretended_gpus import pretended_gpus

gpus = pretended_gpus(2)
gpus.__enter__()  # to the end of the process
torch.cuda.get_device_properties = lambda number: SimpleNamespace(uuid=f"gpu-{number}")
free_gpu.WAIT, structure.structure_figure = 0.02, lambda *_: None


class Source(ModelSource):
    @contextmanager
    def on_a_device(self):
        Path(f"{os.getpid()}.there").touch()
        with super().on_a_device() as source:
            start = time.monotonic()
            while len(list(Path().glob("*.there"))) < int(os.environ["TOGETHER"]):
                time.sleep(0.02)
            yield source
            with open("held.txt", "a") as lines:
                print(json.dumps([source.device, start, time.monotonic()]), file=lines)
"""


def hold(folder: str, gpus: int, seconds: float) -> None:
    """Takes a GPU, notes which, and from when to when, in files named by its process."""
    tempfile.tempdir, free_gpu.WAIT = folder, 0.02
    torch.cuda.device_count = lambda: gpus
    torch.cuda.get_device_properties = lambda number: SimpleNamespace(uuid=f"gpu-{number}")
    note = Path(folder, str(os.getpid()))
    with held_gpu("cuda:any") as device:
        start = time.monotonic()
        note.with_suffix(".held").write_text(device)
        time.sleep(seconds)
        note.with_suffix(".json").write_text(json.dumps([device, start, time.monotonic()]))


def job(folder: Path, gpus: int, seconds: float) -> BaseProcess:
    return forked(hold, str(folder), gpus, seconds)


def ended(process: BaseProcess, folder: Path) -> Any:
    process.join(timeout=120)
    assert process.exitcode == 0
    return json.loads((folder / f"{process.pid}.json").read_text())


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("pruneexp.model.free_gpu.WAIT", 0.01)
    return tmp_path


def check_held(held: list[Any], gpus: int) -> None:
    """Every GPU was used, and none by two at a time. `held`: device, start and end of each job."""
    names = {f"cuda:{number}" for number in range(gpus)}
    assert {device for device, *_ in held} == names
    for gpu in names:
        times = sorted((start, end) for device, start, end in held if device == gpu)
        assert all(end <= start for (_, end), (start, _) in zip(times, times[1:], strict=False))


@pytest.mark.slow
def test_no_two_jobs_ever_share_a_gpu(tmp_path: Path) -> None:
    check_held([ended(process, tmp_path) for process in [job(tmp_path, 3, 0.3) for _ in range(8)]], 3)


def sweep_of_four(folder: Path) -> list[str]:
    """The command line of a sweep in `folder`, which is prepared for it."""
    (folder / "conf" / "model").mkdir(parents=True)
    (folder / "pretended.py").write_text(SOURCE)
    option = "defaults: [embedded, _self_]\n_target_: pretended.Source\n"
    (folder / "conf" / "model" / "pretended.yaml").write_text(option)
    quick = ["dataset.samples=8", "dataset.length=32", "evaluator=[perplexity]", "evaluator.perplexity.samples=8"]
    jobs = ["recipe=flap,wanda_sp", "sparsity.ratio=0.2,0.4", "cache=off", "sweep.dir=jobs"]
    return ["--multirun", "--config-dir", "conf", "model=pretended", "model.device=cuda:any", *quick, *jobs]


def summary(folder: Path) -> list[dict[str, str]]:
    """Without what differs from run to run."""
    with (folder / "jobs" / "summary.csv").open() as lines:
        return [{k: v for k, v in row.items() if not k.startswith(VARYING)} for row in csv.DictReader(lines)]


@pytest.mark.slow
def test_a_sweep_under_joblib_is_the_serial_one_with_a_gpu_for_each_job(
    locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    parallel, serial = locks / "parallel", locks / "serial"
    argv = [*sweep_of_four(parallel), "hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(locks), "TOGETHER": "3"}
    command = [sys.executable, "-m", "pruneexp", *argv]
    done = subprocess.run(command, cwd=parallel, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    held = [json.loads(line) for line in (parallel / "held.txt").read_text().splitlines()]
    check_held(held, 2)
    assert len(held) == 4 and len(list(parallel.glob("*.there"))) >= 3
    monkeypatch.setenv("TOGETHER", "1")
    monkeypatch.setattr(structure, "structure_figure", structure.structure_figure)  # put back afterwards
    argv = sweep_of_four(serial)
    monkeypatch.chdir(serial)
    monkeypatch.syspath_prepend(serial)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(argv) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.modules.pop("pretended").gpus.__exit__(None, None, None)
    assert summary(serial) == summary(parallel)


@pytest.mark.slow
def test_a_killed_holders_gpu_is_taken_over(tmp_path: Path) -> None:
    first = job(tmp_path, 1, 600)
    note = tmp_path / f"{first.pid}.held"
    try:
        while not note.exists():
            assert first.is_alive()
            time.sleep(0.01)
        second = job(tmp_path, 1, 0)
        second.join(timeout=5)
        assert second.is_alive()  # it waits
    finally:
        first.kill()
    first.join()
    assert ended(second, tmp_path)[0] == "cuda:0"


@pytest.mark.usefixtures("locks")
def test_threads_take_one_each_and_wait_when_all_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    waited: list[str] = []

    def waits() -> None:
        with held_gpu("cuda:any") as device:
            waited.append(device)

    caplog.set_level("INFO", "pruneexp")
    with pretended_gpus(2):
        with held_gpu("cuda:any") as first:
            with held_gpu("cuda:any") as second:
                third = threading.Thread(target=waits)
                third.start()
                while "this one waits" not in caplog.text:
                    time.sleep(0.01)
                assert (first, second, waited) == ("cuda:0", "cuda:1", [])
            third.join(timeout=60)
        assert waited == ["cuda:1"]
        with held_gpu("cuda:any") as again:
            assert again == "cuda:0"


@pytest.mark.usefixtures("locks")
def test_a_run_that_fails_gives_its_gpu_back() -> None:
    with pretended_gpus(1):
        for _ in range(2):
            with pytest.raises(OSError, match="disk"), held_gpu("cuda:any"):
                raise OSError("disk full")


@pytest.mark.usefixtures("locks")
def test_what_failed_has_left_its_gpu_before_another_run_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[torch.nn.Module]] = []
    emptied: list[bool] = []

    def load() -> None:
        model = torch.nn.Linear(1, 1)
        models.append(weakref.ref(model))
        raise MemoryError

    def works() -> None:
        model = torch.nn.Linear(1, 1)
        models.append(weakref.ref(model))
        try:
            load()
        except MemoryError as error:
            raise RuntimeError("out of memory") from error

    with pretended_gpus(1):
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.extend(model() is None for model in models))
        with pytest.raises(RuntimeError, match="out of memory") as failure, held_gpu("cuda:any"):
            works()
    assert emptied == [True, True]
    assert failure.tb is not None  # which kept them


def test_a_gpu_that_is_broken_is_given_back_too(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("device-side assert triggered")

    with pretended_gpus(1):
        monkeypatch.setattr(torch.cuda, "empty_cache", broken)
        with pytest.raises(RuntimeError, match="device-side assert") as failure, held_gpu("cuda:any"):
            pass
        (file,) = locks.glob("pruneexp-*.lock")
        with FileLock(file, timeout=0) as again:
            assert again.is_locked
    assert failure.tb is not None  # which keeps what the context held


def test_other_devices_take_no_lock(locks: Path) -> None:
    for name in ("cpu", "cuda:1", "auto"):
        with held_gpu(name) as device:
            assert device == name
    assert not list(locks.iterdir())


def test_locks_that_cannot_be_written(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(expected: str) -> None:
        with pretended_gpus(1), pytest.raises(ConfigError, match=rf"model.device='cuda:any'.*{expected}.*TMPDIR"):
            with held_gpu("cuda:any"):
                pass

    def without_locks(lock: FileLock) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setenv("TMPDIR", str(locks / "missing"))  # Python would take another folder
    refused("missing.*does not exist")
    monkeypatch.setattr("os.access", lambda path, mode: path != str(locks))
    monkeypatch.setenv("TMPDIR", str(locks))
    refused("cannot be written to")
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(FileLock, "_acquire", without_locks)
    refused("support flock")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    refused("No usable temporary directory")
