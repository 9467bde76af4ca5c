"""What no part of an experiment can know alone: methods that do not go together."""

from __future__ import annotations

from pruneexp import types
from pruneexp.conf_files import typed_keys, typed_value
from pruneexp.experiment.settings import Experiment
from pruneexp.pruning.budget import check_precision
from pruneexp.search import KIND, scored_as
from pruneexp.types import ConfigError

JUDGED = ("attention", "mlp", "sublayer", "block")


def check_together(experiment: Experiment) -> None:
    """What no part can know alone. Raises ConfigError."""
    check_members(experiment.criterion, experiment.search, experiment.compensator)
    _check_granularity(experiment)
    _check_sequential(experiment)
    _check_rounds(experiment)
    check_precision(experiment.model.dtype, experiment.criterion, experiment.job["choices"])
    _check_quantity(experiment)
    if experiment.model.stream:
        if experiment.sparsity.of == "latency":
            raise ConfigError(
                "sparsity.of='latency': with model.stream=true, times are those of a disk; expected another quantity, "
                "or model.stream=false"
            )
        _check_streamed(experiment)
    if experiment.quantise.applies and not experiment.recovery.merge:
        chosen = experiment.job["choices"]["quantise"]
        raise ConfigError(
            f"recovery.merge=False: quantise={chosen} rounds the weights, and what was trained is beside them; "
            "expected recovery.merge=true, or quantise=none"
        )


def check_members(criterion: types.Criterion, search: types.Search, compensator: types.Compensator) -> None:
    """Raises ConfigError where a member has a value that its protocol does not allow. Settings are checked by their
    annotations, but members of a class are not."""
    granularity, judges, share = search.granularity, criterion.judges, search.held_out
    named = isinstance(granularity, (list, tuple)) and granularity and all(name in KIND for name in granularity)
    whats = isinstance(judges, (list, tuple, set, frozenset)) and set(judges) <= set(JUDGED)
    of_windows = isinstance(share, (int, float)) and 0 <= share < 1
    for key, value, holds, expected in (
        (
            "criterion.sequential",
            criterion.sequential,
            criterion.sequential in (True, False, types.ALWAYS),
            "True, False or 'always'",
        ),
        ("criterion.judges", judges, whats, f"a tuple of {', '.join(JUDGED)}"),
        ("search.granularity", granularity, named, f"a list of {', '.join(KIND)}"),
        ("search.held_out", share, of_windows, "a share of the windows, in [0, 1)"),
        ("search.objective", search.objective, search.objective in ("next_token", "kl"), "next_token or kl"),
    ):
        if not holds:
            raise ConfigError(f"{key}={value!r}: expected {expected}")
    for group, part in (("criterion", criterion), ("compensator", compensator)):
        try:
            types.evidence_kinds(part.evidence)
        except ConfigError as error:
            raise ConfigError(f"{group}.evidence: {error}") from None


def _check_streamed(experiment: Experiment) -> None:
    """Raises ConfigError where a part needs more than one layer of the model at a time."""
    sources = [types.source_of(kind) for kind in types.evidence_kinds(experiment.criterion.evidence)]
    differentiates, probes = any(s.differentiates for s in sources), any(s.probes for s in sources)
    backward, losses = "needs backward passes through the whole model", "measures the loss of many structures"
    trains = "trains what a streamed run has written by then" if experiment.recovery.layerwise else backward
    held = [name for name, each in experiment.evaluators.items() if not each.streams]
    for refused, group, why, instead in (
        (differentiates, "criterion", backward, "a criterion that only needs forward passes"),
        (probes, "criterion", losses, "a criterion that goes layer by layer"),
        (experiment.search.probes, "search", losses, "a search that goes by scores"),
        (experiment.recovery.trains, "recovery", trains, "recovery=none"),
        (experiment.quantise.applies, "quantise", "changes what a streamed run has written by then", "quantise=none"),
        (experiment.augmentation.added(1, 1), "augmentation", "writes token by token", "augmentation=none"),
        (held, "evaluator", "needs the whole model in memory", "only evaluators that can stream"),
    ):
        if refused:
            chosen = ",".join(held) if refused is held else experiment.job["choices"][group]
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
        typed = "search.granularity" in typed_keys(experiment.job["overrides"])
        own = f" search.granularity={list(granularity)!r}" if typed else ""
        raise ConfigError(
            f"criterion={criterion} scores whole layers, which search={search}{own} does not remove; "
            "expected search=blocks, sublayers or greedy as they are, or a criterion of heads and channels"
        )
    unscored = [name for name in granularity if scored_as([name], judges) is None]
    if "granularity" not in experiment.config["search"]:
        raise ConfigError(
            f"criterion={criterion} has no scores of {', '.join(unscored)}, which search={search} removes; "
            "expected a criterion of heads and channels, or another search"
        )
    raise ConfigError(
        f"search.granularity={list(granularity)!r}: criterion={criterion} has no scores of {', '.join(unscored)}, "
        f"which search={search} removes; expected a criterion of heads and channels, or search.granularity without them"
    )


def _check_sequential(experiment: Experiment) -> None:
    """Raises ConfigError where a search over all layers cannot go by scores as they were asked for. `true` is for
    searches that decide layer by layer. It is refused where it was typed or belongs to an object from Python, but not
    where it is merely the default of a criterion's choice."""
    search, criterion = experiment.search, experiment.criterion
    chosen, instead = experiment.job["choices"]["search"], "expected false"
    if search.local or criterion.evidence is None:
        return
    typed = typed_value(experiment.job["overrides"], "criterion.sequential") or ""
    wanted = typed.lower() == "true" or "given" in experiment.config["criterion"]
    if criterion.sequential is True and wanted:
        raise ConfigError(
            f"criterion.sequential=True: search={chosen} decides over all layers at once; {instead}, always (scores "
            "behind masked layers), or a search that decides layer by layer"
        )
    if criterion.sequential != types.ALWAYS:
        return
    if not set(search.granularity) <= {"heads", "channels"}:
        why = f"search.granularity={list(search.granularity)!r} has more than the heads and channels that are masked"
    elif search.held_out:
        why = f"search.held_out={search.held_out!r} scores part of the windows, and all of them once it has decided"
    elif len(types.collected_by("walk", kinds := types.evidence_kinds(criterion.evidence))) < len(kinds):
        why = f"criterion={experiment.job['choices']['criterion']} looks at the whole model at once"
    else:
        return
    raise ConfigError(f"criterion.sequential='always': {why}; {instead}")


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
    if not {"heads", "attention", "blocks"} & set(granularity):
        raise ConfigError(
            f"search.granularity={list(granularity)!r}: expected heads, attention or blocks with "
            "sparsity.of=kv_cache, which nothing else fills"
        )
