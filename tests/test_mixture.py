"""Mixtures of experts: what is seen of an expert, and whole experts that leave."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pruneexp.calibrate import Bookmark, Meter, walk
from pruneexp.cli.build import with_starts
from pruneexp.compensator import Bias, BiasOfficial, LeastSquares, NoCompensation
from pruneexp.criterion import (
    ActivationNorm,
    BlockInfluence,
    Flap,
    FlapOfficial,
    LlmBip,
    Magnitude,
    Obs,
    SlimLlm,
    Taylor,
    WandaSp,
)
from pruneexp.evidence import InputMoments, Moments
from pruneexp.model import Model, ModelSource
from pruneexp.model.modeling_pruned import experts_of, router_of
from pruneexp.pruning import Method, Pruned, prune_
from pruneexp.pruning.budget import as_searched, check_mixture, check_pruning
from pruneexp.pruning.record import Record
from pruneexp.pruning.rounds import prune_in_rounds_
from pruneexp.search import (
    AlAm,
    Evolutionary,
    Global,
    Greedy,
    LayerShares,
    Layerwise,
    PolicyGradient,
    TwoStage,
    UlMm,
    Uniform,
)
from pruneexp.sparsity import Linear, OneShot
from pruneexp.surgery import BlockProof, StreamedSave, padding, save, shrink_
from pruneexp.tracker.structure import widths
from pruneexp.types import Budget, ConfigError, Plan, SitePlan, unit_scores
from tests.cases import UNTIMED, each
from tests.masking import masked
from tests.tiny_families import tiny_model

Made = Callable[[str], Model]
NONE = NoCompensation(False)
SEARCHES = {
    "uniform": lambda g: Uniform(1, g, 0.0, 0.0, 1, alike=False, remainder="nearest"),
    "layerwise": lambda g: Layerwise(1, g, "zscore"),
    "global": lambda g: Global(1, g, "zscore", 1),
    "greedy": lambda g: Greedy(1, g, 0, 0, 2, "probes", "none", 1),
    "evolutionary": lambda g: Evolutionary(1, g, 4.0, 1.0, 1, 0.5, 2, 1, 1, {}, 0.0, "next_token"),
    "policy_gradient": lambda g: PolicyGradient(1, g, "joint", "scores", "sqrt", 2, 0.1, 2, 1.0, 2, 1),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    loaded: dict[str, Model] = {}

    def model(name: str) -> Model:
        if name not in loaded:
            folder = tmp_path_factory.mktemp(name)
            tiny_model(name).save_pretrained(folder)
            loaded[name] = ModelSource(name, str(folder), None, "float64", "cpu", False, False, 4).load()
        return deepcopy(loaded[name])

    return model


@pytest.fixture(scope="module")
def tokens_NT() -> torch.Tensor:
    return torch.randint(3, 64, (6, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, tokens_NT: torch.Tensor) -> torch.Tensor:
    return getattr(model, "module", model)(tokens_NT, use_cache=False).logits


def pruned(
    model: Model,
    tokens_NT: torch.Tensor,
    criterion: Any,
    search: Any,
    ratio: float,
    compensator: Any = NONE,
    **other: Any,
) -> Pruned:
    method = Method(criterion, OneShot(ratio, "decoder", 0, *UNTIMED), search, compensator)
    return prune_(model, tokens_NT, method, ratio, Record(**{**settings(), **other}))


def settings() -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    return {"meter": Meter(), "rng": rng}


def without_experts(model: Model, *gone: int) -> Plan:
    """The same experts out of every mixture."""
    sites = [site for index in range(len(model.layers)) for site in model.whole_experts(index)]
    kept = tuple(unit for unit in range(4) if unit not in gone)
    return Plan({site.name: SitePlan("experts", site.units, kept) for site in sites})


@pytest.mark.slow
def test_an_expert_is_judged_by_the_tokens_routed_to_it(made: Made, tokens_NT: torch.Tensor) -> None:
    """Against the routing worked out once more, by hand, and whatever the batches."""
    model = made("mixtral")
    before: list[torch.Tensor] = []
    mlp: Any = model.layers[1].mlp
    handle = mlp.register_forward_pre_hook(lambda _mlp, args: before.append(args[0].flatten(0, 1)))
    logits(model, tokens_NT)
    handle.remove()
    hidden_ND = torch.cat(before)
    chosen_NK = (hidden_ND @ mlp.gate.weight.T).topk(2, dim=-1).indices
    expert = mlp.experts[2]
    routed_ND = hidden_ND[(chosen_NK == 2).any(1)]
    assert 2 < len(routed_ND) < len(hidden_ND)
    x_NC = torch.nn.functional.silu(routed_ND @ expert.w1.weight.T) * (routed_ND @ expert.w3.weight.T)
    model.batch_size = 2
    visit = list(walk(model, tokens_NT, (Moments, InputMoments), Bookmark(Meter(), "test"), read_only=True))[1]
    seen, read = (visit.of(kind)["model.layers.1.mlp.experts.2"] for kind in (Moments, InputMoments))
    assert seen.n == read.n == len(routed_ND)
    torch.testing.assert_close(seen.mean_C, x_NC.mean(0))
    torch.testing.assert_close(seen.variance_C, x_NC.var(0))
    torch.testing.assert_close(read.mean_C, routed_ND.mean(0))


@each(
    "criterion",
    [
        WandaSp("sum", False),
        Flap("WIFV", False),
        LlmBip("l2", "up", "scale", False),
        LlmBip("l1", "up", "ignore", False),
        Obs(1e-2, 1, 4, "output", False, 8.0, "site"),
        Taylor("param_first", "sum", "attention"),
        Taylor("param_mix", "sum", "attention"),
    ],
)
def test_an_expert_without_a_token_is_worth_nothing(criterion: Any, made: Made, tokens_NT: torch.Tensor) -> None:
    model = made("mixtral")
    idle(model)
    for visit in walk(model, tokens_NT, (criterion.evidence,), Bookmark(Meter(), "test"), read_only=True):
        for name, score in criterion(visit.block, visit.of(criterion.evidence)).items():
            score_U = unit_scores(score)
            assert score_U.isfinite().all()
            assert bool((score_U == 0).all()) == name.endswith(".experts.3"), name


def idle(model: Model) -> None:
    """Every token goes to one expert, never to the last: some logit of x, -x is above 0, which the last one's is."""
    for layer in model.layers:
        router = router_of(layer, model.family)
        router.top_k = 1
        router.weight.data[1], router.weight.data[3] = -router.weight[0], 0


@pytest.mark.parametrize("compensator", [Bias(False), LeastSquares(1e-3, "pruned", False, "site")])
def test_an_expert_without_a_token_can_be_compensated(compensator: Any, made: Made, tokens_NT: torch.Tensor) -> None:
    model = made("mixtral")
    idle(model)
    before = model.layers[0].mlp.experts[3].w2.weight.clone()
    pruning = pruned(
        model,
        tokens_NT,
        Magnitude("reader", 2),
        Uniform(1, ["channels"], 0, 0, 1, alike=False, remainder="nearest"),
        0.3,
        compensator,
    )
    kept = list(pruning.plan.sites["model.layers.0.mlp.experts.3"].kept)
    linear = model.layers[0].mlp.experts[3].w2
    assert 0 < len(kept) < 24 and torch.equal(linear.weight, before[:, kept])
    assert torch.equal(linear.bias, torch.zeros(48, dtype=torch.float64))


@pytest.mark.slow
@each("granularity, search", itertools.product([["experts"], ["heads", "experts"]], SEARCHES))
def test_searches_remove_whole_experts(
    search: str, granularity: list[str], made: Made, tokens_NT: torch.Tensor
) -> None:
    model = made("mixtral")
    before = model.decoder_params
    pruning = pruned(model, tokens_NT, WandaSp("sum", False), SEARCHES[search](granularity), 0.3)
    left = [len(experts_of(layer, model.family)) for layer in model.layers]
    assert min(left) >= 2 and sum(left) < 12
    assert before - model.decoder_params == pruning.plan.budget["removed_params"]
    dearest = before / 12  # an expert is less than that
    assert abs(pruning.plan.budget["removed_params"] - 0.3 * before) <= dearest / 2
    assert not [name for name in pruning.plan.sites if ".experts." in name]
    for layer, kept in zip(model.layers, left, strict=True):
        assert router_of(layer, model.family).weight.shape == (kept, 48)


@pytest.mark.slow
@each("granularity", [["experts"], ["heads", "experts"]])
def test_starts_score_whole_experts(granularity: list[str], made: Made, tokens_NT: torch.Tensor) -> None:
    model, starts = made("mixtral"), {"flap": Flap("WIFV", False)}
    before = model.decoder_params
    search = Evolutionary(1, granularity, 12.0, 0.5, 1, 0.5, 2, 1, 1, starts, 0.5, "kl")
    pruning = pruned(model, tokens_NT, with_starts(WandaSp("sum", False), search), search, 0.3)
    assert pruning.plan.budget["removed_params"] == before - model.decoder_params > 0.2 * before
    assert min(len(experts_of(layer, model.family)) for layer in model.layers) >= 2


def test_an_expert_is_worth_what_its_channels_are(made: Made, tokens_NT: torch.Tensor) -> None:
    """In layer-by-layer pruning, too; the recorded scores are those that decided."""
    for sequential in (False, True):
        model = made("qwen3_moe")
        pruning = pruned(
            model,
            tokens_NT,
            WandaSp("sum", sequential),
            Uniform(1, ["experts"], 0, 0, 1, alike=False, remainder="nearest"),
            0.15,
        )
        for name in ("model.layers.0.mlp.experts", "model.layers.2.mlp.experts"):
            own_U = torch.stack([unit_scores(pruning.scores[f"{name}.{unit}"]).sum() for unit in range(4)])
            torch.testing.assert_close(pruning.scores[name], own_U)
            kept = pruning.plan.sites[name].kept
            assert len(kept) < 4 and sorted(own_U.topk(len(kept)).indices.tolist()) == list(kept)


def test_a_search_never_leaves_fewer_experts_than_a_token_needs(made: Made, tokens_NT: torch.Tensor) -> None:
    model = made("mixtral")
    search = Global(1, ["experts"], "none", 1)
    with pytest.raises(ConfigError, match=r"sparsity.ratio=0.6: expected at most 0\.\d+"):
        check_pruning(model, search, OneShot(0.6, "decoder", 0, *UNTIMED), NONE)
    with pytest.raises(AssertionError, match="as many experts"):
        shrink_(model, without_experts(model, 0, 1, 2))


def test_a_probe_may_leave_fewer(made: Made, tokens_NT: torch.Tensor) -> None:
    """A token then goes to all that are left; to none, the FFN adds nothing."""
    model = made("qwen3_moe")
    with masked(model, without_experts(model, 0, 1, 2, 3)):
        none = logits(model, tokens_NT)
    with masked(model, without_experts(model, 0, 1, 2)):
        one = logits(model, tokens_NT)
    for index in (0, 2):
        router_of(model.layers[index], model.family).top_k = 1
    with masked(model, without_experts(model, 0, 1, 2)):
        assert torch.equal(logits(model, tokens_NT), one)
    sites = [site for site in model.sites() if site.expert is not None]
    with masked(model, Plan({site.name: SitePlan("mlp", site.units, ()) for site in sites})):
        torch.testing.assert_close(logits(model, tokens_NT), none)


def test_experts_in_rounds_are_counted_as_at_the_start(made: Made, tokens_NT: torch.Tensor) -> None:
    model, dense = made("mixtral"), made("mixtral")
    method = Method(
        WandaSp("sum", False), Linear(0.3, "decoder", 0, 2, *UNTIMED), SEARCHES["global"](["experts"]), NONE
    )
    pruning = prune_in_rounds_(model, tokens_NT, method, Record(**settings()))
    assert len(pruning.plan.budget["rounds"]) == 2
    for index, layer in enumerate(model.layers):
        site = pruning.plan.sites[f"model.layers.{index}.mlp.experts"]
        experts = experts_of(layer, model.family)
        assert site.units == 4 and site.kept == experts.origin
        for expert, number in zip(experts, site.kept, strict=True):
            assert torch.equal(expert.w1.weight, dense.layers[index].mlp.experts[number].w1.weight)
    names = {f"model.layers.0.mlp.experts.{number}" for number in range(4)}
    assert names <= pruning.scores.keys(), "of experts that left in the first round, too"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(("kept", "kind"), [(8, "stock"), (12, "remote_code")])  # 12: rows of 24 bytes in 16 bits
def test_as_many_experts_of_one_width_everywhere_are_stock(
    kept: int, kind: str, name: str, made: Made, tokens_NT: torch.Tensor, tmp_path: Path
) -> None:
    model = made(name)
    plan = without_experts(model, 1)
    channels = {s.name: SitePlan("mlp", 24, tuple(range(kept))) for s in model.sites() if s.expert is not None}
    both = plan.merged(Plan(channels))
    with masked(model, both):
        expected = logits(model, tokens_NT)
    shrink_(model, both)
    torch.testing.assert_close(logits(model, tokens_NT), expected, rtol=1e-6, atol=1e-6)
    form = save(model, tmp_path / "model")
    assert form.kind == kind
    for dtype in (torch.float32, torch.bfloat16):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True, dtype=dtype)
        assert torch.isfinite(logits(plain.eval(), tokens_NT)).all()
    if kind == "remote_code":
        return
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    width = "intermediate_size" if name == "mixtral" else "moe_intermediate_size"
    assert (config["num_local_experts"], config[width]) == (3, kept)
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    own = {"mixtral": "block_sparse_moe.experts.2.w2", "qwen3_moe": "mlp.experts.2.down_proj"}[name]
    assert f"model.layers.0.{own}.weight" in names
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, experts_implementation="eager"
    )
    torch.testing.assert_close(logits(again.eval(), tokens_NT), expected, rtol=1e-6, atol=1e-6)


def test_a_pruned_mixture_is_pruned_on(made: Made, tokens_NT: torch.Tensor, tmp_path: Path) -> None:
    """Experts of many widths, some gone, saved and read: what is left is known, and may leave."""
    model = made("mixtral")
    without_first = without_experts(model, 0)
    widths_ = {s.name: SitePlan("mlp", 24, tuple(range(20 - s.expert))) for s in model.sites() if s.expert is not None}
    shrink_(model, Plan(widths_))
    shrink_(model, without_first)
    save(model, tmp_path / "model")
    again = ModelSource("again", str(tmp_path / "model"), None, "float64", "cpu", False, False, 4).load()
    assert again.experts_origin(0) == (1, 2, 3)
    assert [site.units for site in again.layer_sites(0)[1:]] == [19, 18, 17]
    with pytest.raises(ConfigError, match="expected no experts where they differ in width"):
        as_searched(again, Global(1, ["experts"], "none", 1), again.sites())
    pruned(again, tokens_NT, Flap("WIFV", False), AlAm(), 0.3, Bias(False))
    assert save(again, tmp_path / "once_more").kind == "remote_code"
    last = ModelSource("last", str(tmp_path / "once_more"), None, "float64", "cpu", True, False, 4).load()
    torch.testing.assert_close(last.token_losses(tokens_NT, 4), again.token_losses(tokens_NT, 4))


@pytest.mark.parametrize("granularity", ["channels", "experts"])
def test_streamed_is_held(granularity: str, made: Made, tokens_NT: torch.Tensor, tmp_path: Path) -> None:
    held, method = made("mixtral"), (Flap("WIFV", False), Global(1, [granularity], "zscore", 1), 0.2)
    save(held, tmp_path / "dense")
    streamed = ModelSource("s", str(tmp_path / "dense"), None, "float64", "cpu", True, False, 4).load()
    plan = pruned(held, tokens_NT, *method).plan
    writing = StreamedSave(streamed, tmp_path / "pruned", BlockProof(streamed, tokens_NT[:2]))
    assert pruned(streamed, tokens_NT, *method, shrunk=writing.layer).plan == plan
    writing.finish()
    assert writing.prove()["max_logit_difference"] < 1e-6
    torch.testing.assert_close(streamed.token_losses(tokens_NT, 4), held.token_losses(tokens_NT, 4))


def test_ul_mm_counts_the_channels_of_a_layer(made: Made) -> None:
    model = made("mixtral")
    sites = model.sites()
    scores = {
        site.name: torch.rand(site.units, generator=torch.Generator().manual_seed(i)) for i, site in enumerate(sites)
    }
    total = sum(site.units * site.cost.params for site in sites)
    plan = UlMm(0)(scores, sites, Budget(0.25, total), None, torch.Generator())
    gone = [
        sum(plan.removed(site) for site in sites if site.layer == layer and site.expert is not None)
        for layer in range(3)
    ]
    assert gone == [int(0.25 * total / 3 / sites[1].cost.params)] * 3


def test_what_leaves_is_reported(made: Made) -> None:
    model = made("mixtral")
    by_kind = widths(without_experts(model, 0, 2), model.sites())
    assert [(w.kept, w.units) for w in by_kind["experts"]] == [(2, 4)] * 3
    assert [(w.kept, w.units) for w in by_kind["mlp"]] == [(48, 96)] * 3


def test_multiply_accumulates_are_those_of_the_experts_that_run(made: Made) -> None:
    model = made("mixtral")
    site = model.layer_sites(0)[1]
    assert (site.cost.params, site.cost.macs) == (3 * 48, 3 * 48 * 2 // 4)
    (whole,) = model.whole_experts(0)
    assert (whole.cost.params, whole.cost.macs, whole.least) == (24 * 3 * 48 + 48, 48, 2)


def test_what_a_mixture_does_not_allow(made: Made) -> None:
    model = made("mixtral")
    chosen = {"criterion": "c", "compensator": "k"}
    plain = (Magnitude("reader", 2), AlAm(), NONE)

    def refused(line: str, criterion: Any = plain[0], search: Any = plain[1], compensator: Any = plain[2]) -> None:
        with pytest.raises(ConfigError, match=line):
            check_mixture(model, criterion, search, compensator, chosen)

    check_mixture(model, *plain, chosen)
    refused("criterion=c: expected another for a mixture", criterion=FlapOfficial("WIFV", False))
    refused("compensator=k: expected another for a mixture", compensator=BiasOfficial(False))
    refused("expected experts in the place of ffn", search=Global(1, ["ffn"], "none", 1))
    with pytest.raises(ConfigError, match="expected channels or experts"):
        Global(1, ["channels", "experts"], "none", 1)
    with pytest.raises(ConfigError, match="compensator.target='dense'"):
        check_pruning(model, AlAm(), OneShot(0.2, "decoder", 0, *UNTIMED), LeastSquares(1e-3, "dense", True, "site"))
    with pytest.raises(ConfigError, match="format=padded"):
        padding(model)
    model = made("qwen3")
    refused("expected no experts, qwen3 has none", search=Global(1, ["experts"], "none", 1))


@pytest.mark.slow
@each("granularity", [["experts"], ["heads", "channels"], ["channels"]])
def test_layers_lose_shares_of_their_own(granularity: list[str], made: Made, tokens_NT: torch.Tensor) -> None:
    search = LayerShares(1, granularity, {"by": BlockInfluence("angular")}, "softmax", 10.0, 1.0, 1, "nearest")
    model = made("mixtral")
    before = model.decoder_params
    criterion = SlimLlm(True) if "channels" in granularity else WandaSp("sum", False)
    pruning = pruned(model, tokens_NT, with_starts(criterion, search), search, 0.3)
    assert 1 - model.decoder_params / before == pytest.approx(0.3, abs=0.12 if "experts" in granularity else 0.01)
    assert len(pruning.plan.sites) and torch.isfinite(logits(model, tokens_NT)).all()


@pytest.mark.slow
def test_two_stages_of_a_mixture(made: Made, tokens_NT: torch.Tensor) -> None:
    model = made("mixtral")
    before = model.decoder_params
    pruned(model, tokens_NT, ActivationNorm("tokens", "none", False), TwoStage(1, 1.5, 1), 0.4)
    assert 1 - model.decoder_params / before == pytest.approx(0.4, abs=0.01)
    assert torch.isfinite(logits(model, tokens_NT)).all()
