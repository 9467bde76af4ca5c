"""What is looked at before a run starts: room on the disk, texts and windows, and what the run will take."""

from __future__ import annotations

import logging
import math
import shutil
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneexp.calibrate import DenseStates
from pruneexp.dataset import check_vocabulary, overlap
from pruneexp.experiment import bos_probe
from pruneexp.experiment.forecast import (
    Forecast,
    Passes,
    Running,
    Stage,
    Windows,
    available_memory,
    forecast,
    params_left,
    print_forecast,
    resident_memory,
    warn_of_files,
    warn_of_memory,
)
from pruneexp.experiment.latency import (
    assumed,
    conditions_of,
    given_table,
    of_another_device,
    tell_unsteady,
    with_timing,
    without_table,
)
from pruneexp.experiment.quantised import tell_quantised, warn_of_scratch
from pruneexp.experiment.settings import Experiment
from pruneexp.experiment.unfit import warn_of_coarse_units, warn_of_few_tokens, warn_of_shared_text
from pruneexp.files import existing
from pruneexp.latency import Table
from pruneexp.model import Model
from pruneexp.progress import waiting
from pruneexp.pruning.budget import check_mixture, check_precision, check_pruning, whole_budget
from pruneexp.pruning.query_heads import check_query_heads
from pruneexp.tracker import memory_metrics
from pruneexp.types import Budget, ConfigError, evidence_kinds, size_text

logger = logging.getLogger("pruneexp")


@dataclass(frozen=True)
class Inputs:
    """What a run starts from. `experiment`: as its model settles it; `outline`: the model's structure; `expected`: what
    the run will take."""

    experiment: Experiment
    outline: Model
    budget: Budget
    tokenizer: Any
    tokens_NT: Tensor  # those that are given
    expected: Forecast
    table: Table | None = None  # of a file, that times are counted by


def prepare(experiment: Experiment, shared: DenseStates | None = None) -> Inputs:
    """Everything that can be known before a weight is loaded. `shared`: hidden states that runs one after the other
    have in common. Raises ConfigError."""
    with waiting("reading the model's config"):
        outline = experiment.model.outline()
    experiment = settled(experiment, outline)
    parts = (experiment.criterion, experiment.search, experiment.compensator)
    check_precision(str(outline.dtype).removeprefix("torch."), experiment.criterion, experiment.job["choices"])
    check_mixture(outline, *parts, experiment.job["choices"])
    check_query_heads(outline, *parts[:2], experiment.job["choices"])
    table = given_table(experiment, outline)
    if experiment.sparsity.of == "latency":
        outline = copy(outline)  # another run may have the same one
        outline.times = assumed(outline) if table is None else table.times
    if experiment.sparsity.of == "latency" and table is None:  # whether so much can leave is known once it is measured
        budget = whole_budget(outline, experiment.search, experiment.sparsity, experiment.sparsity.ratio)
    else:
        budget = check_pruning(outline, experiment.search, experiment.sparsity, experiment.compensator)
    experiment.quantise.prepare(outline)
    if not experiment.run.dry and (refused := without_room(experiment, outline, budget)):
        raise ConfigError(refused)
    tokenizer, tokens_NT = read_inputs(experiment)
    expected = forecast_of(experiment, outline, budget, tokenizer, tokens_NT, shared)
    expected = with_timing(experiment, outline, table, expected)
    return Inputs(experiment, outline, budget, tokenizer, tokens_NT, expected, table)


def settled(experiment: Experiment, model: Model) -> Experiment:
    """The experiment, its compensator's `auto` settings decided for this model."""
    settle = experiment.compensator.settled
    if settle is None:
        return experiment
    return replace(experiment, compensator=settle(model.family.adds_up and not model.mixture))


def without_room(experiment: Experiment, model: Model, budget: Budget) -> str | None:
    """What to say where the disk has no room for the pruned checkpoint (a streamed model is always written)."""
    settings = experiment.run
    if not settings.save and not experiment.model.stream:
        return None
    params, _ = params_left(model, experiment.method, budget)
    folder = settings.folder or Path("outputs")
    needed, free = params * model.dtype.itemsize, shutil.disk_usage(existing(folder)).free
    if settings.overwrite:  # an older checkpoint makes room
        free += sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    if free >= needed:
        return None
    without = "" if experiment.model.stream else ", or run.save=false"
    return (
        f"run.dir={settings.dir!r}: the pruned checkpoint takes about {size_text(needed)}, {size_text(free)} are "
        f"free on the disk of {existing(folder).resolve()}; expected a folder on another disk{without}"
    )


def check_room(experiment: Experiment) -> None:
    """Raises ConfigError where the windows that are asked for, int64 [N, T], take more memory than is free. Datasets
    that make any number of windows would find out after hours."""
    dataset = experiment.dataset
    requests = [("dataset.samples", dataset.samples or 0, dataset.length or 0)]
    for name, evaluator in experiment.evaluators.items():
        source = evaluator.dataset
        key = f"{'dataset' if source == dataset else f'evaluator.{name}.dataset'}.evaluation_samples"
        length = evaluator.length or (source and source.length) or 0
        requests.append((key, (source and source.evaluation_samples) or 0, length))
    free = available_memory(torch.device("cpu"))
    for key, samples, length in requests:
        needed = 8 * samples * length
        if needed > free:
            raise ConfigError(
                f"{key}={samples}: so many windows of {length} tokens take {size_text(needed)} of memory, "
                f"{size_text(free)} are free; expected fewer"
            )


def read_inputs(experiment: Experiment) -> tuple[Any, Tensor]:
    """Tokenizer and calibration windows, and every check of texts that needs them, before a weight is loaded."""
    with waiting("loading the tokenizer"):
        model = experiment.model.describe()
    tokenizer, vocabulary, max_length = model.tokenizer, model.vocab_size, model.max_length
    dataset, where = experiment.dataset, experiment.dataset.key("calibration")
    drawn = dataset.length if dataset.samples is not None else None  # else as wide as they come
    if max_length is not None and drawn is not None and drawn > max_length:
        raise ConfigError(f"dataset.length={drawn}: expected at most {max_length}, the model's longest window")
    bos_probe.check_bos(experiment, tokenizer)
    check_room(experiment)
    with waiting("tokenising the calibration text"):
        tokens_NT = dataset.calibration(tokenizer)
    check_vocabulary(tokens_NT, vocabulary, where)
    added = experiment.augmentation.added(*tokens_NT.shape)
    _check_windows(experiment, len(tokens_NT), added)
    if max_length is not None and tokens_NT.shape[1] > max_length:
        wide = f"{where}: windows of {tokens_NT.shape[1]} tokens"
        raise ConfigError(f"{wide}; expected at most {max_length}, the model's longest window")
    experiment.recovery.prepare(model.family, len(tokens_NT) + added)
    for name, evaluator in experiment.evaluators.items():
        with waiting(f"preparing evaluator {name}"):
            evaluator.prepare(tokenizer, vocabulary)
        longest = evaluator.longest(tokenizer)
        if longest is not None and max_length is not None and longest > max_length:
            raise ConfigError(
                f"evaluator.{name}: a prompt and what is written after it take {longest} tokens; "
                f"expected at most {max_length}, the model's longest window"
            )
        windows_NT = evaluator.windows(tokenizer)
        if windows_NT is not None:
            wide = windows_NT.shape[1]
            if model.hard_limit and max_length is not None and wide > max_length:
                raise ConfigError(
                    f"evaluator.{name}.length={wide}: expected at most {max_length}, the model's positions"
                )
            share = overlap(tokens_NT, windows_NT)
            if share:
                logger.warning(
                    "%.0f %% of the windows that %s is measured on share text with the calibration windows",
                    100 * share,
                    evaluator.dataset.name,
                )
    return tokenizer, tokens_NT


def _check_windows(experiment: Experiment, given: int, added: int) -> None:
    """Raises ConfigError where a method wants more calibration windows than there are, with those that are added."""
    dataset, windows = experiment.dataset, given + added
    setting = f"dataset.samples={given}" if dataset.samples is not None else dataset.key("calibration")
    setting += f" and {added} that the model writes" if added else ""
    share = experiment.search.held_out
    held_out = round(share * windows)
    if share and held_out < 2:
        raise ConfigError(
            f"{setting}: {windows} calibration windows, {held_out} of them held out by search.held_out={share}; "
            f"expected at least {math.ceil(2 / share)}, or search.held_out=0"
        )
    for group in ("criterion", "compensator"):
        kinds = evidence_kinds(getattr(experiment, group).evidence)
        there = windows - held_out if group == "criterion" else windows
        least = max((kind.least_windows for kind in kinds), default=0)
        if there < least:
            if there < windows:
                setting = f"{setting}, {held_out} of them held out by search.held_out={share}"
            method, settings = experiment.job["choices"].get(group), experiment.config[group].items()
            autos = " and ".join(f"{group}.{key}" for key, value in settings if value == "auto")
            raise ConfigError(
                f"{setting}: {there} calibration windows; expected at least {least}, since {group}={method} holds some "
                f"out to judge by, or a number for {autos}"
            )


def forecast_of(
    experiment: Experiment,
    model: Model,
    budget: Budget,
    tokenizer: Any,
    tokens_NT: Tensor,
    shared: DenseStates | None = None,
) -> Forecast:
    """What the run will take, as far as it is known now. `shared`: as for `prepare`."""
    settings, measured = experiment.run, []
    to_share = 0 if shared is None or shared.layers else shared.limit  # what is held already is free no more
    for evaluator in experiment.evaluators.values():
        windows_NT = evaluator.windows(tokenizer)
        if windows_NT is not None:
            measured.append(Windows(len(windows_NT), windows_NT.shape[1], evaluator.batch_size))
    windows, length = tokens_NT.shape
    added = experiment.augmentation.added(windows, length)
    seen = Windows(windows + added, length, model.batch_size)
    if tokenizer is not None and not experiment.model.stream:
        measured.append(bos_probe.measured_windows(seen))
    on_gpu = any(device.type == "cuda" for device in model.devices)
    held = 0 if on_gpu else resident_memory()
    reached = 0 if on_gpu else memory_metrics(())["memory/peak_bytes"]
    prove = settings.prove if settings.save else ""
    how = Running(experiment.model.stream, prove, to_share, held, reached)
    expected = forecast(model, experiment.method, experiment.recovery, budget, seen, measured, how)
    if not added:
        return expected
    room = experiment.augmentation.working_bytes(model, windows, length)
    writes = Stage("augment", {"process": held, "weights": expected.shape.bytes, "activations": room})
    return replace(expected, passes=expected.passes + Passes(added / seen.count), held=[writes, *expected.held])


def warn(experiment: Experiment, inputs: Inputs) -> None:
    """A line of the log for each thing that may go wrong."""
    warn_of_memory(inputs.expected, available_memory(*experiment.model.devices))
    warn_of_files(inputs.expected)
    warn_of_scratch(experiment.quantise, inputs.outline)
    warn_of_few_tokens(experiment, inputs.outline, inputs.tokens_NT)
    warn_of_shared_text(experiment, inputs.tokens_NT)
    warn_of_coarse_units(experiment, inputs.outline, inputs.budget)
    left_out = sorted(set(experiment.config.get("evaluator") or {}) - set(experiment.evaluators))
    if left_out:
        logger.info("not measured, since the model is streamed: %s", ", ".join(left_out))
    if not experiment.search.local and experiment.criterion.sequential is True:
        logger.info("the search decides over all layers at once: scores are those of the dense model")


def tell_forecast(experiment: Experiment, inputs: Inputs) -> dict[str, float]:
    """Prints the model's structure, what would leave it and what that would take, from its config alone; as metrics."""
    model, budget, tokens_NT, expected = inputs.outline, inputs.budget, inputs.tokens_NT, inputs.expected
    warn_of_few_tokens(experiment, model, tokens_NT)
    warn_of_shared_text(experiment, tokens_NT)
    warn_of_coarse_units(experiment, model, budget)
    if refused := without_room(experiment, model, budget):  # perhaps not where the run will be
        logger.warning("%s", refused)
    sites, total, decoder = model.sites(), model.params, model.decoder_params
    kinds = {kind: [s for s in sites if s.kind == kind] for kind in ("attention", "mlp")}
    units = ", ".join(f"{sum(s.units for s in own_sites)} {kind} units" for kind, own_sites in kinds.items())
    layers = f"{len(model.layers)} layers, {units}"
    print(f"{experiment.model.name}: {layers}; {total:,} parameters, {decoder:,} in decoder layers")
    added = experiment.augmentation.added(*tokens_NT.shape)
    own = f", and {added} that the model writes" if added else ""
    print(f"calibration: {tokens_NT.shape[0]} windows of {tokens_NT.shape[1]} tokens{own}")
    if experiment.sparsity.of == "latency" and inputs.table is None:
        print(without_table(experiment.sparsity))
    else:
        print(f"to remove: {budget.ratio:.1%} of {budget.total:,} = {round(budget.remove):,} {budget.unit}")
    if inputs.table is not None:
        tell_unsteady(inputs.table)
        if other := of_another_device(inputs.table, conditions_of(model, experiment.sparsity)):
            print(other)
    of_files = tell_quantised(experiment.quantise, model)
    print_forecast(expected, dtype=str(model.dtype).removeprefix("torch."), available=available_memory(*model.devices))
    return expected.metrics() | of_files
