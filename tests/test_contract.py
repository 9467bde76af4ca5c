"""What other people's scripts rely on: the files of a run folder, what is in them, exit codes, folders of sweeps."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pruneexp import progress
from pruneexp.__main__ import main
from pruneexp.cli.build import build
from pruneexp.cli.compose import SECTIONS, Composed, compose
from pruneexp.conf_files import choices, conf_folder
from pruneexp.evidence.held_out import RIDGES
from pruneexp.fingerprint import config_hash
from pruneexp.tracker import structure
from pruneexp.types import Plan
from tests.cases import each
from tests.composing import composer
from tests.conftest import FAMILIES, PARITY
from tests.messages import assert_told

pytestmark = pytest.mark.slow

FILES = {  # of a run that writes its checkpoint and proves it
    "config.yaml",
    "environment.json",
    "plan.json",
    "scores.safetensors",
    "metrics.json",
    "status.json",
    "log.txt",
    "model",
}
DATA = [f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
PARITY_RUN = [
    "model=hf",
    f"model.path={PARITY}",
    "dataset=tokens",
    "dataset.length=64",
    *DATA,
    "evaluator=[perplexity,size]",
]
ABOUT_TIME = ("seconds/", "memory/")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Ended]


def run(*arguments: str) -> Ended:
    """The command, in this process; what it prints is captured."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """A run of the small LLaMA in `tmp_path`, without a picture, a checkpoint or a proof unless asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(progress, "BAR_AFTER", 3600.0)
    monkeypatch.setattr(structure, "structure_figure", lambda *_: None)
    return lambda *typed: run(*PARITY_RUN, "run.prove=off", "run.save=false", *typed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run with everything in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("contract"))
        patch.setattr(sys, "path", list(sys.path))
        ended = run(*PARITY_RUN, "run.dir=run", "run.prove=in_place", "sparsity.ratio=0.25")
        assert ended.code == 0, ended.err
        yield Path("run").resolve()


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# The files of a run folder


def test_the_files_of_a_run(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names >= FILES
    assert not [name for name in names if name.startswith(".") or name.endswith((".tmp", ".partial"))]


def test_metrics_are_written_last(folder: Path) -> None:
    times = {name: time for name, (time, _) in snapshot(folder).items()}
    assert max(times, key=lambda name: times[name]) == "metrics.json"
    assert all(time <= times["metrics.json"] for time in times.values())


def test_the_config_is_complete_and_builds_the_same_run_again(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert set(config) == {*SECTIONS, "asked"}
    assert "${" not in text and "???" not in text, "resolved: no other file is needed to read it"
    composed = compose([*PARITY_RUN, "run.dir=run", "run.prove=in_place", "sparsity.ratio=0.25"])
    assert config == composed.config
    again = build(Composed(config, composed.job, composed.folders))
    typed = build(composed)
    for part in ("model", "dataset", "criterion", "sparsity", "search", "compensator", "tracker", "run", "seed"):
        assert getattr(again, part) == getattr(typed, part), part
    assert set(again.evaluators) == set(typed.evaluators)


def test_numbers_that_yaml_misreads_survive(cli: Cli) -> None:
    assert cli("run.dir=run", "sparsity.ratio=1e-1", "evaluator=[size]").code == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["sparsity"]["ratio"] == 0.1


def test_the_environment(folder: Path) -> None:
    environment = read(folder / "environment.json")
    assert environment["versions"]["torch"] == torch.__version__
    assert {"pruneexp", "transformers", "safetensors", "python"} <= set(environment["versions"])
    assert {"platform", "cpus", "gpus", "memory_bytes", "git", "command"} <= set(environment)
    files = environment["model"]["files"]
    assert set(files) == {"config.json", "model.safetensors"}
    for name, record in files.items():
        assert record["sha256"] == hashlib.sha256((PARITY / name).read_bytes()).hexdigest()
    chosen = environment["choices"]
    assert set(chosen) == {path.name for path in conf_folder().iterdir() if path.is_dir()}
    assert (chosen["recipe"], chosen["search"], chosen["model"], chosen["cache"]) == ("flap", "al_am", "hf", "on")
    assert chosen["evaluator"] == ["perplexity", "size"]
    data = environment["data"]
    assert data["calibration_windows"] == list(np.load(PARITY / "calib.npy").shape)
    assert data["calibration"]["sha256"] == hashlib.sha256((PARITY / "calib.npy").read_bytes()).hexdigest()
    assert re.fullmatch(r"[0-9a-f]{64}", data["calibration_tokens_sha256"])


def assert_plan(plan: dict[str, Any], names: dict[str, tuple[str, int]]) -> None:
    """The schema, to the letter. `names`: site -> kind, units."""
    assert set(plan) == {"version", "sites", "budget"} and plan["version"] == 1
    assert set(plan["sites"]) == set(names)
    for name, (kind, units) in names.items():
        site = plan["sites"][name]
        assert set(site) == {"kind", "units", "kept"}
        assert (site["kind"], site["units"]) == (kind, units)
        assert all(type(unit) is int and 0 <= unit < units for unit in site["kept"])
        assert site["kept"] == sorted(set(site["kept"]))


def test_the_plan(folder: Path) -> None:
    plan = read(folder / "plan.json")
    names = {}
    for layer in range(4):
        names[f"model.layers.{layer}.self_attn"] = ("attention", 4)
        names[f"model.layers.{layer}.mlp"] = ("mlp", 172)
    assert_plan(plan, names)
    assert plan["budget"]["ratio"] == 0.25 and plan["budget"]["of"] == "decoder"
    assert sum(172 - len(plan["sites"][f"model.layers.{layer}.mlp"]["kept"]) for layer in range(4)) > 0
    text = (folder / "plan.json").read_text()
    assert Plan.from_json(text).to_json() + "\n" == text, "what is read is what was written"


def test_the_plan_in_the_checkpoint_is_the_runs(folder: Path) -> None:
    assert (folder / "model" / "plan.json").read_bytes() == (folder / "plan.json").read_bytes()


def test_the_scores(folder: Path) -> None:
    plan, scores = read(folder / "plan.json")["sites"], load_file(folder / "scores.safetensors")
    assert set(scores) == set(plan)
    for name, score in scores.items():
        assert score.dtype == torch.float32 and score.shape == (plan[name]["units"],)
        assert torch.isfinite(score).all()
        gone = sorted(set(range(plan[name]["units"])) - set(plan[name]["kept"]))
        if gone and plan[name]["kept"]:  # within a sublayer, what stays scores higher
            assert score[plan[name]["kept"]].min() >= score[gone].max()


def test_the_metrics(folder: Path) -> None:
    metrics = read(folder / "metrics.json")
    assert all(type(value) in (int, float) for value in metrics.values()), "flat, and numbers alone"
    named = {
        "dense/params",
        "pruned/params",
        "sparsity/decoder",
        "memory/peak_bytes",
        "passes/forward",
        "passes/backward",
        "dense/ppl/test@64",
        "pruned/ppl/test@64",
    }
    assert named <= set(metrics)
    assert {key for key in metrics if key.startswith("seconds/")} >= {
        "seconds/load",
        "seconds/calibrate",
        "seconds/search",
        "seconds/shrink",
        "seconds/save",
    }
    assert all(value >= 0 for key, value in metrics.items() if key.startswith("seconds/"))
    assert all(type(metrics[key]) is int for key in ("dense/params", "pruned/params", "memory/peak_bytes"))
    assert metrics["passes/forward"] == 1 and metrics["passes/backward"] == 0
    oracle = read(PARITY / "oracle.json")
    assert metrics["dense/ppl/test@64"] == pytest.approx(oracle["dense_ppl"], rel=1e-5)


def decoder_params(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() for name, t in tensors.items() if name.startswith("model.layers."))


def test_the_share_is_that_of_the_checkpoints_tensors(folder: Path) -> None:
    metrics = read(folder / "metrics.json")
    before, after = load_file(PARITY / "model.safetensors"), {}
    for file in (folder / "model").glob("*.safetensors"):
        after |= load_file(file)
    before = {name: tensor for name, tensor in before.items() if "inv_freq" not in name}
    assert metrics["sparsity/decoder"] == 1 - decoder_params(after) / decoder_params(before)
    assert metrics["dense/params"] == sum(t.numel() for t in before.values())
    assert metrics["pruned/params"] == sum(t.numel() for t in after.values())
    assert abs(metrics["sparsity/decoder"] - 0.25) < 0.02


def test_the_checkpoint_holds_no_pickles(folder: Path) -> None:
    names = {path.name for path in (folder / "model").rglob("*")}
    assert "config.json" in names and any(name.endswith(".safetensors") for name in names)
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".py", ".txt", ".model", ".jinja", ".md"}


def test_the_status_and_the_log(folder: Path) -> None:
    status = read(folder / "status.json")
    assert (status["status"], status["reason"]) == ("done", None) and status["started"] <= status["ended"]
    log = (folder / "log.txt").read_text()
    assert "pruned/ppl/test@64 = " in log and log.rstrip().endswith("done")


SITES = {
    "llama": {"model.layers.{}.self_attn": ("attention", 3), "model.layers.{}.mlp": ("mlp", 40)},
    "opt": {"model.decoder.layers.{}.self_attn": ("attention", 6), "model.decoder.layers.{}.fc2": ("mlp", 40)},
    "bloom": {"transformer.h.{}.self_attention": ("attention", 6), "transformer.h.{}.mlp": ("mlp", 192)},
}


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_names_its_sites(
    family: str, stream: str, cli: Cli, tiny_folder: Callable[[str], Path], tokens_NT: torch.Tensor
) -> None:
    np.save("tokens.npy", tokens_NT.numpy())
    files = ["dataset.calibration=tokens.npy", "dataset.evaluation=tokens.npy", "dataset.length=24"]
    ended = cli(f"model.path={tiny_folder(family)}", *files, "run.dir=run", "run.save=true", f"model.stream={stream}")
    assert ended.code == 0, ended.err
    names = {name.format(layer): site for layer in range(3) for name, site in SITES[family].items()}
    assert_plan(read(Path("run/plan.json")), names)
    scores = load_file("run/scores.safetensors")
    assert {name: tuple(score.shape) for name, score in scores.items()} == {n: (u,) for n, (_, u) in names.items()}
    assert {path.name for path in Path("run").iterdir()} >= FILES
    assert {path.name for path in Path("run/model").iterdir()} >= {"config.json", "plan.json"}
    assert {"dense/ppl/tokens@24", "pruned/ppl/tokens@24"} <= set(read(Path("run/metrics.json")))


# How a metric is called


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ([], "ppl/test@64"),
        (["dataset.length=32"], "ppl/test@32"),
        (["dataset.name=mine"], "ppl/mine@64"),
        (["evaluator.perplexity.length=16"], "ppl/test@16"),
        (["evaluator.perplexity.samples=3"], "ppl/test@64[3]"),
    ],
)
def test_names_carry_the_protocol(typed: list[str], name: str, cli: Cli) -> None:
    assert cli("run.dir=run", *typed).code == 0
    metrics = read(Path("run/metrics.json"))
    assert {key for key in metrics if "/ppl/" in key} == {f"dense/{name}", f"pruned/{name}"}


# Exit codes


def test_a_run_that_is_done(cli: Cli) -> None:
    ended = cli()
    assert ended.code == 0 and ended.err == ""
    (made,) = Path("outputs/flap").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", made.name)
    assert read(made / "status.json")["status"] == "done" and not (made / "model").exists()


def test_a_config_that_cannot_work(cli: Cli) -> None:
    ended = cli("sparsity.ratio=2")
    assert ended.code == 2 and ended.out == ""
    assert ended.err == "pruneexp: sparsity.ratio=2.0: expected a number in [0, 1)\n"
    assert not list(Path().iterdir())


def test_a_run_that_fails_says_why(cli: Cli, tmp_path: Path) -> None:
    tensors = load_file(PARITY / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    Path("broken").mkdir()
    save_file(tensors, "broken/model.safetensors", metadata={"format": "pt"})
    Path("broken/config.json").write_bytes((PARITY / "config.json").read_bytes())
    ended = cli("model.path=broken", "run.dir=run", "evaluator=[size]")
    reason = "model.layers.1.mlp.up_proj.weight: weights hold NaN or Inf"
    assert (ended.code, ended.err) == (1, f"pruneexp: failed: {reason}\n")
    status = read(Path("run/status.json"))
    assert (status["status"], status["reason"]) == ("failed", reason) and status["ended"]
    assert not Path("run/metrics.json").exists(), "a run with metrics.json is done"
    assert cli("run.dir=run").code == 0, "what a failed run left is no obstacle"
    assert read(Path("run/status.json"))["status"] == "done"


def test_what_compensation_chose_is_written_down_site_by_site(cli: Cli) -> None:
    assert cli("run.dir=run", "compensator=least_squares", "evaluator=[size]").code == 0
    sites, chosen = read(Path("run/plan.json"))["sites"], read(Path("run/compensation.json"))
    assert set(chosen) == {name for name, site in sites.items() if 0 < len(site["kept"]) < site["units"]}
    assert {settings["ridge"] for settings in chosen.values()} <= {ridge / 2 for ridge in RIDGES}
    assert {settings["target"] for settings in chosen.values()} == {"dense"}
    typed = ("run.dir=run", "compensator=least_squares", "evaluator=[size]", "run.overwrite=true")
    assert cli(*typed, "compensator.ridge=1").code == 0
    assert read(Path("run/compensation.json")) == dict.fromkeys(chosen, {"target": "dense"}), "what auto came to"
    typed = (*typed, "compensator.ridge=1", "compensator.target=pruned")
    assert cli(*typed).code == 0 and not Path("run/compensation.json").exists()


def test_what_the_criterion_chose_is_written_down_site_by_site(cli: Cli) -> None:
    typed = ("run.dir=run", "criterion=obs", "evaluator=[size]", "run.overwrite=true")
    assert cli(*typed).code == 0
    sites, chosen = read(Path("run/plan.json"))["sites"], read(Path("run/criterion.json"))
    assert set(chosen) == set(sites) and all(set(of_site) == {"ridge"} for of_site in chosen.values())
    assert {settings["ridge"] for settings in chosen.values()} <= {ridge / 2 for ridge in RIDGES}
    assert cli(*typed).code == 0 and read(Path("run/criterion.json")) == chosen, "from the cache, too"
    assert cli(*typed, "criterion.ridge=1").code == 0 and not Path("run/criterion.json").exists()


def test_windows_that_are_too_few_to_hold_some_back(cli: Cli) -> None:
    np.save("few.npy", np.load(PARITY / "calib.npy")[:3])
    typed = ("run.dir=run", "compensator=least_squares", "dataset.calibration=few.npy", "evaluator=[size]")
    ended = cli(*typed)
    assert ended.code == 2 and not Path("run").exists()
    assert_told(
        ended.err, "dataset.calibration=few.npy", "at least 4", "compensator=least_squares", "compensator.ridge"
    )
    assert cli(*typed, "compensator.ridge=1").code == 0


@pytest.mark.parametrize("part", ["criterion=obs criterion.ridge=0", "compensator=least_squares compensator.ridge=0"])
def test_inputs_that_say_too_little_name_the_ridge(part: str, cli: Cli) -> None:
    np.save("few.npy", np.load(PARITY / "calib.npy")[:2, :40])  # 80 tokens for 172 channels
    typed = ("search=uniform", "sparsity.ratio=0.25", "dataset.calibration=few.npy", "evaluator=[size]")
    ended = cli("run.dir=run", *typed, *part.split())
    few, reason = ended.err.splitlines()
    assert ended.code == 1 and few.startswith("WARNING: dataset.calibration=few.npy: 80 calibration tokens, few for ")
    assert "ridge=0.0: the inputs' covariance is singular" in reason
    assert "expected a larger ridge" in read(Path("run/status.json"))["reason"]


@pytest.mark.parametrize(
    ("end", "code", "reason", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted", "interrupted"),
        (MemoryError(), 1, "out of memory; a smaller model.batch_size or model.stream=true needs less", None),
        (ValueError("a bug\nof two lines"), 1, "ValueError: a bug of two lines", None),
    ],
    ids=["interrupt", "memory", "bug"],
)
def test_every_end_is_recorded(
    end: BaseException, code: int, reason: str, line: str | None, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pruneexp.experiment import run as experiment

    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise end

    monkeypatch.setattr(experiment, "prune_in_rounds_", broken)
    ended = cli("run.dir=run", "evaluator=[size]")
    assert ended.code == code and ended.err.count("\n") == 1 and "Traceback" not in ended.err
    assert ended.err.startswith(f"pruneexp: {line or 'failed: ' + reason}")
    status = read(Path("run/status.json"))
    place = rf", raised in broken \({re.escape(__file__)}, line \d+\)" if isinstance(end, ValueError) else ""
    assert status["status"] == "failed" and re.fullmatch(re.escape(reason) + place, status["reason"])
    assert ("Traceback" in Path("run/log.txt").read_text()) == (code == 1)
    assert not Path("run/metrics.json").exists()


def test_a_dry_run_writes_nothing(cli: Cli) -> None:
    ended = cli("run.dry=true", "run.dir=run")
    assert ended.code == 0 and "4 layers, 16 attention units, 688 mlp units" in ended.out
    assert not list(Path().iterdir())


# A finished run is safe


def test_a_finished_run_is_not_replaced_unless_asked(cli: Cli) -> None:
    assert cli("run.dir=run", "run.save=true", "evaluator=[size]").code == 0
    Path("run/notes.md").write_text("mine")
    before = snapshot(Path("run"))
    ended = cli("run.dir=run", "sparsity.ratio=0.5", "evaluator=[size]")
    line = "pruneexp: run.dir='run': holds a finished run; expected an empty folder or run.overwrite=true\n"
    assert (ended.code, ended.err) == (2, line)
    assert snapshot(Path("run")) == before
    assert cli("run.dir=run", "run.overwrite=true", "sparsity.ratio=1.5").code == 2
    assert cli("run.dir=run", "run.overwrite=true", "dataset.calibration=nowhere.npy").code == 2
    assert snapshot(Path("run")) == before, "mistakes are found before the old run goes"
    assert cli("run.dir=run", "run.overwrite=true", "sparsity.ratio=0.5", "evaluator=[size]").code == 0
    after = snapshot(Path("run"))
    assert json.loads(after["metrics.json"][1])["sparsity/decoder"] == pytest.approx(0.5, abs=0.02)
    assert after["notes.md"] == before["notes.md"] and not Path("run/model").exists()


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_run_never_removes_the_model_that_it_reads(stream: str, cli: Cli) -> None:
    assert cli("run.dir=run", "run.save=true", "evaluator=[size]").code == 0
    before = snapshot(Path("run/model"))
    ended = cli("model.path=run/model", "run.dir=run", "run.overwrite=true", f"model.stream={stream}")
    line = "pruneexp: run.dir='run': its model/ is the model to prune; expected another folder\n"
    assert (ended.code, ended.err) == (2, line)
    assert snapshot(Path("run/model")) == before


def test_the_same_run_twice_is_the_same(cli: Cli) -> None:
    for name in ("one", "two"):
        assert cli(f"run.dir={name}", "run.save=true").code == 0
    plans = [Path(name, "plan.json").read_bytes() for name in ("one", "two")]
    assert plans[0] == plans[1]
    scores = [Path(name, "scores.safetensors").read_bytes() for name in ("one", "two")]
    assert scores[0] == scores[1]
    weights = [Path(name, "model/model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    metrics = [
        {key: value for key, value in read(Path(name, "metrics.json")).items() if not key.startswith(ABOUT_TIME)}
        for name in ("one", "two")
    ]
    assert metrics[0] == metrics[1] and "pruned/ppl/test@64" in metrics[0]


def test_another_seed_is_another_run(cli: Cli) -> None:
    typed = ("criterion=random", "search=uniform", "evaluator=[size]")
    for seed in (1, 2):
        assert cli(f"run.dir=seed{seed}", f"seed={seed}", *typed).code == 0
    kept = [read(Path(f"seed{seed}/plan.json"))["sites"] for seed in (1, 2)]
    assert kept[0] != kept[1]


# Sweeps


def test_a_sweeps_jobs_lie_beside_each_other(cli: Cli) -> None:
    plain = [*PARITY_RUN, "evaluator=[size]"]
    ended = run("--multirun", *plain, "sparsity.ratio=0.1,0.3", "sweep.dir=swept")
    assert ended.code == 0, ended.err
    jobs = [path for path in Path("swept").iterdir() if path.is_dir()]
    assert len(jobs) == 2
    shares = {}
    for job in jobs:
        config = yaml.safe_load((job / "config.yaml").read_text())
        assert job.name == config_hash(config), "the hash is that of the config in the folder"
        assert config["run"]["dir"] == str(job)
        assert not (job / "model").exists() and {path.name for path in job.iterdir()} >= FILES - {"model"}
        assert read(job / "status.json")["status"] == "done"
        shares[config["sparsity"]["ratio"]] = read(job / "metrics.json")["sparsity/decoder"]
    assert shares == {0.1: pytest.approx(0.1, abs=0.02), 0.3: pytest.approx(0.3, abs=0.02)}
    before = snapshot(Path("swept"))
    assert run("--multirun", *plain, "sparsity.ratio=0.1,0.3", "sweep.dir=swept").code == 0
    assert {k: v for k, v in snapshot(Path("swept")).items() if "/" in k} == {
        k: v for k, v in before.items() if "/" in k
    }, "jobs that are done are left alone"


def test_a_sweep_is_summed_up(cli: Cli) -> None:
    ended = run("--multirun", *PARITY_RUN, "evaluator=[size]", "sparsity.ratio=0.1,0.3", "sweep.dir=swept")
    assert ended.code == 0
    rows = Path("swept/summary.csv").read_text().splitlines()
    assert len(rows) == 3 and "sparsity/decoder" in rows[0]


def test_a_job_saves_its_checkpoint_where_asked(cli: Cli) -> None:
    typed = ["seed=1", "evaluator=[size]", "sweep.dir=swept", "run.save=true", "run.prove=off"]
    assert run("--multirun", *PARITY_RUN, *typed).code == 0
    (job,) = (path for path in Path("swept").iterdir() if path.is_dir())
    assert (job / "model" / "config.json").is_file()


def test_a_folder_of_its_own_is_refused_in_a_sweep(cli: Cli) -> None:
    ended = run("--multirun", *PARITY_RUN, "seed=1,2", "run.dir=x")
    line = "pruneexp: run.dir='x': expected null in a multirun: its jobs lie in sweep.dir/<hash>\n"
    assert (ended.code, ended.err) == (2, line)
    assert not list(Path().iterdir())


def test_a_sweep_with_a_job_that_fails(cli: Cli) -> None:
    ended = run("--multirun", *PARITY_RUN, "evaluator=[size]", "sparsity.ratio=0.1", "search=ul_um,uniform",
                "search.min_units=4", "sweep.dir=swept")  # fmt: skip
    assert ended.code == 2 and "search.min_units" in ended.err and not Path("swept").exists()
    typed = ["evaluator=[size]", "search=uniform", "search.min_units=4", "sparsity.ratio=0.1,0.95", "sweep.dir=swept"]
    ended = run("--multirun", *PARITY_RUN, *typed)
    assert ended.code == 1
    states = {}
    for path in Path("swept").glob("*/status.json"):
        status = read(path)
        states[yaml.safe_load((path.parent / "config.yaml").read_text())["sparsity"]["ratio"]] = status
    assert states[0.1]["status"] == "done" and states[0.95]["status"] == "failed"
    assert states[0.95]["reason"].startswith("sparsity.ratio=0.95: expected at most ")


# Recipes


RECIPES = choices(conf_folder() / "recipe")
SWAPS = ["criterion=magnitude", "search=uniform", "compensator=none", "sparsity=flap_official"]


@cache
def composed_once(choice: str) -> Composed:
    return composer().job([choice])


@pytest.mark.parametrize("recipe", RECIPES)
@each("swap", SWAPS)
def test_a_choice_swaps_cleanly_into_a_recipe_in_any_order(recipe: str, swap: str) -> None:
    group, _, option = swap.partition("=")
    first, second = composer().job([f"recipe={recipe}", swap]), composer().job([swap, f"recipe={recipe}"])
    assert first.config == second.config
    assert first.job["choices"][group] == option
    assert first.config[group] == composed_once(swap).config[group], "nothing of the recipe's own choice is left in it"
    plain = composed_once(f"recipe={recipe}")
    for other in ("criterion", "search", "compensator", "sparsity", "model", "dataset", "evaluator"):
        if other != group:
            assert first.config[other] == plain.config[other]


@pytest.mark.parametrize("recipe", RECIPES)
def test_choices_swap_into_a_recipe_as_a_run_composes_them(recipe: str) -> None:
    for typed in ([f"recipe={recipe}", *SWAPS], [*SWAPS, f"recipe={recipe}"]):
        assert compose(typed).config == composer().job(typed).config


def test_a_swapped_recipe_runs(cli: Cli) -> None:
    plans = []
    for number, typed in enumerate((("recipe=wanda_sp", "search=global"), ("search=global", "recipe=wanda_sp"))):
        assert cli(f"run.dir=run{number}", "evaluator=[size]", *typed).code == 0
        plans.append(Path(f"run{number}/plan.json").read_bytes())
    assert plans[0] == plans[1]
    assert yaml.safe_load(Path("run0/config.yaml").read_text())["criterion"]["_target_"] == "pruneexp.criterion.WandaSp"
