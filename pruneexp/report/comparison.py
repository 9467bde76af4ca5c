"""Our figures beside the published ones: what is of the same model, method, ratio and metric, and how far the protocols
differ. Published figures stay apart: no mean and no line of ours contains one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pruneexp.report.methods import Described, departures, model_names
from pruneexp.report.points import SHARE, by_seed, distinct
from pruneexp.report.published import Claim, Published, Table
from pruneexp.report.statistics import Interval, interval

NOMINAL = 0.005 + 1e-9  # between the ratio that a paper prints and the one that a run asked for
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Aspect:
    """One part of a protocol, in words, theirs beside ours. `differs` is None where one of them cannot be told."""

    what: str
    published: str
    ours: str
    differs: bool | None


@dataclass(frozen=True)
class Comparison:
    """A published figure beside ours (a mean over seeds, in its unit; of perplexities, exp of the mean logarithm)."""

    published: Published
    runs: tuple[Described, ...]
    method: str
    ours: Interval
    ratio: float  # that our runs asked for
    share: float  # that left
    within: bool
    aspects: tuple[Aspect, ...]


def comparisons(runs: Sequence[Described], tables: Sequence[Table]) -> list[Comparison]:
    """Every published figure that some of the runs reproduce, by model and ratio."""
    figures = [figure for table in tables for figure in table.figures]
    groups: dict[tuple[int, str, str, float], list[Described]] = {}
    for one in runs:
        matched = [(number, figure) for number, figure in enumerate(figures) if matches(one, figure)]
        for number, figure in matched:
            if figure.ratio == 0:  # the dense model is the same one under every method
                groups.setdefault((number, one.context, "dense", 0.0), []).append(one)
            elif figure.ratio == _nearest(one.ratio, [f for _, f in matched if _key(f) == _key(figure)]):
                groups.setdefault((number, one.context, one.method, one.ratio), []).append(one)
    ordered = sorted(groups.items(), key=lambda item: item[0][0])  # as the tables have them; stable
    found = [_compared(figures[number], method, members) for (number, _, method, _), members in ordered]
    return sorted(found, key=lambda one: (one.published.model, one.published.ratio, one.published.metric))


def _nearest(asked: float, figures: Sequence[Published]) -> float:
    """The one ratio of these figures that a run is held against: figures of two ratios never share a run."""
    return min((figure.ratio for figure in figures), key=lambda ratio: (abs(ratio - asked), ratio))


def _key(figure: Published) -> str:
    return f"{'pruned' if figure.ratio else 'dense'}/{figure.metric}"


def matches(one: Described, figure: Published) -> bool:
    """Same model and metric; where the figure is of a pruned model, same recipe, ratio (as it is printed: LLM-Pruner's
    20 % are 20.3 %), recovery and such settings as make the method."""
    if figure.model not in model_names(one.run.config) or measured(one, figure) is None:
        return False
    if figure.ratio == 0:
        return True
    return (
        one.recipe in figure.recipes
        and abs(one.ratio - figure.ratio) <= NOMINAL
        and one.choices["recovery"].name == figure.recovery
        and all(one.run.flat.get(key) == value for key, value in figure.settings.items())
    )


def measured(one: Described, figure: Published) -> float | None:
    """Ours, as metrics.json has it; of a mean over tasks the mean of ours on the same tasks, each scored as the paper
    scores it. None where the run did not measure it."""
    side = "pruned" if figure.ratio else "dense"
    values = [one.run.metrics.get(f"{side}/{metric}") for metric in figure.mean_of or (figure.metric,)]
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _compared(figure: Published, method: str, members: Sequence[Described]) -> Comparison:
    values = [value for one in members if (value := measured(one, figure)) is not None]
    if not figure.ratio:  # one dense model is one figure, however many runs measured it
        values = distinct(values)
    seeds = [one.seed for one in members] if figure.ratio else range(len(values))
    if figure.unit == "perplexity":
        log = interval(by_seed([math.log(value) for value in values], seeds))
        mean = math.exp(log.mean)
        half = None if log.half is None else mean * math.expm1(log.half)
        ours = Interval(mean, half, log.n)
    else:
        ours = interval(by_seed([100 * value if figure.unit == "percent" else value for value in values], seeds))
    shares = [one.run.metrics.get(SHARE, 0.0) if figure.ratio else 0.0 for one in members]
    within = abs(ours.mean - figure.value) <= figure.tolerance
    asked = members[0].ratio if figure.ratio else 0.0
    aspects = tuple(_aspects(figure, members[0]))
    return Comparison(figure, tuple(members), method, ours, asked, fmean(shares), within, aspects)


def _aspects(figure: Published, one: Described) -> list[Aspect]:
    config, protocol = one.run.config, figure.protocol
    found = []
    evaluator = _evaluator(config, figure.metric)
    if evaluator:
        data = evaluator.get("dataset") or {}
        window = evaluator.get("length") or data.get("length")
        found.append(_aspect("window, tokens", protocol.get("window") or _window(figure.metric), window))
        found.append(_aspect("beginning-of-sequence token before each window", protocol.get("bos"), evaluator["bos"]))
        found.append(_told("split", protocol.get("split"), data.get("evaluation_split")))
        found.append(_told("text", protocol.get("text"), _join(data)))
        if limit := data.get("evaluation_windows"):
            found.append(Aspect("windows", NOT_STATED, f"the first {limit} at most", None))
    elif figure.unit == "percent":
        found.append(_told("harness", protocol.get("harness"), _harness(one)))
        found.append(_told("score", protocol.get("score"), _scores(figure)))
    if figure.ratio:
        found += _calibration(figure, one)
        asked = f"{one.ratio:g} of {config.get('sparsity', {}).get('of')}; {one.run.metrics.get(SHARE, 0):.4f} left"
        found.append(Aspect("share removed", f"{figure.ratio:g}, nominal", asked, None))
        set_apart = ", ".join(f"{key}={value}" for key, value in departures(one).items() if "dataset." not in key)
        if set_apart:
            found.append(Aspect("settings that are not the recipe's", "-", set_apart, True))
    found.append(_told("checkpoint", protocol.get("checkpoint"), config["model"].get("path")))
    found.append(_told("hardware", protocol.get("hardware"), None))
    notes = [str(text) for text in (protocol.get("note"), figure.note) if text]
    found += [Aspect("note", text, "", None) for text in notes]
    read = f"{figure.source.read_in} ({figure.certainty.replace('_', ' ')})"
    found += [Aspect("paper", figure.source.paper, "", None), Aspect("read in", read, "", None)]
    return [aspect for aspect in found if aspect.published or aspect.ours]


def _aspect(what: str, published: Any, ours: Any) -> Aspect:
    differs = None if published is None or ours is None else published != ours
    return Aspect(what, _word(published), _word(ours), differs)


def _told(what: str, published: Any, ours: Any) -> Aspect:
    """Free text on one side: a reader compares."""
    if published is None and ours is None:
        return Aspect(what, "", "", None)
    return Aspect(what, _word(published), _word(ours), None)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NOT_STATED if value is None else str(value)


def _window(metric: str) -> int | None:
    length = metric.rpartition("@")[2]
    return int(length) if length.isdecimal() else None


def _evaluator(config: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    """The evaluator that measured a perplexity; {} for another metric."""
    name, _, length = metric.removeprefix("ppl/").partition("@")
    for node in (config.get("evaluator") or {}).values():
        data = node.get("dataset") if isinstance(node, Mapping) else None
        if isinstance(data, Mapping) and metric.startswith("ppl/") and data.get("name") == name:
            if str(node.get("length") or data.get("length")) == length:
                return node
    return {}


def _join(data: Mapping[str, Any]) -> str | None:
    join = data.get("evaluation_join")
    return None if join is None else f"documents joined by {join!r}".replace("'", '"')


def _scores(figure: Published) -> str:
    """What ours is: "acc", or "mean of acc/boolq@0shot, acc_norm/hellaswag@0shot"."""
    return f"mean of {', '.join(figure.mean_of)}" if figure.mean_of else figure.metric.partition("/")[0]


def _harness(one: Described) -> str | None:
    version = one.run.environment["versions"].get("lm_eval")
    return f"lm_eval {version}" if version else None


def _calibration(figure: Published, one: Described) -> list[Aspect]:
    theirs, data = figure.calibration or {}, one.run.config.get("dataset") or {}
    ours = {"dataset": one.choices["dataset"].name, "samples": data.get("samples"), "length": data.get("length")}
    names = {"dataset": "calibration data", "samples": "calibration windows", "length": "their length, tokens"}
    return [_aspect(what, theirs.get(key), ours[key]) for key, what in names.items()]


def unpublished(runs: Sequence[Described], tables: Sequence[Table]) -> list[str]:
    """A line for every model, and every recipe, of which no figure is known."""
    figures = [figure for table in tables for figure in table.figures]
    models = {figure.model for figure in figures}
    recipes = {recipe for figure in figures for recipe in figure.recipes}
    lines = []
    unknown = {one.context: None for one in runs if not models & model_names(one.run.config)}
    if unknown:
        lines.append(f"No published figure is known of {', '.join(unknown)}.")
    for recipe in dict.fromkeys(one.recipe for one in runs):
        if recipe is not None and recipe not in recipes:
            about = [table for table in tables if recipe in table.recipes]
            why = "; ".join(f"{table.source.paper}: {table.missing or table.title}" for table in about)
            lines.append(f"No published figure is known of recipe {recipe}{f' ({why})' if why else ''}.")
            lines += [_claimed(claim) for table in about for claim in table.claims]
    return lines


def _claimed(claim: Claim) -> str:
    value = "" if claim.value is None else f": {claim.value:g} {claim.unit}"
    return f"The paper's claim: {claim.what}{value} ({claim.certainty.replace('_', ' ')})."
