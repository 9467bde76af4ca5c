"""The command line: what it answers to mistakes, how runs and sweeps get their settings, and every exit code."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import pruneexp
from pruneexp.__main__ import main
from pruneexp.cli import sweep as multirun
from pruneexp.cli.compose import compose
from pruneexp.cli.sweep import SHARED_BYTES
from pruneexp.conf_files import conf_folder
from pruneexp.dataset import Embedded
from pruneexp.experiment import preflight
from pruneexp.experiment import run as experiments
from pruneexp.experiment.settings import Experiment, RunSettings
from pruneexp.fingerprint import config_hash
from pruneexp.tracker.folder import claim_folder
from pruneexp.types import ConfigError, RunError, size_text
from tests.cases import each
from tests.messages import assert_told

OTHER_TEXT = [
    "evaluator=[ptb_128]",
    "dataset@evaluator.ptb_128.dataset=embedded",
    "evaluator.ptb_128.dataset.evaluation_samples=1000",
]
HEAVY = ("transformers", "datasets", "wandb", "lm_eval")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Ended]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs the command in this process, in an empty current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> Ended:
        try:
            code = main(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before)
        return Ended(code, *capfd.readouterr())

    return run


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Experiment]:
    """What would have run. A seed of 13 fails as a run fails, one of 14 as a bug does; at 16 the user stops."""
    started: list[Experiment] = []

    def run_experiment(experiment: Experiment, shared: Any = None) -> experiments.Outcome:
        started.append(experiment)
        if experiment.seed == 13:
            raise RunError("unlucky")
        if experiment.seed == 14:
            raise ValueError("a bug\nof two lines")
        if experiment.seed == 16:
            raise KeyboardInterrupt
        folder = experiment.run.folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "status.json").write_text(json.dumps({"status": "done", "seed": experiment.seed}))
            (folder / "metrics.json").write_text(json.dumps({"pruned/x": experiment.sparsity.ratio}))
            if experiment.run.save:
                (folder / "model").mkdir(exist_ok=True)
        return experiments.Outcome({"pruned/x": experiment.sparsity.ratio})

    monkeypatch.setattr(experiments, "run_experiment", run_experiment)
    monkeypatch.setattr(Experiment, "check", lambda self: None)
    return started


OWN_DATA = ["dataset=wikitext2", "dataset=text dataset.calibration=FILE dataset.evaluation=FILE", "dataset=embedded"]
LONG = "x" * 300
MISTAKES: list[tuple[str, str, list[str]]] = [  # what is typed, what the line names, what it says to type instead
    ("criterion=flapp", "criterion=flapp", ["block_influence", "wanda_sp", "criterion=flap"]),
    ("evaluator=[size,sise]", "evaluator=sise", ["perplexity", "evaluator=size"]),
    ("recipe=null", "recipe=null", ["best", "flap"]),
    ("search=null", "search=null", ["al_am", "uniform"]),
    ("~search", "search", ["al_am", "uniform"]),
    ("hydra/launcher=joblibb", "hydra/launcher=joblibb", ["basic", "plug-in"]),
    ("search.headz=3", "search.headz=3", ["search=al_am", "search.heads"]),
    ("search.heads=3", "search.heads=3", ["search=al_am", "search=al_mm", "ul_mm"]),
    ("sparsty.ratio=0.3", "sparsty.ratio=0.3", ["sparsity.ratio"]),
    ("sparsty=one_shot", "sparsty=one_shot", ["sparsity"]),
    ("sparsity.ration=0.3", "sparsity.ration=0.3", ["sparsity.of", "did you mean sparsity.ratio"]),
    ("run.foo=1", "run.foo=1", ["run.dir", "run.name"]),
    ("+criterion.foo=1", "criterion.foo=1", ["criterion.metric"]),
    ("+foo=1", "foo", ["model", "dataset"]),
    ("+sweep.foo=1", "sweep.foo", ["sweep.dir", "sweep.objective"]),
    ("+criterion=flap", "+criterion=flap", ["criterion=flap"]),
    ("search=ul_mm", "search.heads", ["heads (KV groups) to remove over all layers"]),  # the comment in conf/
    ("model=hf", "model.path", ["a folder", "Hub id", "GGUF"]),
    ("sparsity.ratio=???", "sparsity.ratio", ["[0, 1)"]),
    ("sparsity.ratio=abc", "sparsity.ratio='abc'", ["number"]),
    ("sparsity.ratio=true", "sparsity.ratio=True", ["number"]),
    ("sparsity.ratio=1.5", "sparsity.ratio=1.5", ["[0, 1)"]),
    ("sparsity.ratio=0.2,0.3", "sparsity.ratio=0.2,0.3", ["--multirun"]),
    ("search=uniform search.granularity=heads,ffn", "search.granularity=heads,ffn", ["search.granularity=[heads,ffn]"]),
    ("search=evolutionary search.starts=flap,obs", "search.starts=flap,obs", ["search.starts=[flap,obs]"]),
    ("run.dir=exp,1", "run.dir=exp,1", ["\"run.dir='exp,1'\""]),
    ("search=uniform search.granularity=heads", "search.granularity='heads'", ["did you mean [heads]?"]),
    ("evaluator=perplexity,size", "evaluator=perplexity,size", ["evaluator=[perplexity,size]"]),
    ("run.overwrite=maybe", "run.overwrite='maybe'", ["true", "false"]),
    ("run.prove=in_plaice", "run.prove='in_plaice'", ["process", "off", "did you mean in_place"]),
    ("run=null", "run=None", ["run.dir=..."]),
    ("dataset.samples=0", "dataset.samples=0", [">= 1"]),
    ("dataset=wikitext2 dataset.samples=0", "dataset.samples=0", [">= 1"]),
    ("criterion=obs criterion.ridge=-1", "criterion.ridge=-1.0", [">= 0"]),
    ("seed=-1", "seed=-1", [">= 0"]),
    ("seed=1.5", "seed=1.5", ["integer"]),
    ("seed=9223372036854775808", "seed=9223372036854775808", ["2**63"]),
    ("dataset.seed=9223372036854775808", "dataset.seed=9223372036854775808", ["2**63"]),
    ("model.device=cudaa", "model.device='cudaa'", ["cpu", "cuda", "cuda:N", "cuda:any", "auto"]),
    ("model.device=mps", "model.device='mps'", ["cpu", "cuda", "cuda:N", "cuda:any", "auto"]),
    (
        "model.device=auto model.stream=true",
        "model.device='auto'",
        ["cpu", "cuda", "cuda:N", "model.stream=true"],
    ),
    ("criterion._target_=my.module.Thing", "criterion._target_='my.module.Thing'", ["ModuleNotFoundError"]),
    (
        "criterion._target_=pruneexp.criterion.Flapp",
        "criterion._target_='pruneexp.criterion.Flapp'",
        ["pruneexp.criterion.Flap"],
    ),
    ("criterion._target_=Flap", "criterion._target_='Flap'", ["package.module.Class"]),
    ("criterion._target_=pruneexp.search.AlAm", "criterion.metric='WIFV'", ["no keys"]),
    ("flap", "flap", ["key=value", "recipe=flap"]),
    ("sparsity.ratio==", "sparsity.ratio==", ["key=value"]),
    ("sparsity.ratio=[", "sparsity.ratio=[", ["key=value"]),
    ("sparsity.ratio=${foo.bar}", "sparsity.ratio", ["foo.bar"]),
    ("sweep.dir=x", "sweep.dir='x'", ["null", "--multirun"]),
    ("hydra.run.dir=x", "hydra.run.dir=x", ["run.dir", "sweep.dir"]),
    ("hydra.mode=foo", "hydra.mode=foo", ["RUN", "MULTIRUN"]),
    ("+sweep=flap_ration", "sweep=flap_ration", ["grid", "sweep=flap_ratios"]),
    (
        "model.stream=true compensator=least_squares compensator.target=pruned compensator.sequential=false",
        "compensator.sequential=False",
        ["model.stream=true", "expected true"],
    ),
    ("search=global criterion.sequential=true", "criterion.sequential=True", ["search=global", "always"]),
    ("search=blocks criterion=flap criterion.sequential=always", "criterion.sequential='always'", ["blocks"]),
    (
        "recipe=best criterion.sequential=always",
        "criterion.sequential='always'",
        ["search.held_out=0.5", "expected false"],
    ),
    ("criterion.sequential=alway", "criterion.sequential='alway'", ["did you mean always?"]),
    ("evaluator=[latency] model.stream=true", "model.stream=True", ["evaluator=latency", "model.stream=false"]),
    (
        "model.stream=true compensator=least_squares compensator.sequential=false compensator.target=pruned",
        "compensator.sequential=False",
        ["model.stream=true", "expected true"],
    ),
    ("--multirun sparsity.ratio=0.2,1.5", "sparsity.ratio=1.5", ["[0, 1)", "1 of 2 jobs"]),
    (
        "--multirun sparsity.ratio=interval(0.1,0.3)",
        "sparsity.ratio=interval(0.1,0.3)",
        ["sparsity.ratio=A,B", "hydra/sweeper=optuna"],
    ),
    ("--multirun sparsity.ratio=0.2,", "sparsity.ratio=0.2,", ["key=value"]),
    ("run.dir=späce", "run.dir=späce", ["key=value", "\"run.dir='späce'\""]),
    ("--multirun search=al_am,al_an", "search=al_an", ["al_am", "search=al_am", "1 of 2 jobs"]),
    ("--multirun sparsity.ration=0.3 seed=1,2", "sparsity.ration=0.3", ["did you mean sparsity.ratio"]),
    (
        "--multirun recipe=flap,best search.effort=5,10",
        "search.effort=5,10",
        ["search=evolutionary", "two commands", "sweep.dir", "2 of 4 jobs"],
    ),
    (
        "--multirun recipe=flap,wanda_sp,sleb,best search.effort=5",
        "search.effort=5",
        ["search=evolutionary", "two commands", "sweep.dir", "3 of 4 jobs"],
    ),
    (
        "--multirun recipe=flap,wanda_sp,sleb,best search.min_unit=1",
        "search.min_unit=1",
        ["search.effort", "did you mean search.min_units"],
    ),
    (
        "--multirun search=al_am,evolutionary search.effort=5",
        "search.effort=5",
        ["search=evolutionary", "two commands", "sweep.dir", "1 of 2 jobs"],
    ),
    ("--multirun seed=1,2 run.dir=x", "run.dir='x'", ["null", "sweep.dir/<hash>"]),
    ("run.dir= run.overwrite=true", "run.dir=''", ["a folder", "null for outputs/<recipe>/<date_time>"]),
    ("run.dir='~nobody_here/x'", "run.dir='~nobody_here/x'", ["a folder", "null"]),
    ("run.name=a/b", "run.name='a/b'", ["a plain name"]),
    ("run.name=..", "run.name='..'", ["a plain name"]),
    ("run.name=''", "run.name=''", ["a plain name"]),
    ("--multirun seed=1,2 sweep.dir='~nobody_here/x'", "sweep.dir='~nobody_here/x'", ["a folder", "null"]),
    ("--multirun seed=1,2 sweep.dir=''", "sweep.dir=''", ["a folder", "null"]),
    ("--multirun seed=1,2 sweep.dir=/dev/null", "sweep.dir='/dev/null'", ["a folder", "a file"]),
    ("--multirun seed=1,2 sweep.dir=/dev/null/x", "sweep.dir='/dev/null/x'", ["/dev/null is a file", "a folder"]),
    ("criterion=[flap,wanda_sp]", "criterion=[flap,wanda_sp]", ["criterion=flap,wanda_sp with --multirun"]),
    ("tracker=[local,wandb]", "tracker=[local,wandb]", ["tracker=local,wandb with --multirun"]),
    ("recipe=[flap]", "recipe=[flap]", ["recipe=flap"]),
    ("--multirunn", "unrecognized arguments", ["--multirunn", "pruneexp --help"]),
    ("--cfg foo", "argument --cfg/-c", ["'foo'", "'job'", "'hydra'", "'all'"]),
    ("--cfg job criterion=flapp", "criterion=flapp", ["block_influence", "criterion=flap"]),
    ("--resolve", "--package and --resolve", ["--cfg"]),
    ("--shell-completion", "Expecting one subcommand", ["'install'", "'uninstall'", "'query'"]),
    ("--config-dir nowhere", "--config-dir nowhere", ["no such folder"]),
    ("--config-dir nowhere --help", "--config-dir nowhere", ["no such folder"]),
    ("model=/a/folder", "model=/a/folder", ["model=hf model.path=/a/folder"]),
    ("model=org/name", "model=org/name", ["model=hf model.path=org/name"]),
    ("model=it.gguf", "model=it.gguf", ["model=hf model.path=it.gguf"]),
    ("model=llama2-7b", "model=llama2-7b", ["model=llama2_7b"]),
    ("sparsity=0.3", "sparsity=0.3", ["one_shot", "sparsity.ratio=0.3"]),
    ("ratio=0.3", "ratio=0.3", ["sparsity.ratio=0.3"]),
    ("--recipe flap", "--recipe flap", ["recipe=flap"]),
    ("--recipe=flap", "--recipe=flap", ["recipe=flap"]),
    ("--sparsity.ratio 0.3", "--sparsity.ratio 0.3", ["sparsity.ratio=0.3"]),
    (
        "dataset.text=a.txt",
        "dataset.text=a.txt",
        ["dataset=text dataset.calibration=a.txt dataset.evaluation=FILE"],
    ),
    ("criterion.obs=1", "criterion.obs=1", ["criterion=obs"]),
    (
        "evaluator.zeroshot.limit=3",
        "evaluator.zeroshot.limit=3",
        ["evaluator=[perplexity,size,latency,zeroshot]"],
    ),
    ("model=opt_125m", "dataset=embedded", ["model=opt_125m", *OWN_DATA]),
    ("model=hf model.path=x run.dry=true dataset.samples=4", "dataset=embedded", ["model=hf", *OWN_DATA]),
    (
        "--multirun model=embedded_opt,opt_125m seed=1,2",
        "dataset=embedded",
        ["model=opt_125m", *OWN_DATA, "2 of 4 jobs"],
    ),
    ("+sweep=grid model=opt_125m", "dataset=embedded", ["model=opt_125m", *OWN_DATA]),
    ("+sweep=grid model=opt_125m run.dry=true", "dataset=embedded", ["model=opt_125m", *OWN_DATA]),
    (
        "--multirun model=opt_125m seed=1,2 hydra.sweeper._target_=my.Sweeper",
        "dataset=embedded",
        ["model=opt_125m", *OWN_DATA],
    ),
    (
        "model=hf model.path=x dataset=embedded model.revision=67e5010",
        "model.revision=67e5010",
        ["inf", "\"model.revision='67e5010'\""],
    ),
    ("run.name=true", "run.name=true", ["True", "\"run.name='true'\""]),
    ("run.name=${run.name}", "run.name=${run.name}", ["leads back to itself"]),
    (f"--multirun seed=1 sweep.dir={LONG}", f"sweep.dir='{LONG}'", ["File name too long", "a folder"]),
    ("evaluator.size.limit=3", "evaluator.size.limit=3", ["evaluator.perplexity"]),
]


def of_a_sweep(command: str) -> bool:
    return "--multirun" in command or "sweep=" in command


@each("command, named, typed", [case for case in MISTAKES if not of_a_sweep(case[0])])
def test_a_mistake_is_answered_in_one_line(
    command: str, named: str, typed: list[str], cli: Cli, runs: list[Experiment]
) -> None:
    assert_answered_in_one_line(command, named, typed, cli, runs)


@pytest.mark.slow
@each("command, named, typed", [case for case in MISTAKES if of_a_sweep(case[0])])
def test_a_sweeps_mistake_is_answered_in_one_line(
    command: str, named: str, typed: list[str], cli: Cli, runs: list[Experiment]
) -> None:
    assert_answered_in_one_line(command, named, typed, cli, runs)


def assert_answered_in_one_line(command: str, named: str, typed: list[str], cli: Cli, runs: list[Experiment]) -> None:
    ended = cli(*command.split())
    assert ended.code == 2 and ended.out == ""
    assert_told(ended.err, named, *typed)
    assert not runs and not list(Path().iterdir())


@pytest.mark.slow
def test_mistakes_of_jobs_are_a_line_each(cli: Cli, runs: list[Experiment]) -> None:
    ended = cli("--multirun", "search=al_am,al_an", "criterion=flap,flup", "sparsity.ratio=2,0.2", "seed=1,2")
    lines = ended.err.splitlines()
    assert ended.code == 2 and ended.out == "" and len(lines) == 3 and not runs
    assert lines[0] == "pruneexp: sparsity.ratio=2.0: expected a number in [0, 1) (2 of 16 jobs)"
    assert lines[1].startswith("pruneexp: criterion=flup: expected one of ") and lines[1].endswith("(8 of 16 jobs)")
    assert lines[2].startswith("pruneexp: search=al_an: expected one of ") and lines[2].endswith("(8 of 16 jobs)")
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_unknown_choices_that_were_typed_are_told_together(cli: Cli, runs: list[Experiment]) -> None:
    wrong = ("run.dir=ä", "criterion=foo", "evaluator=[perplxity,size]")
    wrong_keys = ["run.dir=ä", "criterion=foo", "evaluator=perplxity"]
    for typed, more in (((), []), (("--multirun", "recipe=flap,flp", "seed=1,2"), ["recipe=flp"])):
        ended = cli(*typed, *wrong)
        lines = [line.removeprefix("pruneexp: ").partition(": ")[0] for line in ended.err.splitlines()]
        assert ended.code == 2 and sorted(lines) == sorted([*wrong_keys, *more])
    assert not runs and not list(Path().iterdir())


@pytest.mark.slow
def test_unknown_choices_in_a_sweep_file_are_told_together(cli: Cli, runs: list[Experiment], tmp_path: Path) -> None:
    file = tmp_path / "mine" / "sweep" / "odd.yaml"
    file.parent.mkdir(parents=True)
    params = {"recipe": "flap,flapp", "criterion": "flap,magnitud", "search": "global,unifrom", "search.min_unit": "1"}
    swept = {"mode": "MULTIRUN", "sweeper": {"params": params}}
    file.write_text(f"# @package _global_\n{yaml.safe_dump({'hydra': swept})}")
    ended = cli("--config-dir", "mine", "+sweep=odd")
    assert ended.code == 2 and not runs
    for wrong in ("recipe=flapp: ", "criterion=magnitud: ", "search=unifrom: ", "search.min_unit=1: "):
        assert f"pruneexp: {wrong}" in ended.err
    assert [path.name for path in Path().iterdir()] == ["mine"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "key", "bytes_"),
    [
        (["dataset.samples=1000"], "dataset.samples", 8 * 1000 * 128),
        (
            ["dataset.samples=9", "dataset.evaluation_samples=1000", "evaluator.perplexity.length=4"],
            "dataset.evaluation_samples",
            8 * 1000 * 4,
        ),
        (["dataset.samples=9", *OTHER_TEXT], "evaluator.ptb_128.dataset.evaluation_samples", 8 * 1000 * 128),
    ],
    ids=["calibration", "evaluation", "evaluator"],
)
def test_windows_that_no_memory_holds_are_refused_before_they_are_made(
    typed: list[str], key: str, bytes_: int, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made(Exception):
        pass

    def calibration(*_: object) -> None:
        raise Made

    monkeypatch.setattr(Embedded, "calibration", calibration)
    monkeypatch.setattr(preflight, "available_memory", lambda device: bytes_ - 1)
    ended = cli("evaluator=[perplexity]", *typed)
    assert ended.code == 2 and ended.out == "" and ended.err.count("\n") == 1, ended
    assert ended.err.startswith(f"pruneexp: {key}=1000: ") and f"take {size_text(bytes_)} of memory" in ended.err
    assert f"{size_text(bytes_ - 1)} are free" in ended.err and not list(Path().iterdir())
    for free in (bytes_, None):
        monkeypatch.setattr(preflight, "available_memory", lambda device, free=free: free)
        assert cli("evaluator=[perplexity]", *typed).code == 1  # they are made


@pytest.mark.slow
def test_a_sweep_file_that_does_not_say_so_is_no_single_run(cli: Cli, runs: list[Experiment], tmp_path: Path) -> None:
    file = tmp_path / "mine" / "sweep" / "quiet.yaml"
    file.parent.mkdir(parents=True)
    params = {"seed": "1,2", "sparsity.ratio": "0.2,0.3"}
    file.write_text(f"# @package _global_\n{yaml.safe_dump({'hydra': {'sweeper': {'params': params}}})}")
    ended = cli("--config-dir", "mine", "+sweep=quiet")
    line = (
        "pruneexp: hydra.sweeper.params: seed, sparsity.ratio would be swept over in a single run; expected --multirun,"
    )
    assert ended.code == 2 and ended.err.startswith(line) and not runs
    assert cli("--config-dir", "mine", "+sweep=quiet", "--multirun").code == 0 and len(runs) == 4
    file.write_text(file.read_text().partition("\n")[2])
    ended = cli("--config-dir", "mine", "+sweep=quiet")
    line = "pruneexp: sweep=quiet: expected '# @package _global_' as the first line of the sweep's file\n"
    assert ended.code == 2 and ended.err == line and len(runs) == 4


def test_a_list_is_suggested_where_a_key_takes_one(cli: Cli, runs: list[Experiment]) -> None:
    for typed in ("seed=0,1", "criterion=flap,magnitude", "sparsity.ratio=0.2,0.3"):
        assert cli(typed).err == f"pruneexp: {typed}: several values need --multirun\n" and not runs


def test_files_of_ones_own_say_what_they_lack(cli: Cli, runs: list[Experiment]) -> None:
    for group, text in (("evaluator", "_target_: pruneexp.evaluator.Size"), ("recipe", "run: {prove: off}")):
        Path("mine", group).mkdir(parents=True)
        header = "# @package _global_\n" if group == "recipe" else ""
        Path("mine", group, "own.yaml").write_text(f"{header}{text}\n")
    ended = cli("--config-dir", "mine", "evaluator=[own]")
    assert ended.code == 2 and "expected '# @package evaluator.NAME' as the first line of the evaluator's" in ended.err
    Path("mine", "evaluator", "spaced.yaml").write_text(
        "# @package evaluator.my own\n_target_: pruneexp.evaluator.Size\n"
    )
    assert (
        "# @package evaluator.my own: expected a name without" in cli("--config-dir", "mine", "evaluator=[spaced]").err
    )
    Path("mine", "recipe", "flap.yaml").write_text("# @package _global_\n")
    ended = cli("--config-dir", "mine", "recipe=flap")
    assert ended.code == 2 and "--config-dir mine: recipe=flap is a choice that comes with pruneexp" in ended.err
    Path("mine", "recipe", "flap.yaml").write_bytes((conf_folder() / "recipe" / "flap.yaml").read_bytes())
    ended = cli("--config-dir", "mine", "recipe=own")
    assert ended.code == 2 and "run.prove=False: expected one of process, in_place, off; did you mean" in ended.err


def test_files_of_ones_own_inherit_in_any_form(cli: Cli, runs: list[Experiment]) -> None:
    for folder in ("criterion", "sweep"):
        Path("mine", folder).mkdir(parents=True)
    Path("mine/criterion/my-own.yaml").write_text("defaults: [magnitude]\n")
    assert cli("--config-dir", "mine", "search=evolutionary", "search.starts=[flap,my-own]").code == 0
    header = "# @package _global_\n"
    Path("mine/sweep/empty.yaml").write_text(header)
    Path("mine/sweep/my-base.yaml").write_text(f"{header}run: {{save: true}}\n")
    Path("mine/sweep/child.yaml").write_text(f"{header}defaults:\n  - my-base\n  - _self_\nrun: {{prove: process}}\n")
    assert cli("--config-dir", "mine", "-m", "+sweep=empty", "seed=1,2").code == 0
    assert cli("--config-dir", "mine", "-m", "+sweep=child", "seed=1,2").code == 0
    settings = [(run.run.save, run.run.prove) for run in runs[1:]]
    assert settings == [(False, "off")] * 2 + [(True, "process")] * 2


def test_digits_stay_as_they_were_typed_where_text_is_asked_for(cli: Cli, runs: list[Experiment]) -> None:
    own = ("model=hf", "dataset=embedded", "model.path=2_0", "seed=1_000")
    assert cli(*own, "model.revision=+67", "run.name=1_000").code == 0
    assert cli(*own, "--multirun", "model.revision=1_000,1000,'2_0'").code == 0
    assert cli(*own, "--multirun", "seed=1_000,2_000", "model.revision=+5", "sweep.dir=x").code == 0
    assert [run.model.revision for run in runs] == ["+67", "1_000", "1000", "2_0", "+5", "+5"]
    assert {(run.model.path, run.model.name) for run in runs} == {("2_0", "2_0")}
    assert [run.seed for run in runs] == [1000] * 5 + [2000]
    assert runs[0].run.name == "1_000" == runs[0].config["run"]["name"]
    assert len({config_hash(run.config) for run in runs}) == 6


MEANT = {
    "typed": ["model=hf", "model.path=x", "dataset=embedded"],
    "embedded": ["model=hf", "model.path=embedded:opt"],
    "other": ["model=opt_125m", "dataset=wikitext2"],
    "job": ["--multirun", "model=opt_125m,gpt2", "dataset=embedded,wikitext2"],
    "sweep": ["--config-dir", "own", "+sweep=mine", "model=opt_125m"],
    "swept": ["--config-dir", "own", "+sweep=swept", "model=opt_125m"],
    "recipe": ["--config-dir", "own", "recipe=mine", "model=opt_125m"],
    "replayed": ["--config-dir", "own", "+again=config"],
}


@pytest.mark.slow
@pytest.mark.parametrize("typed", MEANT.values(), ids=list(MEANT))
def test_a_dataset_that_somebody_chose(typed: list[str], cli: Cli, runs: list[Experiment], tmp_path: Path) -> None:
    override = "# @package _global_\ndefaults:\n  - override /dataset: embedded\n"
    mode = "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}\n"
    swept = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {dataset: 'embedded,wikitext2'}}}\n"
    config = "# @package _global_\n" + yaml.safe_dump(dict(compose(["model=opt_125m"]).config))
    files = {"sweep/mine": override + mode, "sweep/swept": swept, "recipe/mine": override, "again/config": config}
    for name, text in files.items():
        path = tmp_path / "own" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    ended = cli(*typed)
    assert ended.code == 0, ended.err
    assert runs


def test_a_run_gets_its_settings_and_writes_nothing_of_hydras(cli: Cli, runs: list[Experiment]) -> None:
    ended = cli("search=ul_mm", "search.heads=2", "run.name=2024", "sparsity.ratio=0", "run.prove=off")
    assert ended.code == 0, ended.err
    (run,) = runs
    assert run.run == RunSettings(None, "2024", False, True, "off", False)
    assert run.sparsity.ratio == 0.0 and isinstance(run.sparsity.ratio, float)
    assert run.job["overrides"][:2] == ["search=ul_mm", "search.heads=2"] and run.job["choices"]["search"] == "ul_mm"
    assert run.config["search"] == {"_target_": "pruneexp.search.UlMm", "heads": 2}
    assert not list(Path().iterdir())


def test_a_run_without_a_recipe(cli: Cli, runs: list[Experiment]) -> None:
    assert cli("~recipe").code == 0
    assert runs[0].job["recipe"] == "custom"


def test_evaluators_may_be_one_or_none(cli: Cli, runs: list[Experiment]) -> None:
    assert cli("evaluator=size").code == cli("evaluator=[]").code == 0
    assert [set(run.evaluators) for run in runs] == [{"size"}, set()]


@pytest.mark.parametrize(
    ("seed", "line"), [(13, "failed: unlucky"), (14, "failed: ValueError: a bug of two lines")], ids=["run", "bug"]
)
def test_a_failed_run_is_one_line_and_code_1(seed: int, line: str, cli: Cli, runs: list[Experiment]) -> None:
    assert cli(f"seed={seed}") == (1, "", f"pruneexp: {line}\n")


def test_a_config_error_found_by_the_check_is_code_2(
    cli: Cli, runs: list[Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: Experiment) -> None:
        raise ConfigError("model.path='x': no such folder")

    monkeypatch.setattr(Experiment, "check", check)
    assert cli() == (2, "", "pruneexp: model.path='x': no such folder\n")
    assert not runs


@pytest.mark.parametrize(("end", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)], ids=["INT", "TERM"])
def test_an_ended_run_has_the_shells_code(
    end: BaseException, code: int, cli: Cli, monkeypatch: pytest.MonkeyPatch, runs: list[Experiment]
) -> None:
    def run_experiment(experiment: Experiment) -> Any:
        raise end

    monkeypatch.setattr(experiments, "run_experiment", run_experiment)
    assert cli().code == code


def test_sigterm_becomes_an_exception(cli: Cli, monkeypatch: pytest.MonkeyPatch, runs: list[Experiment]) -> None:
    monkeypatch.setattr(experiments, "run_experiment", lambda experiment: os.kill(os.getpid(), signal.SIGTERM))
    ended = cli()
    assert ended.code == 143 and ended.err == "pruneexp: terminated\n"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["pruneexp", "pruneexp.export", "pruneexp.cli.report_command"])
def test_output_that_is_no_longer_read_ends_it_silently(module: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-m", module, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.slow
def test_a_method_of_ones_own(cli: Cli, runs: list[Experiment], tmp_path: Path) -> None:
    (tmp_path / "mine_for_test.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "@dataclass(frozen=True)\n"
        "class Mine:\n"
        "    power: int\n"
        "    sequential: bool\n"
        "    evidence: ClassVar[type | None] = None\n"
        "    def __call__(self, block, evidence): ...\n"
        "class NoCriterion: ...\n"
    )
    folder = tmp_path / "own" / "criterion"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# mine\n_target_: mine_for_test.Mine\npower: ???  # of the score\nsequential: false\n"
    )
    own = ("--config-dir", "own", "criterion=mine")
    (tmp_path / "own" / "model").mkdir()
    (tmp_path / "own" / "model" / "other.yaml").write_text("# no model\n_target_: mine_for_test.NoCriterion\n")
    assert (
        "model._target_: NoCriterion has no name, path"
        in cli("--config-dir", "own", "model=other", "dataset=embedded", "evaluator=[size]").err
    )
    assert cli(*own).err == "pruneexp: criterion.power is missing: expected of the score\n"
    assert cli(*own, "criterion.power=x").err == "pruneexp: criterion.power='x': expected an integer\n"
    assert cli("--config-dir", "own", "criterion=mines").err.endswith("did you mean criterion=mine?\n")
    assert cli(*own, "criterion.power=2").code == 0
    assert runs[0].criterion.power == 2  # type: ignore[attr-defined]
    assert (
        "NoCriterion has no evidence"
        in cli(
            "search=al_am",
            "criterion=magnitude",
            "~criterion.members",
            "~criterion.norm",
            "criterion._target_=mine_for_test.NoCriterion",
        ).err
    )


def test_a_multirun_names_its_folders_by_config(cli: Cli, runs: list[Experiment]) -> None:
    ended = cli("--multirun", "sparsity.ratio=0.2,0.3", "search=al_am,ul_um")
    assert ended.code == 0, ended.err
    assert len(runs) == 4
    for run in runs:
        folder = Path("outputs/sweeps/flap") / config_hash(dict(run.config))
        assert run.run.dir == str(folder) and folder.is_dir()
        assert not run.run.save and run.run.prove == "off"
        assert run.job["sweep"] == "flap" and run.config["sweep"]["dir"] == "outputs/sweeps/flap"
        assert run.config["run"]["dir"] == run.run.dir
    assert not list(Path().rglob(".hydra"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("swept", "name"),
    [("recipe=wanda_sp,best", "wanda_sp+best"), ("recipe=glob(m*)", "magnitude+mini_llm"), ("recipe=best", "best")],
)
def test_a_sweep_over_recipes_is_named_by_them(swept: str, name: str, cli: Cli, runs: list[Experiment]) -> None:
    for _ in range(2):
        ended = cli("--multirun", swept, "seed=1,2")
        assert ended.code == 0, ended.err
    assert {Path(str(run.run.dir)).parent for run in runs} == {Path("outputs/sweeps", name)}
    assert ended.err.count("done already") == len(runs)


@pytest.mark.slow
def test_the_name_of_a_sweep_over_many_recipes_is_short(cli: Cli, runs: list[Experiment]) -> None:
    assert cli("--multirun", "recipe=glob(*)").code == cli("--multirun", "recipe=glob(*,exclude=best)").code == 0
    names = [path.name for path in Path("outputs/sweeps").iterdir()]
    assert len(names) == 2 and all(re.fullmatch(r"[a-z0-9_+]+\+[0-9a-f]{6}", name) for name in names)
    assert max(map(len, names)) < 100


def test_a_setting_of_all_choices_that_are_swept_over(cli: Cli, runs: list[Experiment]) -> None:
    ended = cli("--multirun", "sparsity=linear,cubic", "sparsity.rounds=2")  # the default choice has no such key
    assert ended.code == 0, ended.err
    assert [len(run.sparsity.shares()) for run in runs] == [2, 2]
    assert runs[0].job["overrides"] == ["sparsity=linear", "sparsity.rounds=2"]


@pytest.mark.slow
def test_a_multirun_that_is_started_again_skips_what_is_done(cli: Cli, runs: list[Experiment]) -> None:
    command = ("-m", "seed=1,2", "sweep.dir=x")
    assert cli(*command).code == 0
    again = cli(*command)
    assert again.code == 0 and again.err.count("done already") == 2 and len(runs) == 2
    assert cli(*command, "run.overwrite=true").code == 0 and len(runs) == 4


def test_jobs_of_another_sweep_in_the_folder_are_not_counted(
    cli: Cli, runs: list[Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = multirun._run

    def beside(*job: Any) -> experiments.Outcome:
        Path("x/other").mkdir(exist_ok=True)
        Path("x/other/status.json").write_text(json.dumps({"status": "failed", "reason": "its own"}))
        return run(*job)

    monkeypatch.setattr(multirun, "_run", beside)
    ended = cli("--multirun", "seed=1,2", "sweep.dir=x")
    assert ended.code == 0 and "2 jobs ran\n" in ended.out


def test_a_job_that_left_no_trace_is_no_success(
    cli: Cli, runs: list[Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose folder another process was writing to all the while."""
    monkeypatch.setattr(multirun, "_run_recorded", lambda *_: None)
    ended = cli("--multirun", "seed=1,2", "sweep.dir=x")
    assert ended.code == 1 and "0 jobs ran, failed: " in ended.out


def test_a_job_that_another_process_ends_meanwhile_is_done(
    cli: Cli, runs: list[Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sweeps started at once: the job began and ended while this one read its model."""
    run = multirun._run

    def second(*job: Any) -> None:
        run(*job)
        raise ConfigError("run.dir='x': holds a finished run; expected an empty folder")

    monkeypatch.setattr(multirun, "_run", second)
    ended = cli("--multirun", "seed=1", "sweep.dir=x")
    assert ended.code == 0 and "job 0: done by another process meanwhile" in ended.err and "failed" not in ended.err


def test_a_job_whose_folder_cannot_be_made_costs_the_others_nothing(
    cli: Cli, runs: list[Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = multirun._run

    def refused(job: Any, shared: Any) -> Any:
        folder = Path(job.config["run"]["dir"])
        if job.config["seed"] == 1:
            folder.write_text("mine")
            raise RunError(f"run.dir={str(folder)!r}: cannot write there")
        return run(job, shared)

    monkeypatch.setattr(multirun, "_run", refused)
    ended = cli("--multirun", "seed=1,2", "sweep.dir=x")
    assert ended.code == 1 and "1 job ran, failed: " in ended.out and [each.seed for each in runs] == [2]
    assert "the failure is not recorded: File exists" in ended.err


def test_a_job_that_could_not_write_its_end_is_no_other_processs(
    cli: Cli, runs: list[Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(job: Any, _shared: Any) -> None:
        folder = Path(job.config["run"]["dir"])
        claim_folder(folder, overwrite=False)
        raise RunError(f"run.dir={str(folder)!r}: cannot write plan.json: No space left on device")

    monkeypatch.setattr(multirun, "_run", full)
    ended = cli("--multirun", "seed=1", "sweep.dir=x")
    assert ended.code == 1 and "left to" not in ended.out + ended.err and "1 job ran, failed: " in ended.out
    assert "No space left" in Path("x/summary.csv").read_text()
    monkeypatch.setattr(multirun, "_record_failure", lambda *_: None)  # nor can this be written
    ended = cli("--multirun", "seed=2", "sweep.dir=x")
    assert ended.code == 1 and "left to" not in ended.out + ended.err and "1 job ran, failed: " in ended.out


def test_a_sweep_that_is_stopped_has_the_table_of_what_is_done(cli: Cli, runs: list[Experiment]) -> None:
    assert cli("--multirun", "seed=1,16,2", "sweep.dir=x").code == 130
    assert [run.seed for run in runs] == [1, 16]
    lines = Path("x/summary.csv").read_text().splitlines()
    assert len(lines) == 2 and Path(str(runs[0].run.dir)).name in lines[1]


@pytest.mark.slow
def test_a_job_whose_figures_are_damaged_runs_again(cli: Cli, runs: list[Experiment]) -> None:
    command = ("--multirun", "seed=1,2,3", "sweep.dir=x")
    assert cli(*command).code == 0
    first, second, _ = (Path(str(run.run.dir)) for run in runs)
    (first / "metrics.json").write_text('{"pruned/x')
    (second / "status.json").write_bytes(b"\xff\xfe")
    again = cli(*command)
    assert again.code == 0, again.err
    assert [run.seed for run in runs] == [1, 2, 3, 1] and again.err.count("done already") == 2


@pytest.mark.slow
def test_a_checkpoint_asked_for_later_is_not_skipped(cli: Cli, runs: list[Experiment]) -> None:
    assert cli("-m", "seed=1", "sweep.dir=x").code == 0
    assert cli("-m", "seed=1", "sweep.dir=x", "run.save=true", "run.prove=in_place").code == 0
    assert [(run.run.save, run.run.prove, run.run.overwrite) for run in runs] == [
        (False, "off", False),
        (True, "in_place", True),
    ]


@pytest.mark.slow
def test_a_sweep_goes_on_after_failures_and_says_so(cli: Cli, runs: list[Experiment]) -> None:
    ended = cli("--multirun", "seed=13,14,15", "sweep.dir=x y")
    assert ended.code == 1 and [run.seed for run in runs] == [13, 14, 15]
    states = {Path(str(run.run.dir)): json.loads(Path(str(run.run.dir), "status.json").read_text()) for run in runs}
    assert [state["status"] for state in states.values()] == ["failed", "failed", "done"]
    assert [state.get("reason") for state in states.values()][:2] == ["unlucky", "ValueError: a bug of two lines"]
    assert "3 jobs ran, failed: " in ended.out and all(folder.name in ended.out for folder in list(states)[:2])


def test_a_folder_may_be_named_by_what_was_typed(cli: Cli, runs: list[Experiment]) -> None:
    typed = ("run.dir=a/${hydra:job.override_dirname}", "run.name=n_${hydra:job.override_dirname}", "seed=1")
    assert cli(*typed, "search=ul_um").code == 0
    assert (runs[0].run.dir, runs[0].run.name) == ("a/search=ul_um,seed=1", "n_search=ul_um,seed=1")


def test_home_is_home(cli: Cli, runs: list[Experiment], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    assert cli("run.dir='~/out'").code == 0
    assert cli("--multirun", "seed=1,2", "sweep.dir='~/swept'").code == 0
    assert Path("home/out/status.json").is_file() and len(list(Path("home/swept").glob("*/status.json"))) == 2
    assert not Path("~").exists()


def test_a_forecast_refuses_the_folder_of_a_finished_run(cli: Cli) -> None:
    Path("done").mkdir()
    Path("done/status.json").write_text('{"status": "done"}')
    Path("done/metrics.json").write_text("{}")
    ended = [cli("run.dir=done", f"run.dry={dry}", "dataset.samples=2", "evaluator=[]") for dry in ("true", "false")]
    line = "pruneexp: run.dir='done': holds a finished run; expected an empty folder or run.overwrite=true\n"
    assert ended == [(2, "", line)] * 2


@pytest.mark.slow
def test_a_forecast_of_a_sweep_leaves_out_what_is_done(cli: Cli, runs: list[Experiment]) -> None:
    assert cli("--multirun", "seed=1", "sweep.dir=x").code == 0
    ended = cli("--multirun", "seed=1,2", "sweep.dir=x", "run.dry=true")
    assert ended.code == 0 and "job 0: seed=1: done already\n" in ended.out
    assert [run.seed for run in runs] == [1, 2]
    assert cli("--multirun", "seed=1", "sweep.dir=x", "run.dry=true", "run.save=true").code == 0 and len(runs) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["compensator=least_squares", "compensator=least_squares_once", "criterion=obs", "best"]
)
def test_fits_to_few_tokens_are_told_what_would_do(setting: str, cli: Cli, caplog: pytest.LogCaptureFixture) -> None:
    chosen = ["recipe=best"] if setting == "best" else ["recipe=flap", setting]
    fitting = "criterion=obs and compensator=least_squares" if setting == "best" else setting
    short = ("run.dry=true", "evaluator=[]", "dataset.length=32")
    assert cli(*chosen, *short, "dataset.samples=40").code == 0
    assert caplog.messages == [
        f"dataset.samples=40: 1280 calibration tokens, few for {fitting}, which fits weights to up to 344 inputs; "
        "dataset.samples=43 would do, better more"
    ]
    caplog.clear()
    assert cli(*chosen, *short, "dataset.samples=43").code == cli("recipe=flap", *short, "dataset.samples=9").code == 0
    assert cli("recipe=slimllm", *short, "dataset.samples=9").code == 0  # a scale and a shift an output
    assert not caplog.messages


@pytest.mark.slow
def test_windows_of_a_short_text_that_decide_and_are_scored_on_are_told(
    cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    words = random.Random(0).choices(["the cat", "a dog", "saw", "heard", "one", "old", "tree", "and", "near"], k=1500)
    Path("short.txt").write_text(" ".join(words))
    short = ("dataset=text", "dataset.calibration=short.txt", "dataset.evaluation=short.txt", "dataset.length=64")
    dry = ("run.dry=true", "evaluator=[]", "dataset.samples=24", *short)
    assert cli("recipe=best", *dry).code == 0
    (shared,) = [line for line in caplog.messages if "share text" in line]
    assert re.match(r"\d+ % of the windows that search.held_out=0.5 lets decide share text .*=consecutive", shared)
    caplog.clear()
    for apart in (
        ("recipe=best", "dataset.sampling=consecutive"),
        ("recipe=best", "search.held_out=0"),
        ("recipe=flap",),
    ):
        assert cli(*apart, *dry).code == 0
    assert not [line for line in caplog.messages if "share text" in line]


@pytest.mark.slow
def test_a_forecast_says_that_units_are_too_large(cli: Cli, caplog: pytest.LogCaptureFixture) -> None:
    few = ("run.dry=true", "evaluator=[]", "dataset.samples=4")
    assert cli("search=uniform", *few).code == cli("search=uniform", "search.remainder=carried", *few).code == 0
    (line,) = caplog.messages
    assert line.startswith("search.remainder=down: 0.0% of the heads leave for a share of 20.0%")


@pytest.mark.slow
def test_a_dry_multirun_writes_nothing(cli: Cli) -> None:
    ended = cli("--multirun", "run.dry=true", "sparsity.ratio=0.2,0.999", "dataset.samples=2", "evaluator=[]")
    assert ended.code == 1 and "job 1 cannot run: sparsity.ratio=0.999" in ended.err
    assert ended.out.count("to remove: 20.0%") == 1 and not list(Path().iterdir())


def test_a_jobs_line_shows_what_tells_it_from_the_others(cli: Cli, runs: list[Experiment]) -> None:
    for typed, lines in (
        (("recipe=flap", "seed=1,2"), ["job 0: seed=1 ->", "job 1: seed=2 ->"]),
        (("recipe=flap,wanda_sp", "seed=1,2"), ["job 0: recipe=flap seed=1 ->", "job 3: recipe=wanda_sp seed=2 ->"]),
        (("recipe=flap", "seed=3"), ["job 0: recipe=flap seed=3 sweep.dir=x ->"]),
    ):
        said = cli("--multirun", *typed, "sweep.dir=x").err
        assert all(line in said for line in lines), said


@pytest.mark.slow
@pytest.mark.parametrize("dry", ["true", "false"])
def test_jobs_that_run_here_share_the_dense_models_hidden_states(
    dry: str, cli: Cli, runs: list[Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, run = [], experiments.run_experiment
    monkeypatch.setattr(experiments, "run_experiment", lambda one, shared=None: given.append(shared) or run(one))
    for typed in (["--multirun", "seed=1,2"], ["--multirun", "seed=1,2", "compensator=bias"], []):
        assert cli("compensator=least_squares", f"run.dry={dry}", *typed).code == 0
    first, second, *others = given
    assert first is second and first.limit == SHARED_BYTES and others == [None] * 3


def test_a_ready_sweep(cli: Cli, runs: list[Experiment]) -> None:
    ended = cli("+sweep=flap_ratios", "sparsity.ratio=0.4,0.6")
    assert ended.code == 0, ended.err
    assert [run.sparsity.ratio for run in runs] == [0.4, 0.4, 0.6, 0.6]
    assert {run.job["sweep"] for run in runs} == {"flap_ratios"}
    assert {Path(str(run.run.dir)).parent for run in runs} == {Path("outputs/sweeps/flap_ratios")}


def test_a_sweep_file_may_ask_for_checkpoints(cli: Cli, runs: list[Experiment], tmp_path: Path) -> None:
    (tmp_path / "own" / "sweep").mkdir(parents=True)
    (tmp_path / "own" / "sweep" / "mine.yaml").write_text(
        "# @package _global_\n# mine\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 1,2\n"
        "run:\n  save: true\n"
    )
    assert cli("--config-dir", "own", "+sweep=mine").code == 0
    assert [(run.run.save, run.run.prove) for run in runs] == [(True, "off")] * 2


def test_the_hash_ignores_where_a_run_goes_and_nothing_else(cli: Cli) -> None:
    config = {"seed": 0, "criterion": {"a": 1.0}, "run": {"dir": None}, "tracker": {"b": 1}}
    assert config_hash(config) == config_hash({**config, "run": {"dir": "x"}, "tracker": {}, "sweep": {}, "cache": 1})
    assert config_hash(config) == config_hash(dict(reversed(list(config.items()))))
    assert config_hash(config) != config_hash({**config, "seed": 1})
    assert config_hash(config) != config_hash({**config, "criterion": {"a": 2.0}})


@pytest.mark.slow
def test_an_optimising_sweeper_is_given_the_objective(runs: list[Experiment], tmp_path: Path) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from pruneexp.cli.compose import compose_raw, open_hydra
    from pruneexp.cli.sweep import run_job

    def value(*overrides: str) -> float | None:
        typed = ["sweep.objective=pruned/x", f"hydra.sweep.dir={tmp_path}", "+hydra.job.num=0", *overrides]
        config = compose_raw(open_hydra(), typed, RunMode.RUN)
        HydraConfig.instance().set_config(config)
        return run_job(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))

    assert value("sparsity.ratio=0.3") == 0.3
    assert value("seed=13") == float("inf")
    with pytest.raises(RunError, match="sweep.objective='nothing': expected one of pruned/x"):
        value("sweep.objective=nothing")


def test_cfg_prints_the_composed_config(cli: Cli) -> None:
    ended = cli("--cfg", "job", "recipe=wanda_sp", "--package", "search", "--resolve")
    assert ended == (0, "# @package search\n_target_: pruneexp.search.UlUm\n", "")


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"pruneexp {pruneexp.__version__}\n", "")


def test_help_shows_every_choice_and_key(cli: Cli) -> None:
    from pruneexp.conf_files import conf_folder

    ended = cli("recipe=flap", "--help")
    assert ended.code == 0
    for path in conf_folder().glob("*/*.yaml"):
        assert path.stem in ended.out
    for key in ("seed=0", "run.dir=null", "run.prove=process", "sweep.dir=null", "+sweep=NAME", "flap_ratios"):
        assert key in ended.out
    assert len([line for line in ended.out.splitlines() if line.startswith("  pruneexp")]) >= 5


def test_help_shows_the_choices_of_a_folder_of_ones_own(cli: Cli) -> None:
    for file, text in (("criterion/mine", "# of my own\n"), ("sweep/table", "# @package _global_\n# Tab. 3\n")):
        path = Path("own", f"{file}.yaml")
        path.parent.mkdir(parents=True)
        path.write_text(text)
    for typed in (("--config-dir", "own", "--help"), ("-h", "--config-dir=own", "recipe=flap")):
        ended = cli(*typed)
        assert ended.code == 0
        lines = [line.split(maxsplit=1) for line in ended.out.splitlines()]
        assert ["mine", "of my own"] in lines and ["table", "Tab. 3"] in lines
    assert "of my own" not in cli("--help").out


def run_python(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(pruneexp.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; from pruneexp.__main__ import main; code = main(['--help'])\n"
    ended = run_python(code + "sys.exit(code or any(m in sys.modules for m in ('torch', 'hydra')))", tmp_path)
    assert ended.returncode == 0 and "usage: pruneexp" in ended.stdout


@pytest.mark.slow
def test_mistakes_in_the_config_import_torch_at_most(tmp_path: Path) -> None:
    mistakes = [
        "sparsity.ratio=abc",
        "tracker=wandb evaluator=[latency,questions] seed=-1",
        "evaluator=[generation,zeroshot] evaluator.zeroshot.data=tasks evaluator.zeroshot.tasks=[pika]",
        "evaluator=[zeroshot] evaluator.zeroshot.data=gone",
    ]
    code = (
        "import sys; from pruneexp.__main__ import main\n"
        f"for typed in {mistakes!r}:\n"
        f"    print(main(typed.split()), [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    ended = run_python(code, tmp_path)
    assert ended.stdout == "2 []\n" * len(mistakes), ended.stderr


@pytest.mark.slow
def test_the_module_and_its_exit_code(tmp_path: Path) -> None:
    ended = run_python(
        "import runpy, sys; sys.argv = ['pruneexp', 'seed=x']; runpy.run_module('pruneexp', run_name='__main__')",
        tmp_path,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "pruneexp: seed='x': expected an integer\n")
    assert not list(tmp_path.iterdir())
