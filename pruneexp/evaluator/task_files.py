"""Multiple-choice tasks from the files that their authors gave out, as rows of lm-eval's own task definitions.

A definition reads the fields of one data set on the hub; the authors' files name and nest the same things differently.
The table TASKS says where each task's files lie below a folder, and how one of their rows is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruneexp.conf_files import did_you_mean
from pruneexp.dataset.files import text_of
from pruneexp.files import sha256
from pruneexp.types import ConfigError

KEY = "evaluator.zeroshot.data"


@dataclass(frozen=True)
class Row:
    """One line of a file."""

    values: Mapping[str, Any]
    where: str  # "evaluator.zeroshot.data: folder/piqa/valid.jsonl, line 3"
    label: str | None  # the same line of the labels' file, where a task keeps them apart

    def text(self, path: str) -> str:
        """The text under `path`, "question.stem" being stem inside question. Raises ConfigError."""
        return self._of(path, str, "a text")

    def texts(self, path: str) -> list[str]:
        """The texts of the list under `path`, at least two. Raises ConfigError."""
        texts = self._of(path, list, "a list of texts")
        if len(texts) < 2 or not all(isinstance(each, str) for each in texts):
            raise ConfigError(f"{self.where}: {path}={texts!r}; expected a list of two texts or more")
        return texts

    def choices(self, path: str) -> dict[str, list[str]]:
        """[{"text": ..., "label": ...}, ...] under `path` as {"text": [...], "label": [...]}. Raises ConfigError."""
        choices = self._of(path, list, "a list of choices")
        for index, each in enumerate(choices):
            if not isinstance(each, dict) or not all(isinstance(each.get(key), str) for key in ("text", "label")):
                raise ConfigError(f"{self.where}: {path}[{index}]={each!r}; expected a text and its label")
        return {key: [each[key] for each in choices] for key in ("text", "label")}

    def one_of(self, path: str, known: Collection[Any]) -> Any:
        """The right answer under `path`, which must be one of the `known`. Raises ConfigError."""
        label = self._of(path, object, "the label")
        # True == 1, but a label of another type is a mistake in the file.
        if not any(label == each and type(label) is type(each) for each in known):
            raise ConfigError(f"{self.where}: {path}={label!r}; expected one of {', '.join(map(repr, known))}")
        return label

    def has(self, name: str) -> bool:
        return name in self.values

    def _of(self, path: str, kind: type, what: str) -> Any:
        part: Any = self.values
        for name in path.split("."):
            if not isinstance(part, dict) or name not in part:
                raise ConfigError(f"{self.where}: no field {path!r}; expected {what}")
            part = part[name]
        if not isinstance(part, kind):
            raise ConfigError(f"{self.where}: {path}={part!r}; expected {what}")
        return part


def boolq(row: Row) -> dict[str, Any]:
    """The definition reads SuperGLUE's version, where the passage begins with the article's title."""
    answer = "label" if row.has("label") else "answer"
    title = f"{row.text('title')} -- " if row.has("title") else ""
    passage = title + row.text("passage")
    return {"question": row.text("question"), "passage": passage, "label": int(row.one_of(answer, (False, True)))}


def piqa(row: Row) -> dict[str, Any]:
    if row.label not in ("0", "1"):
        raise ConfigError(f"{row.where}: label {row.label!r} in the labels' file; expected 0 or 1")
    return {**{name: row.text(name) for name in ("goal", "sol1", "sol2")}, "label": int(row.label)}


def hellaswag(row: Row) -> dict[str, Any]:
    """The definition capitalises the second sentence of the context, ctx_b; files with the whole context alone have
    done so."""
    parts = ("ctx_a", "ctx_b") if row.has("ctx_a") else ("ctx",)
    context = [row.text(name) for name in parts] + [""]
    endings = row.texts("endings")
    known = [kind(i) for kind in (int, str) for i in range(len(endings))]
    return {
        "activity_label": row.text("activity_label"),
        "ctx_a": context[0],
        "ctx_b": context[1],
        "endings": endings,
        "label": str(row.one_of("label", known)),
    }


def winogrande(row: Row) -> dict[str, Any]:
    if "_" not in row.text("sentence"):
        raise ConfigError(f"{row.where}: sentence={row.text('sentence')!r}; expected a blank, '_', in it")
    texts = {name: row.text(name) for name in ("sentence", "option1", "option2")}
    return {**texts, "answer": row.one_of("answer", ("1", "2"))}


def arc(row: Row) -> dict[str, Any]:
    choices = row.choices("question.choices")
    answer = row.one_of("answerKey", choices["label"])
    return {"question": row.text("question.stem"), "choices": choices, "answerKey": answer}


def openbookqa(row: Row) -> dict[str, Any]:
    fields = arc(row)
    return {"question_stem": fields.pop("question"), **fields}


def lambada(row: Row) -> dict[str, Any]:
    """The definition splits off the last word; some files have done so."""
    if row.has("text"):
        return {"text": row.text("text")}
    return {"text": f"{row.text('context')} {row.text('continuation')}"}


@dataclass(frozen=True)
class TaskFiles:
    """Where a task's rows are."""

    definition: str  # folder of the task's definition below lm_eval/tasks
    split: str  # that the definition evaluates
    items: int  # rows of that split, complete
    file: str  # of that split; with a * where names differ
    read: Callable[[Row], dict[str, Any]]
    examples: str | None = None  # file of the split "train", which few-shot examples come from
    labels: tuple[str, str] | None = None  # a file's ending, and that of the file with its labels, one a line


TASKS = {
    "boolq": TaskFiles("super_glue/boolq", "validation", 3270, "boolq/dev.jsonl", boolq, "boolq/train.jsonl"),
    "piqa": TaskFiles(
        "piqa", "validation", 1838, "piqa/valid.jsonl", piqa, "piqa/train.jsonl", (".jsonl", "-labels.lst")
    ),
    "hellaswag": TaskFiles(
        "hellaswag",
        "validation",
        10042,
        "hellaswag/hellaswag_val*.jsonl",
        hellaswag,
        "hellaswag/hellaswag_train.jsonl",
    ),
    "winogrande": TaskFiles(
        "winogrande", "validation", 1267, "winogrande/dev.jsonl", winogrande, "winogrande/train_xl.jsonl"
    ),
    "arc_easy": TaskFiles("arc", "test", 2376, "arc/ARC-Easy-Test.jsonl", arc, "arc/ARC-Easy-Train.jsonl"),
    "arc_challenge": TaskFiles(
        "arc", "test", 1172, "arc/ARC-Challenge-Test.jsonl", arc, "arc/ARC-Challenge-Train.jsonl"
    ),
    "openbookqa": TaskFiles("openbookqa", "test", 500, "openbookqa/test.jsonl", openbookqa, "openbookqa/train.jsonl"),
    "lambada_openai": TaskFiles("lambada", "test", 5153, "lambada/lambada_openai_test.jsonl", lambada),
}


@dataclass(frozen=True)
class TaskRows:
    """A task's rows as its definition reads them, and the files that they come from."""

    splits: Mapping[str, Sequence[Mapping[str, Any]]]
    sources: Mapping[str, str]  # file -> sha256
    complete: bool  # all rows of the evaluated split, rather than some


def check_known(tasks: Sequence[str]) -> None:
    """Raises ConfigError where a task has no local format."""
    for name in tasks:
        if name not in TASKS:
            expected = f"expected some of {', '.join(TASKS)}{did_you_mean(name, TASKS)}"
            raise ConfigError(f"tasks: {name!r} has no format of local files; {expected}")


def read_task(folder: str, task: str, shots: int) -> TaskRows:
    """The rows of `task` from the files below `folder`, those of the examples too where there are `shots`.

    Raises:
        ConfigError: a folder or file is missing or empty, or a line of it is not what the task's format has.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ConfigError(f"{KEY}={folder}: no such folder; expected one with {TASKS[task].file}")
    files = TASKS[task]
    wanted = {files.split: files.file}
    if shots and files.examples is not None:
        wanted["train"] = files.examples
    splits, sources = {}, {}
    for split, pattern in wanted.items():
        path = _file(root, pattern, f"{task}'s rows" if split == files.split else f"{task}'s few-shot examples")
        splits[split], hashes = _rows(path, files)
        sources |= hashes
    examples = splits.get("train", splits[files.split])
    if shots > len(examples):
        raise ConfigError(f"evaluator.zeroshot.num_fewshot={shots}: expected at most {task}'s {len(examples)} examples")
    return TaskRows(splits, sources, len(splits[files.split]) == files.items)


def _file(root: Path, pattern: str, what: str) -> Path:
    matches = sorted(path for path in root.glob(pattern) if path.is_file())
    if not matches:
        raise ConfigError(f"{KEY}={root}: no file {root / pattern}; expected {what}")
    if len(matches) > 1:
        names = ", ".join(path.name for path in matches)
        raise ConfigError(f"{KEY}={root}: {names} all fit {pattern}; expected one file of {what}")
    return matches[0]


def _rows(path: Path, files: TaskFiles) -> tuple[list[dict[str, Any]], dict[str, str]]:
    sources: dict[str, str] = {}
    lines = _lines(path, sources)
    labels: list[str | None] = [None] * len(lines)
    if files.labels is not None:
        ending, other = files.labels
        apart = path.with_name(path.name.removesuffix(ending) + other)
        if not apart.is_file():
            raise ConfigError(f"{KEY}: no file {apart}; expected the labels of {path.name}, one a line")
        labels = list(_lines(apart, sources))
        if len(labels) != len(lines):
            raise ConfigError(f"{KEY}: {apart}: {len(labels)} labels; expected {len(lines)}, as {path.name} has lines")
    rows = []
    for number, (line, label) in enumerate(zip(lines, labels, strict=True), start=1):
        where = f"{KEY}: {path}, line {number}"
        if not line.strip() and label is None:  # beside labels, a blank line may be a row that is missing
            continue
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: not a JSON object; expected one a line")
        rows.append(files.read(Row(values, where, None if label is None else label.strip())))
    return rows, sources


def _lines(path: Path, sources: dict[str, str]) -> list[str]:
    """A file's lines, without a byte order mark; blank ones at its end are left out. Adds its hash to `sources`."""
    sources[str(path)] = sha256(path)
    # Not splitlines: JSON texts may hold other line separators of Unicode's.
    return text_of(path, f"{KEY}: {path}", "UTF-8 text, one row a line").rstrip().split("\n")
