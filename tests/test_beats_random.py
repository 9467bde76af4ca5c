"""What a criterion is worth: at the same share removed, each must leave a better model than random choices do.

The embedded models at 30 %, uniform, at first with nothing compensated. Three ways to lose are the methods' own, and
stand below as what they are:

- magnitude, heads included (OPT: 6.9 against the median 5.0 of five random draws; BLOOM: no better than they). It looks
  at weights alone. Of channels alone, its choice is better than random in every family here; not in models trained on
  WikiText-2, where it loses in LLaMA and OPT (tests/benchmarks/README.md).
- taylor of BLOOM's channels (3.51 against 3.32, with LLM-Pruner's default, the sum of |w g|). Gradients of single
  weights that cancel count as large there; what the loss would change, |sum w g|, from the same gradients: 3.26.
- loss_drop asked once for two blocks (LLaMA: 3.90 against 3.62): losses of single blocks do not add up. The greedy
  search, which asks again after every block, as the paper does, is better than random.

Of heads, a uniform search takes one of four in every layer here, and in OPT nearly all that is lost is lost in the
first one: 0.18 nats without one of its heads, 0.27 to 0.29 without any other, 0.02 at most without a head of another
layer. One draw of four is there as good as any ranking of what is so nearly alike. What a ranking loses there is the
constant that its units hand on together: values with biases and ReLU channels have means, which add up over the units
that leave, while a score judges each alone. With the means carried by a bias, on both sides, every criterion is better
than random in OPT and BLOOM too, heads included (magnitude in OPT: 4.4 against 4.8). One is not held to it, mini_llm in
BLOOM: the side that it comes to lie on changes with the calibration text. tests/benchmarks/README.md has the same of
real text.

With steps of the paper's length, but not its number, the policy gradient is worse than random in LLaMA (7.0 against
5.0); with longer ones, its default, 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from pruneexp.cache import Cache
from pruneexp.cli.build import build
from pruneexp.experiment.settings import Experiment
from pruneexp.model import Model
from pruneexp.pruning import Method, prune_
from pruneexp.pruning.dense_evidence import Results
from pruneexp.pruning.record import Record
from tests.composing import composer
from tests.conftest import FAMILIES

pytestmark = pytest.mark.slow

SHARED = Path(__file__).parents[2] / "shared"
REAL_OPT, REAL_TEXT = SHARED / "models" / "wikitext2-opt", SHARED / "data" / "wikitext2"
MODELS = {
    "llama": ["model=embedded"],
    "opt": ["model=embedded_opt"],
    "bloom": ["model=embedded_bloom"],
    "real_opt": [
        "model=hf",
        f"model.path={REAL_OPT}",
        "dataset=text",
        f"dataset.calibration={REAL_TEXT / 'train.txt'}",
        f"dataset.evaluation={REAL_TEXT / 'test.txt'}",
        "dataset.length=128",
    ],
}
WIDTHS = ("magnitude", "wanda_sp", "flap", "llm_bip", "taylor", "mini_llm", "mini_llm_exact", "obs")
RECIPES = {  # criterion, search, compensator
    "blockpruner": ("loss_drop", "blockpruner", "none"),
    "2ssp": ("activation_norm", "two_stage", "none"),
    "cfsp": ("cfsp", "cfsp", "none"),
    "slimllm": ("slimllm", "slimllm", "linear_regression"),
}
QUICK = {"mini_llm": ("criterion.directions=8",)}
UNIFORM = ("search=uniform", "search.granularity=[heads,channels]")
CARRIED = (*UNIFORM, "compensator=bias")
CHANNELS = ("search=uniform", "search.granularity=[channels]")
WINDOWS = 16  # of calibration and of evaluation, 128 tokens each


KEPT: list[Cache] = []  # scores and statistics of the dense models: searches and draws ask for the same


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    KEPT.append(Cache(str(tmp_path_factory.mktemp("kept")), 1.0))
    yield
    KEPT.clear()


@cache
def known(family: str) -> tuple[Model, Tensor, Tensor]:
    """The dense model, to be copied, and its windows of calibration and evaluation."""
    experiment = build(composer().job([*MODELS[family], f"dataset.samples={WINDOWS}"]))
    tokenizer = experiment.model.describe().tokenizer
    evaluation_NT = experiment.dataset.evaluation(tokenizer, 128)[:WINDOWS]
    return experiment.model.load(), experiment.dataset.calibration(tokenizer), evaluation_NT


@cache
def experiment_of(criterion: str, *typed: str) -> Experiment:
    parts = [f"criterion={criterion}", "compensator=none", "sparsity.ratio=0.3"]
    return build(composer().job([*parts, *QUICK.get(criterion, ()), *typed]))


def pruned(family: str, criterion: str, *typed: str, seed: int = 0) -> tuple[float, float]:
    """Perplexity, and the share of the decoder's parameters that left. `seed`: of random scores."""
    experiment = experiment_of(criterion, *typed)
    scored_by = replace(experiment.criterion, seed=seed) if criterion == "random" else experiment.criterion
    dense, calibration_NT, evaluation_NT = known(family)
    model = deepcopy(dense)
    method = Method(scored_by, experiment.sparsity, experiment.search, experiment.compensator)
    results = Results(KEPT[0], {"family": family})
    prune_(model, calibration_NT, method, 0.3, Record(rng=torch.Generator().manual_seed(0), results=results))
    return math.exp(model.token_losses(evaluation_NT, 16).mean()), 1 - model.decoder_params / dense.decoder_params


@cache
def drawn(family: str, *typed: str) -> tuple[float, float]:
    """The median perplexity of five random draws, and the share removed."""
    seeds = [pruned(family, "random", *typed, seed=seed) for seed in range(5)]
    return median(perplexity for perplexity, _ in seeds), seeds[0][1]


def assert_beats_random(family: str, criterion: str, search: tuple[str, ...], random: tuple[str, ...]) -> None:
    perplexity, share = pruned(family, criterion, *search)
    floor, as_much = drawn(family, *random)
    assert share == pytest.approx(as_much, abs=1e-3), "the comparison is at one size"
    assert perplexity < floor


CANCELLING = pytest.mark.xfail(reason="gradients that cancel count as large", strict=True)
OF_CHANNELS = [
    pytest.param(family, criterion, marks=[CANCELLING] if (family, criterion) == ("bloom", "taylor") else [])
    for family in FAMILIES
    for criterion in WIDTHS
]


@pytest.mark.parametrize(("family", "criterion"), OF_CHANNELS)
def test_channels_are_chosen_better_than_at_random(family: str, criterion: str) -> None:
    assert_beats_random(family, criterion, CHANNELS, CHANNELS)


def test_gradients_that_may_cancel_choose_better_than_at_random() -> None:
    assert_beats_random("bloom", "taylor", (*CHANNELS, "criterion.element=vectorize"), CHANNELS)


@pytest.mark.parametrize("criterion", WIDTHS)
def test_heads_and_channels_are_chosen_better_than_at_random(criterion: str) -> None:
    assert_beats_random("llama", criterion, UNIFORM, UNIFORM)


@pytest.mark.parametrize(
    ("family", "criterion"),
    [(family, each) for family in ("opt", "bloom") for each in WIDTHS if (family, each) != ("bloom", "mini_llm")],
)
def test_with_the_means_carried_heads_and_channels_are_chosen_better_than_at_random(
    family: str, criterion: str
) -> None:
    assert_beats_random(family, criterion, CARRIED, CARRIED)


@pytest.mark.skipif(not (REAL_OPT.is_dir() and REAL_TEXT.is_dir()), reason="needs shared/models and shared/data")
@pytest.mark.parametrize("criterion", ["wanda_sp", "llm_bip", "mini_llm_exact"])
def test_with_the_means_carried_choices_beat_random_on_real_text(criterion: str) -> None:
    assert_beats_random("real_opt", criterion, CARRIED, CARRIED)


def test_the_policy_gradient_beats_random() -> None:
    assert_beats_random("llama", "wanda_sp", ("search=policy_gradient",), UNIFORM)


@pytest.mark.xfail(reason="magnitude looks at weights alone", strict=True)
def test_magnitude_of_heads() -> None:
    assert_beats_random("opt", "magnitude", UNIFORM, UNIFORM)  # on BLOOM it ties with the median


@pytest.mark.parametrize(
    ("criterion", "search"),
    [("block_influence", "blocks"), ("loss_drop", "greedy")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_chosen_better_than_at_random(family: str, criterion: str, search: str) -> None:
    assert_beats_random(family, criterion, (f"search={search}",), ("search=blocks",))


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_losses_of_single_blocks_may_do(family: str) -> None:
    assert_beats_random(family, "loss_drop", ("search=blocks",), ("search=blocks",))


# What each recipe may remove, at random
OF_PAPERS = {
    "blockpruner": ("search=sublayers", "search.normalise=none"),
    "2ssp": CHANNELS,
    "cfsp": CHANNELS,
    "slimllm": (*UNIFORM, "compensator=linear_regression"),
}


@pytest.mark.parametrize("recipe", OF_PAPERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_of_papers_choose_better_than_at_random(family: str, recipe: str) -> None:
    """Sublayers come in sizes: of these, not of units, a little more or less may leave."""
    criterion, search, compensator = RECIPES[recipe]
    perplexity, share = pruned(family, criterion, f"search={search}", f"compensator={compensator}")
    floor, as_much = drawn(family, *OF_PAPERS[recipe])
    assert share == pytest.approx(as_much, abs=0.06 if recipe == "blockpruner" else 2e-3)
    assert perplexity < floor


@pytest.mark.xfail(reason="losses of single blocks do not add up", strict=True)
def test_losses_of_single_blocks_may_mislead() -> None:
    assert_beats_random("llama", "loss_drop", ("search=blocks",), ("search=blocks",))
