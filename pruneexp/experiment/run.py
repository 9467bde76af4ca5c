"""A run, from a composed experiment to a pruned model and, where one is wanted, a finished run folder.

tokens -> calibrate -> score -> search -> compensate + shrink -> recover -> quantise -> evaluate -> track
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import torch

from pruneexp.calibrate import DenseStates
from pruneexp.dataset import forget_documents
from pruneexp.experiment.augmented import augment
from pruneexp.experiment.bos_probe import tell_of_bos
from pruneexp.experiment.card import Card
from pruneexp.experiment.deliver import card_of, deliver, finish_folder, prepare_delivery
from pruneexp.experiment.failures import failures_recorded
from pruneexp.experiment.identity import dense_identity, identify
from pruneexp.experiment.latency import timing_of
from pruneexp.experiment.measure import bos_worth, dense_figures, measure
from pruneexp.experiment.preflight import Inputs, prepare, tell_forecast, warn
from pruneexp.experiment.quantised import card_line, measure_quantised
from pruneexp.experiment.recovered import recover
from pruneexp.experiment.settings import Experiment
from pruneexp.experiment.shares import counted, share_gone, shares_gone
from pruneexp.experiment.summary_table import print_summary, summary_line
from pruneexp.fingerprint import comparable
from pruneexp.model import Model
from pruneexp.model.half import widened
from pruneexp.pruning.dense_evidence import Results
from pruneexp.pruning.record import Record
from pruneexp.pruning.rounds import prune_in_rounds_
from pruneexp.recovery import Adapter
from pruneexp.tracker import LocalRun, Trackers, memory_metrics, reset_peak_memory, run_folder
from pruneexp.types import Plan, RunRecord


@dataclass(frozen=True)
class Outcome:
    """What a run gives: its metrics and, of one that was no forecast, the plan and the pruned model. `folder`: None
    where nothing was written."""

    metrics: dict[str, float]
    plan: Plan | None = None
    model: Model | None = None
    card: Card | None = None  # of the model, without figures
    folder: Path | None = None
    adapter: Adapter | None = None  # on the model, where it is not merged


def run_experiment(experiment: Experiment, shared: DenseStates | None = None, *, recorded: bool = True) -> Outcome:
    """Runs it; the run folder records how it ended (`recorded` false: there is none). `shared`: hidden states that runs
    one after the other have in common.

    Raises ConfigError or RunError, one line each, for what the user can mend; both are in status.json by then.
    """
    reset_peak_memory()  # a process may run several
    inputs = prepare(experiment, shared)
    forget_documents()  # their windows are made
    experiment = inputs.experiment
    if experiment.run.dry:
        return Outcome(tell_forecast(experiment, inputs))
    settings, job = experiment.run, experiment.job
    folder = run_folder(settings.folder, job["recipe"], settings.name, datetime.now()) if recorded else None
    local = LocalRun(settings.overwrite)
    trackers = Trackers((local, experiment.tracker) if recorded else ())
    with failures_recorded(trackers, folder):
        if folder is not None:
            kind = "job" if job["sweep"] else "run"
            trackers.start(RunRecord(folder, experiment.config, job["sweep"], settings.name, kind, job))
        with experiment.model.on_a_device() as source, widened(inputs.outline.dtype):
            held = replace(experiment, model=source)
            warn(held, inputs)
            outcome = _pruned(held, inputs, folder, local, trackers, shared)
            trackers.finish(outcome.metrics)
            if job["sweep"]:  # before another job takes its device
                outcome = replace(outcome, model=None)
    if job["sweep"]:
        print(f"  {summary_line(comparable(outcome.metrics, experiment.config))}", flush=True)
    elif folder is not None and outcome.plan is not None:
        print_summary(outcome.metrics, outcome.plan, inputs.outline.sites(), folder)
    return outcome


def _pruned(
    experiment: Experiment,
    inputs: Inputs,
    folder: Path | None,
    local: LocalRun,
    trackers: Trackers,
    shared: DenseStates | None,
) -> Outcome:
    """The run once everything that it takes is at hand: the steps of the module's docstring."""
    torch.manual_seed(experiment.seed)
    record = Record(rng=torch.Generator().manual_seed(experiment.seed))
    with record.clock("load"):
        model = experiment.model.load(inputs.tokenizer)
    with record.clock("latency") if experiment.sparsity.of == "latency" else nullcontext():
        timing = timing_of(experiment, model, inputs.table)
    evaluate = partial(measure, experiment.evaluators, model, folder, trackers)
    weights, basis = dense_identity(experiment, model, recorded=folder is not None)
    tokens_NT = augment(experiment, model, inputs.tokens_NT, basis, record)
    known = identify(experiment, weights, tokens_NT)
    if folder is not None:
        local.environment(weights, known.data)
    tell_of_bos(experiment, model, inputs.tokens_NT, partial(bos_worth, experiment.cache, basis))
    with record.clock("evaluate_dense"):
        figures, dense = evaluate("dense", partial(dense_figures, experiment.cache, basis, model))
        record.metrics |= figures
    quantise = partial(measure_quantised, experiment, basis, model, record, trackers)
    quantise("dense", None)
    before, origin = counted(experiment, model), list(model.origin)
    record.results = Results(experiment.cache, {**basis, "tokens": known.tokens}, shared)
    delivery, record.notes = prepare_delivery(experiment, model, folder, tokens_NT, known.run)
    if delivery.streamed is not None:
        record.shrunk = delivery.streamed.layer
    pruned = prune_in_rounds_(model, tokens_NT, experiment.method, record)
    trackers.artifacts(pruned.plan, pruned.scores, pruned.sites)
    if timing is not None:
        timing.write(folder, pruned, origin)
    adapter = recover(experiment, model, tokens_NT, record)
    card = card_of(experiment, model, pruned, adapter is not None)
    card = replace(card, quantised=card_line(experiment.quantise, rounded=True))
    with record.clock("save"):
        record.metrics |= deliver(delivery, model, adapter, experiment.model.path)
    if timing is not None:  # before weights are rounded: the dense layers are not
        with record.clock("latency"):
            record.metrics |= timing.figures(model, share_gone(before, counted(experiment, model)))
    quantise("pruned", folder if experiment.run.save else None)
    try:
        with record.clock("evaluate_pruned"):
            record.metrics |= evaluate("pruned", dense=dense)[0]
    finally:
        delivery.clear()
    record.metrics |= shares_gone(experiment, record.metrics, before, counted(experiment, model))
    record.metrics |= {"passes/forward": record.meter.forward, "passes/backward": record.meter.backward}
    record.metrics |= memory_metrics(model.devices)
    if folder is not None:
        unrounded = card_line(experiment.quantise, rounded=False)  # its checkpoint was written before
        own_card = replace(card, metrics=record.metrics, quantised=unrounded)
        finish_folder(folder, own_card, experiment, pruned)
    return Outcome(record.metrics, pruned.plan, model, card, folder, adapter)
