"""A composed config to an Experiment: every object built, every mistake that the config alone shows found.

Fields are checked against their annotations before anything is called, so that a method class needs no code for it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from omegaconf import OmegaConf

from pruneexp import types
from pruneexp.cli.coerce import coerced, described
from pruneexp.cli.compose import Composed
from pruneexp.cli.explain import missing_key
from pruneexp.cli.sources import MIXED, with_shared
from pruneexp.cli.targets import Parameters, located, signature
from pruneexp.conf_files import did_you_mean, option_content, typed_keys, typed_value
from pruneexp.criterion.together import Together
from pruneexp.dataset.bos import check_asked, resolved
from pruneexp.dataset.mixed import Share
from pruneexp.dataset.windows import check_seed
from pruneexp.experiment.compatible import check_together
from pruneexp.experiment.settings import Experiment, RunSettings
from pruneexp.fingerprint import came_later, is_inner, value_before
from pruneexp.model import ModelSource
from pruneexp.search import scored_as
from pruneexp.types import ConfigError, defaults, filled, one_line

DEFAULTS: dict[type, Mapping[str, Any]] = {
    types.Augmentation: defaults.AUGMENTATION,
    types.Compensator: defaults.COMPENSATOR,
    types.Criterion: defaults.CRITERION,
    types.Dataset: defaults.DATASET,
    types.Evaluator: defaults.EVALUATOR,
    types.Quantise: defaults.QUANTISE,
    types.Recovery: defaults.RECOVERY,
    types.Search: defaults.SEARCH,
    types.Sparsity: defaults.SPARSITY,
    types.Tracker: defaults.TRACKER,
}
PROTOCOLS: dict[str, type | None] = {
    "model": ModelSource,
    "dataset": types.Dataset,
    "augmentation": types.Augmentation,
    "criterion": types.Criterion,
    "sparsity": types.Sparsity,
    "search": types.Search,
    "compensator": types.Compensator,
    "recovery": types.Recovery,
    "quantise": types.Quantise,
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
    check_seed(seed)
    run = builder.call(RunSettings, config["run"], "run")
    parts = {name: builder.part(name, protocol) for name, protocol in PROTOCOLS.items()}
    parts["criterion"] = with_starts(parts["criterion"], parts["search"])
    evaluators = {name: builder.evaluator(name) for name in config.get("evaluator") or {}}
    if parts["model"].stream and "evaluator" not in typed_keys(composed.job["overrides"]):
        # The default list is for a model in memory; what was typed is checked below instead.
        evaluators = {name: each for name, each in evaluators.items() if each.streams}
    experiment = Experiment(**parts, evaluators=evaluators, run=run, seed=seed, config=config, job=composed.job)
    check_together(experiment)
    return experiment


def with_starts(criterion: Any, search: types.Search) -> Any:
    """The criterion together with those that the search starts from, where it orders units: whole layers have none."""
    if not isinstance(search.starts, Mapping):
        raise ConfigError(f"search.starts={search.starts!r}: expected criteria by name")
    for name, start in search.starts.items():
        satisfying(start, types.Criterion, f"search.starts.{name}")
    by_units = search.starts and scored_as(search.granularity, criterion.judges) == "units"
    return Together(criterion, search.starts) if by_units else criterion


@dataclasses.dataclass(frozen=True)
class Builder:
    """Objects from the nodes of one composed config."""

    composed: Composed

    def part(self, group: str, protocol: type | None) -> Any:
        node = self.composed.config.get(group, value_before(group))
        if node is None:
            raise self._missing_choice(group)
        return satisfying(self.node(node, group), protocol, f"{group}._target_")

    def evaluator(self, name: str) -> Any:
        key = f"evaluator.{name}"
        node = self.node(self.composed.config["evaluator"][name], key)
        evaluator = satisfying(node, types.Evaluator, f"{key}._target_")
        if evaluator.dataset is not None:
            satisfying(evaluator.dataset, types.Dataset, f"{key}.dataset")
        return evaluator

    def node(self, node: Any, key: str) -> Any:
        """The object that a node with a `_target_` describes."""
        if not isinstance(node, Mapping) or "_target_" not in node:
            raise ConfigError(f"{key}={node!r}: expected a choice with a _target_")
        settings = {name: value for name, value in node.items() if name != "_target_"}
        target = located(node["_target_"], f"{key}._target_")
        if node["_target_"] == MIXED:
            settings = self._with_sources(settings, f"{key}.sources")
        return self.call(target, _as_before(target, _without_bos(target, settings), key), key)

    def _with_sources(self, settings: dict[str, Any], key: str) -> dict[str, Any]:
        """A mixture's settings, with its sources as objects. They lie under their own names, as they are typed."""
        sources = with_shared(settings, key)
        if not isinstance(sources, Mapping):
            return settings
        built = {}
        for name, each in sources.items():
            source = satisfying(self.node(each["dataset"], f"{key}.{name}"), types.Dataset, f"{key}.{name}._target_")
            built[name] = Share(coerced(each.get("weight"), float, f"{key}.{name}.weight"), source)
        return {**settings, "sources": built}

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
            part = self.node(value, key)
            return satisfying(part, types.Dataset, f"{key}._target_") if is_inner(key) else part
        if isinstance(value, Mapping) and dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            return self.call(annotation, value, key)
        if annotation == Mapping[str, types.Criterion]:
            return self._criteria(value, key)
        return coerced(value, annotation, key, self._typed(key))

    def _criteria(self, value: Any, key: str) -> dict[str, Any]:
        """Criteria by name, from a list of the names that criterion= takes."""
        names = coerced(value, list[str], key, self._typed(key))
        known = {
            path.stem: path
            for folder in reversed(self.composed.folders)
            for path in (folder / "criterion").glob("*.yaml")
        }
        built = {}
        for name in names:
            if name in built or name not in known:
                wrong = "there twice" if name in built else f"no criterion{did_you_mean(name, list(known))}"
                raise ConfigError(
                    f"{key}={names!r}: {name!r} is {wrong}; expected some of {', '.join(sorted(known))}, each once"
                )
            own = OmegaConf.create({"seed": self.composed.config["seed"], "own": option_content(known[name])})
            part = self.node(OmegaConf.to_container(own, resolve=True)["own"], f"{key}.{name}")  # type: ignore
            built[name] = satisfying(part, types.Criterion, f"{key}.{name}")
        return built

    def _typed(self, key: str) -> str | None:
        """The key's value as it was typed, None where it was not."""
        return typed_value(self.composed.job.get("overrides", ()), key)

    def _check_names(
        self, parameters: Parameters, settings: Mapping[str, Any], hints: dict[str, Any], key: str
    ) -> None:
        kinds = {parameter.kind for parameter in parameters.values()}
        unknown = [name for name in settings if name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds]
        for name in unknown:
            known = [f"{key}.{parameter}" for parameter in parameters]
            expected = f"expected one of {', '.join(known)}" if known else f"{key} has no keys"
            near = did_you_mean(name, list(parameters), f"{key}.{{}}")
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
    _require_callable(part, protocol, key)
    try:
        return filled(part, optional)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _require_callable(part: Any, protocol: type | None, key: str) -> None:
    """Raises ConfigError where a method of the part cannot be called as the protocol says: with its arguments, with or
    without those that have a default. At the call it would end the run, behind everything slow."""
    for name, declared in _methods(protocol).items():
        parameters = [each for each in inspect.signature(declared).parameters.values() if each.name != "self"]
        needed = [each.name for each in parameters if each.default is each.empty]
        try:
            own = inspect.signature(getattr(part, name, None))  # type: ignore
        except (TypeError, ValueError):  # left out, or without a signature that can be read
            continue
        if not any(_takes(own, given) for given in (needed, [each.name for each in parameters])):
            called = f"{type(part).__name__}.{name}({', '.join(own.parameters)})"
            raise ConfigError(f"{key}: {called}: expected to take ({', '.join(needed)}); see pruneexp.types")


def _takes(signature: inspect.Signature, given: Iterable[str]) -> bool:
    try:
        signature.bind(*given)
    except TypeError:
        return False
    return True


def _without_bos(target: Callable[..., Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without `bos: false`, which a sweep's file may set, where the class has no such key."""
    if settings.get("bos") is not False or "bos" in inspect.signature(target).parameters:
        return settings
    return {name: value for name, value in settings.items() if name != "bos"}


def _as_before(target: Callable[..., Any], settings: dict[str, Any], key: str) -> dict[str, Any]:
    """The settings of a class of ours. Keys that a config of an older version lacks have the value that means what was
    done before."""
    if not target.__module__.startswith("pruneexp."):
        return settings
    names = [name for name in inspect.signature(target).parameters if came_later(f"{key}.{name}")]
    return {name: value_before(f"{key}.{name}") for name in names} | settings


def _under(key: str, parameters: Iterable[str], error: ConfigError) -> ConfigError:
    """The error of a class that does not know its place in the config, with the full key in front."""
    message = str(error)
    if message.startswith(f"{key}."):
        return error
    names_a_field = any(message.startswith(name) and not message[len(name) :][:1].isidentifier() for name in parameters)
    return ConfigError(f"{key}.{message}" if names_a_field else f"{key}: {message}")


def _members(protocol: type | None) -> list[str]:
    return [] if protocol is None else [*protocol.__annotations__, *_methods(protocol)]


def _methods(protocol: type | None) -> dict[str, Callable[..., Any]]:
    methods = {} if protocol is None else {n: value for n, value in vars(protocol).items() if inspect.isfunction(value)}
    return {name: value for name, value in methods.items() if name == "__call__" or not name.startswith("_")}
