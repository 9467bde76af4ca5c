"""The walk that holds the dense model's hidden states beside the pruned one's."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from pruneexp.cache import NoCache
from pruneexp.calibrate import Bookmark, DenseStates, Meter, site_walk, walk_sites
from pruneexp.compensator import LeastSquares
from pruneexp.criterion import Obs, WandaSp, spill
from pruneexp.evidence import Moments, WantedOutput
from pruneexp.model.sites import site_parts
from pruneexp.pruning import Method, prune_
from pruneexp.pruning.dense_evidence import Results
from pruneexp.pruning.record import Record
from pruneexp.search import Evolutionary, Uniform
from pruneexp.sparsity import OneShot
from pruneexp.surgery import shrink_layer_
from pruneexp.types import Plan, SitePlan
from tests.cases import UNTIMED, each
from tests.conftest import FAMILIES

BOTH = ["heads", "channels"]


@dataclass(frozen=True)
class Raw:
    """Everything that was seen, as it was."""

    of: ClassVar[Any] = None  # of everything
    source = "wanted"

    x: tuple[Any, ...] = ()
    y: tuple[Any, ...] = ()

    @classmethod
    def empty(cls, site):
        return cls()

    def update_(self, x_BTC, y_BTO):
        return Raw((*self.x, x_BTC), (*self.y, y_BTO))

    def seen(self):
        return torch.cat(self.x), torch.cat(self.y)


def all_of(site):
    return torch.arange(site.channels)


def out_projection_of(model, visit, site):
    return visit.layer.get_submodule(site_parts(model.family, site)[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untouched_model_wants_what_its_readers_give(family, tiny, tokens_NT):
    model, names = tiny(family), []
    for visit, site, collect in walk_sites(model, tokens_NT, Raw, (), Bookmark(Meter(), "test")):
        x, y = collect(all_of(site)).seen()
        torch.testing.assert_close(y, out_projection_of(model, visit, site)(x), rtol=1e-9, atol=1e-9)
        names.append(site.name)
    assert names == [site.name for site in model.sites()]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@each(
    "kinds, collected, kept",
    itertools.product([(), (Moments,)], [("attention", "mlp"), ("mlp",), ()], [2**28, 0, 2**15]),
)
def test_what_is_counted_is_what_is_run(family, kinds, collected, kept, tiny, tokens_NT, monkeypatch):
    """Multiply-accumulates of all linear layers that are run, and of attention over its context."""
    monkeypatch.setattr(site_walk, "KEPT_BYTES", kept)
    model, meter = tiny(family), Meter()
    model.batch_size, tokens_NT = 1, tokens_NT[:5]  # 2**15 bytes hold three of them
    length, macs = tokens_NT.shape[1], 0

    def linear(module, args, _output):
        nonlocal macs
        macs += args[0].numel() // args[0].shape[-1] * module.weight.numel()

    def attended(_values, args):
        nonlocal macs
        macs += 2 * length * args[0].numel()  # as wide as the hidden states in these models

    for layer in model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(linear)
        layer.get_submodule(model.family.attention_in[-1].path).register_forward_pre_hook(attended)
    last_hidden(model, tokens_NT)
    plain, macs = macs, 0
    for _, site, collect in walk_sites(model, tokens_NT, Raw, kinds, Bookmark(meter, "test")):
        if site.kind in collected:
            collect(all_of(site))
    assert meter.forward == pytest.approx(macs / plain)
    assert meter.forward < (2 if kept == 2**28 else 3) + len(kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_that_gives_what_is_wanted_restores_the_dense_hidden_states(family, tiny, tokens_NT):
    dense, model = tiny(family), tiny(family)
    hidden, calls = dense.enter(tokens_NT[:4])
    before = []  # dense hidden states behind each layer
    for index, layer in enumerate(dense.layers):
        hidden = dense.run_layer(layer, hidden, calls[index])
        before.append(hidden)
    for visit, site, collect in walk_sites(model, tokens_NT[:4], Raw, (), Bookmark(Meter(), "test")):
        out_projection = out_projection_of(model, visit, site)
        if visit.index == 0:
            out_projection.weight.data.mul_(0.5)  # what leaves here is made up for in the next layer
        elif visit.index == 1 and site.kind == "mlp":
            _, wanted = collect(all_of(site)).seen()
            out_projection.forward = lambda x, wanted=wanted: wanted.view(*x.shape[:-1], -1)
        elif visit.index == 2 and site.kind == "attention":
            x, wanted = collect(all_of(site)).seen()
            torch.testing.assert_close(wanted, out_projection(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_targets_come_nearer_to_the_dense_model(family, tiny, tokens_NT):
    errors = {}
    for target in ("pruned", "dense"):
        dense, model = tiny(family), tiny(family)
        method = Method(
            Obs(1e-3, 1, 8, "none", False, 8.0, "site"),
            OneShot(0.3, "decoder", 0, *UNTIMED),
            Uniform(1, BOTH, 0.0, 0.0, 1, alike=False, remainder="nearest"),
            LeastSquares(1e-3, target, True, "site"),
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
            OneShot(0.3, "decoder", 0, *UNTIMED),
            Uniform(1, BOTH, 0.0, 0.0, 1, alike=False, remainder="nearest"),
            LeastSquares(1e-3, target, True, "site"),
        )
        plans[target] = prune(model, tokens_NT, method, 0.3)
    first = [site.name for site in plans["dense"].sites if site.layer == 0]
    assert all(plans["dense"].plan.sites[name] == plans["pruned"].plan.sites[name] for name in first)
    assert plans["dense"].plan.budget["removed_params"] == plans["pruned"].plan.budget["removed_params"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_the_best_recipe_meets_the_budget_to_half_a_channel_biases_included(family, ratio, tiny, tokens_NT):
    model, meter = tiny(family), Meter()
    search = Evolutionary(1, BOTH, 12.0, 0.34, 2, 0.2, 4, None, 1, {}, 0.0, "next_token")
    before = model.decoder_params
    method = Method(
        Obs(1e-3, 1, 8, "none", False, 8.0, "site"),
        OneShot(ratio, "decoder", 0, *UNTIMED),
        search,
        LeastSquares(1e-3, "dense", True, "site"),
    )
    pruned = prune(model, tokens_NT, method, ratio, meter)
    cheapest = min(site.cost.params for site in pruned.sites)
    norms = sum(plan.kept == () for plan in pruned.plan.sites.values())  # a sublayer that goes takes its norm along
    assert norms == 0
    assert abs(before - model.decoder_params - ratio * before) <= cheapest / 2
    assert meter.forward <= 1 + 12 + 3


def test_the_best_recipe_finds_the_same_with_little_memory(tiny, tokens_NT, monkeypatch):
    monkeypatch.setattr(spill, "SMALL", 0)
    outcomes = []
    for memory in (8.0, 0.0):
        model = tiny("llama")
        search = Evolutionary(1, BOTH, 8.0, 0.34, 2, 0.2, 4, None, 1, {}, 0.0, "next_token")
        method = Method(
            Obs(1e-3, 1, 8, "none", False, memory, "site"),
            OneShot(0.3, "decoder", 0, *UNTIMED),
            search,
            LeastSquares(1e-3, "dense", True, "site"),
        )
        plan = prune(model, tokens_NT, method, 0.3).plan
        outcomes.append((plan, {name: weight.clone() for name, weight in model.module.state_dict().items()}))
    (ample, weights), (tight, others) = outcomes
    assert ample == tight and all(torch.equal(weights[name], others[name]) for name in weights)


LEAST_SQUARES = Method(
    Obs(1e-3, 1, 8, "none", False, 8.0, "site"),
    OneShot(0.3, "decoder", 0, *UNTIMED),
    Uniform(1, BOTH, 0.0, 0.0, 1, alike=False, remainder="nearest"),
    LeastSquares(1e-3, "dense", True, "site"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_run_on_from_kept_inputs_as_from_the_start(family, tiny, tokens_NT, monkeypatch):
    """Also where inputs are kept of some batches and not of others."""
    hidden_states = []
    for kept in (2**28, 2**15, 0):
        monkeypatch.setattr(site_walk, "KEPT_BYTES", kept)
        model = tiny(family)
        model.batch_size = 3
        prune(model, tokens_NT, LEAST_SQUARES, 0.3)
        hidden_states.append(last_hidden(model, tokens_NT))
    for other in hidden_states[:2]:
        torch.testing.assert_close(other, hidden_states[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [Raw, WantedOutput])
@pytest.mark.parametrize("family", FAMILIES)
def test_sublayers_that_lose_all_of_their_units_are_walked_on_from(family, kind, tiny, tokens_NT):
    model, wanted = tiny(family), {}
    for visit, site, collect in walk_sites(model, tokens_NT, kind, (), Bookmark(Meter(), "test")):
        if (visit.index, site.kind) in ((0, "attention"), (1, "mlp"), (2, "attention")):
            seen = collect(torch.arange(0))
            mean_O = seen.seen()[1].flatten(0, -2).mean(0) if kind is Raw else seen.wanted_mean_O
            out_projections = {site.name: (mean_O.new_zeros(len(mean_O), 0), mean_O)}
            shrink_layer_(model, visit.index, Plan({site.name: SitePlan(site.kind, site.units, ())}), out_projections)
            wanted[site.name] = mean_O
    assert [[site.kind for site in model.layer_sites(layer)] for layer in range(3)] == [["mlp"], ["attention"], ["mlp"]]
    other = tiny(family)
    for _, site, collect in walk_sites(other, tokens_NT, Raw, (), Bookmark(Meter(), "test")):
        if site.name in wanted and site.layer == 0:
            torch.testing.assert_close(wanted[site.name], collect(all_of(site)).seen()[1].flatten(0, -2).mean(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_that_share_dense_states_find_what_others_find(family, tiny, tokens_NT):
    """And run the dense layers once, when they are scored."""
    shared, plain = Results(NoCache(), {"tokens": 1}, DenseStates(2**28)), Results(NoCache(), {})
    batches = math.ceil(len(tokens_NT) / tiny(family).batch_size)
    for ratio in (0.2, 0.5):
        weights, metered, runs = [], [], []
        for results in (plain, shared):
            model, meter = tiny(family), Meter()
            calls = counted(model)
            prune(model, tokens_NT, LEAST_SQUARES, ratio, meter, results)
            weights.append(model.module.state_dict())
            metered.append(meter.forward)
            runs.append(len(calls))
        assert all(torch.equal(own, weights[1][name]) for name, own in weights[0].items())
        assert metered[0] == metered[1]
        assert runs[0] - runs[1] == 2 * len(model.layers) * batches


@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_of_what_stays_is_a_part_of_that_of_everything(family, tiny, tokens_NT):
    """Whether the rest leaves before it is collected or after."""
    evidence = []
    for kind, leaves_before in ((Raw, False), (WantedOutput, False), (WantedOutput, True)):
        model, seen = tiny(family), {}
        for _, site, collect in walk_sites(model, tokens_NT, kind, (), Bookmark(Meter(), "test")):
            half = tuple(range(0, site.units, 2))
            plan, keep_C = Plan({site.name: SitePlan(site.kind, site.units, half)}), site.keep_C(half)
            if leaves_before:
                shrink_layer_(model, site.layer, plan)
            seen[site.name] = collect(keep_C)
            if not leaves_before:
                shrink_layer_(model, site.layer, plan)
        evidence.append(seen)
    for name, raw in evidence[0].items():
        x, y = (each.flatten(0, -2) for each in raw.seen())
        for part in (evidence[1][name], evidence[2][name]):
            torch.testing.assert_close(part.inputs.gram_CC, x[:, part.keep_C].T @ x[:, part.keep_C])
            torch.testing.assert_close(part.cross_KO, x[:, part.keep_C].T @ y)


def test_dense_states_of_another_model_are_given_up(tiny, tokens_NT):
    hidden_states, shared = [], DenseStates(2**28)
    for number, family in enumerate(("llama", "opt", "llama")):
        model, results = tiny(family), Results(NoCache(), {"model": number}, shared)
        prune(model, tokens_NT, LEAST_SQUARES, 0.3, None, results)
        hidden_states.append(last_hidden(model, tokens_NT))
    assert torch.equal(hidden_states[0], hidden_states[2]) and len(shared.layers) == 3


def test_dense_states_that_are_too_large_are_not_held(tiny, tokens_NT):
    model, shared = tiny("llama"), DenseStates(2**10)
    prune(model, tokens_NT, LEAST_SQUARES, 0.3, None, Results(NoCache(), {}, shared))
    assert not shared.layers


def counted(model):
    """Runs of decoder layers from here on, those that end half way among them."""
    calls, run = [], model.run_layer

    def run_layer(layer, *args):
        if layer in list(model.layers):
            calls.append(layer)
        return run(layer, *args)

    model.run_layer = run_layer
    return calls


def prune(model, tokens_NT, method, ratio, meter=None, results=None):
    return prune_(
        model,
        tokens_NT,
        method,
        ratio,
        Record(rng=torch.Generator().manual_seed(0), meter=meter or Meter(), results=results or Results(NoCache(), {})),
    )


def last_hidden(model, tokens_NT):
    hidden, calls = model.enter(tokens_NT)
    for index, layer in enumerate(model.layers):
        hidden = model.run_layer(layer, hidden, calls[index])
    return hidden


def test_kinds_of_the_criterion_are_seen_on_the_pruned_stream(tiny, tokens_NT):
    model = tiny("llama")
    for visit, site, _ in walk_sites(model, tokens_NT, Raw, (Moments,), Bookmark(Meter(), "test")):
        assert visit.of(Moments)[site.name].n == tokens_NT.numel()


def test_no_readers_are_held_once_the_search_is_over(tiny, tokens_NT):
    pruned = prune(tiny("llama"), tokens_NT, LEAST_SQUARES, 0.3)
    assert all(not score.out_projections for score in pruned.scores.values())


def test_a_streamed_model_is_pruned_as_one_in_memory(tiny, tokens_NT):
    plans, logits = [], []
    for stream in (False, True):
        model = tiny("llama", stream=stream)
        out_projections = []

        def keep(index, model=model, out_projections=out_projections):
            out_projections.extend(
                p.detach().clone() for n, p in model.layers[index].named_parameters() if "_proj" in n
            )

        pruned = prune_(model, tokens_NT, LEAST_SQUARES, 0.3, Record(rng=torch.Generator().manual_seed(0), shrunk=keep))
        plans.append(pruned.plan.to_json())
        logits.append(out_projections)
    assert plans[0] == plans[1]
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
