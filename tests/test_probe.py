"""Calibration losses of candidates: shared beginnings are run once and change no number."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch

import pruneexp
from pruneexp.calibrate import Meter, Probe
from pruneexp.calibrate.probe import predictions_apart
from pruneexp.types import Candidate, Plan, SitePlan
from tests.conftest import FAMILIES
from tests.masking import masked


def candidate(model, removed: dict[int, int], refit: int | None = None) -> Candidate:
    """Site number -> units that leave it; site number `refit` gets a reader of its own."""
    sites, out_projections = model.sites(), {}
    plan = Plan.keep_all(sites)
    for number, units in removed.items():
        site = sites[number]
        plan = plan.merged(Plan({site.name: SitePlan(site.kind, site.units, tuple(range(units, site.units)))}))
    if refit is not None:
        site, width = sites[refit], model.config.hidden_size
        kept = site.width * len(plan.sites[site.name].kept)
        generator = torch.Generator().manual_seed(refit)
        weight = torch.randn(width, kept, generator=generator, dtype=model.dtype) / 10
        out_projections[site.name] = weight, torch.ones(width, dtype=model.dtype)
    return Candidate(plan, out_projections)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_masked_model(family, tiny, tokens_NT):
    model = tiny(family)
    probe = Probe(model, tokens_NT, Meter())
    candidates = [
        candidate(model, {}),
        candidate(model, {0: 1}),
        candidate(model, {0: 1, 3: 20}),
        candidate(model, {5: 7}, refit=5),
        candidate(model, {5: 7}),
    ]
    for batch, tokens in ((None, tokens_NT), (0, tokens_NT[:4]), (2, tokens_NT[8:])):
        losses = probe.losses(candidates, batch)
        for each, loss in zip(candidates, losses, strict=True):
            with masked(model, each.plan, each.out_projections):
                assert loss == pytest.approx(float(model.token_losses(tokens, 4).mean()), rel=1e-12)
    assert probe.batches == 3


def test_the_bar_moves_while_one_batch_is_judged(tiny, tokens_NT, monkeypatch):
    """A batch of many candidates may take minutes."""
    model, seen = tiny("llama"), []

    def bar(steps, *_):
        for step in steps:
            seen.append(probe.passes)
            yield step

    monkeypatch.setattr("pruneexp.calibrate.probe.progress", bar)
    probe = Probe(model, tokens_NT, Meter())
    probe.show("search", 1)
    probe.losses([candidate(model, {}), candidate(model, {0: 1}), candidate(model, {0: 2})], batch=0)
    assert len(set(seen)) > len(model.layers) and len(seen) == 99


PROBING = {  # recipe -> settings that make it quick
    "best": ["search.effort=2", "augmentation=none"],
    "blockpruner": [],
    "2ssp": [],
    "policy_gradient": ["search.steps=12"],
}


@pytest.mark.parametrize("recipe", PROBING)
def test_what_probes_shows_how_far_it_has_come(recipe, tiny, tokens_NT, monkeypatch):
    steps_of = {}

    def bar(steps, stage, *_):
        for step in steps:
            steps_of[stage] = step
            yield step

    monkeypatch.setattr("pruneexp.calibrate.probe.progress", bar)
    pruneexp.prune(tiny("llama").module.float(), None, tokens_NT, recipe=recipe, ratio=0.4, overrides=PROBING[recipe])
    assert 20 < steps_of["search"] < 99
    assert ("losses" in steps_of) == (recipe == "blockpruner") and steps_of.get("losses", 98) == 98


def test_what_is_shared_is_counted_once(tiny, tokens_NT):
    model, meter = tiny("llama"), Meter()
    probe = Probe(model, tokens_NT, meter)
    probe.losses([candidate(model, {})])
    assert probe.passes == meter.forward == pytest.approx(1)
    probe.losses([candidate(model, {}), candidate(model, {5: 3}), candidate(model, {4: 1})], batch=2)
    assert probe.passes == pytest.approx(1 + 0.2 * 5 / 3)  # two of ten windows; three variants of the third layer


@pytest.mark.parametrize("apart_from, most", [((), 1), ((5, 4), 1), ((0,), 2), ((0, 2), 3)])
def test_no_more_hidden_states_are_held_than_variants_still_need(apart_from, most, tiny, tokens_NT, monkeypatch):
    """Those in front of a layer of which another variant is to run, and those that it works on."""
    model, made, held = tiny("llama"), [], []
    candidates = [candidate(model, {}), *(candidate(model, {number: 2}) for number in apart_from)]
    run, enter = model.run_layer, model.enter

    def entered(tokens):
        hidden, calls = enter(tokens)
        made.append(weakref.ref(hidden))
        return hidden, calls

    def noted(layer, hidden, call):
        held.append(sum(state() is not None for state in made))
        output = run(layer, hidden, call)
        made.append(weakref.ref(output))
        return output

    monkeypatch.setattr(model, "run_layer", noted)
    monkeypatch.setattr(model, "enter", entered)
    probe = Probe(model, tokens_NT, Meter())
    probe.losses(candidates)
    assert max(held) == most
    assert probe.losses([]).shape == (0,)


def test_windows_are_split_into_as_many_batches_as_are_asked_for(tiny, tokens_NT):
    model = tiny("llama")
    candidates = [candidate(model, {}), candidate(model, {0: 1, 3: 20})]
    whole, few, many = (Probe(model, tokens_NT, Meter(), least_batches=n) for n in (1, 5, 99))
    assert (whole.batches, few.batches, many.batches) == (3, 5, len(tokens_NT))
    assert torch.allclose(few.losses(candidates), whole.losses(candidates), rtol=1e-12)
    alone = torch.stack([many.losses(candidates, batch) for batch in range(many.batches)])
    assert torch.allclose(alone.mean(0), few.losses(candidates), rtol=1e-12)
    assert many.passes == pytest.approx(whole.passes)


def test_a_removed_block_is_passed_over(tiny, tokens_NT):
    model = tiny("llama")
    name = f"{model.layers_path}.1"
    gone = Candidate(Plan({name: SitePlan("block", 1, ())}))
    with masked(model, gone.plan):
        expected = float(model.token_losses(tokens_NT, 4).mean())
    assert float(Probe(model, tokens_NT, Meter()).losses([candidate(model, {}), gone])[1]) == pytest.approx(expected)


@pytest.mark.parametrize("apart", [1, 2, 5])
def test_divergences_are_those_of_the_predictions_that_are_compared(apart, tiny, tokens_NT):
    model, variant = tiny("llama"), candidate(tiny("llama"), {0: 1, 3: 20})
    probe = Probe(model, tokens_NT, Meter(), objective="kl")
    assert probe.apart == 1  # 96 tokens
    probe.apart = apart
    (loss,) = probe.losses([variant]).tolist()
    p_BTV = model.module(tokens_NT).logits[:, ::apart].log_softmax(-1)
    with masked(model, variant.plan, variant.out_projections):
        q_BTV = model.module(tokens_NT).logits[:, ::apart].log_softmax(-1)
    assert loss == pytest.approx(float((p_BTV.exp() * (p_BTV - q_BTV)).sum(-1).mean()), rel=1e-9)


@pytest.mark.parametrize("vocabulary, apart", [(100, 1), (1000, 1), (1001, 2), (2000, 2), (10**6, 8)])
def test_an_output_head_costs_no_more_than_the_layers(vocabulary, apart):
    model = SimpleNamespace(vocab_size=vocabulary, config=SimpleNamespace(hidden_size=16), decoder_params=16000)
    assert predictions_apart(model) == apart
