"""An experiment on a model and tokens that are in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pruneexp.cli.build import PROTOCOLS, build, satisfying, with_starts
from pruneexp.cli.compose import compose
from pruneexp.cli.single import check_unswept
from pruneexp.conf_files import override_parts, typed_value
from pruneexp.criterion.together import each_of
from pruneexp.dataset.given import GivenTokens, as_windows
from pruneexp.experiment.compatible import check_together
from pruneexp.experiment.settings import Experiment
from pruneexp.model.given import GivenModel, check_module
from pruneexp.types import ConfigError

GIVEN = ("model", "run", "run.dir", "run.dry", "hydra")  # decided by what is given
DRAWN = ("dataset.calibration", "dataset.samples", "dataset.seed")  # would draw the windows, which are given


def given_experiment(
    given: tuple[Any, Any, Any], overrides: Sequence[str], folder: Path | None, in_place: bool, parts: Mapping[str, Any]
) -> Experiment:
    """`given`: model, tokenizer, tokens. `parts`: objects in place of what the overrides choose, by group. Raises
    ConfigError, the model untouched."""
    module, tokenizer, tokens = given
    check_module(module)
    windows_NT = as_windows(tokens)
    for text in overrides:
        key, _ = override_parts(text)
        if key in GIVEN or key.split(".")[0] in ("model", "hydra") and key != "model.batch_size":
            raise ConfigError(f"{text}: the model is given, and `folder` says where the run goes; expected other keys")
        if key == "sweep":
            raise ConfigError(f"{text}: a sweep is of many runs, which pruneexp.run starts; expected other keys")
        if key in DRAWN:
            raise ConfigError(f"{text}: calibration windows are given, as `tokens`; expected other keys")
        if folder is None and key == "tracker" and not text.endswith("=local"):
            raise ConfigError(f"{text}: a tracker reports a run's folder; expected folder='PATH' with it")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ConfigError(f"tokenizer: is a {type(tokenizer).__name__}; expected one of transformers, or None")
    named = typed_value(overrides, "dataset")
    typed = ["dataset=tokens"] if named is None else []
    if named in (None, "tokens", "text"):
        typed.append("dataset.calibration=given")  # which would be missing
    run = compose(["evaluator=[size]", "cache=off", *typed, *overrides])
    check_unswept(run)
    settings = {**run.config["run"], "dir": None if folder is None else str(folder)}
    run = replace(run, config={**run.config, "run": settings})  # not typed: a path may be any text
    experiment = build(run)
    if in_place and experiment.recovery.layerwise:
        chosen = run.job["choices"]["recovery"]
        raise ConfigError(
            f"in_place=True: recovery={chosen} trains towards the dense model, which is spent by then; expected "
            "in_place=False, or recovery=none"
        )
    source = GivenModel(module, tokenizer, experiment.model.batch_size, in_place)
    replaced: dict[str, Any] = {"model": source, "dataset": GivenTokens(windows_NT)}
    described = {"model": _described(source), "dataset": {**run.config["dataset"], "given": list(windows_NT.shape)}}
    choices = {**run.job["choices"], "model": source.name}
    for group, part in parts.items():
        replaced[group] = satisfying(part, PROTOCOLS[group], group)
        described[group] = {"_target_": _class_of(part), "given": repr(part)}
        choices[group] = type(part).__name__
    if replaced.keys() & {"criterion", "search"}:
        criterion, search = (replaced.get(group, getattr(experiment, group)) for group in ("criterion", "search"))
        replaced["criterion"] = with_starts(each_of(criterion)[0], search)
    recipe = "custom" if parts else run.job["recipe"]
    config, job = {**run.config, **described}, {**run.job, "choices": choices, "recipe": recipe}
    experiment = replace(experiment, config=config, job=job, **replaced)
    check_together(experiment)
    experiment.check(recorded=folder is not None)
    return experiment


def _described(source: GivenModel) -> dict[str, Any]:
    """What config.yaml says of the model."""
    own = {name: getattr(source, name) for name in ("name", "path", "dtype")}
    return {
        "_target_": _class_of(source.module),
        **own,
        "stream": False,
        "batch_size": source.batch_size,
        "given": True,
    }


def _class_of(part: Any) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"
