"""The dense model that is pruned is the one that its folder holds: what plain transformers makes of it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruneexp.evaluator import Size
from pruneexp.model import Model, ModelSource
from pruneexp.surgery import check_source, dense_logits, prove_in_place, prove_in_process, save, shrink_
from pruneexp.types import Plan, RunError, SitePlan
from tests.cases import each
from tests.tiny_families import TINY, random_model, tiny_model

# What a folder holds, where its config says that the head is the embedding
TIES = ("another_head", "equal_copy", "head_alone")
TIED = ("llama", "gemma3", "opt", "bloom", "gpt2", "pythia", "falcon_7b")
CASES = [(name, "as_saved") for name in (*TINY, "llama", "opt", "bloom")] + [(n, tie) for n in TIED for tie in TIES]

# Runs in a process of its own, without this package.
PLAIN = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
tokens_file, out_file, *folders = sys.argv[1:]
tokens, found = load_file(tokens_file)["tokens"], {}
with torch.no_grad():
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found[folder] = model(tokens, use_cache=False).logits.contiguous()
assert "pruneexp" not in sys.modules
save_file(found, out_file)
"""


def plain_model(name: str) -> Any:
    """A random model with a head of its own, where that can be."""
    if name in TINY:
        prefix, values = TINY[name]
    else:
        prefix = {"llama": "Llama", "opt": "OPT", "bloom": "Bloom"}[name]
        shape = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
        values = {**shape, "intermediate_size": 24, "ffn_dim": 24, "word_embed_proj_dim": 48}
        values |= {"max_position_embeddings": 64}
    return random_model(prefix, {**values, "tie_word_embeddings": False})


def write(name: str, tie: str, folder: Path) -> Path:
    """A checkpoint of a family: as transformers saves it, or with `tie`."""
    if tie == "as_saved":
        (tiny_model(name) if name in TINY else plain_model(name)).save_pretrained(folder)
        return folder
    plain_model(name).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    (head,) = (key for key in tensors if key in ("lm_head.weight", "embed_out.weight"))
    (embedding,) = (
        key
        for key in tensors
        if key.endswith(("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "in.weight"))
    )
    if tie == "equal_copy":
        tensors[head] = tensors[embedding].clone()
    elif tie == "head_alone":
        del tensors[embedding]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("dense")
    return {(name, tie): write(name, tie, root / f"{name}-{tie}") for name, tie in CASES}


@pytest.fixture(scope="module")
def tokens_BT() -> torch.Tensor:
    return torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(
    folders: dict[tuple[str, str], Path], tokens_BT: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], torch.Tensor]:
    """Logits of plain transformers; one process for all folders."""
    scratch = tmp_path_factory.mktemp("plain")
    save_file({"tokens": tokens_BT}, scratch / "tokens")
    command = [sys.executable, "-I", "-c", PLAIN, str(scratch / "tokens"), str(scratch / "out")]
    done = subprocess.run(
        [*command, *map(str, folders.values())],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    logits_of = load_file(scratch / "out")
    return lambda folder: logits_of[str(folder)]


def load(folder: Path, stream: bool) -> Model:
    return ModelSource("dense", str(folder), None, "float32", "cpu", stream, False, 4).load()


def logits(model: Model, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Through the whole module or, streamed, layer by layer."""
    if not model.streamed:
        with torch.no_grad():
            return model.module(tokens_BT, use_cache=False).logits
    hidden, calls = model.enter(tokens_BT)
    for index, call in enumerate(calls):
        with model.loaded(index) as layer:
            hidden = model.run_layer(layer, hidden, call)
    return model.leave(tokens_BT, hidden)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["held", "streamed"])
@each("name, tie", CASES)
def test_it_is_what_plain_transformers_makes_of_the_folder(
    name: str, tie: str, stream: bool, folders: Any, plain: Any, tokens_BT: torch.Tensor
) -> None:
    folder = folders[name, tie]
    torch.testing.assert_close(logits(load(folder, stream), tokens_BT), plain(folder), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@each("name", TIED)
def test_another_head_than_the_embedding_is_another_model(name: str, folders: Any, plain: Any) -> None:
    """Else the comparison above would be empty."""
    other, copy = (plain(folders[name, tie]) for tie in ("another_head", "equal_copy"))
    assert (other - copy).abs().max() > 0.1


@each("stream, tie, name", itertools.product([False, True], TIES, TIED))
def test_ties_are_those_of_the_file(name: str, tie: str, stream: bool, folders: Any) -> None:
    model = load(folders[name, tie], stream)
    source = ModelSource("dense", str(folders[name, tie]), None, "float32", "cpu", stream, False, 4)
    head, embedding = (p.weight for p in (model.module.get_output_embeddings(), model.module.get_input_embeddings()))
    apart = tie == "another_head"
    assert (head is not embedding) == apart == (not model.config.tie_word_embeddings)
    assert all(config.tie_word_embeddings != apart for config in model.configs)
    outline = source.outline()
    assert outline.params == model.params and Size()(outline, None) == Size()(model, None)
    assert model.params - model.decoder_params > (1 + apart) * 64 * 48


@pytest.mark.slow
@pytest.mark.parametrize("name", TIED)
def test_a_head_of_its_own_is_saved(name: str, folders: Any, tokens_BT: torch.Tensor, tmp_path: Path) -> None:
    """Pruned unevenly, saved, reloaded: by transformers alone in a clean process, and here."""
    model = load(folders[name, "another_head"], False)
    sites = {}
    for site in model.sites():
        if site.kind == "mlp":
            sites[site.name] = SitePlan(site.kind, site.units, tuple(range(site.layer, site.units - 2)))
    shrink_(model, Plan(sites))
    assert save(model, tmp_path / "model").kind == "remote_code"
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    again = [load(tmp_path / "model", stream) for stream in (False, True)]
    for one in again:
        assert not one.config.tie_word_embeddings and one.params == model.params
        torch.testing.assert_close(logits(one, tokens_BT), logits(model, tokens_BT), rtol=1e-5, atol=1e-5)
    if name in ("gemma3", "bloom"):
        assert prove_in_process(model, tmp_path / "model", tokens_BT)["max_logit_difference"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("prove", [prove_in_process, prove_in_place])
def test_a_proof_compares_the_source(prove: Any, folders: Any, tokens_BT: torch.Tensor, tmp_path: Path) -> None:
    folder = folders["gemma3", "another_head"]
    source, model = ModelSource("dense", str(folder), None, "float32", "cpu", False, False, 4), load(folder, False)
    save(model, tmp_path / "model")
    own = dense_logits(model, source, tokens_BT, "process")
    proof = prove(model, tmp_path / "model", tokens_BT, own)["source"]
    assert proof["compared"] and proof["relative_difference"] < 1e-5
    check_source(proof, "folder")
    model.module.lm_head.weight = model.module.get_input_embeddings().weight  # as if the config had been believed
    own = dense_logits(model, source, tokens_BT, "process")
    proof = prove(model, tmp_path / "model", tokens_BT, own)["source"]
    assert proof["relative_difference"] > 0.1
    with pytest.raises(RunError, match="model.path='folder': the dense model is not what plain transformers 5"):
        check_source(proof, "folder")
    (tmp_path / "gone").mkdir()
    proof = prove(model, tmp_path / "model", tokens_BT, replace(own, folder=tmp_path / "gone"))["source"]
    assert not proof["compared"] and "plain transformers does not load it" in proof["why"]


def test_why_a_source_is_not_compared(
    folders: Any, tokens_BT: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why(folder: Path, prove: str = "process", stream: bool = False) -> Any:
        source = ModelSource("dense", str(folder), None, "float32", "cpu", stream, False, 4)
        return dense_logits(source.load(), source, tokens_BT, prove)

    folder = folders["llama", "as_saved"]
    assert why(folder, "off") == "run.prove=off"
    assert "streamed" in why(folder, stream=True)
    model = load(folder, False)
    shrink_(model, Plan({s.name: SitePlan(s.kind, s.units, (0,)) for s in model.sites() if s.layer == 0}))
    save(model, tmp_path / "model")
    assert "model.trust_remote_code=true" in why(tmp_path / "model")
    assert not isinstance(why(folder, "in_place"), str)
    monkeypatch.setattr("pruneexp.surgery.prove_source.SMALL", 1000)
    assert "run.prove=process" in why(folder, "in_place") and not isinstance(why(folder), str)
