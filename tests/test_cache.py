"""The cache: what goes in comes out; what is damaged, foreign or too much does not; many jobs compute a thing once."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pruneexp.cache import Cache, NoCache, store
from pruneexp.cache.packing import Unpackable, packed, unpacked
from pruneexp.criterion.obs import Obs
from pruneexp.evidence import Gram, Moments
from pruneexp.fingerprint import version_of
from pruneexp.types import ColumnScores, ConfigError, RemovalPath
from tests.conftest import PARITY
from tests.processes import PRELOAD, started

KEY = {"what": "a test"}
FILES = [f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
QUICK = ["model=hf", f"model.path={PARITY}", "dataset=tokens", "dataset.length=64", *FILES]
QUICK += ["evaluator=[perplexity,size]"]
VARYING = ("seconds/", "memory/")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"), 1.0)


def kept(cache: Cache, key: dict[str, Any], value: Any) -> Any:
    with cache.held([key]) as entries:
        entries.put(key, value)
        return entries.get(key)


def path_of(cache: Cache) -> Path:
    (path,) = cache.folder.glob("*.safetensors")
    return path


def same(left: Any, right: Any) -> bool:
    """Outlines and tensors, bit for bit."""
    (outline, tensors), (other, others) = packed(left), packed(right)
    return outline == other and all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_what_goes_in_comes_out(cache: Cache) -> None:
    moments = replace(Moments(3, torch.rand(4), torch.rand(4)), m2_C=torch.rand(8, dtype=torch.float64)[::2])
    value = {"a.b": moments, "scores": ColumnScores(torch.rand(2), torch.rand(4).half()), 3: (None, True, [1.5, "x"])}
    assert same(kept(cache, KEY, value), value)
    assert list(kept(cache, KEY, value)) == ["a.b", "scores", 3]


def test_a_removal_path_refits_its_readers_as_before(cache: Cache, tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    block = model.block(0)
    torch.manual_seed(0)
    seen = {site.name: Gram.empty(site).update_(torch.randn(4, 9, site.channels)) for site in block.sites}
    paths = Obs(ridge=1e-3, step=1, levels=4, scale="none", sequential=False, memory=8.0, ridge_per="site")(block, seen)
    back = kept(cache, KEY, paths)
    for name, path in paths.items():
        assert isinstance(path, RemovalPath)
        assert torch.equal(back[name].order_U, path.order_U)
        weight, bias = path.out_projections[2]
        again, its_bias = back[name].out_projections[2]
        assert torch.equal(weight, again) and (bias is None) == (its_bias is None)


def test_what_no_file_holds_is_not_kept(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Unpackable, match="a function"):
        packed(len and (lambda: None))
    assert kept(cache, KEY, {"call": lambda: None}) is None
    assert "is not kept" in caplog.text


def test_only_dataclasses_of_loaded_modules_are_made() -> None:
    with pytest.raises(Unpackable, match="no dataclass"):
        unpacked({"class": ["os", "system"], "fields": {}}, {})
    with pytest.raises(KeyError):
        unpacked({"class": ["not_imported_anywhere", "X"], "fields": {}}, {})


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_damage_is_noticed_and_made_anew(cache: Cache, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    value = {"x": torch.arange(64.0)}
    kept(cache, KEY, value)
    path = path_of(cache)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-9] ^= 1
    elif damage == "foreign":  # another key's entry under this name
        other = Cache(str(cache.folder / "other"), 1.0)
        kept(other, {"what": "else"}, value)
        data = bytearray(path_of(other).read_bytes())
    path.write_bytes(bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(damage, len(data))]))
    with cache.held([KEY]) as entries:
        assert entries.get(KEY) is None
        assert "damaged" in caplog.text and not path.exists()
        entries.put(KEY, value)
        assert same(entries.get(KEY), value)


def test_what_was_used_longest_ago_leaves_first(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), 3.2 * 8192 / 2**30)
    value = torch.zeros(1000, dtype=torch.float64)
    keys = [{"what": str(number)} for number in range(4)]
    for number, key in enumerate(keys[:3]):
        kept(cache, key, value)
        os.utime(cache._path(key), (number, number))
    with cache.held([keys[0]]) as entries:
        assert entries.get(keys[0]) is not None  # used again: now the youngest
    kept(cache, keys[3], value)
    with cache.held(keys) as entries:
        assert [entries.get(key) is not None for key in keys] == [True, False, True, True]
    kept(cache, {"what": "large"}, torch.zeros(2000, dtype=torch.float64))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= cache.limit * 2**30


def test_more_than_half_the_limit_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), 1000 / 2**30)
    assert kept(cache, KEY, torch.zeros(100, dtype=torch.float64)) is None


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(str(tmp_path / "file" / "cache"), 1.0)
    with pytest.raises(ConfigError, match=r"cache.dir='.*/file/cache': '.*/file' is a file; expected a folder"):
        cache.check()
    for _ in range(2):
        with cache.held([KEY]) as entries:
            entries.put(KEY, torch.ones(1))
            assert entries.get(KEY) is None
    assert caplog.text.count("nothing is cached") == 1


def test_a_file_system_without_locks_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_args: Any, **_keys: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", unsupported)
    with Cache(str(tmp_path), 1.0).held([KEY]) as entries:
        assert entries.get(KEY) is None
    assert f"nothing is cached: {tmp_path}: FileSystem does not appear" in caplog.text


def test_what_another_job_removes_as_it_is_read_is_found(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(cache, KEY, torch.ones(3))
    read = store._read

    def removed(path: Path, *more: Any) -> Any:
        value = read(path, *more)
        path.unlink()
        return value

    monkeypatch.setattr(store, "_read", removed)
    with cache.held([KEY]) as entries:
        assert torch.equal(entries.get(KEY), torch.ones(3))


def test_what_killed_jobs_were_writing_leaves(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    """Ours and safetensors' own; another job may rename one between two looks, as if it were a link to nothing."""
    cache.folder.mkdir()
    old = [cache.folder / name for name in (".x.safetensors.1-abc.tmp", ".tmpQ93tZl")]
    new = cache.folder / ".tmpA1b2C3"
    for path in (*old, new):
        path.write_bytes(b"half")
    for path in old:
        os.utime(path, (0, 0))
    (cache.folder / ".y.safetensors.2-abc.tmp").symlink_to("nowhere")
    assert kept(cache, KEY, torch.ones(1)) is not None and "not kept" not in caplog.text
    assert new.exists() and not any(path.exists() for path in old)


def test_settings_and_source_make_the_version() -> None:
    first = Obs(ridge=1e-3, step=1, levels=4, scale="none", sequential=False, memory=8.0, ridge_per="site")
    assert version_of(first) == version_of(replace(first))
    assert version_of(first) != version_of(replace(first, ridge=1e-2))
    assert version_of(Gram) != version_of(Moments)


def _compute(folder: str, number: int) -> None:
    cache = Cache(folder, 1.0)
    with cache.held([KEY]) as entries:
        if entries.get(KEY) is None:
            Path(folder, f"computed-{number}").touch()
            time.sleep(0.2)
            entries.put(KEY, torch.ones(3))


def _hold_for_ever(folder: str) -> None:
    with Cache(folder, 1.0).held([KEY]):
        Path(folder, "holds").touch()
        time.sleep(3600)


@pytest.mark.slow
def test_jobs_that_want_the_same_wait_for_the_first(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    jobs = [context.Process(target=_compute, args=(str(tmp_path), number)) for number in range(6)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    assert len(list(tmp_path.glob("computed-*"))) == 1


@pytest.mark.slow
def test_a_killed_job_lets_go(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    job = context.Process(target=_hold_for_ever, args=(str(tmp_path),))
    job.start()
    while not (tmp_path / "holds").exists():
        time.sleep(0.01)
    assert job.pid is not None
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    assert torch.equal(kept(Cache(str(tmp_path), 1.0), KEY, torch.ones(3)), torch.ones(3))


def metrics(folder: Path) -> dict[str, float]:
    figures = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in figures.items() if not key.startswith(VARYING)}


def ran(folder: Path, *argv: str) -> None:
    folder.mkdir(exist_ok=True)
    process = started(folder, *argv)
    process.join()
    assert process.exitcode == 0, (folder / "out.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ["recipe=flap"],
        ["recipe=wanda_sp", "compensator=bias"],  # scores layer by layer, means of the dense model
        ["recipe=llm_pruner", "compensator=bias"],
        ["recipe=best", "search.effort=2"],
        ["recipe=shortgpt"],
    ],
    ids=lambda method: method[0].removeprefix("recipe="),
)
def test_a_run_from_the_cache_is_the_run(tmp_path: Path, method: list[str]) -> None:
    """Plan, checkpoint and metrics, passes among them: bit for bit those of a run without a cache."""
    typed = [*QUICK, *method, "run.prove=off"]
    for folder, cached in (("plain", ["cache=off"]), ("first", []), ("second", [])):
        ran(tmp_path, *typed, f"run.dir={folder}", *cached)
    plain = tmp_path / "plain"
    assert "cache: " not in (tmp_path / "first" / "log.txt").read_text()
    assert "cache: the dense model's figures from" in (tmp_path / "second" / "log.txt").read_text()
    for other in (tmp_path / "first", tmp_path / "second"):
        assert metrics(other) == metrics(plain)
        for file in ("plan.json", "scores.safetensors"):
            assert (other / file).read_bytes() == (plain / file).read_bytes()
        for path in (plain / "model").glob("*.safetensors"):
            assert (other / "model" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_one_calibration_serves_ratios_searches_and_compensators(tmp_path: Path) -> None:
    swept = ["--multirun", *QUICK, "recipe=flap", "sparsity.ratio=0.2,0.4", "search=al_am,global"]
    ran(tmp_path, *swept, "compensator=none,bias", "sweep.dir=swept")
    logs = [path.read_text() for path in (tmp_path / "swept").glob("*/log.txt")]
    assert len(logs) == 8
    assert sum("cache: scores from" in log for log in logs) == 7
    assert sum("cache: evidence from" in log for log in logs) == 4  # all that have a bias
    assert len(list((tmp_path / "outputs" / "cache").glob("*.safetensors"))) == 3  # scores, means, the dense figures


@pytest.mark.slow
def test_a_job_that_shares_the_dense_models_states_gives_what_it_gives_alone(tmp_path: Path) -> None:
    typed = [*QUICK, "recipe=flap", "compensator=least_squares"]
    ran(tmp_path, "--multirun", *typed, "sparsity.ratio=0.2,0.3,0.4", "sweep.dir=swept")
    ran(tmp_path, *typed, "sparsity.ratio=0.4", "run.dir=alone", "run.save=false", "cache=off")
    [last] = [path.parent for path in (tmp_path / "swept").glob("*/config.yaml") if "ratio: 0.4" in path.read_text()]
    assert metrics(last) == metrics(tmp_path / "alone")


@pytest.mark.slow
def test_eight_jobs_at_once_give_what_they_give_one_by_one(tmp_path: Path) -> None:
    ratios = [0.1 * number for number in range(1, 9)]
    typed = [*QUICK, "recipe=flap", "run.save=false"]
    jobs = [started(tmp_path, *typed, f"sparsity.ratio={ratio:.1f}", f"run.dir=p{ratio:.1f}") for ratio in ratios]
    for job in jobs:
        job.join()
        assert job.exitcode == 0, (tmp_path / "out.txt").read_text()
    for ratio in ratios[::3]:
        ran(tmp_path, *typed, f"sparsity.ratio={ratio:.1f}", f"run.dir=s{ratio:.1f}", "cache=off")
        assert metrics(tmp_path / f"p{ratio:.1f}") == metrics(tmp_path / f"s{ratio:.1f}")
    assert sum("cache: scores from" in path.read_text() for path in tmp_path.glob("p*/log.txt")) == 7


@pytest.mark.slow
def test_no_cache_keeps_nothing(tmp_path: Path) -> None:
    with NoCache().held([KEY]) as entries:
        entries.put(KEY, torch.ones(1))
        assert entries.get(KEY) is None
    ran(tmp_path, *QUICK, "cache=off", "run.dir=x", "run.save=false")
    assert not (tmp_path / "outputs").exists()


KILLER = '''
import os, signal
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Killer:
    """Kills its process, once each, at these moments: job and event."""

    moments: list[str]
    jobs = 0

    def _at(self, event):
        moment = f"{Killer.jobs}-{event}"
        if moment in self.moments and not Path(moment).exists():
            Path(moment).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def start(self, record):
        Killer.jobs += 1
        self._at("start")

    def log(self, metrics):
        self._at("log")

    def artifacts(self, plan, scores, sites):
        self._at("artifacts")

    def finish(self, metrics):
        self._at("finish")

    def fail(self, reason, trace=""):
        pass
'''


def table(folder: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    return [{key: value for key, value in row.items() if not key.startswith(VARYING)} for row in rows]


@pytest.mark.slow
def test_a_sweep_killed_at_several_moments_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Nothing finished is run again, nothing half-written is read, and the table is the undisturbed one's."""
    (tmp_path / "killing.py").write_text(KILLER)
    (tmp_path / "own" / "tracker").mkdir(parents=True)
    moments = ["1-log", "2-start", "2-artifacts", "1-finish"]  # counted in each process anew
    (tmp_path / "own" / "tracker" / "killer.yaml").write_text(f"_target_: killing.Killer\nmoments: {moments}\n")
    swept = ["--multirun", *QUICK, "recipe=flap", "sparsity.ratio=0.2,0.3,0.4", "run.save=true"]
    ran(tmp_path, *swept, "sweep.dir=whole", "cache.dir=apart")
    typed = [*swept, "sweep.dir=killed", "--config-dir", "own", "tracker=killer"]
    finished: dict[Path, tuple[str, int]] = {}
    codes = []
    for _ in range(len(moments) + 1):
        process = started(tmp_path, *typed)
        process.join()
        codes.append(process.exitcode)
        for path, (text, modified) in finished.items():
            assert (path.read_text(), path.stat().st_mtime_ns) == (text, modified), "a finished job ran again"
        done = [path for path in (tmp_path / "killed").glob("*/metrics.json")]
        finished = {path: (path.read_text(), path.stat().st_mtime_ns) for path in done}
    assert codes == [-9] * len(moments) + [0], (tmp_path / "out.txt").read_text()
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    for folder in (tmp_path / "whole").iterdir():
        for path in folder.glob("model/*.safetensors"):
            assert (tmp_path / "killed" / folder.name / "model" / path.name).read_bytes() == path.read_bytes()
