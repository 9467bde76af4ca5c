"""What the evaluators measure of a model: figures, and files of what they saw."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pruneexp.cache import Cache, NoCache
from pruneexp.files import write_atomic
from pruneexp.fingerprint import code_version, version_of
from pruneexp.model import Model
from pruneexp.tracker import Trackers, flat_metrics
from pruneexp.types import Evaluator, Measured, RunError, one_line

SAME = 1e-2  # of two figures, relative
Known = Callable[[Evaluator, str, Callable[[], Measured]], Measured]


def measure_anew(evaluator: Evaluator, name: str, compute: Callable[[], Measured]) -> Measured:
    """What `compute` measures."""
    return compute()


def measure(
    evaluators: Mapping[str, Evaluator],
    model: Model,
    folder: Path | None,
    trackers: Trackers,
    when: str,
    known: Known = measure_anew,
    dense: Mapping[str, Measured] = MappingProxyType({}),
) -> tuple[dict[str, float], dict[str, Measured]]:
    """Figures of all evaluators, under names that begin with `when` ("dense" or "pruned"), and what each evaluator
    found. `known`: gives what was measured before, or measures. `dense`: what each found before pruning. Files go to
    samples/ in `folder`; None: nowhere."""
    figures: dict[str, float] = {"params": model.params, "params/decoder": model.decoder_params}
    answers: dict[str, Measured] = {}
    origins = dict.fromkeys(figures, "every run")
    for name, evaluator in evaluators.items():
        who = f"evaluator.{name}: {type(evaluator).__name__}"
        one = answers[name] = known(
            evaluator, name, lambda e=evaluator, w=who: _checked(e(model, model.tokenizer), f"{w}.__call__")
        )
        compared = Measured({})
        if name in dense:
            compared = _checked(evaluator.against(dense[name], one, model.tokenizer), f"{who}.against")
        for what, new in (("__call__", one.figures), ("against", compared.figures)):
            _require_names_apart(new, figures, origins, f"{who}.{what}")
            figures |= new
        if folder is not None:
            _write(folder / "samples", f"{name}_{when}", one.files)
            _write(folder / "samples", name, compared.files)
    named = {f"{when}/{key}": value for key, value in figures.items()}
    trackers.log(named)
    return named, answers


def _checked(answer: Any, who: str) -> Measured:
    """What an evaluator's method gave: a Measured, or figures alone. Raises RunError, naming the method, where it gave
    something else."""
    one = answer if isinstance(answer, Measured) else Measured(answer)
    if not isinstance(one.figures, Mapping) or not all(isinstance(name, str) for name in one.figures):
        expected = 'expected figures by name, as {"ppl/mine@128": 5.47}, or a Measured of them'
        raise RunError(f"{who} gave {one_line(repr(one.figures))[:60]}; {expected}")
    try:
        flat_metrics(one.figures)
    except RunError as error:
        raise RunError(f"{who} gave {error}") from None
    for ending, text in one.files.items():
        if not isinstance(text, str) or not re.fullmatch(r"\w[\w.-]*", str(ending)):
            expected = 'expected text by the ending of its name, as {"csv": "a,b\\n"}'
            raise RunError(f"{who} gave a file {ending!r} of {type(text).__name__}; {expected}")
    return one


def _require_names_apart(
    new: Mapping[str, float], figures: Mapping[str, float], origins: dict[str, str], who: str
) -> None:
    """Raises RunError where a figure has the name of another one, of another value, and notes where the new ones come
    from. Two evaluators of one protocol may differ by what their batches round."""
    for name, value in new.items():
        if name in figures and not math.isclose(figures[name], value, rel_tol=SAME):
            both = f"gave {name}={value!r}, which {origins[name]} gave as {figures[name]!r}"
            raise RunError(f"{who} {both}; expected figures with names of their own")
        origins.setdefault(name, who)


def _write(folder: Path, stem: str, files: Mapping[str, str]) -> None:
    for ending, content in files.items():
        folder.mkdir(exist_ok=True)
        write_atomic(folder / f"{stem}.{ending}", content)


def recall(cache: Cache | NoCache, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """What `compute` gives, from the cache where it was computed before."""
    with cache.held([key]) as entries:
        entry = entries.get(key)
        if entry is None:
            entry = compute()
            entries.put(key, entry)
    return entry


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
    return recall(cache, key, compute)


def bos_worth(
    cache: Cache | NoCache, basis: Mapping[str, Any], measured_on: str, compute: Callable[[], float]
) -> float:
    """What a beginning-of-sequence token is worth, from the cache."""
    what = {"what": "what a beginning-of-sequence token is worth", "inputs": measured_on}
    code = code_version("pruneexp.dataset", "pruneexp.experiment.bos_probe")
    return recall(cache, {**what, **basis, "code": code}, compute)
