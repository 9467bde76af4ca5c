"""lm-eval's tasks on local files against lm-eval itself, fed the same items as its definitions' data sets have them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pruneexp.embedded import FOLDER
from pruneexp.evaluator import Zeroshot, zeroshot
from pruneexp.evaluator.harness import Answered, answer, load_tasks
from pruneexp.evaluator.task_files import TASKS, read_task
from pruneexp.evaluator.zeroshot import PUBLISHED
from pruneexp.experiment.run import run_experiment
from pruneexp.types import ConfigError, RunError
from tests.cases import each
from tests.task_samples import FILES, HUB, SOURCES, write_files

SHARED = Path(__file__).parents[2] / "shared" / "data" / "tasks"
FEWSHOT = ("boolq", "piqa")  # of which there are examples among the samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def llama() -> Any:
    from pruneexp.model import ModelSource

    settings = {"revision": None, "dtype": "float64", "device": "cpu", "stream": False, "trust_remote_code": False}
    return ModelSource(name="embedded", path=str(FOLDER / "llama"), batch_size=4, **settings).load()  # type: ignore


def a_zeroshot(data: Path | str | None, *tasks: str, **changes: Any) -> Zeroshot:
    fields = {
        "num_fewshot": 0,
        "limit": None,
        "batch_size": 4,
        "data": None if data is None else str(data),
        "bos": False,
    }
    return Zeroshot(**{"tasks": list(tasks), **fields, **changes})  # type: ignore[arg-type]


# against the harness itself


def harness_samples(model: Any, rows: Mapping[str, Any], shots: int, monkeypatch: Any) -> dict[str, list[dict]]:
    """What lm-eval's own entry point logs of its own tasks, its data sets' rows given in memory."""
    import datasets
    from lm_eval import evaluator, tasks
    from lm_eval.models.huggingface import HFLM

    task_of = {source: name for name, source in SOURCES.items()}

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        splits = {split: datasets.Dataset.from_list(examples) for split, examples in rows[task_of[path, name]].items()}
        spare = next(iter(splits.values()))
        return datasets.DatasetDict({**dict.fromkeys(("train", "validation", "test"), spare), **splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # asks every package manager there is
    folders = [f"{tasks.__path__[0]}/{TASKS[name].definition}" for name in rows]
    evaluation: Any = evaluator.simple_evaluate(
        model=HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=4),  # type: ignore[call-arg]
        tasks=list(rows),
        num_fewshot=shots,
        task_manager=tasks.TaskManager(include_path=sorted(set(folders)), include_defaults=False),
        bootstrap_iters=0,
    )
    return evaluation["samples"]


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "shots"), [(tuple(TASKS), 0), (FEWSHOT, 2)])
def test_local_files_ask_and_score_as_the_harness_does(data, llama, monkeypatch, tasks, shots):
    rows = {name: read_task(str(data), name, shots) for name in tasks}
    own: dict[str, Answered] = {}
    for loaded in load_tasks(tasks, rows):
        own |= answer(llama, loaded, shots, None, 4, False)
    theirs = harness_samples(llama, {name: HUB[name] for name in tasks}, shots, monkeypatch)
    assert set(own) == set(theirs) == set(tasks)
    for name, samples in theirs.items():
        assert own[name].shots == shots and own[name].items == len(samples)
        assert own[name].requests == [tuple(request) for sample in samples for request in sample["arguments"]]
        nats = [answers[0][0] for sample in samples for answers in sample["resps"]]
        assert own[name].log_likelihoods == pytest.approx(nats, rel=1e-12)  # float64; other batches, other rounding
        assert set(own[name].scores) == set(samples[0]["metrics"])
        for metric, scores in own[name].scores.items():
            assert scores == [sample[metric] for sample in samples]
    if shots:
        context = own["piqa"].requests[0][0]
        assert context.count("Question: ") == 1 + shots and context.endswith("\nAnswer:")


def test_scores_by_hand(data, llama):
    """acc: the likeliest continuation; acc_norm: the likeliest per character of the choice."""
    (loaded,) = load_tasks(["piqa"], {"piqa": read_task(str(data), "piqa", 0)})
    answered = answer(llama, loaded, 0, None, 1, False)["piqa"]
    assert [continuation for _, continuation in answered.requests[:2]] == [" Use a towel.", " Put it under the tap."]
    best, best_norm = [], []
    for item, label in zip(range(3), (0, 1, 0), strict=True):
        pair = answered.requests[2 * item : 2 * item + 2]
        nats = []
        for context, continuation in pair:
            before = len(llama.tokenizer.encode(context))
            ids = torch.tensor([llama.tokenizer.encode(context + continuation)])
            nats.append(-float(llama.token_losses(ids, 1)[0, before - 1 :].sum()))
        assert answered.log_likelihoods[2 * item : 2 * item + 2] == pytest.approx(nats, rel=1e-5)
        per_character = [value / len(text[1:]) for value, (_, text) in zip(nats, pair, strict=True)]
        best.append(float(nats.index(max(nats)) == label))
        best_norm.append(float(per_character.index(max(per_character)) == label))
    assert (answered.scores["acc"], answered.scores["acc_norm"]) == (best, best_norm)
    assert answered.figures == {"acc": sum(best) / 3, "acc_norm": sum(best_norm) / 3}


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real tasks' files")
@pytest.mark.parametrize("name", TASKS)
def test_real_files_ask_as_the_harness_does(name, monkeypatch):
    """The first 50 items of the real files, turned into the hub's fields here."""

    def requests(task: Any) -> list[tuple[Any, Any, Any]]:
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=50)
        return [(each.doc_id, each.arguments, task.doc_to_target(each.doc)) for each in task.instances]

    import datasets

    path = next(SHARED.glob(TASKS[name].file))
    rows = [json.loads(line) for line in path.read_text().splitlines()[:50]]
    labels = path.with_name("valid-labels.lst").read_text().split() if name == "piqa" else [None] * 50
    hub = [as_on_the_hub(name, row, label) for row, label in zip(rows, labels, strict=False)]
    split = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(hub)))
    (ours,) = load_tasks([name], {name: read_task(str(SHARED), name, 0)})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **options: split)
    (theirs,) = load_tasks([name], {})
    assert requests(ours.tasks[name]) == requests(theirs.tasks[name])


def as_on_the_hub(name: str, row: dict[str, Any], label: str | None) -> dict[str, Any]:
    match name:
        case "boolq":
            return {**row, "label": 1 if row["answer"] else 0}
        case "piqa":
            return {**row, "label": int(str(label))}
        case "hellaswag":
            return {**row, "ctx_a": row["ctx"], "ctx_b": "", "label": str(row["label"])}  # as WikiHow's rows are
        case "arc_easy" | "arc_challenge" | "openbookqa":
            question = row["question"]
            listed = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
            stem = "question_stem" if name == "openbookqa" else "question"
            return {stem: question["stem"], "choices": listed, "answerKey": row["answerKey"]}
        case "lambada_openai":
            return {"text": row["context"] + " " + row["continuation"]}
    return row


# names, records, side effects


def test_names_say_which_items(data, llama, monkeypatch):
    whole = {name: len(HUB[name][TASKS[name].split]) for name in PUBLISHED}
    for name in PUBLISHED:
        if name != "boolq":
            monkeypatch.setitem(TASKS, name, replace(TASKS[name], items=whole[name]))
    evaluator = a_zeroshot(data, *PUBLISHED)
    figures = evaluator(llama, llama.tokenizer).figures
    norm = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")
    named = {f"acc/{name}@0shot" for name in PUBLISHED[1:]} | {f"acc_norm/{name}@0shot" for name in norm}
    means = {f"{kind}/mean7@0shot[{sum(whole.values())}]" for kind in ("acc", "acc_norm_or_acc")}
    assert set(figures) == named | means | {"acc/boolq@0shot[2]"}
    acc = [figures["acc/boolq@0shot[2]"], *(figures[f"acc/{name}@0shot"] for name in PUBLISHED[1:])]
    assert figures[f"acc/mean7@0shot[{sum(whole.values())}]"] == pytest.approx(sum(acc) / 7, rel=1e-12)
    best = [figures[f"acc_norm/{name}@0shot"] for name in norm] + [acc[0], figures["acc/winogrande@0shot"]]
    assert figures[f"acc_norm_or_acc/mean7@0shot[{sum(whole.values())}]"] == pytest.approx(sum(best) / 7, rel=1e-12)

    monkeypatch.setitem(TASKS, "boolq", replace(TASKS["boolq"], items=2))
    assert "acc/boolq@0shot" in a_zeroshot(data, "boolq")(llama, llama.tokenizer).figures
    limited = a_zeroshot(data, "boolq", "piqa", limit=2)(llama, llama.tokenizer).figures
    assert set(limited) == {"acc/boolq@0shot", "acc/piqa@0shot[2]", "acc_norm/piqa@0shot[2]"}


def test_the_record_of_a_model(data, llama):
    evaluator = a_zeroshot(data, "piqa", "lambada_openai", num_fewshot=1)
    measured = evaluator(llama, llama.tokenizer)
    figures, record = measured.figures, json.loads(measured.files["json"])
    assert set(measured.files) == {"json"} and set(record["tasks"]) == {"piqa", "lambada_openai"}
    piqa = record["tasks"]["piqa"]
    assert len(piqa["scores"]["acc"]) == 3 and sum(piqa["scores"]["acc"]) / 3 == figures["acc/piqa@1shot[3]"]
    assert {Path(file).name for file in piqa["data"]} == {
        "valid.jsonl", "valid-labels.lst", "train.jsonl", "train-labels.lst"
    }  # fmt: skip
    share = piqa["figures"]["acc"]
    assert piqa["standard_errors"]["acc"] == pytest.approx(math.sqrt(share * (1 - share) / 2))
    assert piqa["version"] == 1.0 and piqa["num_fewshot"] == 1 and len(piqa["requests_sha256"]) == 64
    assert evaluator(llama, llama.tokenizer) == measured and "perplexity/lambada_openai@1shot[2]" in figures


def test_nothing_of_the_run_is_touched(data, llama):
    states = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()  # type: ignore[index]
    settings = dict(llama.tokenizer.special_tokens_map)
    a_zeroshot(data, "openbookqa")(llama, llama.tokenizer)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
    assert torch.equal(torch.random.get_rng_state(), states[2])
    assert dict(llama.tokenizer.special_tokens_map) == settings


@pytest.mark.slow
def test_a_run_keeps_every_item(data, build_from):
    overrides = ["evaluator=[zeroshot]", f"evaluator.zeroshot.data={data}", "evaluator.zeroshot.tasks=[piqa,arc_easy]"]
    metrics = run_experiment(build_from(*overrides, "run.dir=run", "run.save=false", "dataset.samples=2")).metrics
    assert {"dense/acc/piqa@0shot[3]", "pruned/acc_norm/arc_easy@0shot[2]"} <= metrics.keys()
    kept = [json.loads(Path("run/samples", f"zeroshot_{when}.json").read_text()) for when in ("dense", "pruned")]
    hashes = [each["tasks"]["piqa"]["requests_sha256"] for each in kept]
    assert hashes[0] == hashes[1]
    for when, one in zip(("dense", "pruned"), kept, strict=True):
        assert one["tasks"]["piqa"]["figures"]["acc"] == metrics[f"{when}/acc/piqa@0shot[3]"]


DEFINITION = """
task: {name}
dataset_path: somebody/{name}
test_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_target: 0
doc_to_choice: ["yes", "no"]
metric_list:
  - metric: acc
"""
GROUP = """
group: both
task: [one, two]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""
WRITTEN = """
task: written
dataset_path: somebody/written
test_split: test
output_type: generate_until
num_fewshot: 1
doc_to_text: q
doc_to_target: q
generation_kwargs: {until: ["."], max_gen_toks: 3, do_sample: false}
metric_list:
  - metric: exact_match
filter_list:
  - {name: plain, filter: [{function: take_first}]}
  - {name: small, filter: [{function: lowercase}, {function: take_first}]}
"""


def test_jobs_of_a_process_share_tasks_that_are_asked_alike(data, tmp_path, llama, monkeypatch):
    loads: list[tuple[str, ...]] = []

    def counted(names: Any, rows: Any) -> Any:
        loads.append(tuple(names))
        return load_tasks(names, rows)

    def figures(folder: Path, **changes: Any) -> tuple[Any, Any, Any]:
        evaluator = a_zeroshot(folder, "piqa", "boolq", **changes)
        measured = evaluator(llama, llama.tokenizer)
        return measured.figures, evaluator.measured_on(llama.tokenizer), measured.files

    monkeypatch.setattr(zeroshot, "load_tasks", counted)
    zeroshot._load_once.cache_clear()
    first = figures(data, num_fewshot=2)
    assert figures(data, num_fewshot=2, batch_size=4) == first and len(loads) == 1
    zeroshot._load_once.cache_clear()
    assert figures(data, num_fewshot=2) == first and len(loads) == 2
    for changes in ({"num_fewshot": 0}, {"num_fewshot": 2, "limit": 1}):
        loads.clear()
        assert figures(data, **changes)[0].keys().isdisjoint(first[0]) and len(loads) == 1
    copy = write_files(tmp_path)
    unchanged = figures(copy)[1]
    (copy / "piqa" / "valid.jsonl").write_text((copy / "piqa" / "valid.jsonl").read_text().replace("towel", "rag"))
    loads.clear()
    assert figures(copy)[1] != unchanged and len(loads) == 1


@pytest.fixture
def few_definitions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The whole index of the harness takes seconds: here it knows one of its folders, and this one."""
    import datasets
    from lm_eval import tasks

    whole, folders = tasks.TaskManager, [f"{tasks.__path__[0]}/hellaswag", str(tmp_path)]
    monkeypatch.setattr(tasks, "TaskManager", lambda **_: whole(include_path=folders, include_defaults=False))
    rows = {"one": ["Is it warm", "Is it cold"], "two": ["Do dogs sing"] * 4, "written": ["The dogs", "Nora"]}
    splits = {name: datasets.Dataset.from_list([{"q": text} for text in texts]) for name, texts in rows.items()}
    splits["odd"] = splits["one"]
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, name=None, **options: datasets.DatasetDict({"test": splits[path.split("/")[1]]}),
    )
    return tmp_path


def test_groups_and_filters(few_definitions, llama):
    for name in ("one", "two"):
        (few_definitions / f"{name}.yaml").write_text(DEFINITION.format(name=name))
    (few_definitions / "both.yaml").write_text(GROUP)
    (few_definitions / "written.yaml").write_text(WRITTEN)
    evaluator = a_zeroshot(None, "both", "written", num_fewshot=None, limit=3)
    evaluator.prepare(llama.tokenizer, llama.vocab_size)
    figures = dict(evaluator(llama, llama.tokenizer).figures)
    one, two = figures["acc/one@0shot"], figures["acc/two@0shot[3]"]
    assert figures.pop("acc/both@0shot[5]") == pytest.approx((2 * one + 3 * two) / 5)
    assert figures.keys() == {
        "acc/one@0shot", "acc/two@0shot[3]", "exact_match/written@1shot/plain", "exact_match/written@1shot/small"
    }  # fmt: skip
    assert evaluator(llama, llama.tokenizer).figures.keys() >= figures.keys()


def test_metrics_of_all_items_together(few_definitions, llama):
    """The harness scores an item by its label and NumPy's number or array of the answer."""
    metrics = "".join(f"  - metric: {name}\n" for name in ("f1", "mcc", "brier_score"))
    label = "doc_to_target: \"{{ 1 if 'cold' in q else 0 }}\""
    definition = DEFINITION.format(name="one").replace("doc_to_target: 0", label)
    (few_definitions / "one.yaml").write_text(definition + metrics)
    measured = a_zeroshot(None, "one", num_fewshot=None)(llama, llama.tokenizer)
    assert {"acc/one@0shot", "f1/one@0shot", "mcc/one@0shot", "brier_score/one@0shot"} <= measured.figures.keys()
    scores = json.loads(measured.files["json"])["tasks"]["one"]["scores"]
    assert scores["f1"] == scores["mcc"] and [float(label == answer) for label, answer in scores["f1"]] == scores["acc"]
    brier = [sum((p - (n == label)) ** 2 for n, p in enumerate(shares)) for label, shares in scores["brier_score"]]
    assert sum(brier) / len(brier) == pytest.approx(measured.figures["brier_score/one@0shot"])


@pytest.mark.slow
def test_hub_figures_of_the_dense_model_are_measured_once(few_definitions, build_from, monkeypatch):
    import datasets

    written = DEFINITION.format(name="one")
    (few_definitions / "one.yaml").write_text(written)
    calls: list[str] = []

    def counted(model: Any, loaded: Any, *rest: Any) -> dict[str, Answered]:
        calls.append(loaded.name)
        return answer(model, loaded, *rest)

    monkeypatch.setattr(zeroshot, "answer", counted)

    def dense(folder: str, *changes: str) -> tuple[float, int]:
        calls.clear()
        zeroshot._load_once.cache_clear()  # as in a process of its own
        overrides = ["evaluator=[zeroshot]", "evaluator.zeroshot.tasks=[one]", "dataset.samples=2", *changes]
        metrics = run_experiment(build_from(*overrides, f"run.dir={folder}", "run.save=false")).metrics
        return next(value for key, value in metrics.items() if key.startswith("dense/acc/one@")), len(calls)

    first, answered = dense("first")
    assert answered == 2  # the dense and the pruned model
    assert dense("again") == (first, 1)
    samples = [Path(folder, "samples", "zeroshot_dense.json").read_text() for folder in ("first", "again")]
    assert samples[0] == samples[1]
    assert dense("shots", "evaluator.zeroshot.num_fewshot=1")[1] == 2
    assert dense("limit", "evaluator.zeroshot.limit=1")[1] == 2
    (few_definitions / "one.yaml").write_text(written.replace("doc_to_target: 0", "doc_to_target: 1"))
    changed, answered = dense("definition")
    assert answered == 2 and changed != first
    rows = datasets.Dataset.from_list([{"q": "Is it late"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"test": rows}))
    assert dense("data")[1] == 2


def test_a_model_that_gives_no_numbers(data, llama):
    bias = llama.module.base_model.norm.weight
    before = bias.data.clone()
    try:
        bias.data[0] = math.nan
        with pytest.raises(RunError, match="^evaluator.zeroshot: piqa: the model's log-likelihood of request 0 is not"):
            a_zeroshot(data, "piqa")(llama, llama.tokenizer)
    finally:
        bias.data.copy_(before)


# mistakes


@each(
    "changes, expected",
    [
        ({"tasks": []}, r"tasks=\[\]: expected one task or more, each once"),
        ({"tasks": ["piqa", "piqa"]}, r"tasks=\['piqa', 'piqa'\]: expected one task or more, each once"),
        ({"num_fewshot": -1}, "num_fewshot=-1: expected an integer >= 0, or null"),
        ({"limit": 0}, "limit=0: expected an integer >= 1, or null"),
        ({"batch_size": 0}, "batch_size=0: expected an integer >= 1"),
        ({"tasks": ["pika"]}, "tasks: 'pika' has no format of local files; expected some of boolq, .* you mean piqa"),
    ],
)
def test_config_errors(changes, expected):
    with pytest.raises(ConfigError, match=f"^{expected}"):
        a_zeroshot("data", **{"tasks": ["piqa"], **changes})


def test_it_wants_the_model_in_memory(build_from):
    with pytest.raises(ConfigError, match="evaluator=zeroshot needs the whole model in memory"):
        build_from("model.stream=true", "evaluator=[zeroshot]")


def test_it_wants_a_tokenizer(data):
    with pytest.raises(ConfigError, match="needs a tokenizer and the model has none"):
        a_zeroshot(data, "piqa").prepare(None, 10)


def test_tasks_that_the_harness_lacks(few_definitions):
    with pytest.raises(ConfigError, match="^evaluator.zeroshot.tasks: lm-eval has no .* 'helaswag'.*mean hellaswag"):
        load_tasks(["helaswag"], {})


@pytest.mark.parametrize(
    ("setting", "what"), [("unsafe_code: true", "runs code"), ("doc_to_image: q", "more than text")]
)
def test_tasks_that_cannot_be_run(few_definitions, setting, what):
    (few_definitions / "odd.yaml").write_text(f"{DEFINITION.format(name='odd')}{setting}\n")
    with pytest.raises(ConfigError, match=f"^evaluator.zeroshot.tasks: odd .*{what}.*; expected tasks of text alone"):
        load_tasks(["odd"], {})


def test_without_a_network():
    with pytest.raises(RunError, match="piqa's data cannot be loaded .*; offline, evaluator.zeroshot.data=FOLDER"):
        load_tasks(["piqa"], {})


WITHOUT = {
    "boolq/dev.jsonl": ("boolq", 2, {"passage": None}, "no field 'passage'; expected a text"),
    "piqa/valid.jsonl": ("piqa", 3, {"sol2": 7}, "sol2=7; expected a text"),
    "hellaswag/hellaswag_val.jsonl": ("hellaswag", 1, {"label": 4}, r"label=4; expected one of 0, 1, 2, 3, '0', "),
    "winogrande/dev.jsonl": ("winogrande", 2, {"answer": ""}, "answer=''; expected one of '1', '2'"),
    "arc/ARC-Easy-Test.jsonl": ("arc_easy", 1, {"answerKey": "Z"}, "answerKey='Z'; expected one of 'A', 'B', 'C'"),
    "openbookqa/test.jsonl": ("openbookqa", 1, {"question": {}}, "no field 'question.choices'; expected a list"),
    "lambada/lambada_openai_test.jsonl": ("lambada_openai", 1, {"continuation": None}, "no field 'continuation'"),
}


@each("name", WITHOUT)
def test_a_wrong_line_is_named(name, tmp_path):
    task, number, change, expected = WITHOUT[name]
    path = write_files(tmp_path) / name
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[number - 1] = {key: value for key, value in {**lines[number - 1], **change}.items() if value is not None}
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match=rf"^evaluator\.zeroshot\.data: {path}, line {number}: {expected}"):
        a_zeroshot(tmp_path, task).check()


@each(
    "name, content, expected",
    [
        ("valid.jsonl", None, "no file {path}; expected piqa's rows"),
        ("valid-labels.lst", None, "no file {path}; expected the labels of valid.jsonl, one a line"),
        ("train.jsonl", None, "no file {path}; expected piqa's few-shot examples"),
        ("valid.jsonl", "\n", "{path}: the file is empty"),
        ("valid.jsonl", "[1]\n" * 3, "{path}, line 1: not a JSON object"),
        ("valid.jsonl", '{"goal":\n' * 3, "{path}, line 1: not a JSON object"),
        ("valid.jsonl", b"\xff\n", "{path}: byte 0 is not UTF-8"),
        ("valid-labels.lst", "0\n1\n", "{path}: 2 labels; expected 3, as valid.jsonl has lines"),
        ("valid-labels.lst", "0\n1\n2\n", "{rows}, line 3: label '2' in the labels' file; expected 0 or 1"),
    ],
)
def test_a_wrong_file_is_named(name, content, expected, tmp_path):
    path = write_files(tmp_path) / "piqa" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"^evaluator\.zeroshot\.data") as error:
        a_zeroshot(tmp_path, "piqa", num_fewshot=1).check()
    assert expected.format(path=path, rows=path.with_name("valid.jsonl")) in str(error.value)


@pytest.mark.parametrize("task", ["boolq", "piqa"])
def test_files_that_went_through_other_editors_have_the_same_rows(task, tmp_path):
    """Byte order mark, carriage returns, blank lines at the end; between rows where no labels are counted off."""
    rows = read_task(str(write_files(tmp_path)), task, 0).splits
    for path in (tmp_path / task).iterdir():
        lines = path.read_text().splitlines()
        lines = [*lines[:1], *([] if task == "piqa" else [" "]), *lines[1:], "", ""]
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_task(str(tmp_path), task, 0).splits == rows


def test_a_blank_line_beside_labels_is_a_row_that_is_missing(tmp_path):
    path = write_files(tmp_path) / "piqa" / "valid.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", lines[2]]))
    with pytest.raises(ConfigError, match="line 2: not a JSON object"):
        read_task(str(tmp_path), "piqa", 0)


def test_a_folder_that_cannot_be_read(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^evaluator\.zeroshot\.data=.*gone: no such folder; expected one with piqa/"
    ):
        a_zeroshot(tmp_path / "gone", "piqa").check()
    write_files(tmp_path)
    with pytest.raises(ConfigError, match=r"^evaluator\.zeroshot\.num_fewshot=4: expected at most piqa's 3 examples"):
        a_zeroshot(tmp_path, "piqa", num_fewshot=4).check()
    (tmp_path / "hellaswag" / "hellaswag_val_2.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"hellaswag_val.jsonl, hellaswag_val_2.jsonl all fit"):
        a_zeroshot(tmp_path, "hellaswag").check()
    assert {name.split("/")[0] for name in FILES} == {path.name for path in tmp_path.iterdir()}
