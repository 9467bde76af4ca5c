"""What the evaluators measure of a model: figures, and files of what they saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pruneexp.cache import Cache, NoCache
from pruneexp.files import write_atomic
from pruneexp.fingerprint import code_version, version_of
from pruneexp.model import Model
from pruneexp.tracker import Trackers
from pruneexp.types import Evaluator

Measured = tuple[dict[str, float], dict[str, str]]  # figures; contents of files by name


def measured(
    evaluators: Mapping[str, Evaluator],
    model: Model,
    when: str,
    known: Callable[[Evaluator, str, Callable[[], Measured]], Measured],
    folder: Path | None,
    trackers: Trackers,
) -> dict[str, float]:
    """Every evaluator's figures of the model as it is `when` ("dense", "pruned"), which their names begin with.
    `known`: gives what was measured before, or measures. Files go to samples/ in `folder`; None: nowhere."""
    found: dict[str, float] = {"params": model.params, "params/decoder": model.decoder_params}
    for name, evaluator in evaluators.items():
        figures, files = known(evaluator, name, lambda e=evaluator, n=name: _figures(model, e, n, when))
        found |= figures
        if folder is not None:
            _write(files, folder / "samples")
    named = {f"{when}/{key}": value for key, value in found.items()}
    trackers.log(named)
    return named


def _write(files: Mapping[str, str], folder: Path) -> None:
    for name, content in files.items():
        folder.mkdir(exist_ok=True)
        write_atomic(folder / name, content)


def _figures(model: Model, evaluator: Evaluator, name: str, when: str) -> Measured:
    """What the evaluator measures, and the files that it wants kept, by name."""
    found = evaluator(model, model.tokenizer)
    return found, dict(evaluator.files(name, when))


def kept(cache: Cache | NoCache, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """What `compute` gives, from the cache where it was computed before."""
    with cache.held([key]) as entries:
        found = entries.get(key)
        if found is None:
            found = compute()
            entries.put(key, found)
    return found


def dense_figures(
    cache: Cache | NoCache,
    basis: Mapping[str, Any],
    model: Model,
    evaluator: Evaluator,
    name: str,
    compute: Callable[[], Measured],
) -> Measured:
    """The dense model's, from the cache where the evaluator says what it measures on. `basis`: what identifies the
    model and how it is run."""
    measured_on = evaluator.measured_on(model.tokenizer)
    if measured_on is None:
        return compute()
    what = {"evaluator": [name, version_of(evaluator)], "inputs": measured_on}
    code = code_version("pruneexp.dataset", "pruneexp.evaluator")
    settings = model.module.generation_config  # what it writes depends on them
    key = {"what": "the dense model's figures", **basis, **what, "code": code}
    key |= {} if settings is None else {"generation": settings.to_json_string()}
    return kept(cache, key, compute)


def bos_worth(
    cache: Cache | NoCache, basis: Mapping[str, Any], measured_on: str, measure: Callable[[], float]
) -> float:
    """What a beginning-of-sequence token is worth, from the cache."""
    what = {"what": "what a beginning-of-sequence token is worth", "inputs": measured_on}
    return kept(
        cache, {**what, **basis, "code": code_version("pruneexp.dataset", "pruneexp.experiment.bos_probe")}, measure
    )
