"""Tasks of lm-eval, the evaluation harness, on a model in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import metadata
from statistics import fmean
from typing import Any

from pruneexp.dataset import bos_token
from pruneexp.evaluator.harness import Answered, Loaded, answer, begins, identified, load_tasks
from pruneexp.evaluator.task_files import TaskRows, check_known, read_task
from pruneexp.types import ConfigError, Measured, require_least

PUBLISHED = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@dataclass(frozen=True)
class Zeroshot:
    """lm-eval's tasks, run by lm-eval in this process: its prompts, its tokenisation, its scores.

    - `tasks`: names of lm-eval's tasks, groups or tags
    - `num_fewshot`: worked examples before each question; None: what a task's definition says, 0 where it says nothing
    - `limit`: only the first so many items of each task
    - `data`: folder of the tasks' original files (`task_files.TASKS`), for work without a network; None: the data sets
      that the definitions name, on the hub or in its cache
    - `bos`: every prompt begins with the beginning-of-sequence token; else with what the tokenizer adds by itself

    Named "<metric>/<task>@<n>shot", then "+bos", and "[<items>]" where that is not the whole split:
    "acc_norm/piqa@0shot[100]".
    Answers that are filtered in several ways end in "/<filter>". `acc` takes the choice with the highest
    log-likelihood, `acc_norm` that with the highest per character.

    Of the seven tasks that papers report, all asked for, two means: "acc/mean7@0shot", of `acc`, and
    "acc_norm_or_acc/mean7@0shot", of `acc_norm` where a task has it and `acc` where it has none (boolq, winogrande).
    """

    tasks: list[str]
    num_fewshot: int | None
    limit: int | None
    batch_size: int
    data: str | None
    bos: bool

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks={list(self.tasks)!r}: expected one task or more, each once")
        require_least(self, 0, "num_fewshot", besides=", or null")
        require_least(self, 1, "limit", besides=", or null")
        require_least(self, 1, "batch_size")
        if self.data is not None:
            check_known(self.tasks)

    def check(self) -> None:
        """Reads the local files. Raises ConfigError."""
        _ = self._rows

    def prepare(self, tokenizer: Any, vocabulary: int) -> None:
        """Loads the tasks, so that unknown names and data that cannot be had are found before weights load."""
        if tokenizer is None:
            raise ConfigError("evaluator.zeroshot: needs a tokenizer and the model has none")
        if self.bos:
            bos_token(tokenizer, "evaluator.zeroshot.bos")
        _ = self._loaded

    def __call__(self, model: Any, tokenizer: Any) -> Measured:
        """The figures, and a file of what every item scored."""
        answers: dict[str, Answered] = {}
        for loaded in self._loaded.tasks:
            answers |= answer(model, loaded, self.num_fewshot, self.limit, self.batch_size, self.bos)
        figures = {
            self._name(metric, task, answered): value
            for task, answered in answers.items()
            for metric, value in answered.figures.items()
        }
        record = {
            "lm_eval": metadata.version("lm_eval"),
            "batch_size": self.batch_size,
            "bos": self.bos,
            "tasks": {task: self._record(task, answered) for task, answered in answers.items()},
        }
        return Measured({**figures, **self._means(answers)}, {"json": json.dumps(record, default=_plain) + "\n"})

    def lacks_bos(self, tokenizer: Any, token: int) -> bool:
        """Whether prompts begin with another token."""
        return not self.bos and not begins(tokenizer)

    def measured_on(self, tokenizer: Any) -> str | None:
        """Fingerprint of the tokenizer, and of the local files or else of the definitions and data sets as lm-eval has
        loaded them; None where one of these cannot be told."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        files = {task: dict(rows.sources) for task, rows in self._rows.items()}
        inputs = files if self.data is not None else self._loaded.identified
        if inputs is None or backend is None:
            return None
        return _digest([(metadata.version("lm_eval"), inputs, backend.to_str(), self.bos)])

    @cached_property
    def _rows(self) -> dict[str, TaskRows]:
        if self.data is None:
            return {}
        return {task: read_task(self.data, task, self.num_fewshot or 0) for task in self.tasks}

    @cached_property
    def _loaded(self) -> _LoadedTasks:
        sources = _digest([(task, rows.sources) for task, rows in self._rows.items()])
        return _load_once(_TaskRequest(tuple(self.tasks), self.num_fewshot, self.limit, sources, self._rows))

    def _partial(self, task: str, answered: Answered) -> bool:
        rows = self._rows.get(task)
        return not answered.complete or (rows is not None and not rows.complete)

    def _name(self, metric: str, task: str, answered: Answered) -> str:
        metric, _, chosen = metric.partition(",")
        count = f"[{answered.items}]" if self._partial(task, answered) else ""
        return f"{metric}/{task}@{answered.shots}shot{self._begun}{count}{'/' if chosen else ''}{chosen}"

    @property
    def _begun(self) -> str:
        return "+bos" if self.bos else ""

    def _means(self, answers: Mapping[str, Answered]) -> dict[str, float]:
        if not set(PUBLISHED) <= set(self.tasks):
            return {}
        seven = {task: answers[task] for task in PUBLISHED}
        partial = any(self._partial(task, answered) for task, answered in seven.items())
        count = f"[{sum(answered.items for answered in seven.values())}]" if partial else ""
        protocol = f"/mean7@{seven['boolq'].shots}shot{self._begun}{count}"
        figures = [answered.figures for answered in seven.values()]
        return {
            f"acc{protocol}": fmean(each["acc"] for each in figures),
            f"acc_norm_or_acc{protocol}": fmean(each.get("acc_norm", each["acc"]) for each in figures),
        }

    def _record(self, task: str, answered: Answered) -> dict[str, Any]:
        rows = self._rows.get(task)
        return {
            "version": answered.version,
            "data": answered.data if rows is None else dict(rows.sources),
            "num_fewshot": answered.shots,
            "items": answered.items,
            "requests_sha256": _digest(answered.requests),
            "figures": dict(answered.figures),
            "standard_errors": {metric: _standard_error(scores) for metric, scores in answered.scores.items()},
            "scores": {metric: list(scores) for metric, scores in answered.scores.items()},
        }


@dataclass(frozen=True)
class _TaskRequest:
    """Tasks and how they are asked: equal where a run after another in this process would ask the same."""

    tasks: tuple[str, ...]
    num_fewshot: int | None
    limit: int | None
    sources: str  # digest of the local files
    rows: Mapping[str, TaskRows] = field(compare=False, repr=False)


@dataclass(frozen=True)
class _LoadedTasks:
    tasks: list[Loaded]
    identified: list[Any] | None  # before they are asked, which sets the number of examples in their definitions


@lru_cache(maxsize=1)
def _load_once(request: _TaskRequest) -> _LoadedTasks:
    """The tasks, loaded once for the jobs of a sweep: seconds, and on the hub a request for each data set."""
    loaded = load_tasks(request.tasks, request.rows)
    return _LoadedTasks(loaded, identified(loaded))


def _digest(requests: Sequence[tuple[Any, ...]]) -> str:
    """A hash of every context and continuation: two runs that agree in it were asked the same."""
    return hashlib.sha256(json.dumps(requests, default=str).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has in place of an item's score: the harness gives NumPy's numbers and arrays where a metric is of all
    items together (F1, MCC, Brier score)."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _standard_error(scores: Sequence[Any]) -> float | None:
    """The standard error of the mean of the items' scores; None where they are not numbers, or too few."""
    if len(scores) < 2 or not all(isinstance(score, (int, float)) for score in scores):
        return None
    mean = fmean(scores)
    return math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))
