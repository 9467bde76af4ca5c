"""The walk over the blocks: what evidence is given, what is left behind, what is held, and how it fails."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pruneexp import progress
from pruneexp.__main__ import main
from pruneexp.calibrate import Bookmark, Meter, Probe, walk
from pruneexp.evidence import Moments
from pruneexp.model import Model, source
from pruneexp.model.sites import site_parts
from pruneexp.surgery import shrink_layer_
from pruneexp.tracker import structure
from pruneexp.types import Candidate, Plan, RunError, Site, SitePlan
from tests.cases import each
from tests.conftest import FAMILIES, PARITY


@dataclass(frozen=True)
class AtBlock:
    """Everything that a block read and wrote."""

    source: ClassVar[str] = "block"
    x: tuple[Tensor, ...] = ()
    y: tuple[Tensor, ...] = ()

    @classmethod
    def empty(cls, site: Site) -> AtBlock:
        return cls()

    def update_(self, x_BTD: Tensor, y_BTD: Tensor) -> AtBlock:
        return AtBlock((*self.x, x_BTD), (*self.y, y_BTD))


@dataclass(frozen=True)
class AtReader:
    """Everything that a reader read."""

    source: ClassVar[str] = "reader"
    x: tuple[Tensor, ...] = ()

    @classmethod
    def empty(cls, site: Site) -> AtReader:
        return cls()

    def update_(self, x_BTC: Tensor) -> AtReader:
        return AtReader((*self.x, x_BTC.clone()))


def hooks(model: Model) -> dict[str, tuple[int, int, bool]]:
    """What hangs on every module: hooks before and after its forward, and a forward of its own."""
    return {
        name: (len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in m.__dict__)
        for name, m in model.module.named_modules()
    }


def half(sites: tuple[Site, ...]) -> Plan:
    """Every other unit stays."""
    return Plan({s.name: SitePlan(s.kind, s.units, tuple(range(0, s.units, 2))) for s in sites})


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_hanging(family: str, tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = tiny(family)
    before = hooks(model)
    for visit in walk(model, tokens_NT, (Moments, AtBlock), Bookmark(Meter(), "test")):
        assert hooks(model) == before, "while the caller has the block, it is the model's own"
        assert set(visit.evidence) == {Moments, AtBlock}
    assert hooks(model) == before
    stopped = walk(model, tokens_NT, (Moments,), Bookmark(Meter(), "test"))
    next(stopped)
    stopped.close()
    assert hooks(model) == before


def test_nothing_is_left_hanging_by_evidence_that_fails(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    class Failing(AtReader):
        def update_(self, x_BTC: Tensor) -> AtReader:
            raise RunError("no")

    model = tiny("opt")
    before = hooks(model)
    with pytest.raises(RunError, match="no"):
        next(walk(model, tokens_NT, (Failing,), Bookmark(Meter(), "test")))
    assert hooks(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_given_what_the_model_gives_it(family: str, tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = tiny(family)
    with torch.no_grad():
        states = model.module(tokens_NT, output_hidden_states=True).hidden_states
    for visit in walk(model, tokens_NT, (AtBlock,), Bookmark(Meter(), "test"), read_only=True):
        assert set(visit.of(AtBlock)) == {site.name for site in visit.block.sites}
        for seen in visit.of(AtBlock).values():
            assert [len(x) for x in seen.x] == [4, 4, 2]
            torch.testing.assert_close(torch.cat(seen.x), states[visit.index], rtol=1e-10, atol=1e-10)
            if visit.index < 2:  # the last state of all has gone through the final norm
                torch.testing.assert_close(torch.cat(seen.y), states[visit.index + 1], rtol=1e-10, atol=1e-10)


@each("stream, family", itertools.product([False, True], FAMILIES))
def test_a_readers_input_is_handed_over_by_windows(
    family: str, stream: bool, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    plain, read = tiny(family), {}
    for index, layer in enumerate(plain.layers):
        for site in plain.layer_sites(index):
            out_projection = layer.get_submodule(site_parts(plain.family, site)[1])
            out_projection.register_forward_pre_hook(lambda _m, args, name=site.name: read.update({name: args[0]}))
    with torch.no_grad():
        plain.module(tokens_NT)
    for visit in walk(tiny(family, stream=stream), tokens_NT, (AtReader,), Bookmark(Meter(), "test"), read_only=True):
        for site in visit.block.sites:
            seen = visit.of(AtReader)[site.name]
            # OPT flattens the windows in front of its FFN
            assert [tuple(x.shape) for x in seen.x] == [(n, 24, site.channels) for n in (4, 4, 2)]
            expected = read[site.name].view(10, 24, site.channels)
            torch.testing.assert_close(torch.cat(seen.x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untouched_walk_is_one_dense_pass(family: str, tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    walks = []
    for read_only in (False, True):
        model, meter = tiny(family), Meter()
        before = model.token_losses(tokens_NT, 4)
        visits = walk(model, tokens_NT, (Moments,), Bookmark(meter, "test"), read_only=read_only)
        walks.append({name: moments for visit in visits for name, moments in visit.of(Moments).items()})
        assert meter.forward == pytest.approx(1) and meter.backward == 0
        assert torch.equal(model.token_losses(tokens_NT, 4), before)
    assert walks[0].keys() == walks[1].keys() and len(walks[0]) == 6
    for name, moments in walks[0].items():
        assert moments.n == tokens_NT.numel()
        assert torch.equal(moments.mean_C, walks[1][name].mean_C)
        assert torch.equal(moments.m2_C, walks[1][name].m2_C)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruning_walk_sees_what_the_shrunk_model_before_it_produces(
    family: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model, meter, seen = tiny(family), Meter(), {}
    plan = half(model.sites())
    for visit in walk(model, tokens_NT, (Moments,), Bookmark(meter, "test")):
        seen.update(visit.of(Moments))
        shrink_layer_(model, visit.index, plan)
    assert meter.forward == pytest.approx(1 + 2 / 3), "each block once, and again after it was pruned but for the last"
    dense = {
        n: m
        for v in walk(tiny(family), tokens_NT, (Moments,), Bookmark(Meter(), "test"))
        for n, m in v.of(Moments).items()
    }
    for index in range(3):
        scratch = tiny(family)
        for earlier in range(index):
            shrink_layer_(scratch, earlier, plan)
        for visit in walk(scratch, tokens_NT, (Moments,), Bookmark(Meter(), "test"), read_only=True):
            if visit.index == index:
                for name, moments in visit.of(Moments).items():
                    assert torch.equal(moments.mean_C, seen[name].mean_C)
                    assert torch.equal(moments.m2_C, seen[name].m2_C)
                    assert torch.equal(moments.mean_C, dense[name].mean_C) == (index == 0)


def test_a_read_only_walk_notices_being_lied_to(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = tiny("llama")
    walking = walk(model, tokens_NT, (Moments,), Bookmark(Meter(), "test"), read_only=True)
    visit = next(walking)
    with torch.no_grad():
        visit.layer.mlp.down_proj.weight.mul_(2)  # type: ignore[union-attr, operator]
    with pytest.raises(AssertionError, match=r"model\.layers\.0 was changed"):
        next(walking)


@pytest.mark.parametrize("kinds", [(), (Moments,)])
def test_without_evidence_or_tokens_blocks_are_opened_and_not_run(
    kinds: tuple[type, ...], tiny: Callable[..., Model], tokens_NT: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "run_layer", lambda *_: pytest.fail("a block was run"))
    meter = Meter()
    visits = list(walk(tiny("llama"), None if kinds else tokens_NT, kinds, Bookmark(meter, "test")))
    assert [visit.index for visit in visits] == [0, 1, 2] and meter.forward == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_evidence_is_that_in_memory(family: str, tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    held, streamed = (
        {
            n: m
            for v in walk(tiny(family, stream=s), tokens_NT, (Moments,), Bookmark(Meter(), "test"))
            for n, m in v.of(Moments).items()
        }
        for s in (False, True)
    )
    assert held.keys() == streamed.keys()
    for name, moments in held.items():
        assert torch.equal(moments.mean_C, streamed[name].mean_C) and torch.equal(moments.m2_C, streamed[name].m2_C)


# Probes


def test_keeping_everything_is_the_dense_loss(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model, meter = tiny("llama"), Meter()
    probe, sites = Probe(model, tokens_NT, meter), model.sites()
    expected = model.token_losses(tokens_NT, 4).mean()
    losses = probe.losses([Candidate(Plan.keep_all(sites)), Candidate(Plan({})), Candidate(half(sites))])
    assert losses.dtype == torch.float64 and losses.shape == (3,)
    torch.testing.assert_close(losses[:2], expected.expand(2), rtol=1e-12, atol=0)
    assert abs(losses[2] - expected) > 1e-3
    assert 1 <= probe.passes <= 3 + 1e-9, "layers that candidates have in common are run once at most"
    assert meter.forward == pytest.approx(probe.passes)


def test_a_batch_costs_its_share(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model, meter = tiny("llama"), Meter()
    probe = Probe(model, tokens_NT, meter)
    assert probe.batches == 3
    keep = Candidate(Plan.keep_all(model.sites()))
    batches = [probe.losses([keep], batch).item() for batch in range(3)]
    assert probe.passes == pytest.approx(1) and meter.forward == pytest.approx(1)
    whole = probe.losses([keep]).item()
    assert (4 * batches[0] + 4 * batches[1] + 2 * batches[2]) / 10 == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_judges_the_shrunk_model_and_leaves_none_behind(
    family: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model = tiny(family)
    before, weights = hooks(model), {k: v.clone() for k, v in model.module.state_dict().items()}
    plan = half(model.sites())
    out_projections = {}
    for index in range(3):
        block = model.block(index)
        for site in block.sites:
            kept = site.keep_C(plan.sites[site.name].kept)
            out_projections[site.name] = (
                block.weights[site.name].out_projection[:, kept] * 1.1,
                torch.ones(48, dtype=torch.float64),
            )
    losses = Probe(model, tokens_NT, Meter()).losses([Candidate(plan), Candidate(plan, out_projections)])
    assert hooks(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.module.state_dict().items())
    for replaced, loss in zip(({}, out_projections), losses, strict=True):
        shrunk = tiny(family)
        for index in range(3):
            shrink_layer_(shrunk, index, plan, replaced)
        assert loss.item() == pytest.approx(shrunk.token_losses(tokens_NT, 4).mean().item(), rel=1e-10)


# What a run does about broken models


Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A whole short run in `tmp_path`/run; the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(progress, "BAR_AFTER", 3600.0)
    monkeypatch.setattr(structure, "structure_figure", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)

    def go(*arguments: str) -> int:
        files = [f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
        plain = ["model=hf", f"model.path={PARITY}", "dataset=tokens", "dataset.length=64", *files]
        try:
            return main([*plain, "run.dir=run", "run.prove=off", "evaluator=[size]", *arguments])
        finally:
            signal.signal(signal.SIGTERM, before)

    return go


def damaged(folder: Path, name: str, value: float) -> Path:
    """A copy of the small LLaMA checkpoint with `value` in one place of (Inf, NaN) or all over (else) one tensor."""
    folder.mkdir()
    (folder / "config.json").write_bytes((PARITY / "config.json").read_bytes())
    tensors = load_file(PARITY / "model.safetensors")
    if np.isfinite(value):
        tensors[name] = torch.full_like(tensors[name], value)
    else:
        tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


BROKEN = {
    "NaN weights": (
        ("model.layers.2.mlp.up_proj.weight", float("nan")),
        "model.layers.2.mlp.up_proj.weight: weights hold NaN or Inf",
    ),
    "Inf weights": (
        ("model.layers.1.input_layernorm.weight", float("inf")),
        "model.layers.1.input_layernorm.weight: weights hold NaN or Inf",
    ),
    "Inf activations": (
        ("model.layers.1.mlp.down_proj.weight", 1e38),
        "model.layers.1: activations hold NaN or Inf (calibration batch 0)",
    ),
    "NaN embeddings": (
        ("model.embed_tokens.weight", float("nan")),
        "model.embed_tokens.weight: weights hold NaN or Inf",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("case", BROKEN)
def test_numbers_that_are_none_end_the_run_and_name_the_layer(
    case: str, stream: str, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (name, value), reason = BROKEN[case]
    folder = damaged(tmp_path / "damaged", name, value)
    token = 0 if "embed" in name else 3  # the broken row is that of token 0
    np.save("calib.npy", np.full((4, 16), token))
    code = run(f"model.path={folder}", "dataset.calibration=calib.npy", f"model.stream={stream}")
    assert code == 1
    assert capfd.readouterr().err == f"pruneexp: failed: {reason}\n"
    status = json.loads(Path("run/status.json").read_text())
    assert (status["status"], status["reason"]) == ("failed", reason)
    assert reason in Path("run/log.txt").read_text()
    assert not Path("run/metrics.json").exists() and not Path("run/model").exists()


def test_criteria_that_need_no_data_refuse_broken_weights_too(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(tmp_path / "damaged", "model.layers.3.self_attn.q_proj.weight", float("nan"))
    assert run("recipe=magnitude", f"model.path={folder}") == 1
    expected = "pruneexp: failed: model.layers.3.self_attn.q_proj.weight: weights hold NaN or Inf\n"
    assert capfd.readouterr().err == expected


def test_the_default_evaluators_name_the_layer_as_well(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(tmp_path / "damaged", "model.layers.3.self_attn.q_proj.weight", float("nan"))
    assert run(f"model.path={folder}", "evaluator=[perplexity,size]") == 1
    assert "model.layers.3.self_attn.q_proj.weight" in capfd.readouterr().err


# What a streamed model holds


def blocks_held(model: Model) -> int:
    return sum(any(not p.is_meta for p in layer.parameters()) for layer in model.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_walk_holds_one_block(family: str, tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = tiny(family, stream=True)
    assert blocks_held(model) == 0
    for visit in walk(model, tokens_NT, (Moments,), Bookmark(Meter(), "test")):
        assert [not p.is_meta for p in visit.layer.parameters()].count(False) == 0
        assert blocks_held(model) == 1
        shrink_layer_(model, visit.index, half(visit.block.sites))
        assert blocks_held(model) == 1
    assert blocks_held(model) == 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["flap", "wanda_sp"])
def test_a_streamed_run_never_holds_more_than_two_blocks(
    recipe: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everywhere that a block is run: evaluators before and after, calibration, saving, proving."""
    source._outline.cache_clear()  # it may be that of the run before
    models: list[Model] = []
    held: list[int] = []
    init, run_layer, enter = Model.__init__, Model.run_layer, Model.enter

    def noted(self: Model, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        models.append(self)

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Model, *args: Any) -> Any:
            held.append(sum(blocks_held(model) for model in models))
            return method(self, *args)

        return call

    monkeypatch.setattr(Model, "__init__", noted)
    monkeypatch.setattr(Model, "run_layer", counted(run_layer))
    monkeypatch.setattr(Model, "enter", counted(enter))
    code = run(
        f"recipe={recipe}",
        "model.stream=true",
        "run.prove=in_place",
        "evaluator=[perplexity,size]",
        "model.dtype=float64",
    )
    assert code == 0
    outline, *read = models
    assert all(parameter.is_meta for parameter in outline.module.parameters()), "what the checks look at"
    assert len(read) == 2 and all(model.streamed for model in read), "the model, and its reloaded checkpoint"
    assert max(held) <= 2 and len(held) > 40
    assert all(isinstance(layer, nn.Module) for layer in models[0].layers) and blocks_held(models[0]) == 0
    proof = json.loads(Path("run/proof.json").read_text())
    assert proof["prove"] == "block_by_block" and proof["max_block_difference"] == 0
