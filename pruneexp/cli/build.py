"""A composed config to an Experiment: every object built, every mistake that the config alone shows found.

Fields are checked against their annotations before anything is called, so that a method class needs no code for it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pruneexp import types
from pruneexp.cli.coerce import coerced, described
from pruneexp.cli.compose import Composed
from pruneexp.cli.explain import missing_key
from pruneexp.cli.targets import Parameters, located, signature
from pruneexp.conf_files import did_you_mean, one_line
from pruneexp.dataset.bos import check_asked, resolved
from pruneexp.experiment.settings import Experiment, RunSettings
from pruneexp.fingerprint import value_before
from pruneexp.model import ModelSource
from pruneexp.search import scored_as
from pruneexp.types import ConfigError, defaults, filled

DEFAULTS: dict[type, Mapping[str, Any]] = {
    types.Compensator: defaults.COMPENSATOR,
    types.Criterion: defaults.CRITERION,
    types.Dataset: defaults.DATASET,
    types.Evaluator: defaults.EVALUATOR,
    types.Recovery: defaults.RECOVERY,
    types.Search: defaults.SEARCH,
    types.Tracker: defaults.TRACKER,
}
PROTOCOLS: dict[str, type | None] = {
    "model": ModelSource,
    "dataset": types.Dataset,
    "criterion": types.Criterion,
    "sparsity": types.Sparsity,
    "search": types.Search,
    "compensator": types.Compensator,
    "recovery": types.Recovery,
    "tracker": types.Tracker,
    "cache": None,
}


def build(composed: Composed) -> Experiment:
    """Cheap and offline: reads no file of a model or of data. Raises ConfigError."""
    composed = dataclasses.replace(composed, config=resolved(composed.config))
    builder = Builder(composed)
    config = composed.config
    check_asked(config)
    seed = coerced(config.get("seed"), int, "seed")  # first: other settings are made of it
    if not 0 <= seed < 2**63:  # what generators take
        raise ConfigError(f"seed={seed!r}: expected an integer {'>= 0' if seed < 0 else 'below 2**63'}")
    run = builder.call(RunSettings, config["run"], "run")
    parts = {name: builder.part(name, protocol) for name, protocol in PROTOCOLS.items()}
    evaluators = {name: builder.evaluator(name) for name in config.get("evaluator") or {}}
    if parts["model"].stream and not _typed(composed, "evaluator"):
        # The default list is for a model in memory; what was typed is checked below instead.
        evaluators = {name: each for name, each in evaluators.items() if each.streams}
    experiment = Experiment(**parts, evaluators=evaluators, run=run, seed=seed, config=config, job=composed.job)
    check_together(experiment)
    return experiment


def _typed(composed: Composed, group: str) -> bool:
    """Whether the command line or a sweep's job chose `group`, rather than the defaults."""
    return any(text.lstrip("+~").startswith(f"{group}=") for text in composed.job["overrides"])


def check_together(experiment: Experiment) -> None:
    """What no part can know alone. Raises ConfigError."""
    _check_granularity(experiment)
    _check_rounds(experiment)
    half = experiment.model.dtype in ("float16", "bfloat16")
    if half and any(kind.wide for kind in types.evidence_kinds(experiment.criterion.evidence)):
        chosen = experiment.job["choices"]["criterion"]
        raise ConfigError(
            f"model.dtype={experiment.model.dtype!r}: its rounding hides the finite differences of criterion={chosen}; "
            "expected float32 or float64, or criterion.hessian=exact"
        )
    _check_quantity(experiment)
    if experiment.model.stream:
        _check_streamed(experiment)


def _check_streamed(experiment: Experiment) -> None:
    """Raises ConfigError where a part needs more than one layer of the model at a time."""
    sources = [types.source_of(kind) for kind in types.evidence_kinds(experiment.criterion.evidence)]
    differentiates, probes = any(s.differentiates for s in sources), any(s.probes for s in sources)
    backward, losses = "needs backward passes through the whole model", "measures the loss of many structures"
    trains = "trains what a streamed run has written by then" if experiment.recovery.layerwise else backward
    held = [name for name, each in experiment.evaluators.items() if not each.streams]
    for found, group, why, instead in (
        (differentiates, "criterion", backward, "a criterion that only needs forward passes"),
        (probes, "criterion", losses, "a criterion that goes block by block"),
        (experiment.search.probes, "search", losses, "a search that goes by scores"),
        (experiment.recovery.trains, "recovery", trains, "recovery=none"),
        (held, "evaluator", "needs the whole model in memory", "only evaluators that can stream"),
    ):
        if found:
            chosen = ",".join(held) if found is held else experiment.job["choices"][group]
            instead = f"expected model.stream=false, or {instead}"
            raise ConfigError(f"model.stream=True: {group}={chosen} {why}; {instead}")
    compensator = experiment.compensator
    if not compensator.sequential and any(kind.fits for kind in types.evidence_kinds(compensator.evidence)):
        raise ConfigError(
            "compensator.sequential=False: with model.stream=true, the covariances of all layers would be held at "
            "once; expected true"
        )


def _check_granularity(experiment: Experiment) -> None:
    """Raises ConfigError where the search removes what the criterion does not score."""
    criterion, search = (experiment.job["choices"][group] for group in ("criterion", "search"))
    judges = experiment.criterion.judges
    granularity = experiment.search.granularity
    if scored_as(granularity, judges) is not None:
        return
    if not {"attention", "mlp"} & set(judges) and not {"attention", "ffn", "blocks"} & set(granularity):
        raise ConfigError(
            f"criterion={criterion} scores whole blocks, which search={search} does not remove; "
            "expected search=blocks, sublayers or greedy, or a criterion of heads and channels"
        )
    unscored = [name for name in granularity if scored_as([name], judges) is None]
    raise ConfigError(
        f"search.granularity={list(granularity)!r}: criterion={criterion} has no scores of {', '.join(unscored)}, "
        f"which search={search} removes; expected a criterion of heads and channels, or search.granularity without them"
    )


def _check_rounds(experiment: Experiment) -> None:
    """Raises ConfigError where what is pruned in several rounds can only be pruned in one."""
    rounds = len(experiment.sparsity.shares())
    if rounds == 1:
        return
    if experiment.model.stream:
        raise ConfigError(
            f"sparsity.rounds={rounds}: with model.stream=true a model is written out once, as it is pruned; "
            "expected model.stream=false, or sparsity=one_shot"
        )
    heads = experiment.search.heads
    if heads is not None:
        raise ConfigError(
            f"search.heads={heads}: a count for all rounds together, of which none knows its part; "
            "expected sparsity=one_shot, or a search that goes by the ratio"
        )


def _check_quantity(experiment: Experiment) -> None:
    """Raises ConfigError where the search removes nothing that the sparsity counts."""
    if experiment.sparsity.of != "kv_cache":
        return
    heads, granularity = experiment.search.heads, experiment.search.granularity
    if heads is not None:
        raise ConfigError(
            f"sparsity.of='kv_cache': FFN channels, which make up for the rest of search.heads={heads}, fill none; "
            "expected decoder, prunable, macs or bytes"
        )
    if not {"heads", "blocks"} & set(granularity):
        raise ConfigError(
            f"search.granularity={list(granularity)!r}: expected heads or blocks with sparsity.of=kv_cache, "
            "which nothing else fills"
        )


@dataclasses.dataclass(frozen=True)
class Builder:
    """Objects from the nodes of one composed config."""

    composed: Composed

    def part(self, group: str, protocol: type | None) -> Any:
        node = self.composed.config.get(group)
        if node is None:
            raise self._missing_choice(group)
        return satisfying(self.node(node, group), protocol, f"{group}._target_")

    def evaluator(self, name: str) -> Any:
        key = f"evaluator.{name}"
        return satisfying(self.node(self.composed.config["evaluator"][name], key), types.Evaluator, f"{key}._target_")

    def node(self, node: Any, key: str) -> Any:
        """The object that a node with a `_target_` describes."""
        if not isinstance(node, Mapping) or "_target_" not in node:
            raise ConfigError(f"{key}={node!r}: expected a choice with a _target_")
        settings = {name: value for name, value in node.items() if name != "_target_"}
        target = located(node["_target_"], f"{key}._target_")
        return self.call(target, _as_before(target, _without_bos(target, settings), key), key)

    def call(self, target: Callable[..., Any], settings: Mapping[str, Any], key: str) -> Any:
        """`target(**settings)`, once every setting is known, present and of the type that the signature asks for."""
        parameters, hints = signature(target)
        self._check_names(parameters, settings, hints, key)
        arguments = {
            name: self._argument(value, hints.get(name, Any), f"{key}.{name}") for name, value in settings.items()
        }
        try:
            return target(**arguments)
        except ConfigError as error:
            raise _under(key, parameters, error) from error
        except Exception as error:
            raise ConfigError(f"{key}: {type(error).__name__}: {one_line(error)}") from error

    def _argument(self, value: Any, annotation: Any, key: str) -> Any:
        if isinstance(value, Mapping) and "_target_" in value:
            return self.node(value, key)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            return self.call(annotation, value, key)
        return coerced(value, annotation, key, self._typed(key))

    def _typed(self, key: str) -> str | None:
        """The key's value as it was typed, None where it was not."""
        typed = [text.lstrip("+").partition("=") for text in self.composed.job.get("overrides", ())]
        return next((value for name, _, value in reversed(typed) if name == key), None)

    def _check_names(
        self, parameters: Parameters, settings: Mapping[str, Any], hints: dict[str, Any], key: str
    ) -> None:
        kinds = {parameter.kind for parameter in parameters.values()}
        unknown = [name for name in settings if name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds]
        for name in unknown:
            known = [f"{key}.{parameter}" for parameter in parameters]
            expected = f"expected one of {', '.join(known)}" if known else f"{key} has no keys"
            near = did_you_mean(f"{key}.{name}", known)
            raise ConfigError(f"{key}.{name}={settings[name]!r}: unknown key; {expected}{near}")
        for name, parameter in parameters.items():
            variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if parameter.default is parameter.empty and name not in settings and not variadic:
                raise self._missing(f"{key}.{name}", hints.get(name, Any))

    def _missing(self, key: str, annotation: Any) -> ConfigError:
        expected = "" if annotation is Any else described(annotation)
        return missing_key(key, self.composed.job["choices"], self.composed.folders, expected)

    def _missing_choice(self, group: str) -> ConfigError:
        options = sorted({path.stem for folder in self.composed.folders for path in (folder / group).glob("*.yaml")})
        return ConfigError(f"{group} is missing: expected one of {', '.join(options)}")


def satisfying(part: Any, protocol: type | None, key: str) -> Any:
    """The part, where it has every member of the protocol. Raises ConfigError, saying `key`, where it has not."""
    if isinstance(part, type):
        raise ConfigError(f"{key}: got the class {part.__name__}; expected an object of it, {part.__name__}(...)")
    optional = {} if protocol is None else DEFAULTS.get(protocol, {})
    absent = [name for name in _members(protocol) if name not in optional and not hasattr(part, name)]
    if absent:
        raise ConfigError(f"{key}: {type(part).__name__} has no {', '.join(absent)}; see pruneexp.types")
    return filled(part, optional)


def _without_bos(target: Callable[..., Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Of a class that knows no beginning-of-sequence token, the settings without a false `bos`, which a sweep's file
    may have."""
    if settings.get("bos") is not False or "bos" in inspect.signature(target).parameters:
        return settings
    return {name: value for name, value in settings.items() if name != "bos"}


def _as_before(target: Callable[..., Any], settings: dict[str, Any], key: str) -> dict[str, Any]:
    """Of a class of ours, settings that a config of an older version lacks, as they were before there was the key."""
    if not target.__module__.startswith("pruneexp."):
        return settings
    lacking = {name: value_before(f"{key}.{name}") for name in inspect.signature(target).parameters}
    return {name: value for name, value in lacking.items() if value is not None} | settings


def _under(key: str, parameters: Iterable[str], error: ConfigError) -> ConfigError:
    """The error of a class that does not know its place in the config, with the full key in front."""
    message = str(error)
    if message.startswith(f"{key}."):
        return error
    names_a_field = any(message.startswith(name) and not message[len(name) :][:1].isidentifier() for name in parameters)
    return ConfigError(f"{key}.{message}" if names_a_field else f"{key}: {message}")


def _members(protocol: type | None) -> list[str]:
    if protocol is None:
        return []
    methods = [name for name, value in vars(protocol).items() if inspect.isfunction(value)]
    return [*protocol.__annotations__, *(name for name in methods if name == "__call__" or not name.startswith("_"))]
