"""What models write: against transformers' own generation, closed forms, and batches of one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pruneexp.dataset import Embedded, tokens
from pruneexp.embedded import FOLDER
from pruneexp.evaluator import Generation
from pruneexp.evaluator.generation import (
    agreement,
    common_prefix,
    continued,
    drawn,
    end_tokens,
    side_by_side,
    text_figures,
    up_to,
)
from pruneexp.experiment.run import run_experiment
from pruneexp.types import ConfigError
from tests.cases import each


@pytest.fixture(scope="module")
def llama() -> Any:
    from pruneexp.model import ModelSource

    settings = {"revision": None, "dtype": "float64", "device": "cpu", "stream": False, "trust_remote_code": False}
    return ModelSource(name="embedded", path=str(FOLDER / "llama"), batch_size=4, **settings).load()  # type: ignore


def a_generation(**changes: Any) -> Generation:
    dataset = Embedded(samples=2, length=24, seed=0, evaluation_samples=9, bos=False)
    fields = {"dataset": dataset, "prompts": None, "prompt_tokens": 12, "samples": 5, "new_tokens": 10}
    return Generation(**{**fields, "temperature": 0.0, "seed": 3, "batch_size": 4, "bos": False, **changes})  # type: ignore[arg-type]


def written(evaluator: Generation, model: Any) -> list[list[int]]:
    return evaluator._write(model, evaluator._prompts(model.tokenizer))


# what is written


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_greedy_is_what_transformers_generates(family, tiny):
    model = tiny(family)
    prompt_BT = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(2))
    ours = continued(model.module, prompt_BT, lambda logits_BV, step: logits_BV.argmax(-1), 12)
    theirs = model.module.generate(
        prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=12, min_new_tokens=12, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(ours, theirs[:, 7:])


class Counting:
    """A model whose KV cache is the number of tokens so far, which it predicts."""

    def _output(self, ids: torch.Tensor, seen: Any, name: str) -> Any:
        seen = (seen or 0) + ids.shape[1]
        return SimpleNamespace(logits=torch.eye(9)[seen].expand(len(ids), 1, 9), **{name: seen})


class Before(Counting):
    def forward(self, ids: Any, use_cache: bool, past_key_values: Any = None) -> Any:
        return self._output(ids, past_key_values, "past_key_values")

    __call__ = forward


class Since(Counting):
    def forward(self, ids: Any, use_cache: bool, cache: Any = None) -> Any:
        return self._output(ids, cache, "cache")

    __call__ = forward


@pytest.mark.parametrize("version", [Before, Since])
def test_the_kv_cache_goes_by_the_name_that_the_model_has_for_it(version: Any) -> None:
    tokens_BS = continued(version(), torch.zeros(2, 3, dtype=torch.int64), lambda logits_BV, _: logits_BV.argmax(-1), 4)
    assert tokens_BS.tolist() == [[3, 4, 5, 6]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_batches_do_not_matter(llama, temperature, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("Rosa Page put the cup\nNora\n\nThe dogs were happy there. They\nRosa\n")
    for changes in ({}, {"prompts": str(path)}):
        alike = [
            written(a_generation(temperature=temperature, batch_size=size, **changes), llama) for size in (1, 2, 100)
        ]
        assert alike[0] == alike[1] == alike[2] and len(alike[0]) == (4 if changes else 5)


def test_draws_follow_the_distribution_and_the_seed(llama):
    logits_V = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    uniform_B = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000
    counts = torch.bincount(drawn(logits_V.expand(100000, 4), uniform_B), minlength=4) / 100000
    assert torch.allclose(counts.double(), logits_V.softmax(0), atol=2e-5)
    edge = drawn(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64))
    assert edge.tolist() == [0, 1]
    same, other = [written(a_generation(temperature=1.0, seed=seed), llama) for seed in (3, 4)]
    assert same == written(a_generation(temperature=1.0), llama) and same != other
    cold = written(a_generation(temperature=1e-4), llama)
    assert cold == written(a_generation(), llama)


def test_texts_end_where_the_model_ends_them(llama, monkeypatch):
    assert up_to([4, 5, 2, 6], frozenset([2, 9])) == [4, 5] and up_to([2], frozenset([2])) == []
    assert up_to([4, 5], frozenset()) == [4, 5]
    config = SimpleNamespace(eos_token_id=[7, 8])
    assert end_tokens(SimpleNamespace(config=config)) == {7, 8}
    assert end_tokens(SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=5))) == {5}
    assert end_tokens(SimpleNamespace(config=SimpleNamespace())) == frozenset()
    whole = written(a_generation(), llama)
    stop = whole[0][4]
    monkeypatch.setattr(llama.module.generation_config, "eos_token_id", stop)
    assert written(a_generation(), llama) == [up_to(text, frozenset([stop])) for text in whole]


def test_prompts_are_spread_over_the_windows(llama):
    evaluator = a_generation()
    windows_NT = evaluator.dataset.evaluation(llama.tokenizer, None)
    made = torch.stack(evaluator._prompts(llama.tokenizer))
    assert torch.equal(made, windows_NT[[0, 2, 4, 6, 8], :12])
    assert len(a_generation(samples=50)._prompts(llama.tokenizer)) == 9
    assert evaluator.longest(llama.tokenizer) == 22


# figures


def test_figures_by_hand():
    figures = text_figures([[1, 2, 1, 2, 1, 2], [3, 3]])
    assert figures == {
        "distinct_1": 3 / 8,
        "distinct_2": 3 / 6,  # 12 21 12 21 12, 33
        "distinct_3": 2 / 4,  # 121 212 121 212
        "seq_rep_4": pytest.approx(1 - 2 / 3),  # 1212 2121 1212; the other text has none
    }
    assert text_figures([[1, 2, 3, 4, 5]])["seq_rep_4"] == 0
    assert text_figures([[]]) == {} and set(text_figures([[1]])) == {"distinct_1"}
    assert agreement([[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 6]]) == {"exact_match": 0.5, "common_prefix": 2.0}
    assert [common_prefix(*pair) for pair in (([1], [1, 2]), ([], [1]), ([2], [1]))] == [1, 0, 0]


def test_names_and_the_dense_model_as_reference(llama):
    evaluator = a_generation()
    dense = evaluator(llama, llama.tokenizer)
    names = {"distinct_1", "distinct_2", "distinct_3", "seq_rep_4"}
    assert set(dense.figures) == {f"{name}/embedded@12+10[5]" for name in names}
    assert dense.files == {} and evaluator(llama, llama.tokenizer) == dense  # nothing is held between calls
    agreed = {"exact_match/embedded@12+10[5]": 1.0, "common_prefix/embedded@12+10[5]": 10.0}
    assert evaluator.against(dense, dense, llama.tokenizer).figures == agreed
    head = llama.module.get_output_embeddings().weight
    try:
        head.data.neg_()
        other = evaluator.against(dense, evaluator(llama, llama.tokenizer), llama.tokenizer).figures
    finally:
        head.data.neg_()
    assert other["exact_match/embedded@12+10[5]"] == 0 and other["common_prefix/embedded@12+10[5]"] < 1
    sampled = a_generation(temperature=0.5, samples=2)(llama, llama.tokenizer)
    assert "distinct_2/embedded@12+10t0.5[2]" in sampled.figures


def test_a_table_that_any_text_fits():
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    def ids(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    texts = "a|b", "*<i>\nnew", "*<i>\\"
    table = side_by_side(Letters(), *([ids(text)] for text in texts))
    assert table.splitlines()[2:] == [
        "| a&#124;b | &#42;&lt;i&gt;<br>new | &#42;&lt;i&gt;&#92; | 4 of 8 |"  # numbers and names are characters
    ]
    assert side_by_side(None, [[1, 2]], [[3]], [[3]]).splitlines()[2] == "| 1 2 | 3 | 3 | 1 of 1 |"


def test_tokens_need_no_tokenizer(llama, tmp_path):
    np.save(tmp_path / "windows.npy", np.arange(60).reshape(3, 20))
    evaluator = a_generation(dataset=tokens(None, str(tmp_path / "windows.npy"), None, None, False))
    evaluator.check()
    evaluator.prepare(None, llama.vocab_size)
    first = evaluator(llama, None)
    assert "distinct_1/windows@12+10[3]" in first.figures
    assert "| 0 1 2 3 4 5 6 7 8 9 10 11 |" in evaluator.against(first, first, None).files["md"]
    with pytest.raises(ConfigError, match=r"windows.npy: token id 59 .* vocabulary \(59\)|token id 40 .* \(40\)"):
        a_generation(dataset=evaluator.dataset, prompt_tokens=20).prepare(None, 40)


def test_a_run_shows_the_samples_side_by_side(build_from, tmp_path):
    lines = tmp_path / "my prompts.txt"
    lines.write_text("Rosa Page put the cup in the box\n\nThe dogs were\n")
    changes = ["evaluator.generation.new_tokens=8", f"evaluator.generation.prompts='{lines}'"]
    run = ["evaluator=[generation]", *changes, "run.dir=run", "run.save=false", "dataset.samples=2", "recipe=magnitude"]
    metrics = run_experiment(build_from(*run)).metrics
    assert "dense/distinct_2/my_prompts@+8[2]" in metrics and "dense/exact_match/my_prompts@+8[2]" not in metrics
    assert 0 <= metrics["pruned/exact_match/my_prompts@+8[2]"] <= 1
    table = Path("run/samples/generation.md").read_text().splitlines()
    assert len(table) == 4 and "Rosa Page put the cup in the box" in table[2]
    assert json.loads(Path("run/metrics.json").read_text()).keys() == metrics.keys()
    run_experiment(build_from("evaluator=[size]", *run[-4:], "run.overwrite=true"))
    assert not Path("run/samples").exists()


# mistakes


@each(
    "changes, expected",
    [
        ({"prompt_tokens": 0}, "prompt_tokens=0: expected an integer >= 1"),
        ({"samples": 0}, "samples=0: expected an integer >= 1"),
        ({"new_tokens": 3}, "new_tokens=3: expected an integer >= 4"),
        ({"batch_size": 0}, "batch_size=0: expected an integer >= 1"),
        ({"seed": -1}, "seed=-1: expected an integer >= 0"),
        ({"temperature": -0.1}, "temperature=-0.1: expected a number >= 0; 0 takes the likeliest token"),
        ({"temperature": float("nan")}, "temperature=nan: expected a number >= 0; 0 takes the likeliest token"),
    ],
)
def test_config_errors(changes, expected):
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        a_generation(**changes)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no such file"), (b" \n\n", "the file is empty"), (b"a\n\xff", "byte 2 is not UTF-8")],
)
def test_prompts_that_cannot_be_read(content, expected, tmp_path):
    path = tmp_path / "lines.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^evaluator.generation.prompts={path}: {expected}; expected a UTF-8 text"):
        a_generation(prompts=str(path)).check()
    with pytest.raises(ConfigError, match=f"prompts={tmp_path}: this is a directory"):
        a_generation(prompts=str(tmp_path)).check()


def test_a_byte_order_mark_is_no_prompt(tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbfRosa Page\r\n\r\nNora\r\n")
    assert a_generation(prompts=str(tmp_path / "lines.txt"))._lines() == ["Rosa Page", "Nora"]


@pytest.mark.slow
def test_prompts_that_do_not_fit(llama, build_from, tmp_path):
    with pytest.raises(
        ConfigError, match="prompt_tokens=25: expected at most 24, the width of the windows of dataset="
    ):
        a_generation(prompt_tokens=25).prepare(llama.tokenizer, llama.vocab_size)
    (tmp_path / "lines.txt").write_text("one")
    with pytest.raises(ConfigError, match="prompts=.*: text needs a tokenizer and the model has none"):
        a_generation(prompts=str(tmp_path / "lines.txt")).prepare(None, 10)
    with pytest.raises(ConfigError, match="evaluator=generation needs the whole model in memory"):
        build_from("model.stream=true", "evaluator=[generation]")
    for name, change in (("generation", "new_tokens=500"), ("latency", "prompt=500")):
        long = build_from(f"evaluator=[{name}]", f"evaluator.{name}.{change}", "run.dry=true")
        with pytest.raises(ConfigError, match=f"^evaluator.{name}: a prompt .* take 5.. tokens; expected at most 512"):
            run_experiment(long)
