"""Whole runs: the main job, a proof in a clean process, a model pruned again, a streamed run beside one in memory."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import pruneexp
from pruneexp import progress
from pruneexp.__main__ import main
from tests.conftest import FAMILIES, PARITY

pytestmark = pytest.mark.slow

ORACLE = json.loads((PARITY / "oracle.json").read_text())
FILES = [f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
SMALL = ["model=hf", f"model.path={PARITY}", "dataset=tokens", "dataset.length=64", *FILES]
QUICK = [*SMALL, "evaluator=[perplexity,size]", "run.prove=off"]
VARYING = ("seconds/", "memory/", "passes/", "proof/")

Cli = Callable[..., dict[str, float]]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs the command in `tmp_path`; the metrics of the run in `folder`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(progress, "BAR_AFTER", 3600.0)
    before = signal.getsignal(signal.SIGTERM)

    def run(folder: str, *typed: str) -> dict[str, float]:
        try:
            assert main([f"run.dir={folder}", *typed]) == 0
        finally:
            signal.signal(signal.SIGTERM, before)
        return metrics(folder)

    return run


def metrics(folder: str) -> dict[str, float]:
    return json.loads(Path(folder, "metrics.json").read_text())


def plan(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "plan.json").read_text())


def checkpoint(folder: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder, "model").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def lasting(figures: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in figures.items() if not key.startswith(VARYING)}


def test_the_main_job(cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    embedded = Path(pruneexp.__file__).parent / "embedded" / "llama"
    assert (embedded / "config.json").is_file() and list(embedded.glob("*.safetensors")), "the default model travels"
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["evaluator=[perplexity,size]"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    (folder,) = Path("outputs/flap").iterdir()
    figures = metrics(str(folder))
    (dense,) = (value for key, value in figures.items() if key.startswith("dense/ppl/embedded@"))
    (pruned,) = (value for key, value in figures.items() if key.startswith("pruned/ppl/embedded@"))
    assert 1 < dense < pruned < 10 * dense, "a trained model, and a pruned one that still knows its language"
    sites = plan(str(folder))["sites"].values()
    assert {site["kind"] for site in sites} == {"attention", "mlp"} and all(site["kept"] for site in sites)
    assert figures["sparsity/decoder"] == pytest.approx(0.2, abs=0.025), "al_am stops at a head, which is a large unit"
    proof = json.loads((folder / "proof.json").read_text())
    assert proof["prove"] == "process" and proof["max_logit_difference"] < 1e-3 and proof["greedy_tokens_equal"]
    assert proof["source"]["compared"] and proof["source"]["max_logit_difference"] < 1e-3
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    assert str(folder) in capfd.readouterr().out


@pytest.mark.usefixtures("forked_proofs")
def test_a_run_with_emptied_sublayers_is_proved_in_a_clean_process(cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    typed = ["recipe=flap", "sparsity.ratio=0.9", "model.dtype=float64", "evaluator=[perplexity,size]"]
    figures = cli("run", *SMALL, *typed)
    printed = capfd.readouterr()
    assert "Warning" not in printed.err and "Traceback" not in printed.err
    emptied = [name for name, site in plan("run")["sites"].items() if not site["kept"]]
    assert emptied, "this ratio takes whole sublayers"
    proof = json.loads(Path("run/proof.json").read_text())
    assert proof["prove"] == "process" and proof["form"] == "remote_code" and proof["class"].startswith("Pruned")
    assert proof["max_logit_difference"] < 1e-6 and proof["greedy_tokens_equal"]
    assert figures["proof/max_logit_difference"] == proof["max_logit_difference"]
    tensors = checkpoint("run")
    assert not [name for name in tensors if any(name.startswith(f"{n}.") and "bias" not in name for n in emptied)
                and tensors[name].numel()]  # fmt: skip
    assert figures["pruned/kv_bytes/token"] < figures["dense/kv_bytes/token"]


@pytest.mark.parametrize(("search", "warned"), [("ul_um", True), ("global", False)])
def test_a_share_far_from_the_one_asked_for_is_told(search: str, warned: bool, cli: Cli) -> None:
    figures = cli("run", *QUICK, f"search={search}", "sparsity.ratio=0.2", "run.save=false", "evaluator=[]")
    assert (abs(figures["sparsity/decoder"] - 0.2) > 0.02) == warned
    assert ("sparsity.ratio=0.2 was asked for" in Path("run", "log.txt").read_text()) == warned


def test_a_model_without_any_attention_left(cli: Cli) -> None:
    figures = cli("run", *QUICK, "recipe=flap", "sparsity.ratio=0.95", "model.dtype=float64", "run.prove=in_place")
    assert [site["kept"] for site in plan("run")["sites"].values() if site["kind"] == "attention"] == [[]] * 4
    assert figures["pruned/kv_bytes/token"] == 0 and figures["proof/max_logit_difference"] == 0
    source = json.loads(Path("run/proof.json").read_text())["source"]
    assert source["compared"] and source["relative_difference"] < 1e-6
    again = cli("again", *QUICK, "model.path=run/model", "search=global", "sparsity.ratio=0.2")
    assert again["dense/ppl/test@64"] == figures["pruned/ppl/test@64"]
    assert {site["kind"] for site in plan("again")["sites"].values()} == {"mlp"}


@pytest.mark.parametrize(
    ("setting", "typed"),
    [
        ("flap|WIFV|AL-AM|0.2", ["recipe=flap_official"]),
        ("flap|WIFV|UL-UM|0.5", ["recipe=flap_official", "search=ul_um"]),
        ("wanda_sp|-|-|0.2", ["recipe=wanda_sp"]),
        ("mag_sp|-|-|0.5", ["recipe=magnitude"]),
    ],
)
@pytest.mark.parametrize("stream", ["false", "true"])
def test_the_authors_figures_come_out_of_whole_runs(stream: str, setting: str, typed: list[str], cli: Cli) -> None:
    ratio = setting.rsplit("|", 1)[1]
    figures = cli("run", *QUICK, *typed, f"sparsity.ratio={ratio}", f"model.stream={stream}", "run.save=false")
    assert figures["dense/ppl/test@64"] == pytest.approx(ORACLE["dense_ppl"], rel=1e-5)
    assert figures["pruned/ppl/test@64"] == pytest.approx(ORACLE[setting]["ppl"], rel=1e-4)
    sites = plan("run")["sites"]
    assert [len(sites[f"model.layers.{i}.self_attn"]["kept"]) for i in range(4)] == ORACLE[setting]["heads"]
    assert [len(sites[f"model.layers.{i}.mlp"]["kept"]) for i in range(4)] == ORACLE[setting]["neurons"]
    assert not Path("run/model").exists() and not Path("run/streamed").exists()


@pytest.mark.parametrize("typed", [["recipe=flap"], ["recipe=wanda_sp", "search=uniform", "compensator=bias"]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_run_is_the_one_in_memory(
    family: str, typed: list[str], cli: Cli, tiny_folder: Callable[[str], Path], tokens_NT: torch.Tensor
) -> None:
    np.save("tokens.npy", tokens_NT.numpy())
    files = ["dataset.calibration=tokens.npy", "dataset.evaluation=tokens.npy", "dataset.length=24"]
    common = [*QUICK, f"model.path={tiny_folder(family)}", *files, *typed, "sparsity.ratio=0.4"]
    held = cli("held", *common)
    streamed = cli("streamed", *common, "model.stream=true")
    assert lasting(streamed) == lasting(held) and "pruned/ppl/tokens@24" in held
    assert plan("streamed") == plan("held")
    assert Path("streamed/scores.safetensors").read_bytes() == Path("held/scores.safetensors").read_bytes()
    first, second = checkpoint("held"), checkpoint("streamed")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    configs = [json.loads(Path(name, "model/config.json").read_text()) for name in ("held", "streamed")]
    assert configs[0] == configs[1]
    names = [{path.name for path in Path(name, "model").iterdir()} for name in ("held", "streamed")]
    assert names[0] == names[1]


@pytest.mark.parametrize("stream", ["false", "true"])
def test_what_a_run_leaves_is_a_model_for_the_next(stream: str, cli: Cli) -> None:
    first = cli("first", *QUICK, "sparsity.ratio=0.3", f"model.stream={stream}")
    second = cli(
        "second", *QUICK, "model.path=first/model", "sparsity.ratio=0.3", f"model.stream={stream}", "search=global"
    )
    assert second["dense/ppl/test@64"] == pytest.approx(first["pruned/ppl/test@64"], rel=1e-6)
    assert second["dense/params"] == first["pruned/params"]
    assert second["pruned/params"] < second["dense/params"]
    assert second["sparsity/decoder"] == pytest.approx(0.3, abs=0.003)
    once, twice = plan("first")["sites"], plan("second")["sites"]
    for name, site in twice.items():
        assert site["units"] == len(once[name]["kept"]), "the second run starts from what the first one kept"


def test_half_precision_runs(cli: Cli) -> None:
    figures = cli("run", *QUICK, "model.dtype=bfloat16", "run.prove=in_place")
    assert figures["pruned/ppl/test@64"] == pytest.approx(ORACLE["dense_ppl"], rel=0.05)
    assert {tensor.dtype for tensor in checkpoint("run").values()} == {torch.bfloat16}
    assert figures["proof/max_logit_difference"] == 0
    assert figures["dense/bytes"] == 2 * figures["dense/params"]


def test_a_run_is_repeated_from_its_own_record(cli: Cli, tmp_path: Path) -> None:
    """config.yaml is all that another run needs."""
    first = cli("first", *QUICK, "recipe=wanda_sp", "sparsity.ratio=0.35", "run.save=false")
    from pruneexp.cli.build import build
    from pruneexp.cli.compose import Composed, compose
    from pruneexp.experiment.run import run_experiment

    config = yaml.safe_load(Path("first/config.yaml").read_text())
    config["run"]["dir"] = "second"
    composed = compose([])
    run_experiment(build(Composed(config, composed.job, composed.folders)))
    assert lasting(metrics("second")) == lasting(first)
    assert Path("second/plan.json").read_bytes() == Path("first/plan.json").read_bytes()
