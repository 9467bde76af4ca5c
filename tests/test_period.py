"""Layers removed from models whose layers differ by a period: software that assumes the period is warned of."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy
import pytest

from pruneexp import __main__
from pruneexp.export import main
from pruneexp.model import ModelSource
from pruneexp.surgery import broken_period, remove_blocks_, save
from pruneexp.types import Plan, SitePlan
from tests.tiny_families import TINY, random_model

LAYERS = {"num_hidden_layers": 7}
GEMMA3 = {**TINY["gemma3"][1], **LAYERS, "layer_types": None}  # every sixth layer attends to everything
GEMMA2 = {**TINY["gemma2"][1], **LAYERS, "layer_types": None}  # every other one
SMOLLM3 = {**TINY["smollm3"][1], **LAYERS, "no_rope_layers": None, "no_rope_layer_interval": 4}


def without(layers: list[int], prefix: str, values: dict[str, Any], folder: Path) -> Path:
    random_model(prefix, values).save_pretrained(folder / "dense")
    model = ModelSource("own", str(folder / "dense"), None, "float64", "cpu", False, False, 4).load()
    sites = {f"{model.layers_path}.{index}": SitePlan("block", 1, ()) for index in layers}
    remove_blocks_(model, Plan(sites))
    save(model, folder / "pruned")
    return folder / "pruned"


@pytest.mark.parametrize(
    ("prefix", "values", "layers", "attribute"),
    [
        ("Gemma3Text", GEMMA3, [2], "layer_types"),
        ("Gemma3Text", GEMMA3, [6], ""),
        ("Gemma3Text", GEMMA3, [], ""),
        ("Gemma2", GEMMA2, [0], "layer_types"),
        ("SmolLM3", SMOLLM3, [0], "no_rope_layers"),
        ("SmolLM3", SMOLLM3, [6], ""),
        ("Llama", {**TINY["llama_multi_query"][1], **LAYERS}, [2], ""),
        ("Cohere2", {**TINY["cohere2"][1], **LAYERS, "layer_types": None}, [2], "layer_types"),
        ("Exaone4", TINY["exaone4_full"][1], [1], ""),  # without sliding windows its class has no period
    ],
)
def test_exports_say_that_the_period_is_broken(
    prefix: str, values: dict[str, Any], layers: list[int], attribute: str, tmp_path: Path
) -> None:
    folder, out = without(layers, prefix, values, tmp_path), tmp_path / "out"
    for stream in ("false", "true"):
        command = [str(folder), "format=stock", f"out={out}", "prove=off", "overwrite=true", f"stream={stream}"]
        assert main(command) == 0
        notes = json.loads((out / "export.json").read_text()).get("notes", [])
        assert len(notes) == bool(attribute)
        assert not notes or notes[0].startswith(f"no GGUF file of it: the model's {attribute} do not repeat")


def test_the_servers_own_converter_is_not_recommended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = without([], "Gemma3Text", GEMMA3, tmp_path / "whole")
    assert main([str(whole), "format=gguf", f"out={tmp_path / 'out'}"]) == 2
    assert "which the server's own converter or loader may know" in capsys.readouterr().err
    folder = without([2], "Gemma3Text", GEMMA3, tmp_path / "without")
    assert main([str(folder), "format=gguf", f"out={tmp_path / 'out'}"]) == 2
    line = capsys.readouterr().err
    assert "own converter" not in line and "no GGUF file, llama.cpp assumes another order of layer_types" in line


def test_a_run_says_so_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dense = random_model("Gemma2", GEMMA2)
    for linear in (dense.model.layers[2].self_attn.o_proj, dense.model.layers[2].mlp.down_proj):
        linear.weight.data.zero_()  # nothing depends on this layer
    dense.save_pretrained(tmp_path / "dense")
    numbers = tmp_path / "tokens.npy"
    numpy.save(numbers, numpy.random.default_rng(0).integers(3, 64, (4, 16)))
    data = [f"dataset.{split}={numbers}" for split in ("calibration", "evaluation")]
    model = ["model=hf", f"model.path={tmp_path / 'dense'}", "dataset=tokens", "dataset.length=16", *data]
    with caplog.at_level(logging.WARNING, "pruneexp"):
        arguments = [
            "recipe=shortgpt",
            "sparsity.ratio=0.4",
            *model,
            "evaluator=[size]",
            f"run.dir={tmp_path / 'run'}",
            "run.prove=off",
            "cache=off",
        ]
        assert __main__.main(arguments) == 0
    config = ModelSource("own", str(tmp_path / "run/model"), None, "float64", "cpu", False, False, 4).outline().config
    assert broken_period(config) == "layer_types"
    assert "model/: no GGUF file of it: the model's layer_types do not repeat" in caplog.text
