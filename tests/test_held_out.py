"""Statistics of halves of the windows, and the ridge that is chosen on windows held out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from pruneexp.compensator import LeastSquares
from pruneexp.evidence import Gram, Halves, WantedOutput
from pruneexp.evidence.held_out import MIXTURES, RIDGES, START, _mixing, _wanted, chosen_ridge
from pruneexp.types import evidence_kinds, source_of
from tests.cases import each
from tests.toy_sites import layer_sites

_, MLP = layer_sites(0)
C, OUTPUTS = MLP.channels, 9
KEEP = torch.arange(0, C, 2)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(windows: int, length: int, seed: int = 0) -> torch.Tensor:
    return drawn(windows, length, C, seed=seed) @ (torch.eye(C, dtype=torch.float64) + drawn(C, C, seed=9) / C**0.5)


@each("batch", [1, 2, 3, 5])
def test_halves_are_of_alternate_windows_whatever_the_batches(batch: int) -> None:
    x = correlated(7, 5)
    seen = Halves(Gram).empty(MLP)
    for part in x.split(batch):
        seen = seen.update_(part)
    for half, windows in ((seen.first, x[0::2]), (seen.second, x[1::2])):
        flat = windows.reshape(-1, C)
        assert half.n == len(flat)
        torch.testing.assert_close(half.gram_CC, flat.T @ flat)
    whole = Gram.empty(MLP).update_(x)
    torch.testing.assert_close(seen.whole.gram_CC, whole.gram_CC)
    joined = Halves(Gram).empty(MLP).update_(x[:3]).merge(Halves(Gram).empty(MLP).update_(x[3:]))
    torch.testing.assert_close(joined.first.gram_CC, seen.first.gram_CC)


def test_an_experts_run_of_tokens_is_halved() -> None:
    x = correlated(1, 7)
    seen = Halves(Gram).empty(replace(MLP, expert=0)).update_(x)
    assert (seen.first.n, seen.second.n) == (3, 4)
    torch.testing.assert_close(seen.second.sum_C, x[0, 3:].sum(0))


def test_halves_of_a_kind_are_fed_as_that_kind() -> None:
    [of_gram, of_wanted] = evidence_kinds((Halves(Gram), Halves(WantedOutput)))
    assert (of_gram.source, of_wanted.source, of_gram.fits, of_gram.wide) == ("reader", "wanted", True, False)
    assert source_of(of_wanted).collector == "site_walk"
    assert of_gram.of is None
    assert of_gram.held_bytes is None, "what `empty` lays out"
    assert of_wanted.held_bytes(MLP, OUTPUTS, 2) == 2 * WantedOutput.held_bytes(MLP, OUTPUTS, 2)
    assert of_wanted.of(MLP, KEEP).first.inputs.gram_CC.shape == (len(KEEP), len(KEEP))
    assert len({Halves(Gram): 0, Halves(Gram): 1, Halves(WantedOutput): 2}) == 2
    with pytest.raises(AttributeError):
        of_gram.nothing_of_the_kind  # noqa: B018


def _errors_by_hand(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, variance_K) -> list[float]:
    """Of every ridge: the squared error on each half's raw tokens of what was fitted to the other's."""
    halves = [(x[i::2].reshape(-1, C), y[i::2].reshape(-1, y.shape[-1])) for i in (0, 1)]
    errors = []
    for ridge in RIDGES:
        total = 0.0
        for (fit_x, fit_y), (new_x, new_y) in (halves, halves[::-1]):
            kept = fit_x[:, KEEP]
            strength = torch.diag((ridge * variance_K(fit_x) * (len(kept) - 1)) ** 0.5)
            rows = torch.cat([kept - kept.mean(0), strength])
            aim = torch.cat([fit_y - fit_y.mean(0), strength @ weight[:, KEEP].T])
            solved = torch.linalg.lstsq(rows, aim).solution
            bias = fit_y.mean(0) - kept.mean(0) @ solved
            total += float((new_y - new_x[:, KEEP] @ solved - bias).square().mean(0).sum())
        errors.append(total)
    return errors


@each(
    "per, target, length, noise",
    [
        (per, target, *case)
        for per, target, case in itertools.product(["site", "channel"], ["pruned", "dense"], [(6, 3.0), (200, 0.1)])
    ],
)
def test_the_chosen_ridge_is_half_of_what_errs_least_on_tokens_held_out(target, length, noise, per) -> None:
    weight, bias = drawn(OUTPUTS, C, seed=3), drawn(OUTPUTS, seed=4)
    x = correlated(6, length)
    if target == "pruned":
        y = x @ weight.T + bias
        seen = Halves(Gram).empty(MLP).update_(x)
        mean = lambda fit_x: fit_x.var(0).mean()  # noqa: E731
    else:
        y = x @ weight.T + noise * drawn(6, length, OUTPUTS, seed=5)
        seen = Halves(WantedOutput).of(MLP, KEEP).update_(x[..., KEEP], y)
        mean = lambda fit_x: fit_x[:, KEEP].var(0).mean()  # noqa: E731
    one = torch.ones(len(KEEP), dtype=torch.float64)
    errors = _errors_by_hand(
        x, y, weight, lambda fit_x: fit_x[:, KEEP].var(0) if per == "channel" else mean(fit_x) * one
    )
    assert chosen_ridge(weight, bias, seen, KEEP, per) == RIDGES[errors.index(min(errors))] / 2


@each("target, noise", [("pruned", 0.0), ("dense", 0.1), ("dense", 1.0), ("dense", 10.0)])
def test_of_many_outputs_sums_with_random_signs_tell_the_ridge(target: str, noise: float) -> None:
    weight, bias, x = drawn(3 * MIXTURES, C, seed=3), drawn(3 * MIXTURES, seed=4), correlated(6, 20)
    y = x @ weight.T + bias
    if target == "pruned":
        seen = Halves(Gram).empty(MLP).update_(x)
    else:
        y = y + noise * drawn(*y.shape, seed=5)
        seen = Halves(WantedOutput).of(MLP, KEEP).update_(x[..., KEEP], y)
    errors = _errors_by_hand(x, y, weight, lambda fit_x: fit_x[:, KEEP].var(0))
    chosen = RIDGES.index(2 * chosen_ridge(weight, bias, seen, KEEP, "channel"))
    assert errors[chosen] <= 1.005 * min(errors) < 0.99 * max(errors)


@pytest.mark.parametrize("outputs", [OUTPUTS, 3 * MIXTURES])
def test_inputs_and_a_weight_are_evidence_of_what_it_gives(outputs: int) -> None:
    weight, bias, mixing = drawn(outputs, C, seed=3), drawn(outputs, seed=4), _mixing(outputs)
    x = correlated(4, 8) + 3
    seen = WantedOutput.of(MLP, KEEP).update_(x[..., KEEP], x @ weight.T + bias)
    expected, _ = _wanted(seen, mixing @ weight, mixing @ bias, KEEP, mixing)
    actual, _ = _wanted(Gram.empty(MLP).update_(x), mixing @ weight, mixing @ bias, KEEP, mixing)
    torch.testing.assert_close(expected.cross_KO, seen.cross_KO @ mixing.T)
    for name in ("wanted_O", "cross_KO"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name))
    torch.testing.assert_close(actual.inputs.gram_CC, seen.inputs.gram_CC)
    torch.testing.assert_close(actual.inputs.sum_C, seen.inputs.sum_C)


def test_more_tokens_are_held_back_less() -> None:
    weight = drawn(OUTPUTS, C, seed=3)

    def of(length: int) -> float:
        x = correlated(6, length)
        seen = (
            Halves(WantedOutput)
            .of(MLP, KEEP)
            .update_(x[..., KEEP], x @ weight.T + 3 * drawn(6, length, OUTPUTS, seed=5))
        )
        return chosen_ridge(weight, None, seen, KEEP, "site")

    assert of(4) > of(40) > of(2000)


def test_the_fit_is_to_all_windows_and_says_its_ridge() -> None:
    weight, bias = drawn(OUTPUTS, C, seed=3), drawn(OUTPUTS, seed=4)
    x = correlated(6, 20)
    auto, seen = LeastSquares("auto", "pruned", True, "site"), Halves(Gram).empty(MLP).update_(x)
    ridge = chosen_ridge(weight, bias, seen, KEEP, "site")
    fitted, added, chosen = auto(weight, bias, seen, KEEP)
    expected = LeastSquares(ridge, "pruned", True, "site")(weight, bias, Gram.empty(MLP).update_(x), KEEP)
    assert chosen == {"ridge": ridge}
    torch.testing.assert_close((fitted, added), expected)
    assert auto(weight, bias, Halves(Gram).empty(MLP).update_(x), torch.arange(C)) == (weight, bias)


@pytest.mark.parametrize("tokens", [0, 2])
def test_an_expert_that_saw_next_to_nothing_is_held_back_as_usual(tokens: int) -> None:
    site = replace(MLP, expert=0)
    seen = Halves(Gram).empty(site).update_(torch.zeros(1, tokens, C, dtype=torch.float64))
    assert chosen_ridge(drawn(OUTPUTS, C), None, seen, KEEP, "site") == RIDGES[START] / 2
    wanted = Halves(WantedOutput).of(site, KEEP)
    assert chosen_ridge(drawn(3 * MIXTURES, C), None, wanted, KEEP, "site") == RIDGES[START] / 2
    none = torch.zeros(0, dtype=torch.long)
    assert (
        chosen_ridge(drawn(OUTPUTS, C), None, Halves(Gram).empty(MLP).update_(correlated(4, 8)), none, "site")
        == RIDGES[START] / 2
    )
