"""What the runs of a report are: the choices that made each one, what they share, and in what they differ.

A config holds classes and settings; which option of conf/ they are is found by comparing. Two runs are of one method
where they differ in ratio and seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Any

import yaml

from pruneexp.conf_files import YamlLoader, conf_folder, inherited
from pruneexp.dataset.bos import AUTO
from pruneexp.fingerprint import differing, settings
from pruneexp.report.folders import Run
from pruneexp.report.statistics import crossed

RECIPE = ("criterion", "sparsity", "search", "compensator")  # what a recipe chooses
REST = ("recovery", "dataset")
GROUPS = (*RECIPE, *REST)  # what a method is made of
RATIO = "sparsity.ratio"
HOW = ("model.batch_size", "model.stream", "model.trust_remote_code")  # how a model is run, not which


@dataclass(frozen=True)
class Choice:
    """An option of a group, and the settings in which a config departs from it."""

    name: str
    departures: Mapping[str, Any]


@dataclass(frozen=True)
class Described:
    """A run among the others of its report.

    `context`: its model; runs of different ones share no figure. `method`: what a line in a figure is. `seed`: every
    seed. `factors`: the level of everything that differs between the runs of the context. `settings`: keys in which
    runs of the same choices differ, and seeds that differ."""

    run: Run
    recipe: str | None
    choices: Mapping[str, Choice]
    context: str
    method: str
    ratio: float
    seed: tuple[tuple[str, Any], ...]
    factors: Mapping[str, str]
    settings: Mapping[str, Any]


@cache
def options(group: str) -> dict[str, dict[str, Any]]:
    """Settings of every option of a group, flat, those it inherits among them."""
    found = {}
    for path in sorted((conf_folder() / group).glob("*.yaml")):
        merged: dict[str, Any] = {}
        for file in reversed(inherited(path)):
            merged |= yaml.load(file.read_text(encoding="utf-8"), YamlLoader) or {}
        merged.pop("defaults", None)
        found[path.stem] = settings(merged)
    return found


@cache
def _recipes() -> dict[str, dict[str, str]]:
    """Recipe -> the option of each group that it chooses."""
    found = {}
    for path in sorted((conf_folder() / "recipe").glob("*.yaml")):
        lines = yaml.load(path.read_text(encoding="utf-8"), YamlLoader).get("defaults", ())
        overrides = {key: value for line in lines if isinstance(line, dict) for key, value in line.items()}
        prefix = "override /"
        found[path.stem] = {key.removeprefix(prefix): value for key, value in overrides.items() if prefix in key}
    return found


def choice(group: str, config: Mapping[str, Any], preferred: str | None = None) -> Choice:
    """The option of the group that the config is: of those of its class the one it departs from in nothing, else the
    preferred one, else the nearest. For a class that no option has, the class's name."""
    node = config.get(group)
    if not isinstance(node, Mapping):
        return Choice("none", {})
    given = settings(node)
    near = [
        Choice(name, {key: value for key, value in given.items() if not _stands(key, value, option)})
        for name, option in options(group).items()
        if option.get("_target_") == given.get("_target_")
    ]
    if not near:
        return Choice(str(given.get("_target_", "none")).rpartition(".")[2], {})
    best = min(near, key=lambda found: len(found.departures))
    wanted = [found for found in near if found.name == preferred]
    return wanted[0] if wanted and best.departures else best


def _stands(key: str, value: Any, option: Mapping[str, Any]) -> bool:
    """Whether the option leaves the setting at this value, or to the user or another key."""
    expected = option.get(key)
    open_ended = expected == AUTO or key == "ratio" or _is_seed(key) or "${" in str(expected) or expected == "???"
    return open_ended or expected == value


def choices_of(config: Mapping[str, Any]) -> tuple[str | None, dict[str, Choice]]:
    """The recipe whose options these are, whatever their settings (None if there is none), and each group's option."""
    best: tuple[str | None, dict[str, Choice]] = (None, {group: choice(group, config) for group in GROUPS})
    fewest = math.inf
    for recipe, chosen in _recipes().items():
        found = {group: choice(group, config, chosen.get(group)) for group in GROUPS}
        departures = sum(len(found[group].departures) for group in RECIPE)
        if departures < fewest and all(found[group].name == chosen.get(group) for group in RECIPE):
            best, fewest = (recipe, found), departures
    return best


def model_names(config: Mapping[str, Any]) -> set[str]:
    """What the run's model may be called: its own name, and the options that load the same checkpoint."""
    node = config["model"]
    return {str(node.get("name"))} | {n for n, o in options("model").items() if o.get("path") == node.get("path")}


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"


def describe(runs: Sequence[Run]) -> list[Described]:
    """The runs, each told from the others."""
    by_context: dict[str, list[Run]] = {}
    for run, context in zip(runs, _contexts(runs), strict=True):
        by_context.setdefault(context, []).append(run)
    found = {id(one.run): one for name, members in by_context.items() for one in _describe(name, members)}
    return [found[id(run)] for run in runs]


def _contexts(runs: Sequence[Run]) -> list[str]:
    """The model of each run: its name, and what else tells it from another of that name."""
    nodes = [settings({"model": run.config["model"]}) | _weights(run) for run in runs]
    names = [_short(str(run.config["model"].get("name"))) for run in runs]
    found = []
    for node, name in zip(nodes, names, strict=True):
        same = [other for other, other_name in zip(nodes, names, strict=True) if other_name == name]
        keys = [key for key in differing(same) if key not in HOW]
        found.append(" ".join([name, *(f"{key.removeprefix('model.')}={node.get(key)}" for key in keys)]))
    return found


def _short(name: str) -> str:
    """A folder's own name; an id on the hub as it is."""
    return PurePath(name).name if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name


def _weights(run: Run) -> dict[str, str]:
    """The fingerprint of the weights: one path may have held several models."""
    files = run.environment["model"].get("files", {})
    hashes = [str(file.get("sha256"))[:8] for name, file in sorted(files.items()) if name.endswith(".safetensors")]
    return {"model.weights": "+".join(hashes[:2])} if hashes else {}


def _describe(context: str, runs: Sequence[Run]) -> list[Described]:
    made_of = [choices_of(run.config) for run in runs]
    recipes, choices = [recipe for recipe, _ in made_of], [of_run for _, of_run in made_of]
    flat = [_method_settings(run.config) for run in runs]
    heads, by_recipe = _heads(choices, recipes), _by_recipe(choices, recipes)
    extra = _extra([tuple(one.name for one in of_run.values()) for of_run in choices], flat)
    keys = list(dict.fromkeys(key for found in extra for key in found))
    lasts = [key.rpartition(".")[2] for key in keys]
    short = {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)}
    several = {key for head in heads for key in head if len({other.get(key) for other in heads}) > 1}
    ratios = [float(run.flat.get(RATIO) or 0.0) for run in runs]
    drawn = {key for key in differing([run.flat for run in runs]) if _is_seed(key)}
    described = []
    for index, run in enumerate(runs):
        head = {key: value for key, value in heads[index].items() if key in several}
        factors = head | {key: str(extra[index].get(key, "-")) for key in keys}
        parts = [value for key, value in head.items() if key in ("recipe", *RECIPE)]
        base = (by_recipe[index] or parts) + [f"{key}={value}" for key, value in head.items() if key in REST]
        told = [f"{short[key]}={value}" for key, value in extra[index].items()]
        # Parts that all runs share, and that no recipe's name sums up, tell nothing beside settings that differ.
        words = [*(base or _fallback(recipes[index], choices[index], bool(told))), *told]
        if len(set(ratios)) > 1:
            factors[RATIO] = f"{ratios[index]:g}"
        seeds = sorted(key for key in run.flat if _is_seed(key) and not key.startswith("evaluator."))
        seed = tuple((key, run.flat[key]) for key in seeds)
        described.append(
            Described(
                run=run,
                recipe=recipes[index],
                choices=choices[index],
                context=context,
                method=" ".join(words),
                ratio=ratios[index],
                seed=seed,
                factors=factors,
                settings=extra[index] | {key: value for key, value in seed if key in drawn},
            )
        )
    return described


def _method_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What may tell methods apart: not the model, the ratio, the seeds, or how the result is evaluated."""
    found = settings({key: config[key] for key in GROUPS if key in config})
    return {key: value for key, value in found.items() if key != RATIO and not _is_seed(key)}


def _heads(choices: Sequence[Mapping[str, Choice]], recipes: Sequence[str | None]) -> list[dict[str, str]]:
    """The option names that tell methods apart: of the recipe where every run has one, and they are not just a crossing
    of its parts; else of each group."""
    parts = _parts(choices)
    by_recipe = None not in recipes and not (crossed(parts) and _several_places(parts))
    found = []
    for of_run, recipe in zip(choices, recipes, strict=True):
        names = {"recipe": str(recipe)} if by_recipe else {group: of_run[group].name for group in RECIPE}
        found.append(names | {group: of_run[group].name for group in REST})
    return found


def _by_recipe(choices: Sequence[Mapping[str, Choice]], recipes: Sequence[str | None]) -> list[list[str]]:
    """Names where recipes lie beside runs of no recipe: the recipe; else the one that lies there too and differs in one
    group, with what that group is instead ("flap search=greedy"; another criterion is another method). Empty for a run
    that is near to none, and for all runs where their parts are just a crossing."""
    parts = _parts(choices)
    beside = [] if crossed(parts) else sorted({recipe for recipe in recipes if recipe is not None})
    found = []
    for names, own in zip(parts, recipes, strict=True):
        of_run = dict(zip(RECIPE, names, strict=True))
        swaps = {recipe: set(of_run.items()) - set(_recipes()[recipe].items()) for recipe in beside}
        near = [[recipe, f"{group}={name}"] for recipe, swap in swaps.items() if len(swap) == 1 for group, name in swap]
        near = [words for words in near if not words[1].startswith("criterion=")]
        found.append([own] if own in beside else next(iter(near), []))
    return found


def _parts(choices: Sequence[Mapping[str, Choice]]) -> list[tuple[str, ...]]:
    return [tuple(of_run[group].name for group in RECIPE) for of_run in choices]


def _several_places(parts: Sequence[tuple[Hashable, ...]]) -> bool:
    return sum(len(set(place)) > 1 for place in zip(*parts, strict=True)) > 1


def _extra(names: Sequence[tuple[str, ...]], flat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings in which each run differs from runs of the same options."""
    by_names: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for name, setting in zip(names, flat, strict=True):
        by_names.setdefault(name, []).append(setting)
    keys = {name: differing(same) for name, same in by_names.items()}
    return [{key: setting.get(key) for key in keys[name]} for name, setting in zip(names, flat, strict=True)]


def _fallback(recipe: str | None, choices: Mapping[str, Choice], told: bool) -> list[str]:
    """What to call the method where only one is there; `told`: settings follow."""
    if recipe is not None:
        return [recipe]
    return [] if told else [choices[group].name for group in RECIPE]


def departures(described: Described) -> dict[str, Any]:
    """Settings of the run that are not its options' defaults, by full key."""
    return {f"{group}.{key}": value for group in GROUPS for key, value in described.choices[group].departures.items()}
