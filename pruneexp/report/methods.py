"""What the runs of a report are: the choices that made each one, what they share, and in what they differ.

A config holds classes and settings; which option of conf/ they are is found by comparing. Two runs are of one method
where they differ in ratio and seed alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Any

import yaml

from pruneexp.conf_files import YamlLoader, conf_folder, inherited, option_content
from pruneexp.dataset.bos import AUTO
from pruneexp.fingerprint import differing, settings
from pruneexp.report.folders import Run
from pruneexp.report.statistics import crossed, grouped

RECIPE = ("criterion", "sparsity", "search", "compensator")  # what a recipe chooses
REST = ("augmentation", "recovery", "quantise", "dataset")
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


Runs = Sequence[Described]


@cache
def options(group: str) -> dict[str, dict[str, Any]]:
    """Settings of every option of a group, flat, those it inherits among them."""
    return {path.stem: settings(option_content(path)) for path in sorted((conf_folder() / group).glob("*.yaml"))}


@cache
def _recipes() -> dict[str, dict[str, str]]:
    """Recipe -> the option of each group that it, or one that it builds on, chooses."""
    recipes, prefix = {}, "override /"
    for path in sorted((conf_folder() / "recipe").glob("*.yaml")):
        files = [yaml.load(file.read_text(encoding="utf-8"), YamlLoader) for file in reversed(inherited(path))]
        lines = [line for file in files for line in file.get("defaults", ())]
        overrides = {key: value for line in lines if isinstance(line, dict) for key, value in line.items()}
        recipes[path.stem] = {key.removeprefix(prefix): value for key, value in overrides.items() if prefix in key}
    return recipes


def choice(group: str, config: Mapping[str, Any], preferred: str | None = None) -> Choice:
    """The option of the group that the config has. Of the options of its class, it is the one from which the config
    departs in nothing, else the preferred one, else the nearest. For a class that no option has, it is the class's
    name."""
    node = config.get(group)
    if not isinstance(node, Mapping):
        return Choice("none", {})
    given = settings(node)
    same_class = [n for n, option in options(group).items() if option.get("_target_") == given.get("_target_")]
    near = {name: _departing(name, given, options(group)[name]) for name in same_class}
    if not near:
        return Choice(str(given.get("_target_", "none")).rpartition(".")[2], {})
    best = min(near.values(), key=lambda choice: len(choice.departures))
    return near.get(str(preferred), best) if best.departures else best


def _departing(name: str, given: Mapping[str, Any], option: Mapping[str, Any]) -> Choice:
    """The option, and the settings that have another value there, except those it leaves to the user or takes from
    another key."""
    departures = {}
    for key, value in given.items():
        expected = option.get(key)
        if not (key == "ratio" or _is_seed(key) or expected in (AUTO, "???", value) or "${" in str(expected)):
            departures[key] = value
    return Choice(name, departures)


def _recorded(group: str, config: Mapping[str, Any], name: str | None) -> Choice:
    """The option that was chosen, and the settings in which the config departs from it."""
    node, option = config.get(group), options(group).get(str(name))
    if name is None or option is None or not isinstance(node, Mapping):  # of a folder of one's own
        return choice(group, config) if name is None else Choice(name, {})
    return _departing(name, settings(node), option)


def choices_of(
    config: Mapping[str, Any], recorded: Mapping[str, Any] | None = None
) -> tuple[str | None, dict[str, Choice]]:
    """The recipe whose options these are, whatever their settings (None if there is none), and each group's option.
    `recorded`: what environment.json says was chosen; runs of older versions have none, and are told by their
    settings."""
    if recorded:
        choices = {group: _recorded(group, config, recorded.get(group)) for group in GROUPS}
        recipe = recorded.get("recipe")
        chosen = _recipes().get(str(recipe), {})
        swapped = [group for group in chosen if chosen[group] != recorded.get(group)]
        return (None if swapped else recipe), choices
    near: list[tuple[str | None, dict[str, Choice]]] = []
    for recipe, chosen in _recipes().items():
        choices = {group: choice(group, config, chosen.get(group)) for group in GROUPS}
        if all(choices[group].name == chosen.get(group) for group in {*RECIPE, *chosen}):
            near.append((recipe, choices))
    none_near = (None, {group: choice(group, config) for group in GROUPS})

    def far(pair: tuple[str | None, dict[str, Choice]]) -> tuple[int, int]:
        """Settings that depart; of recipes alike in that, the one that chooses most comes first."""
        departures = sum(len(pair[1][group].departures) for group in RECIPE)
        return departures, -len(_recipes()[str(pair[0])])

    return min(near, key=far, default=none_near)


def model_names(config: Mapping[str, Any]) -> set[str]:
    """What the run's model may be called: its own name, and the options that load the same checkpoint."""
    node = config["model"]
    return {str(node.get("name"))} | {n for n, o in options("model").items() if o.get("path") == node.get("path")}


def follows(one: Described, recipe: str, but: Collection[str]) -> bool:
    """Whether the run has the recipe's options, but perhaps for those of some groups."""
    chosen = _recipes().get(recipe, {})
    near = chosen and all(one.choices[group].name == name for group, name in chosen.items() if group not in but)
    return one.recipe == recipe or bool(but and near)


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"


def describe(runs: Sequence[Run]) -> list[Described]:
    """The runs, each told from the others."""
    contexts = _contexts(runs)
    by_context = grouped(range(len(runs)), lambda index: contexts[index])
    described = {}
    for context, members in by_context.items():
        described |= dict(zip(members, _describe(context, [runs[index] for index in members]), strict=True))
    return [described[index] for index in range(len(runs))]


def _contexts(runs: Sequence[Run]) -> list[str]:
    """The model of each run: its name, and what else tells it from another of that name."""
    nodes = [settings({"model": run.config["model"]}) | _device(run) | _weights(run) for run in runs]
    names = [_short(str(run.config["model"].get("name"))) for run in runs]
    keys = {
        name: [key for key in differing([nodes[number] for number in same]) if key not in HOW]
        for name, same in grouped(range(len(runs)), lambda number: names[number]).items()
    }
    return [
        " ".join([name, *(f"{key.removeprefix('model.')}={node.get(key)}" for key in keys[name])])
        for node, name in zip(nodes, names, strict=True)
    ]


def _short(name: str) -> str:
    """A folder's own name; an id on the hub as it is."""
    return PurePath(name).name if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name


def _device(run: Run) -> dict[str, str]:
    """What kind it is: which of a machine's GPUs is no other model."""
    device = run.config["model"].get("device")
    return {} if device is None else {"model.device": str(device).partition(":")[0]}


def _weights(run: Run) -> dict[str, str]:
    """The fingerprint of the weights: one path may have held several models."""
    files = run.environment["model"].get("files", {})
    hashes = [str(file.get("sha256"))[:8] for name, file in sorted(files.items()) if name.endswith(".safetensors")]
    return {"model.weights": "+".join(hashes[:2])} if hashes else {}


def _describe(context: str, runs: Sequence[Run]) -> list[Described]:
    made_of = [choices_of(run.config, run.environment.get("choices")) for run in runs]
    recipes, choices = [recipe for recipe, _ in made_of], [of_run for _, of_run in made_of]
    flat = []  # what may tell methods apart: not the model, the ratio, the seeds, or how the result is evaluated
    for run in runs:
        whole = settings({key: run.config[key] for key in GROUPS if key in run.config})
        flat.append({key: value for key, value in whole.items() if key != RATIO and not _is_seed(key)})
    heads, by_recipe = _heads(choices, recipes), _by_recipe(choices, recipes)
    extra = _extra([tuple(one.name for one in of_run.values()) for of_run in choices], flat)
    keys = list(dict.fromkeys(key for of_run in extra for key in of_run))
    lasts = [key.rpartition(".")[2] for key in keys]
    short = {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)}
    several = {key for head in heads for key in head if len({other.get(key) for other in heads}) > 1}
    ratios = [float(run.flat.get(RATIO) or 0.0) for run in runs]
    drawn = {key for key in differing([run.flat for run in runs]) if _is_seed(key)}
    described = []
    for run, recipe, of_run, head, near, own, ratio in zip(
        runs, recipes, choices, heads, by_recipe, extra, ratios, strict=True
    ):
        # Which figures are of a quantised model is always said.
        head = {k: value for k, value in head.items() if k in several or (k == "quantise" and value != "none")}
        factors = head | {key: str(own.get(key, "-")) for key in keys}
        if len(set(ratios)) > 1:
            factors[RATIO] = f"{ratio:g}"
        parts = [_word(key, value) for key, value in head.items() if key in ("recipe", *RECIPE)]
        rest = {key: value for key, value in head.items() if key in REST and not _goes_without(recipe, key, value)}
        base = near or parts or ([] if recipe is None else [recipe])
        if not base and not own:  # parts that all runs share tell nothing beside settings that differ
            base = [_word(group, of_run[group].name) for group in RECIPE]
        named = rest | {short[key]: value for key, value in own.items()}
        method = " ".join([*base, *(f"{key}={value}" for key, value in named.items())])
        seeds = sorted(key for key in run.flat if _is_seed(key) and not key.startswith("evaluator."))
        seed = tuple((key, run.flat[key]) for key in seeds)
        shown = own | {key: value for key, value in seed if key in drawn}
        described.append(Described(run, recipe, of_run, context, method, ratio, seed, factors, shown))
    return described


def _word(group: str, name: str) -> str:
    return f"{group}=none" if name == "none" else name


def _goes_without(recipe: str | None, group: str, name: str) -> bool:
    """Whether the recipe's name implies the choice: the recipe makes it, or it is none and the recipe makes no
    other."""
    return recipe is not None and name == _recipes().get(recipe, {}).get(group, "none")


def _heads(choices: Sequence[Mapping[str, Choice]], recipes: Sequence[str | None]) -> list[dict[str, str]]:
    """The option names that tell methods apart: the recipe's, where every run has one and the runs are not just a
    crossing of its parts; else those of each group."""
    parts = _parts(choices)
    several = sum(len(set(place)) > 1 for place in zip(*parts, strict=True)) > 1
    by_recipe = None not in recipes and not (crossed(parts) and several)
    heads = []
    for of_run, recipe in zip(choices, recipes, strict=True):
        names = {"recipe": str(recipe)} if by_recipe else {group: of_run[group].name for group in RECIPE}
        heads.append(names | {group: of_run[group].name for group in REST})
    return heads


def _by_recipe(choices: Sequence[Mapping[str, Choice]], recipes: Sequence[str | None]) -> list[list[str]]:
    """Names of runs by recipes, where runs with a recipe lie beside runs without. A run is named by its own recipe,
    else by one of the others that it departs from in one group, with its choice there: "flap search=greedy". Another
    criterion is another method. Empty for a run that is near to none, and for all runs where their parts are just a
    crossing."""
    parts = _parts(choices)
    beside = [] if crossed(parts) else sorted({recipe for recipe in recipes if recipe is not None})
    words = []
    for names, own in zip(parts, recipes, strict=True):
        of_run = set(zip(RECIPE, names, strict=True))
        swaps = {recipe: of_run - set(_recipes().get(recipe, {}).items()) for recipe in beside}
        near = [[recipe, f"{group}={name}"] for recipe, swap in swaps.items() if len(swap) == 1 for group, name in swap]
        near = [pair for pair in near if not pair[1].startswith("criterion=")]
        words.append([own] if own in beside else next(iter(near), []))
    return words


def _parts(choices: Sequence[Mapping[str, Choice]]) -> list[tuple[str, ...]]:
    return [tuple(of_run[group].name for group in RECIPE) for of_run in choices]


def _extra(names: Sequence[tuple[str, ...]], flat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings in which each run differs from runs of the same options."""
    of_names = grouped(zip(names, flat, strict=True), lambda pair: pair[0])
    keys = {name: differing([setting for _, setting in same]) for name, same in of_names.items()}
    return [{key: setting.get(key) for key in keys[name]} for name, setting in zip(names, flat, strict=True)]


def departures(described: Described) -> dict[str, Any]:
    """Settings of the run that are not its options' defaults, by full key."""
    return {f"{group}.{key}": value for group in GROUPS for key, value in described.choices[group].departures.items()}
