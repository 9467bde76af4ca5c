"""What lm-eval, the evaluation harness, is asked: its tasks by name, and a model's answers to them.

Importing this loads neither the harness nor the libraries that it brings along; calling it does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from pruneexp.conf_files import did_you_mean
from pruneexp.dataset.offline import hub
from pruneexp.evaluator.harness_world import SEEDS, quiet, seeded
from pruneexp.evaluator.task_files import TASKS, TaskRows
from pruneexp.progress import waiting
from pruneexp.types import ConfigError, RunError, one_line

TASKS_KEY = "evaluator.zeroshot.tasks"


@dataclass(frozen=True)
class Loaded:
    """A name that was asked for, as the harness knows it: one task, or a group or tag of several."""

    name: str
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    members: Mapping[str, Sequence[str]]  # names that each group holds


@dataclass(frozen=True)
class Answered:
    """What a model achieved on one task, or on a group of tasks (which has no scores of its own)."""

    shots: int
    items: int  # that were answered
    complete: bool  # these are all items that the task evaluates
    figures: Mapping[str, float]  # "acc" -> share; "exact_match,strict-match" where answers are filtered
    scores: Mapping[str, Sequence[float]]  # of each item, by the same names
    requests: Sequence[tuple[Any, ...]]  # (context, continuation), all items' choices in order
    log_likelihoods: Sequence[float]  # of each request; empty where the model writes its answers
    version: Any  # of the task's definition
    data: str  # what the definition reads


def load_tasks(names: Sequence[str], rows: Mapping[str, TaskRows]) -> list[Loaded]:
    """The tasks called `names`, each on its local `rows` where there are any, else on its data set on the hub.

    Raises:
        ConfigError: a name that the harness does not know, or a task that cannot be run here.
        RunError: neither the hub nor its cache has a task's data.
    """
    import lm_eval.tasks

    asks_hub = any(name not in rows for name in names)
    with (
        hub() if asks_hub else nullcontext("") as unreachable,
        quiet(),
        seeded(),
        waiting("loading the evaluation tasks"),
    ):
        root = lm_eval.tasks.__path__[0]
        known = [f"{root}/{TASKS[name].definition}" for name in names if name in TASKS]
        # Indexing every definition takes seconds; a few folders of them do not.
        whole = len(known) < len(names)
        manager = lm_eval.tasks.TaskManager(include_path=None if whole else sorted(set(known)), include_defaults=whole)
        for name in names:
            if name not in manager.all_tasks:
                expected = f"expected its tasks, groups or tags{did_you_mean(name, manager.all_tasks)}"
                raise ConfigError(f"{TASKS_KEY}: lm-eval has no task {name!r}; {expected}")
        return [_loaded(manager, name, rows.get(name), unreachable) for name in names]


def _loaded(manager: Any, name: str, rows: TaskRows | None, unreachable: str) -> Loaded:
    # A task inside a group of one is how the harness lets a definition's settings be replaced.
    spec: Any = name if rows is None else {"group": f"local_{name}", "task": [{"task": name, **_replaced(rows)}]}
    try:
        loaded = manager.load(spec)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # the hub's client raises OSError, ValueError, RuntimeError, its http library's own
        reason = unreachable or one_line(f"{type(error).__name__}: {error}")
        offline = "offline, evaluator.zeroshot.data=FOLDER reads local files"
        raise RunError(f"{TASKS_KEY}: {name}'s data cannot be loaded ({reason}); {offline}") from error
    if rows is not None:
        loaded = {"tasks": loaded["tasks"], "groups": {}, "group_map": {}}
    for task in loaded["tasks"].values():
        unfit = [what for what in ("UNSAFE_CODE", "MULTIMODAL") if getattr(task, what, False)]
        if unfit:
            does = "runs code that the model writes" if unfit == ["UNSAFE_CODE"] else "needs more than text"
            raise ConfigError(f"{TASKS_KEY}: {task.task_name} {does}; expected tasks of text alone")
    return Loaded(name, loaded["tasks"], loaded["groups"], loaded["group_map"])


def _replaced(rows: TaskRows) -> dict[str, Any]:
    import datasets

    splits = {name: datasets.Dataset.from_list([dict(row) for row in split]) for name, split in rows.splits.items()}
    any_split = next(iter(splits.values()))
    # A definition reads its examples' split even where none is asked for.
    filled = datasets.DatasetDict({"train": any_split.select([]), **splits})
    return {"custom_dataset": lambda **_: filled}


def identified(loaded: Sequence[Loaded]) -> list[Any] | None:
    """What the harness will ask and how it will score that, for as long as its version is the same: each task's
    definition with the source of its functions, the fingerprints that `datasets` gives its splits, the groups'
    definitions. None where a split has no fingerprint."""
    identities: list[Any] = []
    for each in loaded:
        for name, task in each.tasks.items():
            splits = task.dataset if isinstance(task.dataset, Mapping) else {}
            prints = {split: getattr(rows, "_fingerprint", None) for split, rows in splits.items()}
            if not prints or None in prints.values():
                return None
            identities.append([name, task.VERSION, type(task).__qualname__, task.dump_config(), prints])
        for name, group in each.groups.items():
            identities.append([name, group.version, group.aggregate_metric_list, each.members.get(name)])
    return identities


def answer(
    model: Any, loaded: Loaded, shots: int | None, limit: int | None, batch_size: int, bos: bool
) -> dict[str, Answered]:
    """The model's answers to the first `limit` items of every task of `loaded`, by the names of tasks and groups.

    The harness runs them: its prompts, its tokenisation, its scores, its seeds. `shots`: None for each task's own.
    `bos`: prompts begin with the beginning-of-sequence token, once; False: with what the tokenizer adds by itself.

    Raises RunError where a log-likelihood is not a number.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models import huggingface

    for task in loaded.tasks.values():
        own = task.get_config("num_fewshot")
        # As the harness does: a definition that says 0 cannot have examples.
        task.set_config(key="num_fewshot", value=own or 0 if shots is None or own == 0 else shots)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    with quiet(), seeded(model.devices), waiting(f"evaluating {loaded.name}"):
        # A copy: the harness gives a tokenizer without a padding token one, which must not be saved with the model.
        tokenizer = copy.deepcopy(model.tokenizer)
        if bos and not begins(tokenizer):  # the harness asks the tokenizer to begin its texts so, by this setting
            tokenizer.add_bos_token = True
        wrapper: Any = huggingface.HFLM  # its decorator hides its parameters from type checkers
        lm = wrapper(
            pretrained=model.module,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            add_bos_token=bos or None,
        )
        if bos:
            lm.loglikelihood_rolling = _begun_once(lm, lm.loglikelihood_rolling)
        evaluation: Any = evaluate(
            lm=lm,
            task_dict={"tasks": loaded.tasks, "groups": loaded.groups, "group_map": loaded.members},  # type: ignore
            limit=limit,
            bootstrap_iters=0,  # its standard errors cost a pool of processes
        )
        # Inside: even to ask a task for its name draws a random number.
        answered = {name: _answered(task, evaluation) for name, task in loaded.tasks.items()}
        return answered | {name: _aggregated(group, evaluation, answered) for name, group in loaded.groups.items()}


def begins(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with its beginning-of-sequence token by itself."""
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _begun_once(lm: Any, rolling: Callable[..., list[float]]) -> Callable[..., list[float]]:
    """The likelihood of whole texts, in front of which the harness puts that token by itself."""

    def begun(*args: Any, **kwargs: Any) -> list[float]:
        lm.add_bos_token = False
        try:
            return rolling(*args, **kwargs)
        finally:
            lm.add_bos_token = True

    return begun


def _answered(task: Any, evaluation: Mapping[str, Any]) -> Answered:
    name = task.task_name
    counts = evaluation["n-samples"][name]
    scores: dict[str, list[float]] = {}
    requests, nats = [], []
    for sample in evaluation["samples"][name]:
        for metric in sample["metrics"]:
            scores.setdefault(_named(metric, sample["filter"]), []).append(sample[metric])
        if sample["filter"] == evaluation["samples"][name][0]["filter"]:  # each filter repeats the same requests
            requests += [tuple(request) for request in sample["arguments"]]
            if task.OUTPUT_TYPE != "generate_until":
                nats += [_likelihood(answers[0]) for answers in sample["resps"]]
    if any(math.isnan(value) for value in nats):
        broken = next(i for i, value in enumerate(nats) if math.isnan(value))
        raise RunError(f"evaluator.zeroshot: {name}: the model's log-likelihood of request {broken} is not a number")
    return Answered(
        shots=evaluation["n-shot"][name],
        items=counts["effective"],
        complete=counts["effective"] == counts["original"],
        figures=_figures(evaluation["results"][name]),
        scores=scores,
        requests=requests,
        log_likelihoods=nats,
        version=evaluation["versions"][name],
        data="local files" if task.config.custom_dataset is not None else f"{task.DATASET_PATH}/{task.DATASET_NAME}",
    )


def _aggregated(group: Any, evaluation: Mapping[str, Any], tasks: Mapping[str, Answered]) -> Answered:
    """A group's own figures (a weighted mean, say), where its definition asks for any."""
    members = [tasks[task.task_name] for task in group.get_all_tasks()]
    return Answered(
        shots=max(member.shots for member in members),
        items=sum(member.items for member in members),
        complete=all(member.complete for member in members),
        figures=_figures(evaluation["results"].get(group.name, {})),
        scores={},
        requests=(),
        log_likelihoods=(),
        version=group.version,
        data="",
    )


def _likelihood(answer: Any) -> float:
    """The log-likelihood in (log-likelihood, greedy), or alone."""
    return float(answer[0] if isinstance(answer, (tuple, list)) else answer)


def _named(metric: str, chosen: str) -> str:
    return metric if chosen == "none" else f"{metric},{chosen}"


def _figures(results: Mapping[str, Any]) -> dict[str, float]:
    """{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": ...} -> {"acc": 0.5}."""
    split = {key: key.rsplit(",", 1) for key, value in results.items() if isinstance(value, (int, float))}
    return {_named(*parts): float(results[key]) for key, parts in split.items() if len(parts) == 2}
