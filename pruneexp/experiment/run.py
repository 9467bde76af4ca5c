"""A run, from a composed experiment to a finished run folder.

tokens -> calibrate -> score -> search -> compensate + shrink -> recover -> evaluate -> track
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneexp.cache import NoCache
from pruneexp.calibrate import DenseStates, Meter
from pruneexp.dataset import fingerprint
from pruneexp.experiment.bos_probe import tell_of_bos
from pruneexp.experiment.card import Card
from pruneexp.experiment.deliver import card_of, deliver, deliver_streamed, write_card
from pruneexp.experiment.forecast import available_memory, out_of_memory, warn_of_files, warn_of_memory
from pruneexp.experiment.preflight import check_disk, foreseen, read_inputs, told, warn_of_few_tokens
from pruneexp.experiment.resume import take_up
from pruneexp.experiment.settings import Experiment
from pruneexp.experiment.summary_table import print_summary, summary_line
from pruneexp.files import write_atomic
from pruneexp.fingerprint import STAGE, code_version, identity, version_of
from pruneexp.model import Model
from pruneexp.progress import waiting
from pruneexp.pruning import Pruned
from pruneexp.pruning.budget import check_mixture, check_pruning, whole_budget
from pruneexp.pruning.dense_evidence import Results
from pruneexp.pruning.notes import Notes
from pruneexp.pruning.rounds import prune_in_rounds_
from pruneexp.surgery import BlockProof, StreamedSave, check_source, dense_logits
from pruneexp.tracker import NOTES, LocalRun, Trackers, clear_unfinished, memory_metrics, run_folder
from pruneexp.types import (
    ConfigError,
    Evaluator,
    RunError,
    RunRecord,
)

logger = logging.getLogger("pruneexp")

Measured = tuple[dict[str, float], dict[str, str]]  # figures; contents of files by name

WIDE = 0.02  # between the share asked for and the one that left
PROOF_WINDOWS, PROOF_LENGTH = 2, 64  # tokens on which a saved checkpoint is compared


def run_experiment(experiment: Experiment, shared: DenseStates | None = None) -> dict[str, float]:
    """Runs it and returns its metrics; the run folder records how it ended. `shared`: hidden states that runs one after
    the other have in common.

    Raises ConfigError or RunError, one line each, for what the user can mend; both are in status.json by then.
    """
    with waiting("reading the model's config"):
        outline = experiment.model.outline()
    parts = (experiment.criterion, experiment.search, experiment.compensator)
    check_mixture(outline, *parts, experiment.job["choices"])
    budget = check_pruning(outline, experiment.search, experiment.sparsity, experiment.compensator)
    if not experiment.run.dry:
        check_disk(experiment, outline, budget)
    tokenizer, tokens_NT = read_inputs(experiment)
    expected = foreseen(experiment, outline, budget, tokenizer, tokens_NT, shared)
    if experiment.run.dry:
        warn_of_few_tokens(experiment, outline, tokens_NT)
        return told(experiment, outline, budget, tokens_NT, expected)
    settings, job = experiment.run, experiment.job
    folder = run_folder(settings.dir, job["recipe"], settings.name, datetime.now())
    local = LocalRun(settings.overwrite)
    trackers = Trackers((local, experiment.tracker))
    try:
        kind = "job" if job["sweep"] else "run"
        trackers.start(RunRecord(folder, experiment.config, job["sweep"], settings.name, kind, job))
        warn_of_memory(expected, available_memory(*outline.devices))
        warn_of_files(expected)
        warn_of_few_tokens(experiment, outline, tokens_NT)
        return _Run(experiment, folder, local, trackers, shared).execute(tokenizer, tokens_NT)
    except (ConfigError, RunError) as error:
        trackers.fail(str(error))
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        trackers.fail("interrupted" if isinstance(error, KeyboardInterrupt) else "terminated")
        raise
    except Exception as error:
        if where := out_of_memory(error):
            helps = "a smaller model.batch_size or model.stream=true needs less"
            spread = ", model.device=auto less of each" if torch.cuda.device_count() > 1 else ""
            trackers.fail(f"{where}; {helps}{spread}", traceback.format_exc())
            raise RunError(f"{where}; {helps}{spread}") from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        trackers.fail(reason, traceback.format_exc())
        raise RunError(f"{reason} (the traceback is in {folder / 'log.txt'})") from error


class _Run:
    """One run under way: its parts, its clock, its metrics."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        local: LocalRun,
        trackers: Trackers,
        shared: DenseStates | None,
    ):
        self.experiment, self.folder, self.local, self.trackers = experiment, folder, local, trackers
        self.metrics: dict[str, float] = {}
        self.meter = Meter()
        self.dense: dict[str, Any] = {}  # what identifies the dense model and how it is run
        self.results, self.shared = Results(NoCache(), {}), shared
        self.identity = ""  # of what the results depend on
        self.card: Card | None = None  # of the checkpoint, where one is kept

    def execute(self, tokenizer: Any, tokens_NT: Tensor) -> dict[str, float]:
        experiment = self.experiment
        torch.manual_seed(experiment.seed)
        with self.clock("load"):
            model = experiment.model.load(tokenizer)
        self._record_inputs(model, tokens_NT)
        tell_of_bos(experiment, model, tokens_NT, self._worth)
        left_out = sorted(set(experiment.config.get("evaluator") or {}) - set(experiment.evaluators))
        if left_out:
            logger.info("not measured, since the model is streamed: %s", ", ".join(left_out))
        self._measure(model, "dense")
        counted = [self._counted(model)]
        pruned = self._prune(model, tokens_NT)
        try:
            self._measure(model, "pruned")
        finally:
            if model.streamed and not experiment.run.save:
                shutil.rmtree(self.folder / "streamed", ignore_errors=True)
        decoder = [self.metrics[f"{when}/params/decoder"] for when in ("dense", "pruned")]
        total = [self.metrics[f"{when}/params"] for when in ("dense", "pruned")]
        self.metrics |= {"sparsity/decoder": 1 - decoder[1] / decoder[0], "sparsity/model": 1 - total[1] / total[0]}
        if experiment.sparsity.of != "decoder":
            counted.append(self._counted(model))
            self.metrics[f"sparsity/{experiment.sparsity.of}"] = 1 - counted[1] / counted[0] if counted[0] else 0.0
        self._compare_with_asked()
        self.metrics |= {"passes/forward": self.meter.forward, "passes/backward": self.meter.backward}
        self.metrics |= memory_metrics(model.devices)
        if self.card is not None:
            write_card(replace(self.card, metrics=self.metrics), self.folder / "model")
        shutil.rmtree(self.folder / NOTES, ignore_errors=True)
        self.trackers.finish(self.metrics)
        if experiment.job["sweep"]:
            print(f"  {summary_line(self.metrics)}", flush=True)
        else:
            print_summary(self.metrics, pruned.plan, pruned.sites, self.folder)
        return self.metrics

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Adds the time spent inside to seconds/<stage>."""
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"seconds/{stage}"
            self.metrics[key] = self.metrics.get(key, 0.0) + time.perf_counter() - start

    def _compare_with_asked(self) -> None:
        """A word where the share that left is far from the one asked for, which is no error."""
        sparsity = self.experiment.sparsity
        asked, removed = sparsity.ratio, self.metrics[f"sparsity/{sparsity.of}"]
        if abs(removed - asked) > WIDE:
            logger.warning(
                "sparsity.ratio=%g was asked for, %.3f of %s has left: the search rounds in its own way, or by units "
                "that large",
                *(asked, removed, sparsity.of),
            )

    def _counted(self, model: Model) -> int:
        """What the sparsity counts in the model as it stands."""
        return whole_budget(model, self.experiment.search, self.experiment.sparsity, 0.0).total

    def _record_inputs(self, model: Model, tokens_NT: Tensor) -> None:
        """environment.json, and what the cache goes by: the weights, how they are run, the calibration tokens."""
        experiment, tokens = self.experiment, fingerprint(tokens_NT)
        weights = experiment.model.fingerprint()
        data = {**experiment.dataset.description(), "calibration_windows": list(tokens_NT.shape)}
        self.local.environment(weights, {**data, "calibration_tokens_sha256": tokens})
        gpus = sorted({torch.cuda.get_device_name(device) for device in model.devices if device.type == "cuda"})
        run = {"dtype": str(model.dtype), "device": gpus or "cpu", "batch_size": model.batch_size}
        self.dense = {"weights": weights["files"], **run}
        self.results = Results(experiment.cache, {**self.dense, "tokens": tokens}, self.shared)
        method = {
            key: value
            for key, value in experiment.config.items()
            if key not in ("run", "sweep", "cache", "tracker", "asked")
        }
        self.identity = identity(config=method, save=experiment.run.save, weights=weights, tokens=tokens)

    def _measure(self, model: Model, when: str) -> None:
        """Every evaluator's figures, prefixed "dense/" or "pruned/"."""
        found: dict[str, float] = {"params": model.params, "params/decoder": model.decoder_params}
        with self.clock(f"evaluate_{when}"):
            for name, evaluator in self.experiment.evaluators.items():
                known = self._dense_figures if when == "dense" else _figures
                figures, files = known(model, evaluator, name, when)
                found |= figures
                self._keep_samples(files)
        named = {f"{when}/{key}": value for key, value in found.items()}
        self.trackers.log(named)
        self.metrics |= named

    def _dense_figures(self, model: Model, evaluator: Evaluator, name: str, when: str) -> Measured:
        """The dense model's, from the cache where the evaluator says what it measures on."""
        measured_on = getattr(evaluator, "measured_on", lambda tokenizer: None)(model.tokenizer)
        if measured_on is None:
            return _figures(model, evaluator, name, when)
        what = {"evaluator": [name, version_of(evaluator)], "inputs": measured_on}
        code = code_version((*STAGE, "dataset", "evaluator"))
        settings = model.module.generation_config  # what it writes depends on them
        key = {"what": "the dense model's figures", **self.dense, **what, "code": code}
        key |= {} if settings is None else {"generation": settings.to_json_string()}
        with self.experiment.cache.held([key]) as entries:
            found = entries.get(key)
            if found is None:
                found = _figures(model, evaluator, name, when)
                entries.put(key, found)
        return found

    def _worth(self, measured_on: str, measure: Callable[[], float]) -> float:
        """What a beginning-of-sequence token is worth, from the cache."""
        what = {"what": "what a beginning-of-sequence token is worth", "inputs": measured_on}
        key = {**what, **self.dense, "code": code_version((*STAGE, "dataset"))}
        with self.experiment.cache.held([key]) as entries:
            found = entries.get(key)
            if found is None:
                found = measure()
                entries.put(key, found)
        return found

    def _keep_samples(self, files: Mapping[str, str]) -> None:
        """What an evaluator saw of a model, item by item, into samples/."""
        for name, content in files.items():
            path = self.folder / "samples" / name
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, content)

    def _prune(self, model: Model, tokens_NT: Tensor) -> Pruned:
        """Prunes round by round, records the plan, trains where asked to, and writes and proves the checkpoint."""
        experiment = self.experiment
        if not experiment.search.local and experiment.criterion.sequential:
            logger.info("the search decides over all layers at once: scores are those of the dense model")
        probe_BT = tokens_NT[:PROOF_WINDOWS, :PROOF_LENGTH]
        prove = experiment.run.prove if experiment.run.save else "off"
        dense = dense_logits(model, experiment.model, probe_BT, prove)
        streamed, notes = None, Notes(None)
        if model.streamed:
            target = self.folder / ("model" if experiment.run.save else "streamed")
            streamed = StreamedSave(
                model, target, BlockProof(model, probe_BT), keep=take_up(self.folder, self.identity)
            )
            notes = Notes(self.folder / NOTES, streamed)
        else:
            clear_unfinished(self.folder)  # of a streamed run that came before
        pruned = prune_in_rounds_(
            model,
            tokens_NT,
            experiment.method,
            meter=self.meter,
            rng=torch.Generator().manual_seed(experiment.seed),
            shrunk=streamed.layer if streamed is not None else _nothing,
            clock=self.clock,
            results=self.results,
            notes=notes,
        )
        self.trackers.artifacts(pruned.plan, pruned.scores, pruned.sites)
        adapter = None
        if experiment.recovery.trains:
            with self.clock("recover"):
                recovered = experiment.recovery(model, tokens_NT, self.meter, experiment.seed)
            adapter, self.metrics = recovered.adapter, {**self.metrics, **recovered.metrics}
        with self.clock("save"):
            settings = experiment.run
            if settings.save:
                self.card = card_of(experiment.model.path, model, pruned, experiment.job, adapter is not None)
            if streamed is not None:
                self._record_proof(deliver_streamed(streamed, self.folder, prove != "off", str(dense)))
            elif settings.save:
                self._record_proof(deliver(model, self.folder, prove, probe_BT, adapter, dense))
        return pruned

    def _record_proof(self, proof: Mapping[str, Any]) -> None:
        """proof.json, and the difference as a metric. A checkpoint that differs is worth a warning, not a lost run.

        Raises RunError where the dense model was another than its source: so is everything that was measured."""
        write_atomic(self.folder / "proof.json", json.dumps(proof, indent=1) + "\n")
        if "max_logit_difference" in proof:
            self.metrics["proof/max_logit_difference"] = proof["max_logit_difference"]
            if proof["max_logit_difference"] > proof.get("tolerance", 1e-2):
                logger.warning("the reloaded checkpoint's logits differ by up to %g", proof["max_logit_difference"])
        check_source(proof["source"], self.experiment.model.path)


def _figures(model: Model, evaluator: Evaluator, name: str, when: str) -> Measured:
    """What the evaluator measures, and the files that it wants kept, by name."""
    found = evaluator(model, model.tokenizer)
    files = getattr(evaluator, "files", lambda name, when: {})
    return found, dict(files(name, when))


def _nothing(index: int) -> None:
    """A model in memory has nothing to write layer by layer."""
