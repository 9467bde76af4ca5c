"""Our figures beside the published ones: what is of the same model, method, ratio and metric, and how far the protocols
differ. Published figures stay apart: no mean and no line of ours contains one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pruneexp.report.methods import Described, Runs, departures, follows, model_names
from pruneexp.report.points import SHARE, by_seed, distinct
from pruneexp.report.published import Published, Table
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
    aspects: Sequence[Aspect]


def comparisons(runs: Runs, tables: Sequence[Table]) -> list[Comparison]:
    """Every published figure that some of the runs reproduce, by model and ratio."""
    figures = [figure for table in tables for figure in table.figures]
    groups: dict[tuple[int, str, str, float], list[Described]] = {}
    for one in runs:
        matched = [(number, figure) for number, figure in enumerate(figures) if matches(one, figure)]
        for number, figure in matched:
            # Figures of two ratios never share a run: the nearest has it.
            ratios = [f.ratio for _, f in matched if f.metric == figure.metric and (f.ratio > 0) == (figure.ratio > 0)]
            if figure.ratio == min(ratios, key=lambda ratio: (abs(ratio - one.ratio), ratio)):
                # The dense model is the same one under every method.
                method, ratio = (one.method, one.ratio) if figure.ratio else ("dense", 0.0)
                groups.setdefault((number, one.context, method, ratio), []).append(one)
    in_order = sorted(groups.items(), key=lambda item: item[0][0])  # as the tables have them; stable
    compared = [_compared(figures[number], method, members) for (number, _, method, _), members in in_order]
    return sorted(compared, key=lambda one: (one.published.model, one.published.ratio, one.published.metric))


def matches(one: Described, figure: Published) -> bool:
    """Whether the run is what the figure is of: same model and metric; for a pruned model also the same recipe, ratio
    of parameters (to 0.005: LLM-Pruner's 20 % are 20.3 %), recovery and settings that make the method, and nothing
    quantised."""
    if figure.model not in model_names(one.run.config) or measured(one, figure) is None:
        return False
    pinned = {key.partition(".")[0] for key in figure.settings}  # these settings tell the option, in place of a recipe
    return figure.ratio == 0 or (
        any(follows(one, recipe, pinned) for recipe in figure.recipes)
        and abs(one.ratio - figure.ratio) <= NOMINAL
        and one.run.flat.get("sparsity.of") in ("decoder", "prunable")
        and one.choices["recovery"].name == figure.recovery
        and one.choices["quantise"].name == "none"
        and all(one.run.flat.get(key) == value for key, value in figure.settings.items())
    )


def measured(one: Described, figure: Published) -> float | None:
    """The run's own figure, as metrics.json has it. For a mean over tasks, it is our mean over the same tasks, each
    scored as in the paper. None where the run did not measure it."""
    side = "pruned" if figure.ratio else "dense"
    keys = [f"{side}/{metric}" for metric in figure.mean_of or (figure.metric,)]
    return fmean(one.run.metrics[key] for key in keys) if set(keys) <= set(one.run.metrics) else None


def _compared(figure: Published, method: str, members: Sequence[Described]) -> Comparison:
    values = [value for one in members if (value := measured(one, figure)) is not None]
    if not figure.ratio:  # one dense model is one figure, however many runs measured it
        values = distinct(values)
    seeds = [one.seed for one in members] if figure.ratio else range(len(values))
    if figure.unit == "perplexity":
        log = interval(by_seed([math.log(value) for value in values], seeds))
        mean = math.exp(log.mean)
        ours = Interval(mean, None if log.half is None else mean * math.expm1(log.half), log.n)
    else:
        ours = interval(by_seed([100 * value if figure.unit == "percent" else value for value in values], seeds))
    share = fmean(one.run.metrics.get(SHARE, 0.0) if figure.ratio else 0.0 for one in members)
    within = abs(ours.mean - figure.value) <= figure.tolerance
    ratio = members[0].ratio if figure.ratio else 0.0
    return Comparison(figure, tuple(members), method, ours, ratio, share, within, _aspects(figure, members[0]))


def _aspects(figure: Published, one: Described) -> list[Aspect]:
    config, protocol = one.run.config, figure.protocol
    evaluator, aspects = _evaluator(config, figure.metric), []
    if evaluator:
        data = evaluator.get("dataset") or {}
        length, join = figure.metric.rpartition("@")[2], data.get("evaluation_join")
        window = protocol.get("window") or (int(length) if length.isdecimal() else None)
        joined = None if join is None else f"documents joined by {join!r}".replace("'", '"')
        bos = "beginning-of-sequence token before each window"
        aspects += _aspect("window, tokens", window, evaluator.get("length") or data.get("length"))
        aspects += _aspect(bos, protocol.get("bos"), evaluator["bos"])
        aspects += _text("split", protocol.get("split"), data.get("evaluation_split"))
        aspects += _text("text", protocol.get("text"), joined)
        if limit := data.get("evaluation_windows"):
            aspects.append(Aspect("windows", NOT_STATED, f"the first {limit} at most", None))
    elif figure.unit == "percent":
        version = one.run.environment["versions"].get("lm_eval")
        score = f"mean of {', '.join(figure.mean_of)}" if figure.mean_of else figure.metric.partition("/")[0]
        aspects += _text("harness", protocol.get("harness"), f"lm_eval {version}" if version else None)
        aspects += _text("score", protocol.get("score"), score)
    if figure.ratio:
        theirs, data = figure.calibration or {}, config.get("dataset") or {}
        aspects += _aspect("calibration data", theirs.get("dataset"), one.choices["dataset"].name)
        aspects += _aspect("calibration windows", theirs.get("samples"), data.get("samples"))
        aspects += _aspect("their length, tokens", theirs.get("length"), data.get("length"))
        share = f"{one.ratio:g} of {config.get('sparsity', {}).get('of')}; {one.run.metrics.get(SHARE, 0):.4f} left"
        aspects.append(Aspect("share removed", f"{figure.ratio:g}, nominal", share, None))
        set_apart = ", ".join(f"{key}={value}" for key, value in departures(one).items() if "dataset." not in key)
        if set_apart:
            aspects.append(Aspect("settings that are not the recipe's", "-", set_apart, True))
    aspects += _text("checkpoint", protocol.get("checkpoint"), config["model"].get("path"))
    aspects += _text("hardware", protocol.get("hardware"), None)
    read = f"{figure.source.read_in} ({figure.certainty.replace('_', ' ')})"
    remarks = [("note", protocol.get("note")), ("note", figure.note), ("paper", figure.source.paper), ("read in", read)]
    remarks.append(("found by others", figure.reproduced_by))
    return aspects + [Aspect(what, str(text), "", None) for what, text in remarks if text]


def _aspect(what: str, published: Any, ours: Any) -> list[Aspect]:
    differs = None if published is None or ours is None else published != ours
    return [Aspect(what, _word(published), _word(ours), differs)]


def _text(what: str, published: Any, ours: Any) -> list[Aspect]:
    """Free text on one side, which a reader compares; nothing where there is none on either."""
    return [] if published is None and ours is None else [Aspect(what, _word(published), _word(ours), None)]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NOT_STATED if value is None else str(value)


def _evaluator(config: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    """The evaluator that measured a perplexity; {} for another metric."""
    name, _, length = metric.removeprefix("ppl/").partition("@")
    for node in (config.get("evaluator") or {}).values():
        data = node.get("dataset") if isinstance(node, Mapping) else None
        if isinstance(data, Mapping) and metric.startswith("ppl/") and data.get("name") == name:
            if str(node.get("length") or data.get("length")) == length:
                return node
    return {}


def unpublished(runs: Runs, tables: Sequence[Table]) -> list[str]:
    """A line for every model, and every recipe, of which no figure is known."""
    figures = [figure for table in tables for figure in table.figures]
    models = {figure.model for figure in figures}
    recipes = {recipe for figure in figures for recipe in figure.recipes}
    unknown = dict.fromkeys(one.context for one in runs if not models & model_names(one.run.config))
    lines = [f"No published figure is known of {', '.join(unknown)}."] if unknown else []
    for recipe in dict.fromkeys(one.recipe for one in runs):
        if recipe is not None and recipe not in recipes:
            about = [table for table in tables if recipe in table.recipes]
            why = "; ".join(f"{table.source.paper}: {table.missing or table.title}" for table in about)
            lines.append(f"No published figure is known of recipe {recipe}{f' ({why})' if why else ''}.")
            for claim in (claim for table in about for claim in table.claims):
                value = "" if claim.value is None else f": {claim.value:g} {claim.unit}"
                lines.append(f"The paper's claim: {claim.what}{value} ({claim.certainty.replace('_', ' ')}).")
    return lines
