"""A checkpoint larger than memory is exported layer by layer, to the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pruneexp.export import main, streamed
from pruneexp.model import Model, ModelSource
from pruneexp.surgery import save, shrink_
from pruneexp.types import Plan, SitePlan
from tests.llama_like import pruned_folder

EVEN = ((0, 5), (2, 0), (2, 7))  # attention units and FFN channels that stay in each layer


@pytest.fixture
def layers_in_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many decoder layers held weights, whenever one was loaded."""
    counts: list[int] = []
    loaded = Model.loaded

    def counting(self: Model, index: int, *then: Any) -> Any:
        counts.append(sum(not p.is_meta for layer in self.layers for p in list(layer.parameters())[:1]))
        return loaded(self, index, *then)

    monkeypatch.setattr(Model, "loaded", counting)
    return counts


def files_of(folder: Path) -> dict[str, Any]:
    """What a folder holds, its record aside."""
    contents: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            contents |= {name: tensor.tolist() for name, tensor in load_file(path).items()}
        elif path.name != "export.json":
            contents[path.name] = path.read_bytes()
    return contents


@pytest.mark.parametrize(
    ("format", "proof"),
    [
        ("remote_code", "block_by_block"),
        ("padded", "block_by_block"),
        ("gguf", "read_back"),
        ("vllm", "read_back"),
    ],
)
def test_the_same_files_layer_by_layer(
    format: str, proof: str, tmp_path: Path, layers_in_memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if format == "gguf":
        pytest.importorskip("gguf")
    folder = pruned_folder(tmp_path, "llama", EVEN, biases=True)
    assert main([str(folder), f"format={format}", f"out={tmp_path / 'whole'}", "prove=off"]) == 0
    layers_in_memory.clear()
    monkeypatch.setattr(streamed, "available_memory", lambda device: 100_000)
    assert main([str(folder), f"format={format}", f"out={tmp_path / 'streamed'}", "prove=in_place"]) == 0
    assert layers_in_memory and not any(layers_in_memory), "one at a time"
    whole, parts = (files_of(tmp_path / name) for name in ("whole", "streamed"))
    assert whole == parts
    record = json.loads((tmp_path / "streamed" / "export.json").read_text())
    assert record["streamed"] and record["prove"] == proof
    assert record.get("max_logit_difference", 0.0) < 1e-5 and record.get("max_block_difference", 0.0) < 1e-5
    assert not json.loads((tmp_path / "whole" / "export.json").read_text())["streamed"]


def test_a_stock_form_with_biases(tmp_path: Path) -> None:
    folder = pruned_folder(tmp_path, "llama", ((2, 7), (2, 7), (2, 7)), biases=True)
    for stream in ("true", "false"):
        arguments = [str(folder), "format=stock", f"stream={stream}", f"out={tmp_path / stream}"]
        assert main([*arguments, "prove=in_place"]) == 0
    assert files_of(tmp_path / "true") == files_of(tmp_path / "false")
    record = json.loads((tmp_path / "true" / "export.json").read_text())
    assert record["prove"] == "block_by_block" and record["max_logit_difference"] < 1e-5


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_other_families(family: str, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    model = ModelSource(family, str(tiny_folder(family)), None, "float64", "cpu", False, False, 4).load()
    kept = {s.name: SitePlan(s.kind, s.units, tuple(range(s.units - 1 - s.layer))) for s in model.sites()}
    shrink_(model, Plan(kept))
    save(model, tmp_path / "pruned")
    for stream in ("true", "false"):
        arguments = [str(tmp_path / "pruned"), "format=padded", f"stream={stream}", f"out={tmp_path / stream}"]
        assert main([*arguments, "prove=in_place"]) == 0
    assert files_of(tmp_path / "true") == files_of(tmp_path / "false")


def test_another_model_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, padded_layer = pruned_folder(tmp_path, "llama", EVEN), streamed.padded_layer

    def wrong(model: Model, index: int, *arguments: Any) -> Any:
        layer: Any = padded_layer(model, index, *arguments)
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight * 1.5, requires_grad=False)
        return layer

    monkeypatch.setattr(streamed, "padded_layer", wrong)
    assert main([str(folder), "format=padded", "stream=true", f"out={tmp_path / 'out'}", "prove=in_place"]) == 1
    assert "computes something else" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_by_the_memory_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pruned_folder(tmp_path, "llama", EVEN)
    outline = ModelSource("x", str(folder), None, "float32", "cpu", False, False, 1).outline()
    for free, expected in ((outline.params * 16 + 2, False), (outline.params * 16 - 2, True)):
        monkeypatch.setattr(streamed, "available_memory", lambda device, free=free: free)
        assert streamed.wants_streaming(outline) is expected
