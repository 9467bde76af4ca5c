"""A streamed run that was killed goes on at the block where it was, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pruneexp import progress
from pruneexp.__main__ import main
from pruneexp.calibrate import bookmark
from pruneexp.surgery import StreamedSave
from pruneexp.tracker import status_of, structure
from pruneexp.types import ConfigError
from tests.benchmarks.big_checkpoint import Shape, write_checkpoint

pytestmark = pytest.mark.slow

# Methods that write down when they are called, and kill the process at the call that kill.txt names.
METHODS = """
import os, signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pruneexp.compensator import Bias, LeastSquares
from pruneexp.criterion import Flap, WandaSp

calls = Counter()


def called(what):
    calls[what] += 1
    with open("calls.txt", "a") as log:
        print(what, file=log)
    if Path("kill.txt").is_file() and Path("kill.txt").read_text() == f"{what} {calls[what]}":
        os.kill(os.getpid(), signal.SIGKILL)


def watched(base, what):
    def method(self, *args):
        called(what)
        return base.__call__(self, *args)

    return dataclass(frozen=True)(type("Watched", (base,), {"__call__": method}))


Flap, WandaSp = watched(Flap, "score"), watched(WandaSp, "score")
Bias, LeastSquares = watched(Bias, "fit"), watched(LeastSquares, "fit")
"""
TARGETS = {
    "criterion": {"flap": "Flap", "wanda_sp": "WandaSp"},
    "compensator": {"bias": "Bias", "least_squares": "LeastSquares"},
}
CASES = {  # what is run; the call that kills it; calls from there to the end; bytes of a shard
    "scores": (
        ["criterion=my_flap", "search=uniform", "compensator=my_bias"],
        "score 3",
        ["score"] * 2 + ["fit"] * 8,
        1,
    ),
    "shrinking": (["criterion=my_flap", "search=uniform", "compensator=my_bias"], "fit 5", ["fit"] * 4, 1),
    "layer by layer": (
        ["criterion=my_wanda_sp", "search=uniform", "compensator=my_bias", "compensator.sequential=true"],
        "fit 5",
        ["score", "fit", "fit"] * 2,
        10**9,
    ),
    "site by site": (
        ["criterion=my_flap", "search=uniform", "compensator=my_least_squares"],
        "fit 6",
        ["fit"] * 4,
        10**9,
    ),
}

Run = Callable[..., int]
save = sys.modules[StreamedSave.__module__]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in `tmp_path`, with a model of four layers there and methods that can be killed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(progress, "BAR_AFTER", 3600.0)
    monkeypatch.setattr(structure, "structure_figure", lambda *_: None)
    monkeypatch.setattr(bookmark, "SHARE", float("inf"))  # every block is noted, however short it is
    write_checkpoint(tmp_path / "dense", Shape(48, 80, 4, 6, 3, 96), "float32", seed=0)
    np.save("tokens.npy", np.random.default_rng(0).integers(3, 96, (6, 24)))
    Path("methods.py").write_text(METHODS)
    for group, classes in TARGETS.items():
        Path("conf", group).mkdir(parents=True)
        for name, target in classes.items():
            lines = Path(__file__).parents[1].joinpath("conf", group, f"{name}.yaml").read_text().splitlines()
            text = [f"_target_: methods.{target}" if line.startswith("_target_") else line for line in lines]
            Path("conf", group, f"my_{name}.yaml").write_text("\n".join(text))
    before = signal.getsignal(signal.SIGTERM)

    def command(*typed: str) -> int:
        monkeypatch.delitem(sys.modules, "methods", raising=False)
        try:
            return main(line(*typed))
        finally:
            signal.signal(signal.SIGTERM, before)

    return command


def line(*typed: str) -> list[str]:
    files = ["dataset.calibration=tokens.npy", "dataset.evaluation=tokens.npy", "dataset.length=24"]
    common = ["model=hf", "model.path=dense", "model.stream=true", "model.batch_size=2", "dataset=tokens", *files]
    return ["--config-dir", "conf", *common, "sparsity.ratio=0.4", "evaluator=[perplexity,size]", "cache=off", *typed]


def killed(run: Run, at: str, *typed: str) -> None:
    """Runs the command in a process of its own, which kills itself at the call `at`. Forked: it need not import."""
    Path("kill.txt").write_text(at)
    child = os.fork()
    if child == 0:
        try:
            run(*typed)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    Path("kill.txt").unlink()


def calls() -> list[str]:
    """Since they were last asked for."""
    names = Path("calls.txt").read_text().split()
    Path("calls.txt").unlink()
    return names


def outcome(folder: str) -> dict[str, Any]:
    """What a run leaves, but for times and memory."""
    metrics = json.loads(Path(folder, "metrics.json").read_text())
    tensors = {}
    for file in sorted(Path(folder, "model").glob("*.safetensors")):
        tensors |= {(file.name, name): tensor for name, tensor in load_file(file).items()}
    return {
        "metrics": {k: v for k, v in metrics.items() if not k.startswith(("seconds/", "memory/"))},
        "tensors": {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()},
        "files": sorted(path.name for path in Path(folder, "model").iterdir()),
        "folder": sorted(path.name for path in Path(folder).iterdir()),
        **{name: Path(folder, name).read_bytes() for name in ("plan.json", "scores.safetensors", "proof.json")},
    }


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_at_its_block(case: str, run: Run, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    typed, at, left, shard_bytes = CASES[case]
    monkeypatch.setattr(save, "STREAMED_SHARD_BYTES", shard_bytes)
    killed(run, at, *typed, "run.dir=killed")
    assert status_of(Path("killed")) == "interrupted"
    assert not Path("killed/model").exists() and not Path("killed/metrics.json").exists()
    with pytest.raises(ConfigError, match="holds no model"):
        source("killed/model.partial").check()
    calls()
    assert run(*typed, "run.dir=killed") == 0
    assert calls() == left
    assert run(*typed, "run.dir=undisturbed") == 0
    assert len(calls()) > len(left)
    first, second = outcome("undisturbed"), outcome("killed")
    assert first["tensors"] and first == second


def test_what_was_written_is_of_use_to_the_same_run_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "STREAMED_SHARD_BYTES", 1)
    typed, at, left, _ = CASES["shrinking"]
    whole = ["score"] * 4 + ["fit"] * 8
    killed(run, at, *typed, "run.dir=run")
    assert sorted(path.name for path in Path("run/model.partial").iterdir()) == ["shard-00000", "shard-00001"]
    shutil.copytree("run", "as_killed")
    calls()

    def put_back() -> None:
        shutil.rmtree("run")
        shutil.copytree("as_killed", "run")

    assert run(*typed, "run.dir=run") == 0 and calls() == left
    put_back()
    shard = Path("run/model.partial/shard-00001")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(*typed, "run.dir=run") == 0 and calls() == ["fit"] * 8, "cut short: written anew, scores known"
    put_back()
    assert run(*typed, "run.dir=run", "run.overwrite=true") == 0 and calls() == whole
    put_back()
    assert run(*typed, "run.dir=run", "sparsity.ratio=0.5") == 0 and calls() == whole, "another run's notes"
    put_back()
    tokens = np.load("tokens.npy")
    np.save("tokens.npy", tokens[::-1])
    assert run(*typed, "run.dir=run") == 0 and calls() == whole, "other tokens"
    put_back()
    assert run(*typed, "run.dir=run", "model.stream=false") == 0 and calls() == whole
    assert sorted(path.name for path in Path("run").iterdir()) == sorted(
        {*("config.yaml environment.json log.txt metrics.json model plan.json proof.json".split())}
        | {"scores.safetensors", "status.json"}
    )


def test_a_checkpoint_in_its_place_is_not_written_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it was proved or measured."""
    from pruneexp.experiment import deliver

    def broken(*_: Any) -> Any:
        raise RuntimeError("killed")

    typed = [*CASES["shrinking"][0], "run.dir=run"]
    with monkeypatch.context() as patch:
        patch.setattr(deliver, "check_source", broken)
        assert run(*typed) == 1
    calls()
    times = {path: path.stat().st_mtime_ns for path in Path("run/model").iterdir()}
    assert run(*typed) == 0
    assert not Path("calls.txt").exists()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.name != "plan.json")
    assert run(*CASES["shrinking"][0], "run.dir=undisturbed") == 0
    assert outcome("run") == outcome("undisturbed")
