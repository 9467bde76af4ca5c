"""Lines of the log where what was chosen fits the model or the text badly: too few tokens, shared text, large units."""

from __future__ import annotations

import logging

from torch import Tensor

from pruneexp.dataset import overlap
from pruneexp.experiment.settings import Experiment
from pruneexp.model import Model
from pruneexp.pruning.ask import parted
from pruneexp.pruning.budget import refusal, searched_sites
from pruneexp.types import QUERY_HEADS, Budget, evidence_kinds

logger = logging.getLogger("pruneexp")

FITTED = 4  # calibration tokens for each input of an out-projection that is fitted to them, at least
SHARED = 0.1  # of the windows that decide, that may share text with others without a word


def warn_of_few_tokens(experiment: Experiment, model: Model, tokens_NT: Tensor) -> None:
    """A word where weights are fitted to fewer tokens than `FITTED` times the inputs of the widest out-projection."""
    methods = {"criterion": experiment.criterion, "compensator": experiment.compensator}
    fitting = [
        f"{group}={experiment.job['choices'].get(group)}"
        for group, method in methods.items()
        if not method.few_tokens and any(kind.fits for kind in evidence_kinds(method.evidence))
    ]
    sites = searched_sites(model, experiment.search)
    widest = max((s.channels for s in sites if s.kind in ("attention", QUERY_HEADS, "mlp")), default=0)
    windows, length = tokens_NT.shape
    if not fitting or windows * length >= FITTED * widest:
        return
    drawn, enough = experiment.dataset.samples is not None, -(-FITTED * widest // length)
    logger.warning(
        "%s: %d calibration tokens, few for %s, which fits weights to up to %d inputs; %s would do, better more",
        f"dataset.samples={windows}" if drawn else experiment.dataset.key("calibration"),
        *(windows * length, " and ".join(fitting), widest),
        f"dataset.samples={enough}" if drawn else f"{enough} windows",
    )


def warn_of_shared_text(experiment: Experiment, tokens_NT: Tensor) -> None:
    """A word where many of the windows that decide between structures share text with those that are scored on, as
    random windows of a short text do."""
    held_out = experiment.search.held_out
    if not held_out:
        return
    share = overlap(*parted(tokens_NT, held_out, experiment.seed))
    if share > SHARED:
        helps = ["a longer text"]
        if experiment.dataset.samples is not None:
            helps.append("fewer dataset.samples")
        if experiment.config["dataset"].get("sampling") == "random":
            helps.append("dataset.sampling=consecutive")
        logger.warning(
            "%.0f %% of the windows that search.held_out=%g lets decide share text with those that are scored on; %s "
            "would keep them apart",
            *(100 * share, held_out, " or ".join(helps)),
        )


def warn_of_coarse_units(experiment: Experiment, model: Model, budget: Budget) -> None:
    """A word where whole units come to far more or less than their share, as the search says."""
    search, sites = experiment.search, searched_sites(model, experiment.search)
    if refusal(search, sites, budget) is None and (said := search.warning(sites, budget)):  # times may yet allow it
        logger.warning("%s", said)
