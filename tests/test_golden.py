"""Runs give what they gave when the answers were frozen: plans and configs exactly, metrics to rounding."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests import golden


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def same(model: str, recipe: str, run: dict, before: dict) -> list[str]:
    """What differs, a line each."""
    plan = [] if run["plan"] == before["plan"] else [f"{model}, {recipe}: another plan"]
    now, then = run["metrics"], before["metrics"]
    return plan + [
        f"{model}, {recipe}: {key}={now.get(key)}, was {then.get(key)}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != pytest.approx(then.get(key), rel=1e-6)
    ]


@pytest.mark.parametrize("name", [*golden.MODELS, "configs"])
def test_every_recipe_and_sweep_has_an_answer(name: str) -> None:
    expected = golden.sweeps() if name == "configs" else golden.recipes()
    assert sorted(golden.frozen(name)) == expected, "`python -m tests.golden` adds what is new and drops what is gone"


@pytest.mark.slow
@pytest.mark.parametrize("model", golden.MODELS)
def test_every_recipe_gives_what_it_gave(model: str, tmp_path: Path) -> None:
    before = golden.frozen(model)
    runs = golden.runs_of(model, tmp_path, list(before))
    different = [line for recipe in before for line in same(model, recipe, runs[recipe], before[recipe])]
    assert not different, "\n".join(different)


@pytest.mark.slow
def test_sweeps_compose_as_they_did() -> None:
    before = golden.frozen("configs")
    for name, config in before.items():
        assert golden.config_of(name) == config, name
