"""What the FLAP authors' released code answers on the same weights and tokens (tests/data/flap_tiny/README.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pruneexp.pruning import Method, prune_
from pruneexp.pruning.record import Record
from tests.cases import each
from tests.conftest import PARITY

ORACLE = json.loads((PARITY / "oracle.json").read_text())
ARRAYS = np.load(PARITY / "oracle.npz")
SETTINGS = [key for key in ORACLE if "|" in key]
SEARCH = {
    "UL-UM": ["search=ul_um"],
    "UL-MM": ["search=ul_mm", "search.heads=4"],
    "AL-MM": ["search=al_mm", "search.heads=4"],
    "AL-AM": ["search=al_am_official"],
}
RECIPE = {"flap": "flap_official", "wanda_sp": "wanda_sp", "mag_sp": "magnitude"}


def overrides(setting: str) -> list[str]:
    method, metric, structure, ratio = setting.split("|")
    chosen = [f"recipe={RECIPE[method]}", f"sparsity.ratio={ratio}"]
    if method == "flap":
        chosen += [f"criterion.metric={metric}", *SEARCH[structure]]
    files = [f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
    return [*chosen, "model=hf", f"model.path={PARITY}", "dataset=tokens", "dataset.length=64", *files]


def test_the_fixture_has_all_28_settings() -> None:
    assert len(SETTINGS) == 28


@pytest.mark.slow
@each("setting", SETTINGS)
def test_masks_biases_and_perplexity(setting: str, build_from: Callable[..., Any]) -> None:
    experiment = build_from(*overrides(setting))
    model = experiment.model.load()
    method = Method(experiment.criterion, experiment.sparsity, experiment.search, experiment.compensator)
    pruned = prune_(model, experiment.dataset.calibration(None), method, experiment.sparsity.ratio, Record())
    for layer in range(4):
        for site, part in (("self_attn", "attn"), ("mlp", "mlp")):
            plan = pruned.plan.sites[f"model.layers.{layer}.{site}"]
            kept = np.flatnonzero(ARRAYS[f"{setting}|{part}_mask|{layer}"])
            assert list(plan.kept) == kept.tolist(), (layer, site)
    if setting.startswith("flap"):
        for layer, module in enumerate(model.layers):
            for linear, part in ((module.self_attn.o_proj, "o_bias"), (module.mlp.down_proj, "down_bias")):
                expected = torch.from_numpy(ARRAYS[f"{setting}|{part}|{layer}"])
                bias = torch.zeros_like(expected) if linear.bias is None else linear.bias
                torch.testing.assert_close(bias, expected, rtol=1e-4, atol=1e-6)
    figures = experiment.evaluators["perplexity"](model, None)
    assert figures == {"ppl/test@64": pytest.approx(ORACLE[setting]["ppl"], rel=1e-4)}


def test_dense_perplexity(build_from: Callable[..., Any]) -> None:
    experiment = build_from(*overrides("mag_sp|-|-|0.2"))
    figures = experiment.evaluators["perplexity"](experiment.model.load(), None)
    assert figures == {"ppl/test@64": pytest.approx(ORACLE["dense_ppl"], rel=1e-5)}
