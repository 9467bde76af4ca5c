"""Sublayers, blocks and widths in multiples on whole models: masked, shrunk, saved, streamed; every method with every
granularity that it takes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneexp.calibrate import Bookmark, Meter, walk
from pruneexp.compensator import Bias, LeastSquares, NoCompensation
from pruneexp.criterion import BlockInfluence, Flap, LossDrop, Magnitude, Random, WandaSp
from pruneexp.evidence import BlockChange, LossWithout
from pruneexp.experiment.compatible import check_together
from pruneexp.experiment.run import run_experiment
from pruneexp.experiment.settings import Experiment
from pruneexp.model import Model
from pruneexp.pruning import Method, Pruned, prune_
from pruneexp.pruning.record import Record
from pruneexp.search import Global, UlUm
from pruneexp.sparsity import OneShot
from pruneexp.surgery import BlockProof, StreamedSave, prove_in_place, save, shrink_
from pruneexp.types import ConfigError, Plan, SitePlan, unit_scores
from tests.cases import UNTIMED, each, pairwise
from tests.conftest import FAMILIES
from tests.masking import masked
from tests.test_prune import built

SUBLAYERS, ALL = ["attention", "ffn"], ["heads", "channels", "attention", "ffn", "blocks"]


def prune(model: Model, tokens_NT: Tensor, parts: Method, ratio: float | None = None, **more: Any) -> Pruned:
    ratio = parts.sparsity.ratio if ratio is None else ratio
    rng = torch.Generator().manual_seed(0)
    return prune_(model, tokens_NT, parts, ratio, Record(rng=rng, **more))


def method(criterion: Any, granularity: list[str], compensator: Any, normalise: Any = "zscore", m: int = 1) -> Method:
    search = Global(1, granularity, normalise, m)
    return Method(
        criterion, OneShot(0.4 if len(granularity) > 1 else 0.15, "decoder", 0, *UNTIMED), search, compensator
    )


def tokens_of_norms(model: Model, plan: Plan) -> int:
    """Parameters that leave with no unit: of the norms in front of emptied sublayers."""
    norms = {"attention": model.family.attention_norm, "mlp": model.family.mlp_norm}
    gone = [(name, site.kind) for name, site in plan.sites.items() if not site.kept and site.kind in norms]
    layer_of = {site.name: site.layer for site in model.sites()}
    modules = [model.layers[layer_of[name]].get_submodule(norms[kind]) for name, kind in gone]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


CASES = {
    "attention, ffn": method(LossDrop(), SUBLAYERS, NoCompensation(False), "per_parameter"),
    "attention by influence": method(BlockInfluence("cosine"), ["attention"], NoCompensation(False), "none"),
    "heads, channels, ffn; bias": method(Flap("WIFV", False), ["heads", "channels", "ffn"], Bias(False)),
    "all": method(Magnitude("reader", 2), ALL, Bias(True), "zscore", 4),
    "channels, blocks; sequential bias": method(Random(3), ["channels", "blocks"], Bias(True), "mean", 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_judged_is_what_is_left_and_reloads(
    family: str,
    case: str,
    tiny: Callable[..., Model],
    source: Callable[..., Any],
    tokens_NT: Tensor,
    tmp_path: Path,
) -> None:
    parts = CASES[case]
    model, dense = tiny(family), tiny(family)
    plain = replace(parts, compensator=NoCompensation(False))
    pruned = prune(model, tokens_NT, plain)
    norms = tokens_of_norms(dense, pruned.plan)
    assert dense.decoder_params - model.decoder_params - norms == pruned.plan.budget["removed_params"] > 0
    with torch.no_grad(), masked(dense, pruned.plan):
        torch.testing.assert_close(
            model.token_losses(tokens_NT, 4), dense.token_losses(tokens_NT, 4), rtol=1e-9, atol=0
        )
    blocks = [name for name, site in pruned.plan.sites.items() if site.kind == "block"]
    assert not [n for n in pruned.plan.sites for block in blocks if n.startswith(f"{block}.")]
    assert len(model.layers) == 3 - len(blocks)
    compensated = tiny(family)
    prune(compensated, tokens_NT, parts)
    for index, left in enumerate((model, compensated)):
        assert torch.isfinite(left.token_losses(tokens_NT, 4)).all()
        save(left, tmp_path / f"{index}")
        assert prove_in_place(left, tmp_path / f"{index}", tokens_NT[:2])["max_logit_difference"] == 0
        again = source(tmp_path / f"{index}").load()
        assert torch.equal(again.token_losses(tokens_NT, 4), left.token_losses(tokens_NT, 4))


@pytest.mark.slow
@each("family, case", itertools.product(FAMILIES, [name for name in CASES if name != "attention, ffn"]))
def test_streamed_is_in_memory(
    family: str, case: str, tiny: Callable[..., Model], tokens_NT: Tensor, tmp_path: Path
) -> None:
    held, streamed = tiny(family), tiny(family, stream=True)
    expected = prune(held, tokens_NT, CASES[case])
    saving = StreamedSave(streamed, tmp_path / "model", BlockProof(streamed, tokens_NT[:2]))
    pruned = prune(streamed, tokens_NT, CASES[case], shrunk=saving.layer)
    saving.finish()
    assert pruned.plan == expected.plan
    assert torch.equal(streamed.token_losses(tokens_NT, 4), held.token_losses(tokens_NT, 4))
    assert saving.prove()["max_block_difference"] == 0


@pytest.mark.parametrize("sequential", [True, False], ids=["layer by layer", "all at once"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_lost_both_sublayers_before_is_streamed_too(
    family: str,
    sequential: bool,
    tiny: Callable[..., Model],
    source: Callable[..., Any],
    tokens_NT: Tensor,
    tmp_path: Path,
) -> None:
    model = tiny(family)
    shrink_(model, Plan({site.name: SitePlan(site.kind, site.units, ()) for site in model.layer_sites(1)}))
    save(model, tmp_path / "emptied")
    held, streamed = (source(tmp_path / "emptied", stream=stream).load() for stream in (False, True))
    compensator = LeastSquares(1e-2, "dense", True, "channel")
    parts = Method(WandaSp("sum", sequential), OneShot(0.3, "decoder", 0, *UNTIMED), UlUm(), compensator)
    expected = prune(held, tokens_NT, parts)
    saving = StreamedSave(streamed, tmp_path / "model", BlockProof(streamed, tokens_NT[:2]))
    assert prune(streamed, tokens_NT, parts, shrunk=saving.layer).plan == expected.plan
    saving.finish()
    assert torch.equal(streamed.token_losses(tokens_NT, 4), held.token_losses(tokens_NT, 4))
    proof = saving.prove()
    assert proof["max_block_difference"] == proof["max_logit_difference"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_sublayers_are_judged_by_the_loss_without_and_by_the_residual_stream(
    family: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model = tiny(family)
    dense = model.token_losses(tokens_NT, 4).mean()
    stream: list[Tensor] = []
    shown = ["attention", "mlp", "block"]
    for visit in walk(
        model, tokens_NT, (LossWithout, BlockChange), Bookmark(Meter(), "test"), read_only=True, whole=shown
    ):
        assert visit.whole is not None
        assert [site.units for site in visit.whole.sites] == [1, 1, 1]
        drops = LossDrop()(visit.whole, visit.of(LossWithout))
        for site in model.layer_sites(visit.index):
            whole = Plan.from_masks([site], {site.name: torch.zeros(site.units, dtype=torch.bool)})
            with masked(model, whole):
                rise = model.token_losses(tokens_NT, 4).mean() - dense
            assert drops[site.name].item() == pytest.approx(rise.item(), abs=1e-12)
        influence = BlockInfluence("cosine")(visit.whole, visit.of(BlockChange))
        read: dict[str, Tensor] = {}
        out_projection = visit.layer.get_submodule(model.family.mlp_out)
        handles = [
            visit.layer.register_forward_pre_hook(lambda _m, args, read=read: read.update(x=args[0])),
            out_projection.register_forward_hook(lambda _m, _a, output, read=read: read.update(f=output)),
            visit.layer.register_forward_hook(
                lambda _m, _a, o, read=read: read.update(y=o[0] if isinstance(o, tuple) else o)
            ),
        ]
        with torch.no_grad():
            model.module(tokens_NT)
        for handle in handles:
            handle.remove()
        middle = read["y"] - read["f"].view_as(read["y"])
        expected = [(read["x"], middle), (middle, read["y"]), (read["x"], read["y"])]
        for (x, y), score in zip(expected, influence.values(), strict=True):
            cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()
            assert score.item() == pytest.approx(1 - cosine.item(), rel=1e-9)
        stream.append(middle)
    assert len(stream) == 3


def test_sublayers_of_a_model_that_normalises_behind_them_have_no_influence(
    tmp_path: Path, source: Callable[..., Any], tokens_NT: Tensor
) -> None:
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig(vocab_size=96, hidden_size=48, ffn_dim=40, num_hidden_layers=3, num_attention_heads=6,
                       word_embed_proj_dim=48, max_position_embeddings=64, do_layer_norm_before=False)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "post")
    model = source(tmp_path / "post").load()
    with pytest.raises(ConfigError, match=r"^search\.granularity: expected .* that normalises behind its sublayers"):
        prune(model, tokens_NT, CASES["attention by influence"])
    pruned = prune(model, tokens_NT, CASES["attention, ffn"])
    assert any(not site.kept for site in pruned.plan.sites.values())


def test_a_block_is_worth_the_sum_of_its_units(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    pruned = prune(tiny("llama"), tokens_NT, method(Magnitude("reader", 2), ["blocks"], Bias(False), "none"), 0.34)
    sums = [0.0, 0.0, 0.0]
    for site in pruned.sites:
        sums[site.layer] += unit_scores(pruned.scores[site.name]).sum().item()
    gone = [name for name, site in pruned.plan.sites.items() if not site.kept]
    assert gone == [f"model.layers.{sums.index(min(sums))}"]


def test_one_run_of_everything_from_the_command_line(
    tiny_folder: Callable[[str], Path], build_from: Callable[..., Any], tmp_path: Path
) -> None:
    import numpy as np

    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 96, (6, 24)))
    data = [f"dataset.{part}={tmp_path / 'tokens.npy'}" for part in ("calibration", "evaluation")]
    plain = ["model=hf", f"model.path={tiny_folder('llama')}", "dataset=tokens", "dataset.length=24", *data]
    rest = ["evaluator=[perplexity,size]", "run.dir=run", "run.prove=in_place", "sparsity.ratio=0.5"]
    chosen = ["search=global", "search.granularity=[channels,attention,blocks]", "search.multiple=8"]
    metrics = run_experiment(build_from("recipe=flap", *chosen, *plain, *rest)).metrics
    assert metrics["proof/max_logit_difference"] < 1e-6 and math.isfinite(metrics["pruned/ppl/tokens@24"])
    assert metrics["sparsity/decoder"] == pytest.approx(0.5, abs=0.08)
    plan = json.loads(Path("run/plan.json").read_text())
    assert all(len(s["kept"]) % 8 == 0 for s in plan["sites"].values() if s["kind"] == "mlp")


# Every method, every granularity that it takes

GRANULARITIES = [["attention"], ["ffn"], SUBLAYERS, ["channels", "ffn"], ["heads", "blocks"], ALL]
CRITERIA = ["flap", "flap_official", "wanda_sp", "magnitude", "random", "obs", "llm_bip", "taylor", "mini_llm",
            "mini_llm_exact", "block_influence", "loss_drop"]  # fmt: skip
SEARCHES = ["global", "greedy", "policy_gradient", "evolutionary", "uniform"]
COMPENSATORS = ["none", "bias", "flap_official", "least_squares"]
MATRIX = pairwise(GRANULARITIES, CRITERIA, SEARCHES, COMPENSATORS, FAMILIES)


def combined(granularity: list[str], criterion: str, search: str, compensator: str) -> Experiment:
    chosen = {"criterion": criterion, "search": search, "compensator": compensator}
    parts = {group: getattr(built(group, option), group) for group, option in chosen.items()}
    settings = {"granularity": granularity, "multiple": 4}
    settings |= {"budgets": "joint", "passes": 1.0} if search == "policy_gradient" else {}
    settings |= {"effort": 3.0} if search == "evolutionary" else {}
    settings |= {"keep_first": 0, "keep_last": 0, "shortlist": 3} if search == "greedy" else {}
    experiment = replace(built("criterion", criterion), **{**parts, "search": replace(parts["search"], **settings)})
    experiment.job["choices"].update(chosen)
    check_together(experiment)
    return experiment


@pytest.mark.slow
@each("granularity, criterion, search, compensator, family", MATRIX)
def test_every_combination_runs_or_is_refused_before_it_starts(
    granularity: list[str],
    criterion: str,
    search: str,
    compensator: str,
    family: str,
    tiny: Callable[..., Model],
    tokens_NT: Tensor,
) -> None:
    try:
        experiment = combined(granularity, criterion, search, compensator)
    except ConfigError as error:
        line = str(error)
        assert "\n" not in line and ("granularity" in line or "criterion=" in line), line
        mixed = search == "evolutionary" and "blocks" in granularity
        shown = {"heads", "channels"} & set(granularity) and criterion in ("block_influence", "loss_drop")
        assert mixed or shown or search == "uniform", line
        return
    model, fresh = tiny(family), tiny(family)
    before = model.decoder_params
    parts = Method(experiment.criterion, experiment.sparsity, experiment.search, experiment.compensator)
    one_kind = len(granularity) == 1 or granularity == ["channels", "ffn"]  # of which no more can leave
    pruned = prune(model, tokens_NT[:4], parts, 0.15 if one_kind else 0.4)
    assert torch.isfinite(model.token_losses(tokens_NT, 5)).all()
    out = {name for name, site in pruned.plan.sites.items() if site.kind == "block"}
    assert len(model.layers) == 3 - len(out) >= 1
    touched = [site for site in pruned.sites if pruned.plan.removed(site)]
    assert touched or out
    owned = {layer: fresh.layers[layer] for layer in range(3)}
    out_projections = {"attention": fresh.family.attention_out, "mlp": fresh.family.mlp_out}
    bare = [site for site in touched if owned[site.layer].get_submodule(out_projections[site.kind]).bias is None]
    biases = 48 * len(bare) if parts.compensator.adds_bias else 0
    norms = tokens_of_norms(fresh, pruned.plan)
    assert before - model.decoder_params == pruned.plan.budget["removed_params"] + norms - biases
    for site in touched:
        kept = len(pruned.plan.sites[site.name].kept)
        assert site.kind == "attention" or kept % 4 == 0
