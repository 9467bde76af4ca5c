"""Jobs that take a free GPU each: pretended ones, real locks, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pruneexp.model.free_gpu import held_gpu
from pruneexp.types import ConfigError
from tests.pretended_gpus import pretended_gpus

JOB = """
import json, os, sys, time
from types import SimpleNamespace
import torch
torch.cuda.device_count = lambda: int(sys.argv[2])
torch.cuda.get_device_properties = lambda number: SimpleNamespace(uuid=f"gpu-{number}")
from pruneexp.model import free_gpu
free_gpu.WAIT = 0.02
with free_gpu.held_gpu("cuda:any") as device:
    start = time.monotonic()
    open(os.path.join(sys.argv[1], f"{os.getpid()}.held"), "w").write(device)
    time.sleep(float(sys.argv[3]))
    print(json.dumps([device, start, time.monotonic()]))
"""


def job(folder: Path, gpus: int, seconds: float) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", JOB, str(folder), str(gpus), str(seconds)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)})


def ended(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(out)


@pytest.mark.slow
def test_no_two_jobs_ever_share_a_gpu(tmp_path: Path) -> None:
    held = [ended(process) for process in [job(tmp_path, 3, 0.3) for _ in range(8)]]
    assert {device for device, *_ in held} == {"cuda:0", "cuda:1", "cuda:2"}
    for gpu in ("cuda:0", "cuda:1", "cuda:2"):
        times = sorted((start, end) for device, start, end in held if device == gpu)
        assert all(end <= start for (_, end), (start, _) in zip(times, times[1:], strict=False))


@pytest.mark.slow
def test_a_killed_holders_gpu_is_taken_over(tmp_path: Path) -> None:
    first = job(tmp_path, 1, 600)
    note = tmp_path / f"{first.pid}.held"
    while not note.exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = job(tmp_path, 1, 0)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=5)  # it waits
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert ended(second)[0] == "cuda:0"


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("pruneexp.model.free_gpu.WAIT", 0.01)
    return tmp_path


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


def test_other_devices_take_no_lock(locks: Path) -> None:
    for name in ("cpu", "cuda:1", "auto"):
        with held_gpu(name) as device:
            assert device == name
    assert not list(locks.iterdir())


def test_locks_that_cannot_be_written(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (locks / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(locks / "file"))
    with pretended_gpus(1), pytest.raises(ConfigError, match=r"model.device='cuda:any'.*file.*TMPDIR"):
        with held_gpu("cuda:any"):
            pass
