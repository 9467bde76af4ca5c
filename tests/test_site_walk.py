"""The walk that holds the dense model's hidden states beside the pruned one's."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pruneexp.calibrate import Meter, walk_sites
from pruneexp.compensator import LeastSquares
from pruneexp.criterion import Obs, WandaSp, shelf
from pruneexp.evidence import Moments
from pruneexp.model.sites import site_parts
from pruneexp.prune import Method, prune_
from pruneexp.search import Evolutionary, Uniform
from pruneexp.sparsity import OneShot
from tests.conftest import FAMILIES

BOTH = ["heads", "channels"]


@dataclass(frozen=True)
class Raw:
    """Everything that was seen, as it was."""

    source = "wanted"

    x: tuple[Any, ...] = ()
    y: tuple[Any, ...] = ()

    @classmethod
    def empty(cls, site):
        return cls()

    def update(self, x_BTC, y_BTO):
        return Raw((*self.x, x_BTC), (*self.y, y_BTO))

    def seen(self):
        return torch.cat(self.x), torch.cat(self.y)


def reader_of(model, visit, site):
    return visit.layer.get_submodule(site_parts(model.family, site)[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untouched_model_wants_what_its_readers_give(family, tiny, tokens_NT):
    model, names = tiny(family), []
    for visit, site, collect in walk_sites(model, tokens_NT, Raw, (), Meter(), "test"):
        x, y = collect().seen()
        torch.testing.assert_close(y, reader_of(model, visit, site)(x), rtol=1e-9, atol=1e-9)
        names.append(site.name)
    assert names == [site.name for site in model.sites()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kinds", [(), (Moments,)], ids=["", "criterion"])
@pytest.mark.parametrize("collected", [("attention", "mlp"), ("mlp",), ()], ids=str)
def test_what_is_counted_is_what_is_run(family, kinds, collected, tiny, tokens_NT):
    """Multiply-accumulates of all linear layers that are run, and of attention over its context."""
    model, meter = tiny(family), Meter()
    length, found = tokens_NT.shape[1], 0

    def linear(module, args, _output):
        nonlocal found
        found += args[0].numel() // args[0].shape[-1] * module.weight.numel()

    def attended(_reader, args):
        nonlocal found
        found += 2 * length * args[0].numel()

    for layer in model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(linear)
        layer.get_submodule(model.family.attention_reader).register_forward_pre_hook(attended)
    last_hidden(model, tokens_NT)
    plain, found = found, 0
    for _, site, collect in walk_sites(model, tokens_NT, Raw, kinds, meter, "test"):
        if site.kind in collected:
            collect()
    assert meter.forward == pytest.approx(found / plain)
    assert meter.forward < 3 + len(kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_that_gives_what_is_wanted_restores_the_dense_hidden_states(family, tiny, tokens_NT):
    dense, model = tiny(family), tiny(family)
    hidden, calls = dense.enter(tokens_NT[:4])
    before = []  # dense hidden states behind each layer
    for index, layer in enumerate(dense.layers):
        hidden = dense.run_layer(layer, hidden, calls[index])
        before.append(hidden)
    for visit, site, collect in walk_sites(model, tokens_NT[:4], Raw, (), Meter(), "test"):
        reader = reader_of(model, visit, site)
        if visit.index == 0:
            reader.weight.data.mul_(0.5)  # what leaves here is made up for in the next layer
        elif visit.index == 1 and site.kind == "mlp":
            _, wanted = collect().seen()
            reader.forward = lambda x, wanted=wanted: wanted.view(*x.shape[:-1], -1)
        elif visit.index == 2 and site.kind == "attention":
            x, wanted = collect().seen()
            torch.testing.assert_close(wanted, reader(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_targets_come_nearer_to_the_dense_model(family, tiny, tokens_NT):
    errors = {}
    for target in ("pruned", "dense"):
        dense, model = tiny(family), tiny(family)
        method = Method(
            Obs(1e-3, 1, 8, "none", False, 8.0),
            OneShot(0.3, "decoder", 0),
            Uniform(1, BOTH, 0.0, 0.0, 1),
            LeastSquares(1e-3, target, True),
        )
        prune(model, tokens_NT, method, 0.3)
        errors[target] = float((last_hidden(model, tokens_NT) - last_hidden(dense, tokens_NT)).square().mean())
    assert errors["dense"] < errors["pruned"]


def test_layer_by_layer_scores_are_those_of_the_pruned_layers_before(tiny, tokens_NT):
    """A criterion and a search that decide layer by layer, with a compensator that goes site by site."""
    plans = {}
    for target in ("pruned", "dense"):
        model = tiny("llama")
        method = Method(
            WandaSp("sum", True),
            OneShot(0.3, "decoder", 0),
            Uniform(1, BOTH, 0.0, 0.0, 1),
            LeastSquares(1e-3, target, True),
        )
        plans[target] = prune(model, tokens_NT, method, 0.3)
    first = [site.name for site in plans["dense"].sites if site.layer == 0]
    assert all(plans["dense"].plan.sites[name] == plans["pruned"].plan.sites[name] for name in first)
    assert plans["dense"].plan.budget["removed_params"] == plans["pruned"].plan.budget["removed_params"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_the_best_recipe_meets_the_budget_to_half_a_channel_biases_included(family, ratio, tiny, tokens_NT):
    model, meter = tiny(family), Meter()
    search = Evolutionary(1, BOTH, 12.0, 0.34, 2, 0.2, 4, None, 1)
    before = model.decoder_params
    method = Method(
        Obs(1e-3, 1, 8, "none", False, 8.0), OneShot(ratio, "decoder", 0), search, LeastSquares(1e-3, "dense", True)
    )
    pruned = prune(model, tokens_NT, method, ratio, meter)
    cheapest = min(site.cost.params for site in pruned.sites)
    norms = sum(plan.kept == () for plan in pruned.plan.sites.values())  # a sublayer that goes takes its norm along
    assert norms == 0
    assert abs(before - model.decoder_params - ratio * before) <= cheapest / 2
    assert meter.forward <= 1 + 12 + 3


def test_the_best_recipe_finds_the_same_with_little_memory(tiny, tokens_NT, monkeypatch):
    monkeypatch.setattr(shelf, "SMALL", 0)
    found = []
    for memory in (8.0, 0.0):
        model = tiny("llama")
        search = Evolutionary(1, BOTH, 8.0, 0.34, 2, 0.2, 4, None, 1)
        method = Method(
            Obs(1e-3, 1, 8, "none", False, memory),
            OneShot(0.3, "decoder", 0),
            search,
            LeastSquares(1e-3, "dense", True),
        )
        plan = prune(model, tokens_NT, method, 0.3).plan
        found.append((plan, {name: weight.clone() for name, weight in model.module.state_dict().items()}))
    (ample, weights), (tight, others) = found
    assert ample == tight and all(torch.equal(weights[name], others[name]) for name in weights)


def prune(model, tokens_NT, method, ratio, meter=None):
    return prune_(
        model,
        tokens_NT,
        method,
        ratio,
        meter=meter or Meter(),
        rng=torch.Generator().manual_seed(0),
        shrunk=lambda index: None,
        clock=lambda stage: nullcontext(),
    )


def last_hidden(model, tokens_NT):
    hidden, calls = model.enter(tokens_NT)
    for index, layer in enumerate(model.layers):
        hidden = model.run_layer(layer, hidden, calls[index])
    return hidden


def test_kinds_of_the_criterion_are_seen_on_the_pruned_stream(tiny, tokens_NT):
    model = tiny("llama")
    for visit, site, _ in walk_sites(model, tokens_NT, Raw, (Moments,), Meter(), "test"):
        assert visit.of(Moments)[site.name].n == tokens_NT.numel()


def test_no_readers_are_held_once_the_search_is_over(tiny, tokens_NT):
    method = Method(
        Obs(1e-3, 1, 8, "none", False, 8.0),
        OneShot(0.3, "decoder", 0),
        Uniform(1, BOTH, 0.0, 0.0, 1),
        LeastSquares(1e-3, "dense", True),
    )
    pruned = prune(tiny("llama"), tokens_NT, method, 0.3)
    assert all(not score.readers for score in pruned.scores.values())


def test_a_streamed_model_is_pruned_as_one_in_memory(tiny, tokens_NT):
    plans, logits = [], []
    for stream in (False, True):
        model = tiny("llama", stream=stream)
        method = Method(
            Obs(1e-3, 1, 8, "none", False, 8.0),
            OneShot(0.3, "decoder", 0),
            Uniform(1, BOTH, 0.0, 0.0, 1),
            LeastSquares(1e-3, "dense", True),
        )
        readers = []

        def keep(index, model=model, readers=readers):
            readers.extend(p.detach().clone() for n, p in model.layers[index].named_parameters() if "_proj" in n)

        pruned = prune_(
            model,
            tokens_NT,
            method,
            0.3,
            meter=Meter(),
            rng=torch.Generator().manual_seed(0),
            shrunk=keep,
            clock=lambda stage: nullcontext(),
        )
        plans.append(pruned.plan.to_json())
        logits.append(readers)
    assert plans[0] == plans[1]
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
