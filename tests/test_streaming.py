"""How layers come from disk: read and not mapped, the next one on another thread."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruneexp.calibrate import Bookmark, Meter, walk, walk_sites
from pruneexp.evidence import Gram, Moments, WantedOutput
from pruneexp.model import Checkpoint, Model
from pruneexp.model.tensor_file import places, read_tensor
from pruneexp.types import RunError
from tests.benchmarks.big_checkpoint import Shape, write_checkpoint

SHAPE = Shape(hidden=48, intermediate=80, layers=5, heads=6, kv_heads=3, vocab=96)


@pytest.fixture
def streamed(tmp_path: Path, source: Callable[..., Any]) -> Model:
    write_checkpoint(tmp_path, SHAPE, "float32", seed=0)
    return source(tmp_path, stream=True).load()


def test_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {
        "matrix": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(2, 2, dtype=torch.float64),
    }
    save_file(tensors, file)
    place_of = places(file)
    assert place_of.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = read_tensor(file, place_of[name])
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    largest = max(place_of.values(), key=lambda place: place.start)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match="ends within a tensor"):
        read_tensor(file, largest)


def test_the_big_checkpoint_is_one_that_others_load(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    total = write_checkpoint(tmp_path, SHAPE, "bfloat16", seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert total == 2 * sum(p.numel() for p in model.parameters()) and model.dtype == torch.bfloat16
    states = model(torch.arange(40)[None], output_hidden_states=True).hidden_states
    assert all(0.5 < state.float().std() < 3 for state in states[:-1])
    assert model.model.layers[0].mlp.up_proj.weight.ne(model.model.layers[1].mlp.up_proj.weight).any()


class Reads:
    """Notes which layer is read, and on which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: int | None = None):
        self.seen: list[tuple[int, bool]] = []  # layer, whether the main thread read it
        get = Checkpoint.__getitem__

        def noted(checkpoint: Checkpoint, name: str) -> torch.Tensor:
            if name.endswith("down_proj.weight"):
                layer = int(name.split(".")[2])
                self.seen.append((layer, threading.current_thread() is threading.main_thread()))
                if layer == broken:
                    raise RunError(f"layer {layer} cannot be read")
            return get(checkpoint, name)

        monkeypatch.setattr(Checkpoint, "__getitem__", noted)


def settle() -> None:
    """Until the reading threads have ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("read-ahead"):
            thread.join(10)


@pytest.mark.parametrize("run", ["walk", "walk_sites"])
def test_one_layer_is_read_ahead(
    run: str, streamed: Model, tokens_NT: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    walked = (
        (visit.index for visit in walk(streamed, tokens_NT, (Moments,), Bookmark(Meter(), "test")))
        if run == "walk"
        else (
            visit.index for visit, _, _ in walk_sites(streamed, tokens_NT, WantedOutput, (), Bookmark(Meter(), "test"))
        )
    )
    for index in walked:
        settle()
        assert reads.seen[-1][0] == min(index + 1, SHAPE.layers - 1), "one ahead and no more"
    assert [layer for layer, _ in reads.seen] == list(range(SHAPE.layers)), "each once"
    assert [on_main for _, on_main in reads.seen] == [True] + [False] * (SHAPE.layers - 1)


def test_reading_goes_on_while_a_layer_is_worked_on(streamed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    get = Checkpoint.__getitem__

    def slow(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        time.sleep(0.2 if name.endswith("down_proj.weight") else 0)
        return get(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "__getitem__", slow)
    with streamed.loaded(0, then=1):
        time.sleep(0.4)  # the work
        start = time.monotonic()
        settle()
    with streamed.loaded(1):
        assert time.monotonic() - start < 0.15


def test_what_goes_wrong_ahead_is_raised_at_its_layer(
    streamed: Model, tokens_NT: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    Reads(monkeypatch, broken=3)
    seen = []
    with pytest.raises(RunError, match="layer 3 cannot be read"):
        for visit in walk(streamed, tokens_NT, (Moments,), Bookmark(Meter(), "test")):
            settle()
            seen.append(visit.index)
    assert seen == [0, 1, 2]
    assert all(p.is_meta for p in streamed.layers.parameters())


@pytest.fixture
def young() -> Iterator[None]:
    """The collector looks at what comes from here on: there is much else in a process that has run many tests."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_an_abandoned_walk_lets_go_of_what_it_read(streamed: Model, tokens_NT: torch.Tensor, young: None) -> None:
    shape = streamed.layers[1].get_submodule("mlp.down_proj").weight.shape

    def held() -> int:
        gc.collect()
        tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and not o.is_meta)
        return len({tensor.data_ptr() for tensor in tensors if tensor.shape == shape})

    before = held()
    walking = walk(streamed, tokens_NT, (Moments,), Bookmark(Meter(), "test"))
    visit = next(walking)
    settle()
    assert held() == before + 2, "the layer and the one behind it"
    del visit
    walking.close()  # type: ignore[attr-defined]
    settle()
    assert held() == before and all(p.is_meta for p in streamed.layers.parameters())
    with streamed.loaded(2) as layer:
        name = "model.layers.2.mlp.down_proj.weight"
        file = streamed.checkpoint._places[name][0]  # type: ignore[union-attr]
        assert torch.equal(layer.state_dict()["mlp.down_proj.weight"], load_file(file)[name])


def test_batches_of_one_size_share_their_masks(loaded: Callable[..., Model], source: Callable[..., Any]) -> None:
    held = loaded("gemma2")  # makes its masks itself, whatever multiplies
    streamed = source(held.source_folder, dtype="float64", stream=True).load()
    tokens_NT = torch.randint(3, 64, (7, 20), generator=torch.Generator().manual_seed(1))
    masks, run_layer = set(), streamed.run_layer

    def noted(layer: Any, hidden_BTD: torch.Tensor, call: Any) -> torch.Tensor:
        masks.add(call.kwargs["attention_mask"])
        return run_layer(layer, hidden_BTD, call)

    streamed.run_layer = noted  # type: ignore[method-assign]
    losses = streamed.token_losses(tokens_NT, 2)
    assert len(masks) == 4, "two kinds of attention, batches of two and of one"
    torch.testing.assert_close(losses, held.token_losses(tokens_NT, 2), rtol=0, atol=0)


def test_a_gram_grows_in_its_own_memory() -> None:
    gram = Gram(0, torch.zeros(40, dtype=torch.float64), torch.zeros(40, 40, dtype=torch.float64))
    x = torch.randn(3, 8, 40, dtype=torch.float64)
    seen = gram.update_(x[:1]).update_(x[1:])
    assert seen.gram_CC.data_ptr() == gram.gram_CC.data_ptr()
    assert seen.n == 24 and torch.allclose(seen.gram_CC, x.flatten(0, 1).T @ x.flatten(0, 1))


def test_a_gram_is_whole_however_its_triangle_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    import pruneexp.evidence.gram as module

    x = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = x.flatten(0, 1)
    for rows in (7, 20, 40, 1024):
        monkeypatch.setattr(module, "_ROWS", (rows, rows))
        empty = Gram(0, torch.zeros(40, dtype=torch.float64), torch.zeros(40, 40, dtype=torch.float64))
        seen = empty.update_(x[:1]).update_(x[1:])
        torch.testing.assert_close(seen.gram_CC, flat.T @ flat, rtol=1e-12, atol=1e-12)
