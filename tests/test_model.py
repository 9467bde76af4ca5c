"""Loading and its mistakes, the sites of every family counted by hand, and decoder layers as tensors by role."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pruneexp import progress
from pruneexp.__main__ import main
from pruneexp.dataset import files as dataset_files
from pruneexp.embedded import FOLDER
from pruneexp.evaluator import Size
from pruneexp.model import Model, modeling_pruned
from pruneexp.model import source as model_source
from pruneexp.surgery import save
from pruneexp.tracker import structure
from pruneexp.types import ConfigError, Cost, RunError
from tests.cases import each
from tests.conftest import FAMILIES, PARITY
from tests.messages import assert_told

D, HEAD = 48, 8  # hidden size and head size of the tiny models

Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Exit code and stderr of a short run in `tmp_path`; arguments typed later win."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(progress, "BAR_AFTER", 3600.0)  # what a slow machine says about waiting is not asked here
    monkeypatch.setattr(structure, "structure_figure", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, str]:
        files = [f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
        plain = ["model=hf", f"model.path={PARITY}", "dataset=tokens", "dataset.length=64", *files]
        capfd.readouterr()  # what writing a checkpoint has shown
        try:
            code = main([*plain, "run.dir=run", "run.prove=off", "evaluator=[size]", *arguments])
        finally:
            signal.signal(signal.SIGTERM, before)
        return code, capfd.readouterr().err

    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of a small LLaMA checkpoint, to be damaged."""
    folder = tmp_path / "damaged"
    shutil.copytree(PARITY, folder, ignore=shutil.ignore_patterns("oracle*", "*.npy", "README.md"))
    return folder


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def rename_to_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def point_to_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": names[0], "lm_head.weight": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def break_the_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"metadata": {')


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
    "config.json no JSON": (lambda folder: (folder / "config.json").write_text("{"), ("config.json", "JSON", "line 1")),
    "config.json a list": (lambda folder: (folder / "config.json").write_text("[]"), ("config.json", "list", "object")),
    "impossible config": (lambda folder: edit_config(folder, num_attention_heads=5), ("config.json", "llama")),
    "another family": (
        lambda folder: edit_config(folder, model_type="bert"),
        ("model_type 'bert'", *modeling_pruned.FAMILIES),
    ),
    "quantised": (lambda folder: edit_config(folder, quantization_config={"bits": 4}), ("quantised", "4 bits")),
    "pickled": (
        rename_to_bin,
        (
            "pytorch_model.bin",
            "safetensors",
            'python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained({path}, dtype='auto').save_pretrained('NEW_FOLDER')\"",
        ),
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ("no weights", "model.safetensors", "model.safetensors.index.json"),
    ),
    "a missing shard": (
        point_to_a_missing_shard,
        ("model.safetensors.index.json", "model-00002-of-00002.safetensors"),
    ),
    "a broken index": (break_the_index, ("model.safetensors.index.json",)),
    "truncated": (truncate, ("model.safetensors", "cut short")),
}


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused_before_anything_is_written(
    case: str, stream: str, cli: Cli, checkpoint: Path
) -> None:
    damage, typed = DAMAGED[case]
    damage(checkpoint)
    code, err = cli(f"model.path={checkpoint}", f"model.stream={stream}")
    path = repr(str(checkpoint))
    assert_told(err, f"model.path={path}", *(words.format(path=path) for words in typed))
    assert code == 2
    assert not Path("run").exists()


ODD_PATHS = [
    "",
    "nowhere/of/all",
    "./no/where",
    "gpt2",
    "owner/a name",
    "owner/name.git",
    "https://hub.co/a/b",
    "~no_one/x",
]


@pytest.mark.parametrize("path", [*ODD_PATHS, "x" * 5000])
def test_a_path_that_is_no_folder_and_no_hub_id(path: str, cli: Cli) -> None:
    code, err = cli(f"model.path='{path}'")
    assert_told(err, f"model.path={path!r}", "config.json", "*.safetensors", "*.gguf", "owner/name")
    assert code == 2


def test_a_run_in_the_place_of_its_checkpoint(cli: Cli, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path / "a run" / "model")
    code, err = cli(f"model.path='{tmp_path / 'a run'}/'")
    place = f"{tmp_path / 'a run'}"
    assert_told(err, f"model.path={place + '/'!r}", f"{place}/model")
    assert code == 2


def test_a_path_that_is_a_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.safetensors").touch()  # a path that could be a Hub id
    code, err = cli("model.path=models/model.safetensors")
    assert_told(err, "model.path='models/model.safetensors'", "file", "folder")
    assert code == 2


def test_a_hub_id_that_cannot_be_had(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("offline\nand more words")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    code, err = cli("model.path=some/model")
    assert_told(err, "model.path='some/model'", "no such folder", "Hub", "offline")
    assert code == 2 and "more words" not in err


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop("model.layers.3.mlp.up_proj.weight"), ("lacks", "model.layers.3.mlp.up_proj.weight")),
        (lambda t: t.pop("model.norm.weight"), ("lacks", "model.norm.weight")),
        (
            lambda t: t.update({"model.layers.2.self_attn.o_proj.bias": torch.ones(64)}),
            ("besides", "model.layers.2.self_attn.o_proj.bias"),
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(171, 64)}),
            ("shape", "model.layers.2.mlp.up_proj.weight"),
        ),
    ],
    ids=["missing in a layer", "missing", "extra", "shape"],
)
def test_tensors_that_do_not_fit_are_named(
    edit: Callable[[dict[str, torch.Tensor]], object], named: tuple[str, str], stream: str, cli: Cli, checkpoint: Path
) -> None:
    edit_tensors(checkpoint, edit)
    code, err = cli(f"model.path={checkpoint}", f"model.stream={stream}")
    assert_told(err, f"model.path={str(checkpoint)!r}", "config", *named)
    assert code == 2 and err.count(".weight") + err.count(".bias") == 1
    assert not Path("run").exists(), "told from the files' headers"


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
@pytest.mark.parametrize("token", [256, -1])
def test_token_ids_out_of_the_vocabulary(part: str, token: int, cli: Cli, tmp_path: Path) -> None:
    windows = np.full((2, 64), 7)
    windows[1, 5] = token
    np.save("bad.npy", windows)
    code, err = cli(f"dataset.{part}=bad.npy", "evaluator=[perplexity]")
    typed = (f"token id {token}", "window 1", "position 5", "256" if token > 0 else "negative")
    assert_told(err, f"dataset.{part}=bad.npy", *typed)
    assert code == 2
    assert not Path("run").exists()


def test_calibration_windows_longer_than_the_model_reads(cli: Cli) -> None:
    np.save("long.npy", np.full((2, 300), 7))
    code, err = cli("dataset.calibration=long.npy")
    assert_told(err, "dataset.calibration=long.npy", "300", "256")
    assert code == 2
    assert not Path("run").exists()


def test_a_length_that_the_model_does_not_read_is_told_before_any_text_is_tokenised(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("train.txt").write_text("abc")
    monkeypatch.setattr(dataset_files, "encode", lambda *_, **__: pytest.fail("tokenised"))
    code, err = cli(
        "dataset=text", "dataset.calibration=train.txt", "dataset.evaluation=train.txt", "dataset.length=300"
    )
    assert_told(err, "dataset.length=300", "256")
    assert code == 2


def test_evaluation_windows_beyond_learned_positions(
    cli: Cli, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    np.save("short.npy", np.full((2, 64), 7))
    np.save("long.npy", np.full((2, 80), 7))
    files = ["dataset.calibration=short.npy", "dataset.evaluation=long.npy", "dataset.length=null"]
    code, err = cli(f"model.path={tiny_folder('opt')}", *files, "evaluator=[perplexity]")
    assert code == 2 and err.count("\n") == 1 and "64" in err
    assert not Path("run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(cli: Cli) -> None:
    line = "pruneexp: model.device='cuda:1': this machine has 0 CUDA devices; expected cpu\n"
    assert cli("model.device=cuda:1") == (2, line)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("stored", "dtype", "held"),
    [
        ("float16", "auto", torch.float32),
        ("float16", "float16", torch.float16),
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "float64", torch.float64),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("stream", [False, True])
def test_precision(
    stored: str,
    dtype: str,
    held: torch.dtype,
    key: str,
    stream: bool,
    source: Callable[..., Any],
    checkpoint: Path,
) -> None:
    kept = getattr(torch, stored)
    edit_tensors(checkpoint, lambda tensors: tensors.update({k: t.to(kept) for k, t in tensors.items()}))
    config = json.loads((checkpoint / "config.json").read_text())
    del config["torch_dtype"]
    (checkpoint / "config.json").write_text(json.dumps({**config, key: stored}))
    model = source(checkpoint, dtype=dtype, stream=stream).load()
    assert model.dtype == held
    assert {p.dtype for p in model.module.parameters()} == {held}
    with model.loaded(1) as layer:
        assert {p.dtype for p in layer.parameters()} == {held}


# name, units, width, cost of one unit (written out: rows of the writers, columns of the reader, biases)
ATTENTION_COST = {
    "llama": Cost(params=(16 + 8 + 8) * D + D * 16, macs=48 * D, kv=2 * HEAD, context_macs=2 * 16),
    "opt": Cost(params=3 * (8 * D + 8) + D * 8, macs=32 * D, kv=2 * HEAD, context_macs=2 * 8),
    "bloom": Cost(params=3 * (8 * D + 8) + D * 8, macs=32 * D, kv=2 * HEAD, context_macs=2 * 8),
}
MLP_COST = {
    "llama": Cost(params=3 * D, macs=3 * D, kv=0),
    "opt": Cost(params=2 * D + 1, macs=2 * D, kv=0),
    "bloom": Cost(params=2 * D + 1, macs=2 * D, kv=0),
}
NAMES = {
    "llama": ("model.layers.{}.self_attn", "model.layers.{}.mlp"),
    "opt": ("model.decoder.layers.{}.self_attn", "model.decoder.layers.{}.fc2"),
    "bloom": ("transformer.h.{}.self_attention", "transformer.h.{}.mlp"),
}
UNITS = {"llama": (3, 40), "opt": (6, 40), "bloom": (6, 192)}
WIDTH = {"llama": (16, 1), "opt": (8, 1), "bloom": (8, 1)}
REST_OF_A_LAYER = {  # norms, and the readers' biases
    "llama": 2 * D,
    "opt": 2 * 2 * D + 2 * D,
    "bloom": 2 * 2 * D + 2 * D,
}
OUTSIDE = {  # embeddings (tied ones once), positions, norms around the layers
    "llama": 2 * 96 * D + D,
    "opt": 96 * D + (64 + 2) * D + 2 * D,
    "bloom": 96 * D + 2 * D + 2 * D,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_by_hand(family: str, tiny: Callable[..., Model]) -> None:
    model = tiny(family)
    rows = [(s.name, s.kind, s.layer, s.units, s.width, s.cost) for s in model.sites()]
    expected = []
    for layer in range(3):
        for which, (kind, cost) in enumerate((("attention", ATTENTION_COST), ("mlp", MLP_COST))):
            name = NAMES[family][which].format(layer)
            expected.append((name, kind, layer, UNITS[family][which], WIDTH[family][which], cost[family]))
    assert rows == expected
    for site in model.sites():
        model.module.get_submodule(site.name)  # names are module paths


@each("stream, family", itertools.product([False, True], FAMILIES))
def test_parameters_by_hand(family: str, stream: bool, tiny: Callable[..., Model]) -> None:
    model = tiny(family, stream=stream)
    units = zip(UNITS[family], (ATTENTION_COST[family], MLP_COST[family]), strict=True)
    layer = sum(count * cost.params for count, cost in units) + REST_OF_A_LAYER[family]
    sizes = Size()(model, None)
    assert model.decoder_params == sizes["params/decoder"] == 3 * layer
    assert sizes["params"] == 3 * layer + OUTSIDE[family], "tied embeddings count once"
    assert sizes["bytes"] == 8 * sizes["params"]
    heads = UNITS[family][0]
    assert sizes["kv_bytes/token"] == 3 * heads * 2 * HEAD * 8
    units = zip(UNITS[family], (ATTENTION_COST[family], MLP_COST[family]), strict=True)
    assert sizes["macs/token"] == 3 * sum(count * cost.macs for count, cost in units) + 96 * D


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outline_needs_no_weights(
    family: str, tiny: Callable[..., Model], tiny_folder: Callable[[str], Path], source: Callable[..., Any]
) -> None:
    model = tiny(family)
    outline = source(tiny_folder(family)).outline()
    assert len(outline.layers) == 3 and outline.sites() == model.sites() and outline.dtype == model.dtype
    assert Size()(outline, None) == Size()(model, None)
    assert all(p.is_meta for p in outline.module.parameters())


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_tied_embeddings_are_stored_once_and_stay_tied(
    family: str, tiny: Callable[..., Model], source: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(family)
    assert model.module.get_output_embeddings().weight is model.module.get_input_embeddings().weight
    save(model, tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    for stream in (False, True):
        again = source(tmp_path / "saved", stream=stream).load().module
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_query_rows_of_a_group_are_those_of_its_heads(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    block, attention = model.block(1), model.layers[1].self_attn
    weights = block.weights["model.layers.1.self_attn"]
    assert {role: tuple(w.shape) for role, w in weights.in_projections.items()} == {
        "query": (3, 16, D),
        "key": (3, 8, D),
        "value": (3, 8, D),
    }
    assert weights.in_projection_biases == {} and weights.out_projection_bias is None
    for head in range(6):
        group, within = head // 2, head % 2  # as transformers repeats keys and values: head h reads KV head h // G
        rows = attention.q_proj.weight[head * HEAD : (head + 1) * HEAD]
        assert torch.equal(weights.in_projections["query"][group, within * HEAD : (within + 1) * HEAD], rows)
    for group in range(3):
        rows = slice(group * HEAD, (group + 1) * HEAD)
        assert torch.equal(weights.in_projections["key"][group], attention.k_proj.weight[rows])
        assert torch.equal(weights.in_projections["value"][group], attention.v_proj.weight[rows])
    assert torch.equal(weights.out_projection, attention.o_proj.weight)
    assert torch.equal(block.norms["model.layers.1.self_attn"], model.layers[1].input_layernorm.weight)


def test_a_gated_ffn_by_role(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    mlp, weights = model.layers[2].mlp, model.block(2).weights["model.layers.2.mlp"]
    assert torch.equal(weights.in_projections["gate"], mlp.gate_proj.weight[:, None])
    assert torch.equal(weights.in_projections["up"], mlp.up_proj.weight[:, None])
    assert torch.equal(weights.out_projection, mlp.down_proj.weight)
    norms = model.block(2).norms
    assert torch.equal(norms["model.layers.2.mlp"], model.layers[2].post_attention_layernorm.weight)


def test_opt_by_role(tiny: Callable[..., Model]) -> None:
    model = tiny("opt")
    layer, block = model.layers[0], model.block(0)
    weights = block.weights["model.decoder.layers.0.self_attn"]
    for role, linear in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        part = layer.self_attn.get_submodule(linear)
        for head in range(6):
            rows = slice(head * HEAD, (head + 1) * HEAD)
            assert torch.equal(weights.in_projections[role][head], part.weight[rows])
            assert torch.equal(weights.in_projection_biases[role][head], part.bias[rows])
    assert weights.out_projection_bias is not None and torch.equal(
        weights.out_projection_bias, layer.self_attn.out_proj.bias
    )
    ffn = block.weights["model.decoder.layers.0.fc2"]
    assert list(ffn.in_projections) == ["up"] and torch.equal(ffn.in_projections["up"][:, 0], layer.fc1.weight)
    assert torch.equal(ffn.in_projection_biases["up"][:, 0], layer.fc1.bias) and torch.equal(
        ffn.out_projection, layer.fc2.weight
    )
    assert torch.equal(block.norms["model.decoder.layers.0.fc2"], layer.final_layer_norm.weight)


def test_blooms_fused_rows_are_interleaved_by_head(tiny: Callable[..., Model]) -> None:
    model = tiny("bloom")
    attention, name = model.layers[1].self_attention, "transformer.h.1.self_attention"
    weights, fused = model.block(1).weights[name], attention.query_key_value
    for head in range(6):
        for number, role in enumerate(("query", "key", "value")):
            rows = slice((3 * head + number) * HEAD, (3 * head + number + 1) * HEAD)
            assert torch.equal(weights.in_projections[role][head], fused.weight[rows])
            assert torch.equal(weights.in_projection_biases[role][head], fused.bias[rows])
    x_BTD = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    split = attention._reshape(fused(x_BTD))  # the module's own reading of the fused rows: [B, heads, T, head]
    for role, expected in zip(("query", "key", "value"), split, strict=True):
        own = torch.einsum("btd,urd->butr", x_BTD, weights.in_projections[role])
        own = own + weights.in_projection_biases[role][None, :, None]
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_by_role_are_views_and_add_up(family: str, tiny: Callable[..., Model]) -> None:
    model = tiny(family)
    own = {p.untyped_storage().data_ptr() for p in model.layers[0].parameters()}
    block = model.block(0)
    for site in block.sites:
        weights = block.weights[site.name]
        biases = [] if weights.out_projection_bias is None else [weights.out_projection_bias]
        tensors = [*weights.in_projections.values(), *weights.in_projection_biases.values(), weights.out_projection]
        assert all(t.untyped_storage().data_ptr() in own for t in [*tensors, *biases])
        assert sum(t.numel() for t in tensors) == site.units * site.cost.params
        assert weights.out_projection.shape == (D, site.channels)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_those_in_memory(family: str, tiny: Callable[..., Model], tokens_NT: torch.Tensor) -> None:
    held, streamed = tiny(family), tiny(family, stream=True)
    assert torch.equal(held.token_losses(tokens_NT, 4), streamed.token_losses(tokens_NT, 4))
    assert all(p.is_meta for p in streamed.layers.parameters())


def test_a_checkpoint_that_cannot_be_written(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def read_only(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name.startswith("model"):
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    for stream in ("false", "true"):
        code, err = cli(f"model.stream={stream}", "run.overwrite=true")
        assert code == 1 and err.count("\n") == 1
        assert err.startswith("pruneexp: failed: run/model: the checkpoint cannot be written (")
        assert "Permission denied" in err
        status = json.loads(Path("run/status.json").read_text())
        assert status["status"] == "failed" and "cannot be written" in status["reason"]
        assert not list(Path("run").glob("model*")) and not Path("run/metrics.json").exists()


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_disk_that_fills_up_leaves_no_half_checkpoint(stream: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    written = []

    def full(tensors: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "model" not in str(file):
            return save_file(tensors, file, *args, **kwargs)
        written.append(file)
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    code, err = cli(f"model.stream={stream}")
    assert code == 1 and "No space left on device" in err and err.count("\n") == 1 and written
    assert not list(Path("run").glob("model*"))
    assert json.loads(Path("run/status.json").read_text())["status"] == "failed"


def test_settings_that_cannot_be(source: Callable[..., Any]) -> None:
    for settings, typed in (
        ({"dtype": "float8"}, ("auto", "float64", "float32", "bfloat16", "float16")),
        ({"batch_size": 0}, (">= 1",)),
        ({"device": "abacus"}, ("cpu", "cuda", "cuda:N", "cuda:any", "auto")),
    ):
        ((key, value),) = settings.items()
        with pytest.raises(ConfigError) as error:
            source(PARITY, **settings)
        assert_told(f"{error.value}\n", f"{key}={value!r}", *typed)


def test_a_checkpoint_that_is_written_while_it_is_read_is_no_model(
    checkpoint: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_finite = model_source.check_finite

    def written(module: Any, prefix: str) -> None:
        (checkpoint / "README.md").write_text("a card that comes last")
        if ".1." in prefix:
            (checkpoint / "model.safetensors").touch()
        check_finite(module, prefix)

    monkeypatch.setattr(model_source, "check_finite", written)
    with pytest.raises(RunError, match=r"^model.path='.*': changed while it was read; expected files that nobody"):
        source(checkpoint).load()


def test_a_tokenizer_is_shared_until_a_file_changes(source, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FOLDER / "llama", folder)
    first = source(folder).describe().tokenizer
    assert source(folder).load().tokenizer is first
    before = source(folder).fingerprint()["files"]["config.json"]["sha256"]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 7}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 5}))
    again = source(folder).describe().tokenizer
    assert again is not first and again.model_max_length == 7 != first.model_max_length
    assert source(folder).fingerprint()["files"]["config.json"]["sha256"] != before


def test_logits_are_gone_before_the_next_batch_has_some(tiny: Callable[..., Model], tokens_NT: torch.Tensor) -> None:
    """A large vocabulary's are most of what an evaluation takes."""
    model, logits, held = tiny("llama"), [], []
    model.module.register_forward_pre_hook(lambda *_: held.append(sum(one() is not None for one in logits)))
    model.module.register_forward_hook(lambda *of: logits.append(weakref.ref(of[2].logits)))
    model.token_losses(tokens_NT, 4)
    assert held == [0, 0, 0]
