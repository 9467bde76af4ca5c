"""Models on GPUs, one or several: pretended ones here, real ones where there are some."""

from __future__ import annotations

import gc
import json
import math
import tempfile
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pruneexp.experiment.run
from pruneexp.cache import NoCache
from pruneexp.cache.packing import packed, unpacked
from pruneexp.calibrate import DenseStates
from pruneexp.compensator import LeastSquares
from pruneexp.criterion import WandaSp
from pruneexp.evaluator.generation import continued
from pruneexp.experiment.forecast import available_memory
from pruneexp.experiment.forecast.machine import out_of_memory
from pruneexp.experiment.run import run_experiment
from pruneexp.model import Model, ModelSource
from pruneexp.model.free_gpu import held_gpu
from pruneexp.model.placement import connect_, devices_of, placed
from pruneexp.pruning import Method, prune_
from pruneexp.pruning.answers import checked_scores
from pruneexp.pruning.dense_evidence import Results
from pruneexp.pruning.record import Record
from pruneexp.search import UlUm
from pruneexp.sparsity import OneShot
from pruneexp.surgery import save, shrink_
from pruneexp.tracker import structure
from pruneexp.types import Block, ColumnScores, ConfigError, Cost, Plan, RemovalPath, RunError, Site, SitePlan
from tests.cases import UNTIMED, each
from tests.conftest import FAMILIES
from tests.masking import masked
from tests.pretended_gpus import Mixed, pretended_gpus
from tests.tiny_families import TINY, tiny_model

pytestmark = pytest.mark.slow

CPU, FIRST, SECOND, THIRD = (torch.device(name) for name in ("cpu", "cuda:0", "cuda:1", "cuda:2"))
Run = Callable[..., tuple[dict[str, float], dict[str, Any]]]

one_gpu = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture
def run(
    build_from: Callable[..., Any], tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """A run of a tiny model: its metrics that are no times and no memory, and its plan."""
    monkeypatch.setattr(structure, "structure_figure", lambda *_: None)
    tokens_NT = torch.randint(3, 96, (12, 24), generator=torch.Generator().manual_seed(1)).numpy()
    np.save(tmp_path / "seen.npy", tokens_NT[:8])
    np.save(tmp_path / "unseen.npy", tokens_NT[8:])

    def tiny_run(device: str, family: str, *overrides: str) -> tuple[dict[str, float], dict[str, Any]]:
        files = ["dataset=tokens", "dataset.calibration=seen.npy", "dataset.evaluation=unseen.npy"]
        model = ["model=hf", f"model.path={tiny_folder(family)}", f"model.device={device}", "model.batch_size=4"]
        plain = ["cache=off", "sparsity.ratio=0.3", "evaluator=[perplexity,size]", "run.prove=in_place"]
        folder = "run_" + device.replace(":", "")
        experiment = build_from(*files, *model, *plain, f"run.dir={folder}", "run.overwrite=true", *overrides)
        experiment.check()
        metrics = run_experiment(experiment).metrics
        varying = ("seconds/", "memory/", "dense/latency", "pruned/latency")
        same = {name: value for name, value in metrics.items() if not name.startswith(varying)}
        return same, json.loads((tmp_path / folder / "plan.json").read_text())

    return tiny_run


# pretended GPUs notice what real ones would


def test_tensors_of_different_devices_are_noticed() -> None:
    with pretended_gpus():
        here, there = torch.ones(3, device="cuda:0"), torch.ones(3).to("cuda:1")
        assert (here.device, there.device, (2 * there)[1:].device, there.cpu().device) == (FIRST, SECOND, SECOND, CPU)
        assert torch.nn.Parameter(there).device == SECOND and there.new_zeros(2).device == SECOND
        assert here.is_cuda and torch.nn.Linear(3, 3).to("cuda:1")(there).device == SECOND
        assert here[torch.tensor([0, 2])].device == FIRST  # a GPU takes indices of the CPU here, but nowhere else
        assert (here * torch.tensor(2.0)).device == FIRST  # and numbers
        for wrong in (
            lambda: here + there,
            lambda: here + torch.ones(3),
            lambda: here.add_(there),
            lambda: torch.zeros(()).add_(here.sum()),
            lambda: torch.stack([here.sum(), there.sum()]),
            lambda: torch.stack([here.sum(), torch.zeros(())]),
            lambda: here.index_select(0, torch.tensor([0])),
            lambda: here.numpy(),
            lambda: torch.rand(3, device="cuda:0", generator=torch.Generator()),
            lambda: torch.rand(3, generator=torch.Generator("cuda:0")),
        ):
            with pytest.raises(Mixed):
                wrong()
        leaf = torch.ones(3, device="cuda:0", requires_grad=True)
        (2 * leaf.to("cuda:1") * there).sum().backward()
        assert leaf.grad is not None and leaf.grad.device == FIRST
        assert torch.equal(leaf.grad.cpu(), torch.full((3,), 2.0))


def test_a_planted_mistake_is_noticed(tiny: Any, tokens_NT: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpus():
        model = tiny("llama", device="auto")
        monkeypatch.setattr(Model, "layer_device", lambda self, index: self.device)  # masks on the first GPU
        with pytest.raises(Mixed), masked(model, half(model)):
            model.token_losses(tokens_NT, 4)
        monkeypatch.undo()
    with pretended_gpus():
        monkeypatch.setattr("pruneexp.model.source.connect_", lambda *_: None)  # inputs that stay where they are
        with pytest.raises(Mixed):
            tiny("llama", device="auto").token_losses(tokens_NT, 4)


def half(model: Model) -> Plan:
    return Plan({s.name: SitePlan(s.kind, s.units, tuple(range(s.units // 2, s.units))) for s in model.sites()})


# which layer lies where


def test_every_device_holds_its_share_of_the_bytes() -> None:
    devices = (FIRST, SECOND, THIRD)
    assert placed([10] * 6, 0, devices[:2], [1, 1]) == (FIRST,) * 3 + (SECOND,) * 3
    assert placed([10] * 6, 0, devices, [1, 2, 3]) == (FIRST, SECOND, SECOND, THIRD, THIRD, THIRD)
    assert placed([10] * 6, 40, devices[:2], [1, 1]) == (FIRST,) + (SECOND,) * 5  # the head lies on the first
    assert placed([10] * 4, 100, devices[:2], [1, 1]) == (SECOND,) * 4  # and may be more than its share
    assert placed([30, 10, 10, 10], 0, devices[:2], [1, 1]) == (FIRST,) + (SECOND,) * 3
    assert placed([10] * 6, 0, devices[:2], [0, 5]) == (SECOND,) * 6
    for free in ([3, 1, 7], [1, 1, 1], [8, 1, 1]):
        placement = placed([7, 3, 9, 4, 4, 4, 8, 1], 11, devices, free)
        assert sorted(placement, key=devices.index) == list(placement)


def test_what_a_device_is_called(source: Any, tiny_folder: Any) -> None:
    assert devices_of("cpu") == (CPU,) and devices_of("cuda") == devices_of("cuda:0") == (FIRST,)
    with pretended_gpus(0):
        assert devices_of("auto") == (CPU,)
        assert source(tiny_folder("opt"), device="auto").load().devices == (CPU,)
        with pytest.raises(ConfigError, match=r"^model.device='cuda': this machine has 0 CUDA devices; expected cpu$"):
            source(tiny_folder("opt"), device="cuda").check()
    with pretended_gpus(2):
        assert devices_of("auto") == (FIRST, SECOND)
        source(tiny_folder("opt"), device="cuda:1").check()
        line = "this machine has 2 CUDA devices; expected cpu, auto, cuda:any or cuda:0 to cuda:1"
        with pytest.raises(ConfigError, match=f"^model.device='cuda:7': {line}$"):
            source(tiny_folder("opt"), device="cuda:7").check()
        assert available_memory(FIRST, SECOND) == 2**31
    with pretended_gpus(1):
        model = source(tiny_folder("opt"), device="auto").load()
        assert model.devices == (FIRST,) and not model.layers[0]._forward_pre_hooks


def test_what_pytorch_keeps_of_a_gpu_is_free(source: Any, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is from the second run in a process on."""
    with pretended_gpus(2, free=(0, 2**20)):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**20 if device == FIRST else 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**20 if device == FIRST else 0)
        assert available_memory(FIRST, SECOND) == 2**21
        layers = source(tiny_folder("opt"), device="auto").load().layers
        assert {next(layer.parameters()).device for layer in layers} == {FIRST, SECOND}


# the model itself


@each("name", [*FAMILIES, *TINY])
def test_a_model_over_two_gpus_computes_what_it_did(
    name: str, tiny_folder: Any, source: Any, tokens_NT: Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if name in FAMILIES:
        folder = tiny_folder(name)
    else:
        tiny_model(name).save_pretrained(folder)
    tokens_NT = tokens_NT % 61 + 3
    plain = source(folder).load()
    losses = plain.token_losses(tokens_NT, 4)
    written = continued(plain.module, tokens_NT[:2, :8], lambda logits, step: logits.argmax(-1), 6)
    with pretended_gpus():
        model = source(folder, device="auto").load()
        assert model.devices == (FIRST, SECOND)
        assert all(
            p.device == model.layer_device(i) for i, layer in enumerate(model.layers) for p in layer.parameters()
        )
        assert torch.equal(model.token_losses(tokens_NT, 4), losses)
        again = continued(model.module, tokens_NT[:2, :8].to(FIRST), lambda logits, step: logits.argmax(-1), 6)
        assert torch.equal(again, written)
        hidden, calls = model.enter(tokens_NT[:4])
        for index, layer in enumerate(model.layers):
            hidden = model.run_layer(layer, hidden, calls[index])
            assert hidden.device == model.layer_device(index)
        logits = model.leave(tokens_NT[:4], hidden)
        assert torch.equal(logits.cpu(), plain.module(tokens_NT[:4]).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_shrunk_and_masked_models_over_two_gpus(family: str, tiny: Any, tokens_NT: Tensor, tmp_path: Path) -> None:
    plain = tiny(family)
    plan = half(plain)
    gone = Plan({**plan.sites, f"{plain.layers_path}.0": SitePlan("block", 1, ())})
    with pretended_gpus():
        model = tiny(family, device="auto")
        with masked(model, gone):
            expected = model.token_losses(tokens_NT, 4)
        shrink_(plain, gone)
        shrink_(model, gone)
        assert model.devices == (FIRST, SECOND) and [model.layer_device(i) for i in (0, 1)] == [SECOND, SECOND]
        torch.testing.assert_close(model.token_losses(tokens_NT, 4), expected)
        assert torch.equal(model.token_losses(tokens_NT, 4), plain.token_losses(tokens_NT, 4))
        save(model, tmp_path / "spread")
    save(plain, tmp_path / "plain")
    written = {f.name: f.read_bytes() for f in (tmp_path / "spread").iterdir()}
    assert written == {f.name: f.read_bytes() for f in (tmp_path / "plain").iterdir()}


def test_masks_are_moved_once_for_all_layers_of_a_device() -> None:
    seen: list[Tensor] = []

    class Layer(torch.nn.Module):
        def forward(self, hidden: Tensor, mask: Tensor, more: Any = None) -> Tensor:
            seen.append(mask)
            assert hidden.device == mask.device == more[0].device == more[1]["deep"].device
            return hidden

    layers = torch.nn.ModuleList(Layer() for _ in range(3))
    with pretended_gpus():
        connect_(torch.nn.ModuleList([layers]), layers, (FIRST, SECOND, SECOND), FIRST)
        hidden, mask = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:0")
        for layer in layers:
            hidden = layer(hidden, mask, more=(mask, {"deep": mask}))
    assert seen[0] is mask and seen[1] is seen[2] is not mask


@pytest.mark.parametrize("family", FAMILIES)
def test_jobs_on_different_gpus_share_the_dense_models_hidden_states(family: str, tiny: Any, tokens_NT: Tensor) -> None:
    compensator, losses = LeastSquares(1e-2, "dense", True, "channel"), []
    method = Method(WandaSp("sum", False), OneShot(0.3, "decoder", 0, *UNTIMED), UlUm(), compensator)
    results = Results(NoCache(), {}, DenseStates(2**28))
    with pretended_gpus():
        for device in ("cuda:0", "cuda:1"):
            model = tiny(family, device=device)
            prune_(model, tokens_NT, method, 0.3, Record(results=results))
            losses.append(model.token_losses(tokens_NT, 4))
    assert results.shared is not None and len(results.shared.layers) == 3
    assert torch.equal(*losses)


# whole runs

RUNS = (
    ("llama", "recipe=best search.effort=12"),
    ("bloom", "recipe=best search.effort=6 compensator.target=pruned compensator.sequential=false"),
    ("opt", "recipe=flap 'evaluator=[perplexity,generation,latency]'"),
    ("bloom", "recipe=flap_official"),
    ("llama", "recipe=wanda_sp sparsity=cubic sparsity.rounds=2 search=global"),
    ("opt", "recipe=llm_pruner recovery=lora recovery.steps=2"),
    ("llama", "recipe=flap recovery=lora recovery.steps=2 recovery.merge=false"),
    ("bloom", "recipe=mini_llm criterion.directions=8"),
    ("opt", "recipe=mini_llm criterion.perturb=gates criterion.directions=8"),
    ("llama", "recipe=llm_bip"),
    ("llama", "recipe=policy_gradient search.passes=20"),
    ("opt", "recipe=ifso"),
    ("llama", "criterion=ifso criterion.hessian=exact"),
    ("bloom", "recipe=shortgpt"),
    ("opt", "recipe=sleb"),
    ("llama", "recipe=flap search=greedy 'search.granularity=[attention,ffn]'"),
)
WRITING = ["evaluator.generation.prompt_tokens=8", "evaluator.generation.new_tokens=6"]
TIMING = ["evaluator.latency.prompt=8", "evaluator.latency.new_tokens=2", "evaluator.latency.repeats=1"]


@pytest.mark.parametrize(("family", "words"), RUNS)
def test_a_run_over_two_gpus_gives_what_one_on_the_cpu_gives(run: Run, family: str, words: str) -> None:
    overrides = words.replace("'", "").split() + (WRITING + TIMING if "generation" in words else [])
    expected = run("cpu", family, *overrides)
    with pretended_gpus():
        assert run("auto", family, *overrides) == expected


def test_a_run_on_one_gpu_and_its_memory(run: Run, tmp_path: Path) -> None:
    expected = run("cpu", "llama", "recipe=flap")
    with pretended_gpus():
        assert run("cuda:1", "llama", "recipe=flap") == expected
    assert json.loads((tmp_path / "run_cuda1/metrics.json").read_text())["memory/cuda:1/peak_bytes"] == 2**20
    with pretended_gpus():
        run("auto", "llama", "recipe=flap")
    metrics = json.loads((tmp_path / "run_auto/metrics.json").read_text())
    assert {name for name in metrics if name.startswith("memory/cuda")} == {
        "memory/cuda:0/peak_bytes",
        "memory/cuda:1/peak_bytes",
    }


def test_a_run_on_any_gpu(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = run("cpu", "llama", "recipe=flap")
    with pretended_gpus(), held_gpu("cuda:any") as taken:
        assert taken == "cuda:0"
        assert run("cuda:any", "llama", "recipe=flap") == expected
    metrics = json.loads((tmp_path / "run_cudaany/metrics.json").read_text())
    assert [name for name in metrics if name.startswith("memory/cuda")] == ["memory/cuda:1/peak_bytes"]
    assert "are free" not in caplog.text
    with pretended_gpus(2, free=(2**30, 2**10)), held_gpu("cuda:any"):
        run("cuda:any", "llama", "recipe=flap")
    assert "1.00 KiB are free" in caplog.text, "it is the free memory of the GPU that was taken"
    with pretended_gpus(0), pytest.raises(ConfigError, match=r"model.device='cuda:any'.* 0 CUDA devices; expected cpu"):
        run("cuda:any", "llama", "recipe=flap")


@pytest.mark.parametrize("fails", [False, True])
def test_a_sweep_s_job_has_left_its_gpu_when_another_takes_it(
    fails: bool, tmp_path: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(structure, "structure_figure", lambda *_: None)
    load, prunes, models, left = ModelSource.load, pruneexp.experiment.run.prune_in_rounds_, [], []

    def loads(source: ModelSource, *args: Any) -> Any:
        model = load(source, *args)
        models.append(weakref.ref(model.module))
        return model

    def empties() -> None:
        gc.collect()
        left.append(any(one() is not None for one in models))

    def pruned(*args: Any) -> Any:
        outcome = prunes(*args)
        if fails:
            raise torch.OutOfMemoryError("of GPU 0")
        return outcome

    monkeypatch.setattr(ModelSource, "load", loads)
    monkeypatch.setattr(pruneexp.experiment.run, "prune_in_rounds_", pruned)
    monkeypatch.setattr(torch.cuda, "empty_cache", empties)
    model = ["model=hf", f"model.path={tiny_folder('llama')}", "model.device=cuda:any"]
    np.save("windows.npy", torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(1)).numpy())
    seen = ["dataset=tokens", "dataset.calibration=windows.npy", "dataset.evaluation=windows.npy", "cache=off"]
    with pretended_gpus(1):
        with pytest.raises(RunError, match=r"failed: \w+, \w+$") if fails else nullcontext():
            pruneexp.run(["--multirun", *model, *seen, "evaluator=[perplexity]", "sparsity.ratio=0.2,0.3"])
    assert len(models) == 2 and left == [False, False]


@pytest.mark.parametrize(
    ("family", "words"), [("llama", "recipe=best search.effort=6"), ("opt", "compensator=least_squares_once")]
)
def test_what_one_gpu_calibrated_serves_another(run: Run, family: str, words: str) -> None:
    expected = run("cpu", family, *words.split())
    for device, devices in (("cuda:0", {FIRST}), ("cuda:1", {SECOND}), ("auto", {FIRST, SECOND})):
        with pretended_gpus() as gpus:
            assert run(device, family, *words.split(), "cache=on", "cache.dir=kept") == expected
        assert {place for _, place in gpus.places.values()} == devices, "nothing comes to another job's GPU"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 1 has a total"), " on cuda:1"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes"), ""),
        (MemoryError(), ""),
    ],
)
def test_out_of_memory_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Model, "enter", fails)
    with pytest.raises(RunError, match=f"^out of memory{line}; a smaller model.batch_size .* needs less$"):
        run("cpu", "opt", "recipe=flap")
    assert not out_of_memory(RuntimeError("tensors differ in size"))


# what outlives a device


def test_scores_end_on_the_cpu() -> None:
    sites = tuple(Site(name, "mlp", 0, units=3, width=1, cost=Cost(1, 1, 0)) for name in "abc")
    block = Block("layer", 0, sites, {})
    with pretended_gpus():
        cost_U, order_U = torch.arange(3.0, device="cuda:1"), torch.arange(3, device="cuda:1")
        scores = {"a": cost_U, "b": ColumnScores(cost_U, cost_U), "c": RemovalPath(order_U, cost_U)}
        moved = checked_scores(scores, block)
        tensors = [moved["a"], moved["b"].scores_U, moved["b"].columns_C, moved["c"].order_U, moved["c"].cost_U]
        assert all(t.device == CPU for t in tensors)
        with pytest.raises(RunError, match="^a: scores hold NaN or Inf"):
            checked_scores({"a": cost_U / 0}, block)


def test_cached_tensors_come_to_the_models_devices() -> None:
    with pretended_gpus(3):
        outline, tensors = packed([torch.ones(2, device="cuda:1"), torch.ones(2)])
        for devices, expected in (((FIRST, SECOND), SECOND), ((THIRD,), THIRD), ((), CPU)):
            assert [t.device for t in unpacked(outline, tensors, devices)] == [expected, CPU]


# real GPUs

KINDS = (("llama", "recipe=flap"), ("opt", "recipe=wanda_sp"), ("bloom", "recipe=best search.effort=6"))
PERPLEXITIES = ("dense/ppl/unseen@24", "pruned/ppl/unseen@24")


def check_alike(actual: Any, expected: Any, tolerance: float) -> None:
    (metrics, plan), (known, known_plan) = actual, expected
    assert metrics["sparsity/decoder"] == pytest.approx(known["sparsity/decoder"], abs=0.05)
    for name in (key for key in known if "/ppl/" in key):
        assert math.log(metrics[name]) == pytest.approx(math.log(known[name]), rel=tolerance)
    if tolerance < 1e-4:
        assert plan["sites"] == known_plan["sites"]


@one_gpu
@pytest.mark.parametrize(("family", "recipe"), KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-2), ("bfloat16", 0.2)])
def test_a_real_gpu(run: Run, family: str, recipe: str, dtype: str, tolerance: float) -> None:
    words = [*recipe.split(), f"model.dtype={dtype}"]
    check_alike(run("cuda", family, *words), run("cpu", family, *words), tolerance)


@one_gpu
def test_a_streamed_model_on_a_real_gpu(run: Run) -> None:
    words = ["recipe=flap", "model.stream=true"]
    check_alike(run("cuda", "llama", *words), run("cpu", "llama", *words), 1e-6)


@two_gpus
@pytest.mark.parametrize(("family", "recipe"), [*KINDS, *((f, r) for f, r in RUNS if "mini_llm" not in r)])
def test_two_real_gpus(run: Run, family: str, recipe: str) -> None:
    words = recipe.replace("'", "").split() + (WRITING + TIMING if "generation" in recipe else [])
    check_alike(run("auto", family, *words), run("cpu", family, *words), 1e-6)
