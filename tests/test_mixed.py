"""Windows of several sources: their order, what is typed for them, and what goes wrong."""

from __future__ import annotations

import gc
import gzip
import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pruneexp import run
from pruneexp.cli.build import build
from pruneexp.cli.compose import Composed, compose
from pruneexp.dataset import document_files, evaluation_parts, evaluation_windows, forget_documents
from pruneexp.dataset.given import GivenTokens
from pruneexp.dataset.mixed import interleaved, shared_out
from pruneexp.evaluator import Perplexity
from pruneexp.evidence import Gram, Halves
from pruneexp.fingerprint import config_hash
from pruneexp.types import ConfigError, Dataset, RunError
from tests.cases import each
from tests.test_bos import byte_tokenizer
from tests.toy_sites import layer_sites

BOS = 256


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(begins=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Texts of one letter's case each, so that a window says where it is from; documents of one digit each."""
    (tmp_path / "low.txt").write_text("".join(chr(97 + i % 26) for i in range(900)))
    (tmp_path / "link.txt").symlink_to("low.txt")
    (tmp_path / "up.txt").write_text("".join(chr(65 + i % 26) for i in range(900)))
    for file, digits in (("one.jsonl", "0123"), ("two.jsonl", "4567")):
        (tmp_path / file).write_text("".join(json.dumps({"text": d * 60, "meta": 0}) + "\n" for d in digits))
    np.save(tmp_path / "t.npy", np.full((4, 8), 7))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_of(sources: str, *more: str) -> Composed:
    sizes = ["dataset.samples=12", "dataset.length=8", "evaluator=[size]"]
    return compose(["dataset=mixed", f"dataset.sources={sources}", *sizes, *more])


def mixed(sources: str, *more: str) -> Any:
    return build(run_of(sources, *more)).dataset


# how windows are shared out, and their order


@each(
    "weights, samples, expected",
    [
        ({"a": 1, "b": 1}, 128, [64, 64]),
        ({"a": 3, "b": 1}, 10, [8, 2]),
        ({"a": 1, "b": 1, "c": 1}, 10, [4, 3, 3]),
        ({"a": 0.5, "b": 0}, 7, [7, 0]),
    ],
)
def test_windows_are_shared_out_by_weights(weights: dict[str, float], samples: int, expected: list[int]) -> None:
    assert list(shared_out(weights, samples).values()) == expected


@each(
    "counts", [{"a": 64, "b": 64}, {"a": 5, "b": 5}, {"a": 30, "b": 10}, {"a": 17, "b": 9, "c": 40}, {"a": 3, "b": 0}]
)
def test_any_first_part_and_every_second_and_fourth_window_hold_each_source_in_proportion(
    counts: dict[str, int],
) -> None:
    order, total = interleaved(counts), sum(counts.values())
    assert Counter(order) == {name: count for name, count in counts.items() if count}
    for stride in (1, 2, 4):
        for place in range(stride):
            part = order[place::stride]
            for length in range(1, len(part) + 1):
                had = Counter(part[:length])
                assert all(abs(had[name] - length * count / total) < 2 for name, count in counts.items())


def test_a_single_source_has_no_origins_and_nothing_apart() -> None:
    dataset: Any = build(compose(["evaluator=[size]"])).dataset
    assert (dataset.origins, dataset.apart) == (None, None)
    assert (GivenTokens.origins, GivenTokens.apart) == (None, None)


def test_halves_of_two_sources_hold_both_alike() -> None:
    order = interleaved({"a": 64, "b": 64})
    assert order[:8] == ("a", "b", "b", "a", "b", "a", "a", "b")
    assert [order[half::2].count("a") for half in (0, 1)] == [32, 32]
    x = torch.tensor([[[1.0 if name == "a" else 0.0] * layer_sites(0)[1].channels] for name in order])
    seen = Halves(Gram).empty(layer_sites(0)[1]).update_(x)
    assert seen.first.sum_C[0] == seen.second.sum_C[0] == 32


# what is typed


def test_each_source_gives_the_windows_that_it_gives_alone(folder: Path, tokenizer: Any) -> None:
    digits = "{calibration: [one.jsonl,two.jsonl], calibration_documents: '2:6'}"
    dataset = mixed(f"{{low: low.txt, digits: {digits}}}", "seed=3")
    assert isinstance(dataset, Dataset)
    windows_NT, alone = dataset.calibration(tokenizer), {}
    common = ["dataset.samples=6", "dataset.length=8", "seed=3", "evaluator=[size]"]
    for name, typed in (
        ("low", ["dataset=text", "dataset.calibration=low.txt"]),
        (
            "digits",
            ["dataset=documents", "dataset.calibration=[one.jsonl,two.jsonl]", "dataset.calibration_documents=2:6"],
        ),
    ):
        alone[name] = build(compose([*typed, *common])).dataset.calibration(tokenizer)
        mine = torch.tensor([origin == name for origin in dataset.origins])
        assert torch.equal(windows_NT[mine], alone[name])
    assert windows_NT.shape == (12, 8) and set(bytes(alone["digits"].flatten().tolist())) <= set(b"2345\n")


def test_names_choose_datasets_and_keep_their_settings(folder: Path) -> None:
    run = run_of("{wikitext2: 1, books: {dataset: bookcorpus, weight: 2}, c4: {calibration_split: 'train[:500]'}}")
    sources = run.config["dataset"]["sources"]
    assert sources["wikitext2"]["dataset"]["path"] == "Salesforce/wikitext" and sources["books"]["weight"] == 2
    assert sources["c4"]["dataset"]["calibration_split"] == "train[:500]"
    dataset: Any = build(run).dataset
    books = dataset.sources["books"].dataset
    assert (books.name, books.path, books.length, books.bos) == ("books", "rojagtap/bookcorpus", 8, False)
    assert Counter(dataset.origins) == {"wikitext2": 3, "books": 6, "c4": 3}
    again = Composed(compose(["dataset=mixed", "dataset.sources=[wikitext2,c4]"]).config, run.job, run.folders)
    assert config_hash(again.config) != config_hash(run.config)
    assert build(again).dataset.origins.count("c4") == 64


def test_a_written_config_says_all_and_builds_the_same(folder: Path, tokenizer: Any) -> None:
    run = run_of("{low: low.txt, up: {calibration: up.txt, weight: 3}}")
    written = yaml.safe_load(yaml.safe_dump(run.config))
    again = Composed(written, compose([]).job, run.folders)
    assert config_hash(written) == config_hash(run.config)
    assert build(again).dataset == build(run).dataset
    other = run_of("{low: low.txt, up: {calibration: up.txt, weight: 2}}")
    assert config_hash(other.config) != config_hash(run.config)
    assert torch.equal(build(again).dataset.calibration(tokenizer), build(run).dataset.calibration(tokenizer))


def test_windows_begin_with_bos_where_single_sources_do(folder: Path, tokenizer: Any) -> None:
    dataset = mixed("{low: low.txt, up: {calibration: up.txt, evaluation: up.txt}}", "dataset.bos=true")
    windows_NT = dataset.calibration(tokenizer)
    assert windows_NT.shape == (12, 8) and bool((windows_NT[:, 0] == BOS).all()) and BOS not in windows_NT[:, 1:]
    assert bool((evaluation_windows(dataset, tokenizer, 5, True)[:, 0] == BOS).all())
    assert BOS not in evaluation_windows(dataset, tokenizer, 5, False)


def test_token_windows_are_a_source(folder: Path, tokenizer: Any) -> None:
    dataset = mixed("{t: t.npy, low: {calibration: low.txt, weight: 2}}", "dataset.bos=true")
    assert [row.tolist() == [7] * 8 for row in dataset.calibration(tokenizer)] == [o == "t" for o in dataset.origins]
    for sources, problem in (("{t: t.npy, low: low.txt}", "4 windows; expected at least 6, its share"),):
        with pytest.raises(ConfigError, match=rf"^dataset\.sources\.t\.calibration=t\.npy: {problem}"):
            mixed(sources).calibration(tokenizer)
    with pytest.raises(ConfigError, match="windows of 8 tokens; expected the mixture's length, 9"):
        mixed("{t: t.npy, low: {calibration: low.txt, weight: 2}}", "dataset.length=9").calibration(tokenizer)


# what is measured


class Model:
    """Its loss is the token id in hundredths of a nat."""

    vocab_size, max_length = 300, None

    def token_losses(self, windows_NT: torch.Tensor, batch_size: int, name: str) -> torch.Tensor:
        return windows_NT[:, 1:] / 100


def test_each_source_is_measured_apart_and_all_by_weights(folder: Path, tokenizer: Any) -> None:
    sources = "{low: {calibration: low.txt, evaluation: low.txt, weight: 3}, none: up.txt"
    dataset = mixed(sources + ", up: {evaluation: up.txt, calibration: one.jsonl, dataset: text}}")
    parts = evaluation_parts(dataset, tokenizer, 5, False)
    assert {name: (weight, len(rows)) for name, (weight, rows) in parts.items()} == {"low": (3, 180), "up": (1, 180)}
    settings: Any = {"length": 5, "stride": None, "batch_size": 4, "bos": False, "samples": 10}
    figures = Perplexity(dataset, **settings)(Model(), tokenizer)
    assert list(figures) == ["ppl/low@5[10]", "ppl/up@5[10]", "ppl/mixed@5[10]"]
    low, up, both = (float(np.log(figure)) for figure in figures.values())
    assert low == pytest.approx(up + 0.32) and both == pytest.approx((3 * low + up) / 4)
    overlapping = Perplexity(dataset, **settings | {"stride": 2, "samples": None}).windows(tokenizer)
    assert len(overlapping) == 2 * ((900 - 5) // 2 + 1)
    watched = mixed("{low: low.txt, up: {weight: 0, evaluation: up.txt}}")
    assert set(watched.origins) == {"low"} and list(Perplexity(watched, **settings)(Model(), tokenizer)) == [
        "ppl/up@5[10]"
    ]
    watched.check()


# documents


def test_documents_of_jsonl_and_parquet_are_the_same(folder: Path, tokenizer: Any) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    rows = [json.loads(line) for line in (folder / "one.jsonl").read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "one.parquet")
    (folder / "one.json.gz").write_bytes(gzip.compress((folder / "one.jsonl").read_bytes()))
    splits = []
    for file in ("one.jsonl", "one.parquet", "one.json.gz"):
        run = compose(
            [
                "dataset=documents",
                f"dataset.calibration={file}",
                f"dataset.evaluation=[{file},two.jsonl]",
                "dataset.evaluation_documents=3:",
                "dataset.samples=9",
                "evaluator=[size]",
            ]
        )
        dataset = build(run).dataset
        dataset.check()
        splits.append((dataset.calibration(tokenizer), dataset.evaluation(tokenizer, 20)))
        assert set(bytes(splits[-1][1].flatten().tolist())) == set(b"34567\n")
    assert all(torch.equal(one, other) for each in splits[1:] for one, other in zip(splits[0], each, strict=True))
    assert build(run).dataset.description()["calibration"]["files"][0]["sha256"]


@each(
    "content, problem",
    [
        ('{"text": "a"}\n{"body": "b"}\n', "line 2: field 'text' is missing \\(there are body\\)"),
        ('{"text": 5}\n', "line 1: field 'text' is no text"),
        (
            '{"text": "a"}\n{"text": "\\ud83d"}\n',
            "line 2: field 'text' holds half a character, \\\\ud83d; expected a text",
        ),
        ("plain\n", "line 1 is no JSON object"),
        ("", "no text in it"),
        ('{"text": " "}\n', "no text in it"),
    ],
)
def test_documents_that_cannot_be_read(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    typed = ["dataset=documents", f"dataset.calibration={tmp_path / 'a.jsonl'}", "evaluator=[size]"]
    with pytest.raises(ConfigError, match=rf"^dataset\.calibration=.*a\.jsonl: {problem}"):
        build(compose(typed)).dataset.check(evaluation=False)


class Row(dict[str, str]):
    """A document that can be watched."""


def test_documents_are_read_once_and_let_go_of_when_the_windows_are_made(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[weakref.ref[Row]] = []
    fields_of = document_files._fields_of

    def watched(*given: Any) -> Row:
        row = Row(fields_of(*given))
        read.append(weakref.ref(row))
        return row

    monkeypatch.setattr(document_files, "_fields_of", watched)
    typed = ["dataset=documents", "dataset.calibration=one.jsonl", "dataset.evaluation=two.jsonl"]
    dataset = build(compose([*typed, "dataset.samples=9", "dataset.length=8", "evaluator=[size]"])).dataset

    def windows() -> list[torch.Tensor]:
        dataset.check()
        return [dataset.calibration(tokenizer), dataset.evaluation(tokenizer, 20)]

    made = windows()
    assert len(read) == 8, "each once"
    forget_documents()
    gc.collect()
    assert not any(row() for row in read)
    assert all(torch.equal(one, other) for one, other in zip(made, windows(), strict=True)) and len(read) == 8


@pytest.mark.slow
def test_a_run_lets_go_of_its_documents(folder: Path) -> None:
    typed = ["dataset=documents", "dataset.calibration=one.jsonl", "dataset.evaluation=two.jsonl", "run.dry=true"]
    run([*typed, "dataset.samples=2", "dataset.length=8", "evaluator=[perplexity]"])
    assert document_files._read.cache_info().currsize == 0


# mistakes


@each(
    "sources, problem",
    [
        ("null", "dataset.sources=None: expected sources and their weights"),
        ("{}", "dataset.sources={}: expected sources and their weights"),
        ("5", "dataset.sources=5: expected names with weights"),
        ("{low: low.txt, wikitxt2: 1}", "dataset.sources.wikitxt2: .*; did you mean wikitext2?"),
        ("{low: low.txt, mixed: 1}", "dataset.sources.mixed: mixed is no dataset"),
        ("[wikitext2,c4,wikitext2]", "dataset.sources=.*: wikitext2 is repeated"),
        ("{c4: 1, d: {weight: 1, calibration: [one.jsonl, two.jsonl]}, c4: 2}", ".*: c4 is repeated"),
        ("{a: low.txt, b: low.txt}", "dataset.sources.b: the same text as dataset.sources.a"),
        (
            "{wikitext2: 1, mine: {dataset: wikitext2}}",
            "dataset.sources.mine: the same text as dataset.sources.wikitext2",
        ),
        ("{wikitext2: -1, c4: 1}", "dataset.sources.wikitext2.weight=-1: expected a number >= 0"),
        ("{wikitext2: 0, c4: 0}", "dataset.sources={wikitext2: 0, c4: 0}: the weights sum to 0"),
        ("{wikitext2: inf, c4: 1}", "dataset.sources.wikitext2.weight=inf: expected a number >= 0"),
        ("{wikitext2: nan, c4: 1}", "dataset.sources.wikitext2.weight=nan: expected a number >= 0"),
        ("{wikitext2: {weight: much}, c4: 1}", "dataset.sources.wikitext2.weight='much': expected a number"),
        ("{wikitext2: 0.001, c4: 1}", "dataset.sources.wikitext2.weight=0.001: no window of dataset.samples=12"),
        ("{wikitext2: true, c4: 1}", "dataset.sources.wikitext2=True: expected a weight, a file, or settings"),
        ("{low: {calibration: low.txt, samples: 3}}", "dataset.sources.low.samples=3: all sources have the mixture's"),
        ("{low: {calibraton: low.txt}}", "dataset.sources.low: low is no dataset"),
        ("{c4: {calibration_splt: train}}", "dataset.sources.c4.calibration_splt='train': .*did you mean"),
        ("{low: none.txt}", "dataset.sources.low.calibration=none.txt: no such file"),
        ("{low: none.jsonl}", "dataset.sources.low.calibration=none.jsonl: no such file"),
        ("{low: empty.txt}", "dataset.sources.low.calibration=empty.txt: the file is empty"),
        (
            "{d: {calibration: one.jsonl, calibration_documents: '9:'}}",
            "dataset.sources.d.calibration_documents=9:: no text",
        ),
        (
            "{d: {calibration: one.jsonl, calibration_documents: '9'}}",
            "dataset.sources.d.calibration_documents='9': exp",
        ),
        ("{low: short.txt}", "dataset.sources.low.calibration=short.txt: 3 tokens found; expected at least 8"),
        (
            "{d: {calibration: one.jsonl, calibration_join: null}}",
            "dataset.sources.d.calibration=one.jsonl: 4 of 4 documents",
        ),
    ],
)
def test_mistakes_are_one_line(folder: Path, tokenizer: Any, sources: str, problem: str) -> None:
    (folder / "empty.txt").write_text(" \n")
    (folder / "short.txt").write_text("abc")
    with pytest.raises(ConfigError, match=f"^{problem.replace('{', '[{]')}") as caught:
        dataset = mixed(sources)
        dataset.check(evaluation=False)
        dataset.calibration(tokenizer)
    assert "\n" not in str(caught.value)


@each(
    "sources",
    [
        "{low: low.txt, again: ./low.txt}",
        "{low: low.txt, again: HERE/low.txt}",
        "{low: low.txt, again: link.txt}",
        "{low: low.txt, again: '~/low.txt'}",
        "{low: one.jsonl, again: {calibration: [./one.jsonl]}}",
        "{low: {calibration: low.txt, evaluation: up.txt}, up: {calibration: low.txt, weight: 0}, again: ./low.txt}",
        "{up: {calibration: low.txt, weight: 0}, low: low.txt, again: low.txt}",
    ],
)
def test_a_file_is_the_same_however_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch, sources: str) -> None:
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(ConfigError, match="^dataset.sources.again: the same text as dataset.sources.low"):
        mixed(sources.replace("HERE", str(folder)))


@each("weights", [(1, 0), (0, 1)])
def test_a_file_that_is_not_calibrated_on_is_no_other_sources(folder: Path, weights: tuple[int, int]) -> None:
    first, last = (f"{{calibration: low.txt, evaluation: up.txt, weight: {weight}}}" for weight in weights)
    assert list(mixed(f"{{a: {first}, b: {last}}}").sources) == ["a", "b"], "in either order"


def test_a_mixture_without_a_text_to_evaluate(folder: Path) -> None:
    with pytest.raises(ConfigError, match="none of low, up has a text to evaluate; expected evaluation=FILE"):
        mixed("{low: low.txt, up: up.txt}").check()


def test_a_hub_out_of_reach_names_the_source(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no way")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(RunError, match=r"^dataset\.sources\.c4\.path=allenai/c4: .*no way"):
        mixed("{c4: 1}").calibration(tokenizer)
