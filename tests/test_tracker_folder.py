import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from pruneexp import files
from pruneexp.files import create_whole, process_name, scratch_folder, write_atomic
from pruneexp.tracker import LocalRun, check_folder, folder, run_folder, status_of
from pruneexp.types import ConfigError, RunError
from tests.tracker_samples import METRICS, contents, finished, record

NOW = datetime(2026, 1, 2, 3, 4, 5)


# Names


def test_run_folder_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder(Path("somewhere/else"), "flap", None, NOW) == Path("somewhere/else")
    assert run_folder(None, "flap", None, NOW) == Path("outputs/flap/2026-01-02_03-04-05")
    assert run_folder(None, "flap", None, NOW) == Path("outputs/flap/2026-01-02_03-04-05-2")
    assert run_folder(None, "flap", None, NOW) == Path("outputs/flap/2026-01-02_03-04-05-3")
    assert run_folder(None, "flap", "probe", NOW) == Path("outputs/flap/2026-01-02_03-04-05_probe")
    assert not Path("somewhere").exists() and Path("outputs/flap/2026-01-02_03-04-05-3").is_dir()


def test_run_folder_where_nothing_can_be_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").touch()
    with pytest.raises(RunError, match=r"^run.dir='outputs/flap/.*': cannot create it: "):
        run_folder(None, "flap", None, NOW)


def test_a_finished_run_is_refused_and_nothing_of_it_is_lost(tmp_path):
    finished(tmp_path)
    before = contents(tmp_path)
    run = LocalRun(overwrite=False)
    with pytest.raises(ConfigError, match=r"^run.dir=.*holds a finished run; expected .* or run.overwrite=true"):
        run.start(record(tmp_path))
    run.fail("the refusal")  # a runner that reports every error must not mark the old run failed
    assert contents(tmp_path) == before


def test_overwrite_removes_the_runs_files_and_no_others(tmp_path):
    finished(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "paper.pdf").write_text("mine")
    (tmp_path / "samples").mkdir()
    for name in ("zeroshot_dense.json", "generation.md", ".generation.md.7.tmp"):
        (tmp_path / "samples" / name).touch()
    (tmp_path / "samples" / "mine.txt").write_text("mine")
    run = LocalRun(overwrite=True)
    run.start(record(tmp_path))
    assert sorted(contents(tmp_path)) == [
        "config.yaml",
        "environment.json",
        "log.txt",
        "paper.pdf",
        "samples/mine.txt",
        "status.json",
    ]
    assert status_of(tmp_path) == "running"
    run.finish(METRICS)
    assert status_of(tmp_path) == "done"


def test_a_run_that_is_killed_while_it_clears_the_folder_makes_room_for_the_next(tmp_path, monkeypatch):
    finished(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(folder, "clear_unfinished", killed)
        folder.claim_folder(tmp_path, overwrite=True)
    assert (tmp_path / "model" / "config.json").exists() and status_of(tmp_path) != "done"
    monkeypatch.setattr(folder, "_alive", lambda status, *_: False)
    folder.claim_folder(tmp_path, overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_somebody_elses_files_are_not_taken_for_a_runs(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: true")
    with pytest.raises(ConfigError, match=r"^run.dir=.*holds config.yaml, from no run"):
        LocalRun(False).start(record(tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "mine: true"


@pytest.mark.parametrize("file", ["model/config.json", "samples/mine.json", "model.partial/model.safetensors"])
def test_somebody_elses_folders_are_not_taken_for_a_runs(tmp_path, file):
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text("mine")
    with pytest.raises(ConfigError, match=rf"^run.dir=.*holds {Path(file).parts[0]}, from no run"):
        LocalRun(False).start(record(tmp_path))
    assert (tmp_path / file).read_text() == "mine"


@pytest.mark.parametrize("file", ["notes.md", "adapter/notes.md"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_checkpoint_among_other_files_is_refused_beforehand(tmp_path, file, overwrite):
    if overwrite:
        finished(tmp_path)
    (tmp_path / "model" / "adapter").mkdir(parents=True)
    (tmp_path / "model" / "adapter" / "adapter_config.json").touch()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "model" / file).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=rf"^run.dir=.*model/.* holds {file}, which no run writes"):
        LocalRun(overwrite).start(record(tmp_path))
    assert contents(tmp_path) == before


def test_a_folder_that_another_run_writes_to_is_refused_even_with_overwrite(tmp_path):
    run = LocalRun(False)
    run.start(record(tmp_path))
    with pytest.raises(ConfigError, match=rf"^run.dir=.*process {os.getpid()} is still writing"):
        LocalRun(True).start(record(tmp_path))
    run.fail("over")
    finished(tmp_path)  # a failed run makes room without being asked


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^run.dir='.*file': expected a folder, found a file"):
        LocalRun(False).start(record(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"^run.dir='.*file/a/run': .*/file is a file; expected a folder that can"):
        check_folder(tmp_path / "file" / "a" / "run", overwrite=True)
    with pytest.raises(ConfigError, match=r"^run.dir='.*file/run': .*/file is a file; expected a folder that can"):
        LocalRun(False).start(record(tmp_path / "file" / "run"))


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, f"Permission denied in {dir}")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    refused = rf"^run.dir='.*/a/b': {tmp_path} cannot be written to \(Permission denied in {tmp_path}\); expected a "
    with pytest.raises(ConfigError, match=refused):
        check_folder(tmp_path / "a" / "b", overwrite=False)
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_file_system_that_takes_no_files_whatever_its_permissions():
    with pytest.raises(ConfigError, match=r"^run.dir='/proc/x/y': /proc cannot be written to \(.*\); expected a"):
        check_folder(Path("/proc/x/y"), overwrite=False)


def test_looking_leaves_nothing(tmp_path):
    check_folder(tmp_path, overwrite=False)
    check_folder(tmp_path / "a" / "b", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_nevertheless(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(type(tmp_path), "mkdir", refuse)
    with pytest.raises(RunError, match=r"^run.dir='.*/run': cannot write there: Read-only file system"):
        LocalRun(False).start(record(tmp_path / "run"))


def test_write_atomic_keeps_the_old_file_when_it_cannot_write_the_new_one(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a.json", "old")

    def broken(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no"):
        write_atomic(tmp_path / "a.json", b"new")
    assert contents(tmp_path) == {"a.json": b"old"}


# Status


@pytest.mark.slow
def test_a_killed_run_counts_as_interrupted(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from pruneexp.tracker import LocalRun;"
        "from pruneexp.types import RunRecord;"
        "LocalRun(False).start(RunRecord(Path(sys.argv[1]), {}, None, None, None));"
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


def test_a_process_number_used_again_is_not_the_run(tmp_path):
    run = LocalRun(False)
    run.start(record(tmp_path))
    status = json.loads((tmp_path / "status.json").read_text())
    write_atomic(tmp_path / "status.json", json.dumps({**status, "process": 1.0}))
    assert status_of(tmp_path) == "interrupted"
    for early in (None, "a boot:123"):  # older versions wrote other marks, or none
        write_atomic(tmp_path / "status.json", json.dumps({**status, "process": early}))
        assert status_of(tmp_path) == "running"
    write_atomic(tmp_path / "status.json", json.dumps({**status, "host": "elsewhere", "pid": 1}))
    assert status_of(tmp_path) == "running"
    run.fail("over")


def test_a_process_is_known_after_the_clock_was_set(tmp_path, monkeypatch):
    run = LocalRun(False)
    run.start(record(tmp_path))
    made, booted = psutil.Process.create_time, psutil.boot_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: made(self) + 3600)
    monkeypatch.setattr(psutil, "boot_time", lambda: booted() + 3600)
    assert status_of(tmp_path) == "running"
    run.fail("over")


def test_a_run_of_another_container_lives_as_long_as_it_holds_its_log(tmp_path, monkeypatch):
    """Its machine's name may be ours, and its number says nothing here."""
    run, ended = LocalRun(False), tmp_path / "ended"
    run.start(record(tmp_path))
    name = process_name()
    monkeypatch.setattr(files, "process_namespace", lambda: 1)
    monkeypatch.setattr(folder, "process_namespace", lambda: 1)
    assert process_name() != name, "two that write aside do not meet"
    assert status_of(tmp_path) == "running" and not folder.is_own(tmp_path)
    with pytest.raises(ConfigError, match="is still writing a run there"):
        check_folder(tmp_path, overwrite=True)
    ended.mkdir()
    for file in ("status.json", "log.txt"):
        shutil.copy(tmp_path / file, ended)
    assert status_of(ended) == "interrupted"  # as where the container was killed: nobody holds it
    (ended / "log.txt").unlink()
    assert status_of(ended) == "running"  # it has not come so far as to open it
    status = json.loads((tmp_path / "status.json").read_text())
    del status["host"]  # it is about to write its metrics, and may be on another machine
    write_atomic(tmp_path / "status.json", json.dumps({**status, "status": "done", "namespace": 1, "pid": 2**22 + 1}))
    assert status_of(tmp_path) == "running"
    run.fail("over")
    assert not files.is_held(tmp_path / "log.txt")


def test_a_process_is_known_where_psutil_remembers_when_the_system_started(tmp_path, monkeypatch):
    """As versions before 7 do: a process's start is counted from what `boot_time` gave when it was last called."""
    run = LocalRun(False)
    run.start(record(tmp_path))
    made, booted = psutil.Process.create_time, psutil.boot_time
    known = [booted()]

    def boot_time():
        known[0] = booted() + 3600
        return known[0]

    monkeypatch.setattr(psutil.Process, "create_time", lambda self: made(self) - booted() + known[0])
    monkeypatch.setattr(psutil, "boot_time", boot_time)
    assert status_of(tmp_path) == "running"
    run.fail("over")


def test_a_run_that_could_not_say_that_it_failed_is_marked_so_by_its_process_alone(tmp_path, monkeypatch):
    own, other, absent = (tmp_path / name for name in ("own", "other", "absent"))
    for path in (own, other):
        path.mkdir()
        write_atomic(path / "status.json", json.dumps(folder.new_status()))
    elsewhere = json.dumps({**folder.new_status(), "host": "elsewhere"})  # with our number
    write_atomic(other / "status.json", elsewhere)
    assert folder.mark_failed(own, "a full disk") and not folder.mark_failed(own, "twice")
    status = json.loads((own / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("failed", "a full disk") and "host" not in status
    assert not folder.mark_failed(other, "not ours")
    assert folder.mark_failed(absent, "never began") and status_of(absent) == "failed"

    begun = tmp_path / "begun"
    seen = folder.status_of

    def begins(path):  # another process, between the look and the mark
        state = seen(path)
        path.mkdir()
        write_atomic(path / "status.json", elsewhere)
        return state

    monkeypatch.setattr(folder, "status_of", begins)
    assert not folder.mark_failed(begun, "late")
    assert (begun / "status.json").read_text() == elsewhere == (other / "status.json").read_text()


@pytest.mark.parametrize("left", ["model/adapter/.tmpQ93tZl", "model/.README.md.1-abc.tmp", "model/.tmpQ93tZl"])
def test_what_a_run_was_writing_when_it_was_killed_makes_room_for_the_next(tmp_path, left):
    run = LocalRun(False)
    run.start(record(tmp_path))
    (tmp_path / left).parent.mkdir(parents=True)
    (tmp_path / left).write_bytes(b"half")
    run.fail("killed")
    again = LocalRun(False)
    again.start(record(tmp_path))
    folder.clear_unfinished(tmp_path)
    assert not (tmp_path / "model").exists()
    again.fail("over")


def test_temporary_files_that_cannot_be_removed_yet_cost_nothing(monkeypatch, tmp_path):
    """As on NFS, where those that are mapped stay under another name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def busy(*_args, **_keys):
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patched, scratch_folder() as scratch:
        Path(scratch, "mapped").touch()
        patched.setattr(os, "rmdir", busy)


def test_a_process_that_nobody_has_waited_for_is_no_run(tmp_path):
    run = LocalRun(False)
    run.start(record(tmp_path))
    status = json.loads((tmp_path / "status.json").read_text())
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as ended:
        assert ended.stdout is not None and ended.stdout.read() == b""  # its end
        while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        write_atomic(tmp_path / "status.json", json.dumps({**status, "pid": ended.pid, "process": None}))
        assert status_of(tmp_path) == "interrupted"
    run.fail("over")


def test_a_run_that_died_before_its_metrics_were_written_is_interrupted(tmp_path):
    finished(tmp_path)
    (tmp_path / "metrics.json").unlink()
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "done" and "host" not in status
    assert status_of(tmp_path) == "running"  # this process still lives, and may be about to write them
    write_atomic(tmp_path / "status.json", json.dumps({**status, "process": 1.0}))
    assert status_of(tmp_path) == "interrupted"


@pytest.mark.parametrize("damaged", [b"", b'{"params": 1', b"[]", b"\xff\xfe"])
def test_a_run_whose_metrics_are_damaged_makes_room_for_the_next(tmp_path, damaged):
    finished(tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    write_atomic(tmp_path / "status.json", json.dumps({**status, "process": 1.0}))
    (tmp_path / "metrics.json").write_bytes(damaged)
    assert status_of(tmp_path) == "interrupted"
    finished(tmp_path)
    assert status_of(tmp_path) == "done"


def test_status_of_a_folder_without_a_run(tmp_path):
    assert status_of(tmp_path / "none") == status_of(tmp_path) == "absent"
    (tmp_path / "status.json").write_text("[]")
    assert status_of(tmp_path) == "absent"


def _claims(folders: Sequence[Path], begin: Any, won: Any) -> None:
    begin.wait()
    for path in folders:
        try:
            folder.claim_folder(path, overwrite=False)
            won.put(path.name)
        except ConfigError:
            continue
    begin.wait()  # whoever ends earlier makes room for the other


def test_of_processes_that_race_for_a_folder_one_gets_it(tmp_path):
    """New folders, and folders whose holder was killed."""
    fork = multiprocessing.get_context("fork")
    folders, won, begin = [tmp_path / f"{number:03}" for number in range(100)], fork.SimpleQueue(), fork.Barrier(2)
    dead = {**folder.new_status(), "pid": 2**22 + 1}
    for path in folders[::2]:
        path.mkdir()
        (path / "status.json").write_text(json.dumps(dead))
        (path / "metrics.json").write_text("{}")
    racers = [fork.Process(target=_claims, args=(folders, begin, won)) for _ in range(2)]
    for racer in racers:
        racer.start()
    got = [won.get() for _ in folders]
    for racer in racers:
        racer.join()
    assert won.empty() and sorted(got) == [path.name for path in folders]
    for path in folders:
        assert [file.name for file in path.iterdir()] == ["status.json"]
        assert json.loads((path / "status.json").read_text())["pid"] in {racer.pid for racer in racers}


def test_a_claim_needs_no_hard_links(tmp_path, monkeypatch):
    def cannot(*paths):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", cannot)
    folder.claim_folder(tmp_path / "run", overwrite=False)
    assert folder.status_of(tmp_path / "run") == "running"
    assert not create_whole(tmp_path / "run" / "status.json", "{}")
    assert folder.status_of(tmp_path / "run") == "running"


def test_a_claim_on_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(path, data, **settings):
        path.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"^run.dir=.*: cannot write there: No space left on device$"):
        folder.claim_folder(tmp_path / "run", overwrite=False)
    assert not any((tmp_path / "run").iterdir())


def test_a_run_on_another_machine_runs_until_its_cluster_job_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "status.json").write_text(json.dumps({**folder.new_status(), "host": "elsewhere"}))
    with pytest.raises(ConfigError, match=r"^run.dir=.* of elsewhere is still writing .* or status.json removed where"):
        check_folder(tmp_path, overwrite=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # preempted there, and put in the queue again
    assert folder.status_of(tmp_path) == "interrupted"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert folder.status_of(tmp_path) == "running"


def test_a_status_that_is_claimed_is_never_away(tmp_path, monkeypatch):
    """A late process that still knows the stale status opens no gap for a third one."""
    path, rename = tmp_path / "status.json", Path.rename
    path.write_text("stale")
    won = [folder._take(path, b"stale", "first")]

    def renamed(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if not path.exists():  # the moment that a third one waits for
            won.append(folder._take(path, None, "third"))
        return moved

    monkeypatch.setattr(Path, "rename", renamed)
    won.append(folder._take(path, b"stale", "late"))
    assert won == [True, False] and path.read_text() == "first" and [*contents(tmp_path)] == ["status.json"]


def test_a_claim_whose_process_has_ended_is_taken_over(tmp_path, monkeypatch):
    def stale(path: Path) -> Path:
        return path.with_name(f".{path.name}.{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.claim")

    monkeypatch.setattr(folder, "PATIENCE", 0.05)
    path, dead = tmp_path / "status.json", json.dumps({**folder.new_status(), "process": 0.5})
    path.write_text(dead)
    stale(path).write_text(json.dumps(folder.new_status()))
    assert not folder._take(path, dead.encode(), "another") and stale(path).exists(), "it is alive"
    stale(path).write_text(dead)
    stale(stale(path)).write_text(dead)  # who took that over was killed, too
    assert len([*tmp_path.iterdir()]) == 3
    folder.claim_folder(tmp_path, overwrite=False)
    assert folder.status_of(tmp_path) == "running" and [*contents(tmp_path)] == ["status.json"]


def test_who_comes_second_waits_for_the_status_of_the_first(tmp_path):
    """What is told of a folder is then told by that status."""
    path, status = tmp_path / "status.json", json.dumps(folder.new_status())
    path.write_text("stale")
    claim = path.with_name(f".status.json.{hashlib.sha256(b'stale').hexdigest()[:16]}.claim")
    claim.write_text(status)
    timer = threading.Timer(0.1, lambda: (path.write_text(status), claim.unlink()))
    timer.start()
    assert not folder._take(path, b"stale", "second") and path.read_text() == status
    timer.join()
