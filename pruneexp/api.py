"""The door for Python: what the command does, on models that are in memory too, with results as objects."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pruneexp.types import ConfigError, Plan, RunError

__all__ = ["ConfigError", "Plan", "Result", "RunError", "apply", "prune", "run"]

PARTS = ("criterion", "search", "compensator")  # groups for which Python may give an object
_ONE_AT_A_TIME = threading.RLock()  # Hydra, logging and random numbers are the process's


@dataclass(frozen=True, repr=False)
class Result:
    """What a run gives. `model`: the pruned one, in evaluation mode; None where it was streamed, forecast, or a job of
    a sweep. `metrics`: flat, as metrics.json has them. `folder`: the run's; None where nothing was written."""

    model: Any
    tokenizer: Any
    plan: Plan | None
    metrics: Mapping[str, float]
    folder: Path | None
    _outcome: Any = None

    def __repr__(self) -> str:
        """One line; the plan alone would take pages."""
        share = self.metrics.get("sparsity/decoder")
        what = "a forecast" if share is None else f"{share:.1%} of the decoder removed"
        left = self.metrics.get("pruned/params")
        params = "" if left is None else f", {left:,.0f} parameters left"
        return f"Result({what}{params}, folder={None if self.folder is None else str(self.folder)!r})"

    def save(self, folder: str | Path) -> Path:
        """Writes what a run has in model/ to a new folder, so that
        `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it. Raises ConfigError."""
        from pruneexp.experiment.deliver import save_checkpoint

        outcome = self._outcome
        if self.model is None or outcome is None:
            raise ConfigError(f"save({str(folder)!r}): this result holds no model; expected one of a run in memory")
        if any(tensor.is_meta for tensor in self.model.parameters()):
            raise ConfigError(f"save({str(folder)!r}): has weights on the meta device; expected all in memory")
        if any(type(tensor).__module__.startswith("torchao") for tensor in self.model.parameters()):
            raise ConfigError(f"save({str(folder)!r}): has weights in torchao's form; expected quantise.kernels=false")
        target = _folder(folder)
        held = outcome.model
        held.dtype = next((p.dtype for p in held.layers.parameters()), held.dtype)  # it may have been cast since
        card = replace(outcome.card, metrics=outcome.metrics)
        save_checkpoint(held, outcome.plan, outcome.adapter, card, target)
        return target


def run(overrides: Sequence[str], config_dir: str | None = None) -> Any:
    """What `pruneexp OVERRIDES` does: a Result, or for `--multirun` and sweeps one for each job, without models.

    Raises ConfigError where the command would end with exit code 2, RunError where with 1, and where another process is
    running one of a sweep's jobs.
    """
    from pruneexp.cli.compose import open_hydra
    from pruneexp.cli.single import asked_for_one, single_experiment
    from pruneexp.cli.sweep import multirun
    from pruneexp.experiment.run import run_experiment

    overrides = _texts(overrides)
    typed = [text for text in overrides if text not in ("-m", "--multirun")]
    if options := [text for text in typed if text.startswith("-")]:
        expected = "expected --multirun alone; a folder of configs of your own is run([...], config_dir='DIR')"
        raise ConfigError(f"{options[0]}: an option of the command; {expected}")
    with _undisturbed():
        hydra = open_hydra(config_dir)
        config = asked_for_one(hydra, typed, len(typed) < len(overrides))
        if config is not None:
            return _result(run_experiment(single_experiment(hydra, config)))
        ended = multirun(hydra, typed)
    if ended.failed:
        raise RunError(f"sweep in {ended.folder}: failed: {', '.join(ended.failed)}")
    if ended.elsewhere:
        left = ", ".join(ended.elsewhere)
        raise RunError(f"sweep in {ended.folder}: left to the processes that run them: {left}; run it again afterwards")
    forecasts = {job: Result(None, None, None, metrics, None) for job, metrics in ended.forecasts.items()}
    return [forecasts.get(job) or _read(job) for job in ended.jobs]


def prune(
    model: Any,
    tokenizer: Any,
    tokens: Any,
    recipe: str = "flap",
    ratio: float = 0.2,
    overrides: Sequence[str] = (),
    folder: str | Path | None = None,
    in_place: bool = False,
    **parts: Any,
) -> Result:
    """Prunes a model that is in memory by what it computes for `tokens`, integers [N, T], used exactly as they are.

    `model`: a transformers PreTrainedModel in evaluation mode. It stays as it was, and the Result has another one,
    whose parameters require gradients where its own do; with `in_place` it is itself pruned. `overrides`: as for `run`,
    after the recipe ("search.effort=10"); the evaluator is `size` unless they say otherwise, the cache off. `folder`:
    where a run folder is written; None: nothing is. `parts`: a criterion, search or compensator as an object, in place
    of the recipe's.

    Raises ConfigError for what cannot work, before anything is changed, and RunError for a run that failed."""
    from pruneexp.cli.given import given_experiment
    from pruneexp.experiment.run import run_experiment

    for name in parts:
        if name not in PARTS:
            raise ConfigError(f"{name}={parts[name]!r}: unknown; expected one of {', '.join(PARTS)}")
    if not isinstance(recipe, str):
        raise ConfigError(f"recipe={recipe!r}: expected a recipe's name; settings are overrides=['search.effort=10']")
    with _undisturbed(), _flags_kept(model) as flags:
        typed = [f"recipe={recipe}", f"sparsity.ratio={ratio}", *_texts(overrides)]
        where = None if folder is None else _folder(folder)
        experiment = given_experiment((model, tokenizer, tokens), typed, where, in_place, parts)
        return _result(run_experiment(experiment, recorded=folder is not None), flags)


def apply(model: Any, plan: Plan | str | Path, folder: str | Path | None = None) -> Any:
    """Another model with the structure of `plan` (a Plan, or a plan.json) and the weights of `model`, without
    calibrating: nothing is compensated. `folder`: a new one, where its checkpoint is written, without a tokenizer;
    None: nothing is. Raises ConfigError for a plan of another model."""
    from pruneexp.experiment.deliver import check_new_folder, save_checkpoint
    from pruneexp.model.given import GivenModel
    from pruneexp.surgery import check_plan, shrink_

    with _undisturbed(), _flags_kept(model) as flags:
        read = plan if isinstance(plan, Plan) else _plan(_path(plan, "plan", "a Plan, or the path of a plan.json"))
        given = GivenModel(model, None, 1, in_place=False)
        given.check()
        check_plan(given.outline(), read)
        target = None if folder is None else _folder(folder)
        if target is not None:
            check_new_folder(target)
        copied = given.load()
        shrink_(copied, read)
        if target is not None:
            save_checkpoint(copied, read, None, None, target)
        return _handed_out(copied, flags)


def _result(outcome: Any, flags: Mapping[str, bool] | None = None) -> Result:
    """`flags`: as `_handed_out` takes them."""
    model = outcome.model
    if model is None or model.streamed:
        return Result(None, None if model is None else model.tokenizer, outcome.plan, outcome.metrics, outcome.folder)
    module = _handed_out(model, flags or {})
    return Result(module, model.tokenizer, outcome.plan, outcome.metrics, outcome.folder, outcome)


def _handed_out(model: Any, flags: Mapping[str, bool]) -> Any:
    """The module of a pruned model, in evaluation mode. `flags`: which parameters of the original model required
    gradients. A parameter without a counterpart there (a new bias, a split expert) requires them where any did."""
    from pruneexp.surgery.forms import fits_config

    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(flags.get(_original_name(model, name), any(flags.values())))
    if not fits_config(model):
        model.module.save_pretrained = _not_saved
    return model.module.eval()


def _original_name(model: Any, name: str) -> str:
    """The parameter's name before layers were removed."""
    prefix = f"{model.layers_path}."
    if not name.startswith(prefix):
        return name
    index, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{model.origin[int(index)]}.{rest}"


def _not_saved(folder: Any, *args: Any, **kwargs: Any) -> None:
    """Replaces a pruned model's `save_pretrained`, which would write a checkpoint that cannot be loaded."""
    raise ConfigError(
        f"save_pretrained({str(folder)!r}): its config cannot say its widths; expected Result.save(folder), or "
        "pruneexp.apply(model, plan, folder)"
    )


def _texts(overrides: Any) -> list[str]:
    if isinstance(overrides, (str, bytes, Mapping)) or not isinstance(overrides, Iterable):
        raise ConfigError(f"overrides={overrides!r}: expected a list, ['recipe=flap', 'sparsity.ratio=0.2']")
    return [str(text) for text in overrides]


def _folder(given: Any) -> Path:
    return _path(given, "folder", "the path of a folder")


def _path(given: Any, what: str, expected: str) -> Path:
    try:
        path = Path(given).expanduser()
        if given == "" or "\0" in str(path):
            raise TypeError
        return path
    except (TypeError, RuntimeError):  # no path, or none that can be named; a home that is not known
        raise ConfigError(f"{what}={given!r}: expected {expected}") from None


def _read(folder: Path) -> Result:
    """The Result of a sweep's job, from its folder."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return Result(None, None, _plan(folder / "plan.json"), metrics, folder)


def _plan(file: Path) -> Plan:
    try:
        return Plan.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"plan={str(file)!r}: {error.strerror or error}; expected a plan.json") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"plan={str(file)!r}: no plan ({type(error).__name__}: {error})") from None


@contextmanager
def _flags_kept(model: Any) -> Iterator[dict[str, bool]]:
    """Which parameters of a model require gradients, by name. The flags are restored where the code inside fails."""
    flags = {name: parameter.requires_grad for name, parameter in _parameters(model)}
    try:
        yield flags
    except BaseException:
        for name, parameter in _parameters(model):  # asked for anew: held, those that are pruned in place would stay
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))
        raise


def _parameters(model: Any) -> Iterator[tuple[str, Any]]:
    from torch import nn

    return model.named_parameters() if isinstance(model, nn.Module) else iter(())


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Runs one call at a time, outside the caller's autocast and inference mode. Afterwards Hydra, random numbers and
    transformers' messages are as the caller had them."""
    import numpy
    import torch
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton

    with _ONE_AT_A_TIME:
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        instances, drawn, numpys = Singleton._instances, random.getstate(), numpy.random.get_state()
        ours = {kind: one for kind, one in instances.items() if kind is not GlobalHydra}  # whose Hydra holds the world
        messages = sys.modules.get("transformers.utils.logging")
        said = None if messages is None else (messages.get_verbosity(), messages.is_progress_bar_enabled())
        try:
            plain = (torch.inference_mode(False), *(torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda")))
            with ExitStack() as contexts:
                for context in (*plain, torch.random.fork_rng(list(gpus))):
                    contexts.enter_context(context)
                Singleton._instances = {k: one if k is Plugins else deepcopy(one) for k, one in ours.items()}
                yield
        finally:
            Singleton._instances = instances
            random.setstate(drawn)
            numpy.random.set_state(numpys)
            if messages is not None and said is not None:
                messages.set_verbosity(said[0])
                (messages.enable_progress_bar if said[1] else messages.disable_progress_bar)()
