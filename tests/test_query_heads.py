"""Query heads, as many out of every KV group: masked, shrunk, saved, scored, searched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pruneexp.model import Model
from pruneexp.surgery import masked, save, shrink_
from pruneexp.types import Plan, SitePlan

GROUPED = ("llama", "qwen3", "phi3", "olmo2", "stablelm_2_12b", "falcon_40b", "gemma2", "granite", "mixtral")


EAGER = {"mixtral": {"experts_implementation": "eager"}}  # experts' other ways know no float64


def one_of_each(site: Any, kept: tuple[int, ...], which: int) -> SitePlan:
    """Of each kept group the query head `which`, counted on from its own number."""
    heads = tuple(unit * site.group + (which + unit) % site.group for unit in kept)
    return SitePlan("attention", site.units, kept, site.units * site.group, heads)


def plan_for(model: Model, case: str) -> Plan:
    """`alike`: one query head of each group in every layer; `uneven`: in the first, of two of its groups in the last;
    channels leave, too."""
    sites = {}
    for site in model.sites():
        if site.kind == "attention":
            kept = (0, 2) if case == "uneven" and site.layer == 2 else tuple(range(site.units))
            if case == "alike" or site.layer != 1:
                sites[site.name] = one_of_each(site, kept, site.layer)
        elif case == "uneven":
            sites[site.name] = SitePlan(site.kind, site.units, tuple(range(site.layer + 1, site.units)))
    return Plan(sites)


def logits(model: Model, tokens_NT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.module(tokens_NT).logits


@pytest.mark.parametrize("case", ["alike", "uneven"])
@pytest.mark.parametrize("name", GROUPED)
def test_masked_is_shrunk_is_saved(
    name: str, case: str, loaded: Callable[..., Model], tokens_NT: torch.Tensor, tmp_path: Path, modules_cache: None
) -> None:
    import transformers

    model = loaded(name)
    tokens_NT = tokens_NT % model.vocab_size
    plan, before = plan_for(model, case), model.decoder_params
    freed = sum(site.cost.params * plan.removed(site) for site in model.sites())
    freed += sum(s.head_cost.params * plan.lost_heads(s) for s in model.sites() if s.head_cost is not None)
    with masked(model, plan):
        expected = logits(model, tokens_NT)
    assert not torch.allclose(expected, logits(model, tokens_NT), atol=1e-3)
    shrink_(model, Plan.from_json(plan.to_json()))
    assert model.decoder_params == before - freed
    torch.testing.assert_close(logits(model, tokens_NT), expected, rtol=1e-9, atol=1e-10)
    form = save(model, tmp_path / "saved")
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", trust_remote_code=True, dtype=torch.float64, **EAGER.get(name, {})
    )
    torch.testing.assert_close(again(tokens_NT).logits, expected, rtol=1e-9, atol=1e-10)
    assert (form.kind == "stock") == (case == "alike" and name not in ("stablelm_2_12b", "falcon_40b"))
