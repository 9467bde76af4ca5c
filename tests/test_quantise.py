"""Fewer bits: the arithmetic against closed forms, bytes counted by hand, and nothing changed where none are asked."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pruneexp
from pruneexp import quantise
from pruneexp.__main__ import main
from pruneexp.evaluator import Latency
from pruneexp.export import gguf_engine, gguf_quantise
from pruneexp.export.gguf_engine import Engine, engine
from pruneexp.export.gguf_quantise import GgufQuantise, InEngine, contents
from pruneexp.fingerprint import comparable, config_hash
from pruneexp.model import ModelSource
from pruneexp.model.modeling_pruned import as_matrix
from pruneexp.quantise import NoQuantise, WeightOnly, linears, rounded
from pruneexp.report.against_share import accuracy_section, perplexity_section
from pruneexp.report.bytes_figure import bytes_section
from pruneexp.report.figures import styles
from pruneexp.report.folders import find
from pruneexp.report.methods import describe
from pruneexp.report.sections import effects_section, pareto_section
from pruneexp.report.sweep_table import sweep_table
from pruneexp.types import ConfigError, RunError
from tests.cases import each
from tests.conftest import PARITY
from tests.messages import assert_told
from tests.report_samples import PPL, config, metrics, write_run

DATA = ["dataset=tokens", f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
QUICK = ["model=hf", f"model.path={PARITY}", *DATA, "dataset.length=64", "evaluator=[perplexity,size]", "cache=off"]
INT8, INT4 = WeightOnly(8, None, False), WeightOnly(4, 32, False)
SPEED = "latency/prefill_tok_s@b1x128"
MIXTURES = ("mixtral", "qwen3_moe")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def by_hand(weight_OI: Tensor, group: int) -> Tensor:
    """4 bits, a number at a time."""
    made = weight_OI.clone()
    for row, values in enumerate(weight_OI.tolist()):
        for start in range(0, len(values), group):
            own = values[start : start + group]
            low = torch.tensor(min(own)).half().item()
            step = torch.tensor((max(own) - min(own)) / 15).half().item()
            for place, value in enumerate(own, start):
                level = min(15, max(0, round((value - low) / step))) if step else 0
                made[row, place] = low + step * level
    return made


@pytest.mark.parametrize("group", [None, 32, 1])
def test_int8_is_off_by_half_a_step_at_most(group: int | None) -> None:
    weight_OI = normal(24, 75) * torch.logspace(-6, 2, 24)[:, None]
    weight_OI[3] = 0
    gap_OI = (rounded(weight_OI, 8, group) - weight_OI).abs()
    parts = weight_OI.split(group or 75, 1)
    step_OI = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in parts], 1) / 127.5
    assert bool((gap_OI <= step_OI / 2 * (1 + 1e-4)).all())
    assert torch.equal(rounded(weight_OI, 8, group)[3], weight_OI[3])


@pytest.mark.parametrize(("width", "group"), [(64, 32), (75, 32), (20, 32), (7, 1), (33, 32)])
def test_int4_is_what_is_computed_by_hand(width: int, group: int) -> None:
    """Groups that fit, a shorter one at the end, one longer than the row, of one number, and one number left."""
    weight_OI = normal(5, width)
    weight_OI[1] = 0.25  # a group without a spread
    torch.testing.assert_close(rounded(weight_OI, 4, group), by_hand(weight_OI, group), rtol=1e-6, atol=1e-7)
    assert all(len(part.unique()) <= 16 for row in rounded(weight_OI, 4, group) for part in row.split(group))


def test_rounding_twice_changes_nothing() -> None:
    weight_OI = normal(9, 70)
    once = rounded(weight_OI, 8, None)
    torch.testing.assert_close(rounded(once, 8, None), once, rtol=0.01, atol=0)
    assert rounded(weight_OI.bfloat16(), 4, 32).dtype == torch.bfloat16


@each("family", ["qwen2", "phi3", "gpt2", "falcon_7b", "pythia", "gemma2"])
def test_linear_layers_of_the_decoder_and_nothing_else(loaded: Callable[..., Any], family: str) -> None:
    model = loaded(family)
    before = {name: parameter.clone() for name, parameter in model.module.named_parameters()}
    names = {f"{path}.weight": linear for path, linear in linears(model, 4)}
    expected = {
        name: as_matrix(linear, rounded(as_matrix(linear, linear.weight), 4, 32)) for name, linear in names.items()
    }
    dense = INT4(model, "dense", {}, None)
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters()), "measured, not changed"
    figures = INT4(model, "pruned", {}, None)
    after = dict(model.module.named_parameters())
    assert after.keys() == before.keys() and names
    assert all(torch.equal(parameter, expected.get(name, before[name])) for name, parameter in after.items())
    assert dense["bytes"] == sum(p.numel() * p.element_size() for p in before.values())
    assert figures["bytes"] == model.bytes < dense["bytes"]
    assert figures["bits/param"] == 8 * figures["bytes"] / sum(p.numel() for p in after.values())


@each("family", MIXTURES)
def test_what_is_no_linear_layer(loaded: Callable[..., Any], family: str) -> None:
    with pytest.raises(ConfigError) as error:
        INT8.prepare(loaded(family))
    assert_told(f"{error.value}\n", "quantise=int8", "quantise=none")


def test_bytes_of_the_embedded_model(build_from: Callable[..., Any]) -> None:
    """Counted by hand: rows of whole bytes, 4 bytes a group, all else in float32."""
    model = build_from("quantise=none").model.load()
    linear = [module for module in model.layers.modules() if isinstance(module, nn.Linear)]
    held = {id(module.weight) for module in linear}
    others = sum(4 * p.numel() for p in model.module.parameters() if id(p) not in held)
    for part, a_row in (
        (INT8, lambda width: width + 4),
        (WeightOnly(8, 50, False), lambda width: width + 4 * -(-width // 50)),
        (WeightOnly(4, 50, False), lambda width: -(-width // 2) + 4 * -(-width // 50)),
    ):
        size = part(model, "pruned", {}, None)["bytes"]
        assert size == others + sum(m.out_features * a_row(m.in_features) for m in linear)


def test_torchao_has_the_same_numbers(loaded: Callable[..., Any]) -> None:
    pytest.importorskip("torchao", reason="needs torchao")
    weight_OI = normal(12, 33)
    held: Any = quantise._int8_tensor(weight_OI)
    assert torch.equal(held.dequantize(), rounded(weight_OI, 8, None))
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = nn.Linear(33, 12, bias=False)
    linear.weight = nn.Parameter(weight_OI.clone())
    quantize_(linear, Int8WeightOnlyConfig())
    theirs: Any = linear.weight
    assert torch.equal(theirs.qdata, held.qdata) and torch.equal(theirs.scale, held.scale)
    model, plain, tokens = loaded("qwen2"), loaded("qwen2"), torch.arange(20)[None]
    WeightOnly(8, None, True)(model, "pruned", {}, None)
    INT8(plain, "pruned", {}, None)
    assert model.bytes == plain.bytes
    torch.testing.assert_close(model.module(tokens).logits, plain.module(tokens).logits, rtol=1e-3, atol=1e-4)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    monkeypatch.chdir(tmp_path)

    def finished(name: str, *settings: str, quick: list[str] = QUICK) -> dict[str, float]:
        assert main([*quick, "run.prove=in_place", f"run.dir={name}", *settings]) == 0
        return json.loads(Path(name, "metrics.json").read_text())

    return finished


def test_a_run(run: Callable[..., dict[str, float]]) -> None:
    """Its figures are of the quantised model, its checkpoint is the one from before, and says so."""
    plain, quantised = run("plain", "quantise=none"), run("int4", "quantise=int4", "quantise.group=16")
    same = {key for key in plain if key.startswith("dense/")} | {"pruned/params", "pruned/macs/token"}
    assert all(quantised[key] == plain[key] for key in same)
    assert quantised["proof/max_logit_difference"] == plain["proof/max_logit_difference"] == 0
    assert quantised["pruned/ppl/test@64"] != plain["pruned/ppl/test@64"]
    assert quantised["pruned/bytes"] < plain["pruned/bytes"] / 2
    assert quantised["pruned/bits/param"] == 8 * quantised["pruned/bytes"] / quantised["pruned/params"]
    assert "pruned/bits/param" not in plain
    stored = [Path(name, "model", "model.safetensors").read_bytes() for name in ("plain", "int4")]
    assert stored[0] == stored[1]
    assert (
        "4 bits a weight and 32 for 16 inputs. The weights in this folder are as they were before"
        in Path("int4", "model", "README.md").read_text()
    )
    assert "fewer bits" not in Path("plain", "model", "README.md").read_text()
    assert json.loads(Path("int4", "environment.json").read_text())["choices"]["quantise"] == "int4"
    loaded = ModelSource("again", "int4/model", None, "float32", "cpu", False, True, 4).load()
    figures = WeightOnly(4, 16, False)(loaded, "pruned", {}, None)
    assert figures["bytes"] == quantised["pruned/bytes"]
    windows_NT = torch.from_numpy(np.load(PARITY / "test.npy")).long().reshape(-1, 64)
    ppl = loaded.token_losses(windows_NT, 4).mean().exp().item()
    assert ppl == pytest.approx(quantised["pruned/ppl/test@64"], rel=1e-6), (
        "the checkpoint, quantised, is what was measured"
    )


def test_from_python(loaded: Callable[..., Any], tokens_NT: Tensor, tmp_path: Path) -> None:
    """The caller's model stays; the result is quantised, and is saved so."""
    from transformers import AutoModelForCausalLM

    tokens_NT = tokens_NT % 60

    module = loaded("qwen2").module.float()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    whole = pruneexp.prune(module, None, tokens_NT, ratio=0.0, overrides=["quantise=int8"])
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    for name, parameter in whole.model.named_parameters():
        matrix = "layers" in name and parameter.ndim == 2
        assert torch.equal(parameter, rounded(before[name], 8, None) if matrix else before[name]), name
    result = pruneexp.prune(module, None, tokens_NT, ratio=0.3, overrides=["quantise=int4"])
    assert result.metrics["pruned/bytes"] < result.metrics["dense/bytes"]
    folder = result.save(tmp_path / "small")
    assert "The weights in this folder are rounded so." in (folder / "README.md").read_text()
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(again(tokens_NT).logits, result.model(tokens_NT).logits)


def test_none_is_the_identity(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2")
    before = {name: parameter.clone() for name, parameter in model.module.named_parameters()}
    assert NoQuantise()(model, "pruned", {}, None) == {} and not model.stored_bytes
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.module.named_parameters())


def test_a_forecast_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "quantise=int4", "run.dry=true"]) == 0
    assert "quantised afterwards: the decoder's linear layers in 4 bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "named", "typed"),
    [
        (["quantise=int4", "quantise.group=0"], "quantise.group=0", ["null", "64"]),
        (["quantise=int8", "model.stream=true"], "model.stream=True", ["model.stream=false", "quantise=none"]),
        (
            ["quantise=int8", "recovery=lora", "recovery.merge=false"],
            "recovery.merge=False",
            ["recovery.merge=true", "quantise=none"],
        ),
        (["quantise=int8", "quantise.bits=5"], "quantise.bits=5", []),
        (["quantise=int4", "quantise.kernels=true"], "quantise.kernels=True", ["bits=4 and group=64", "false"]),
        (
            ["quantise=int8", "quantise.group=32", "quantise.kernels=true"],
            "quantise.kernels=True",
            ["group=32", "quantise.group=null"],
        ),
    ],
)
def test_mistakes_that_the_config_shows(
    build_from: Callable[..., Any], settings: list[str], named: str, typed: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        build_from(*QUICK, *settings)
    assert_told(f"{error.value}\n", named, *typed)


def test_layers_that_torchao_does_not_run(loaded: Callable[..., Any]) -> None:
    kernels = WeightOnly(8, None, True)
    kernels.prepare(loaded("qwen2"))
    INT8.prepare(loaded("gpt2"))
    with pytest.raises(ConfigError) as error:
        kernels.prepare(loaded("gpt2"))
    assert_told(f"{error.value}\n", "quantise.kernels=True", "Conv1D", "false")


def test_without_torchao(build_from: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        build_from(*QUICK, "quantise=int8", "quantise.kernels=true").check()
    assert_told(f"{error.value}\n", "quantise.kernels=True", "pip install 'pruneexp[torchao]'")


def test_a_report_takes_no_model_for_a_quantised_one(tmp_path: Path) -> None:
    """A picture an engine, a point a method and ratio; what llama.cpp ran is not taken for what transformers did."""
    sizes = {"none": 4.0, "int8": 2.0, "gguf": 4.0, "gguf_q8_0": 4.0}
    for name, size in sizes.items():
        for at, share in ((0.0, 0.0), (0.2, 0.2)):
            kind = {"gguf": "/gguf-q4_k_m", "gguf_q8_0": "/gguf-q8_0"}.get(name)
            more = {"dense/bytes": 4.0 * 2**20, "pruned/bytes": size * (1 - share) * 2**20}
            more |= {f"{side}/{SPEED}": 1000.0 for side in ("dense", "pruned")} | {"pruned/acc/a": 0.5}
            if kind:
                more |= {f"{side}/{SPEED}{kind}": 4000.0 for side in ("dense", "pruned")}
                more |= {f"pruned/bytes{kind}": 2.0**20 * (1 - share), f"pruned/bits/param{kind}": 8.0}
                more |= {f"pruned/{PPL}{kind}": 5.0 + share, f"dense/{PPL}{kind}": 4.5}
            elif name == "int8":
                more["pruned/bits/param"] = 8.5
            composed = config("recipe=flap", f"quantise={name}", f"sparsity.ratio={at}")
            write_run(tmp_path / f"{name}{at}", composed, metrics(4.0, share, **more))
    runs = describe(find([tmp_path], "same").runs)
    assert {one.method for one in runs} == {"flap", *(f"flap quantise={name}" for name in sizes if name != "none")}
    looks = styles(list(dict.fromkeys(one.method for one in runs)))
    section = bytes_section(runs, looks)
    assert section is not None
    ours, theirs, _ = section.tables
    assert [[cell.text for cell in row] for row in ours.rows] == [
        ["flap", "0", "4.000", "", "4.000"],
        ["flap", "0.2", "3.200", "", "4.000"],
        ["flap quantise=int8", "0", "2.000", "8.500", "4.000"],
        ["flap quantise=int8", "0.2", "1.600", "8.500", "4.000"],
    ]
    assert len(theirs.rows) == 4 and "llama.cpp" in section.pictures[1].caption
    dash = section.pictures[0].figure.axes[0].lines
    assert [line.get_label() for line in dash if not str(line.get_label()).startswith("_")] == [
        "dense", "flap", "flap quantise=int8",
    ]  # fmt: skip
    shown = perplexity_section(runs, [], [], looks), accuracy_section(runs, [], [], looks), pareto_section(runs, looks)
    methods: dict[str, set[str]] = {}
    for of_section in shown:
        assert of_section is not None and any(line.startswith("Left out: ") for line in of_section.lines)
        for each_table in of_section.tables:
            place = each_table.header.index("method")
            methods[each_table.title.partition(": ")[0]] = {row[place].text for row in each_table.rows}
    ms = "prefill, ms per token (b1x128)"
    q4, q8 = (f"{PPL}/gguf-{kind}" for kind in ("q4_k_m", "q8_0"))
    assert methods == {
        PPL: {"flap", "flap quantise=int8"},
        q4: {"flap quantise=gguf"},
        q8: {"flap quantise=gguf_q8_0"},
        "acc/a": {"flap", "flap quantise=int8"},
        f"{PPL} against {ms}": {"dense", "flap"},
        f"{PPL} against weights, MiB": {"dense", "flap", "flap quantise=int8"},
        f"{q4} against {ms}": {"dense, quantised", "flap quantise=gguf"},
        f"{q8} against {ms}": {"dense, quantised", "flap quantise=gguf_q8_0"},
    }
    effects = effects_section(runs)
    assert effects is not None
    assert {row[1].text for row in effects.tables[0].rows if row[0].text == "quantise"} == {"none", "int8"}
    alone = describe(find([tmp_path / "gguf0.2"], "same").runs)
    assert alone[0].method == "flap quantise=gguf" and accuracy_section(alone, [], [], looks) is None
    header, table = sweep_table(tmp_path)
    filled = {key: sum(row[header.index(key)] != "" for row in table) for key in header}
    assert [filled[f"{side}/{PPL}"] for side in ("pruned", "unquantised")] == [4, 4]
    assert [filled[f"{side}/{SPEED}"] for side in ("pruned", "unquantised")] == [2, 6]
    assert filled["pruned/params"] == filled[f"dense/{PPL}"] == 8


def test_decoder_layers_are_timed_before_they_are_quantised() -> None:
    """So their times are not those of kernels, either."""
    timed = {f"pruned/{SPEED}": 2.0, "pruned/latency/decoder_decode_ms@b1x0": 3.0}
    layers, speed = "unquantised/latency/decoder_decode_ms@b1x0", f"unquantised/{SPEED}"
    for typed, names in (
        (["quantise=none"], set(timed)),
        (["quantise=int8"], {layers, speed}),
        (["quantise=int8", "quantise.kernels=true"], {layers, f"pruned/{SPEED}"}),
    ):
        assert set(comparable(timed, config(*typed))) == names


def test_a_new_key_changes_no_hash() -> None:
    plain = config("recipe=flap")
    assert plain["quantise"] == {"_target_": "pruneexp.quantise.NoQuantise"}
    older = {key: value for key, value in plain.items() if key != "quantise"}
    assert config_hash(plain) == config_hash(older) != config_hash(config("recipe=flap", "quantise=int8"))


@pytest.fixture
def llama() -> Engine:
    pytest.importorskip("gguf", reason="needs gguf")
    try:
        return engine()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_gguf(run: Callable[..., dict[str, float]], llama: Engine) -> None:
    """llama.cpp measures what transformers does, but for the rounding; the file lies in the run folder."""
    quick = ["dataset.samples=8", "evaluator.perplexity.samples=8", "cache=off", "quantise=gguf"]
    f16 = run("f16", "quantise.type=F16", "evaluator=[perplexity,size]", quick=quick)
    for side in ("dense", "pruned"):
        ours = f16[f"{side}/ppl/embedded@128[8]"]
        assert f16[f"{side}/ppl/embedded@128[8]/gguf-f16"] == pytest.approx(ours, rel=2e-3)
        assert f16[f"{side}/bytes"] > f16[f"{side}/bytes/gguf-f16"]
    small = run(
        "q4", "quantise.type=Q4_0", "evaluator=[perplexity,latency]", "evaluator.latency.repeats=1", quick=quick
    )
    assert small["pruned/bytes/gguf-q4_0"] < 0.35 * f16["pruned/bytes/gguf-f16"]
    for side in ("dense", "pruned"):
        name = f"{side}/ppl/embedded@128[8]/gguf-"
        four, sixteen = small[f"{name}q4_0"], f16[f"{name}f16"]
        assert four == pytest.approx(sixteen, rel=0.05) and four != sixteen
    assert small["pruned/bits/param/gguf-q4_0"] == 8 * small["pruned/bytes/gguf-q4_0"] / small["pruned/params"]
    assert all(small[f"{side}/latency/decode_tok_s@b1x128+16/gguf-q4_0"] > 0 for side in ("dense", "pruned"))
    assert contents(Path("q4", "model.gguf"))[0] == small["pruned/bytes/gguf-q4_0"]
    if (library := gguf_engine._in_package("xllamacpp", "xllamacpp*.so")) is not None:
        windows_NT = torch.arange(64).reshape(2, 32)
        ours, theirs = (each.losses(Path("q4", "model.gguf"), windows_NT, 886, "") for each in (llama, Engine(library)))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert "filled up with zeros to multiples of 32; matrices: 42 Q4_0, 1 " in Path("q4", "log.txt").read_text()


@dataclass(frozen=True)
class Pretended:
    """In the place of llama.cpp: of each call `called` has the name."""

    called: list[str]
    version: int = 1

    def quantise(self, file: Path, out: Path, kind: str) -> None:
        self.called.append("quantise")
        shutil.copyfile(file, out)

    def losses(self, file: Path, windows_NT: Tensor, vocabulary: int, stage: str) -> Tensor:
        self.called.append("losses")
        return torch.full((len(windows_NT), windows_NT.shape[1] - 1), float(len(self.called)))

    def speeds(self, file: Path, vocabulary: int, prompt_1T: Tensor, latency: Latency) -> dict[str, float]:
        self.called.append("speeds")
        return {"latency/prefill_tok_s": float(len(self.called))}


@pytest.mark.slow
def test_gguf_measures_the_dense_model_once(
    run: Callable[..., dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="needs gguf")
    llama = Pretended([])
    monkeypatch.setattr(gguf_quantise, "engine", lambda: llama)
    quick = ["dataset.samples=4", "cache.dir=cache", "evaluator=[perplexity]", "run.save=false", "quantise=gguf"]
    quick += ["evaluator.perplexity.samples=4"]

    def calls(name: str, *typed: str) -> list[str]:
        llama.called.clear()
        metrics_of[name] = run(name, *typed, quick=quick)
        return list(llama.called)

    metrics_of: dict[str, dict[str, float]] = {}
    pruned = ["quantise", "losses"]
    assert calls("first") == 2 * pruned and calls("second", "sparsity.ratio=0.4") == pruned
    names = [name for name in metrics_of["first"] if name.startswith("dense/") and name.endswith("/gguf-q4_k_m")]
    assert len(names) == 3 and all(metrics_of["first"][name] == metrics_of["second"][name] for name in names)
    for other in ("quantise.type=Q8_0", "evaluator.perplexity.samples=3", "model.dtype=bfloat16"):
        assert calls(other.partition("=")[2], other) == 2 * pruned, other
    assert calls("timed", "evaluator=[perplexity,latency]", "evaluator.latency.repeats=1") == 2 * [*pruned, "speeds"]
    llama = replace(llama, version=2)
    assert calls("newer") == 2 * pruned and calls("again") == pruned


def test_llama_cpp_is_timed_as_the_evaluator_says(
    run: Callable[..., dict[str, float]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("gguf", reason="needs gguf")
    requests: list[tuple[list[int], int]] = []

    def ran(self: Engine, file: Path, windows_NT: Tensor, vocabulary: int, written: int, stage: str) -> Tensor:
        requests.append((list(windows_NT.shape), written))
        return torch.arange(1.0, 1 + 2 * len(windows_NT)).view(-1, 2)  # seconds of a prompt and of what is behind it

    monkeypatch.setattr(gguf_quantise, "engine", lambda: Engine(Path(__file__), quantiser="cp"))
    monkeypatch.setattr(Engine, "quantise", lambda self, file, out, kind: shutil.copyfile(file, out))
    monkeypatch.setattr(Engine, "_run", ran)
    settings = {"prompt": 6, "new_tokens": 3, "repeats": 2, "warmup": 2, "batch_sizes": "[1,2]"}
    typed = [f"evaluator.latency.{key}={value}" for key, value in settings.items()]
    measured = run("timed", "evaluator=[latency]", *typed, quick=["dataset.samples=4", "cache=off", "quantise=gguf"])
    assert requests == 2 * [([4, 6], 3)]
    for side in ("dense", "pruned"):
        # of two rounds, the quartiles and the median are a quarter and a half of the way from one rate to the other
        for name, rates in (("prefill_tok_s@b1x6", (6 / 5, 6 / 7)), ("decode_tok_s@b1x6+3", (3 / 6, 3 / 8))):
            rate, spread = (measured[f"{side}/latency/{name}{end}/gguf-q4_k_m"] for end in ("", "/iqr"))
            assert rate == pytest.approx(sum(rates) / 2) and spread == pytest.approx((rates[0] - rates[1]) / 2)
    assert "/iqr" not in Path("timed", "model", "README.md").read_text()
    assert sum("evaluator.latency.batch_sizes=[1, 2]: llama.cpp runs 1" in text for text in caplog.messages) == 1


def test_a_file_has_no_sliding_window() -> None:
    """llama.cpp knows none: there the file's context ends, which perplexities then tell of."""
    config = SimpleNamespace(max_position_embeddings=512, sliding_window=16)
    model: Any = SimpleNamespace(max_length=512, config=config)
    llama: Any = Pretended([])
    assert InEngine(llama, Path("model.gguf"), model).max_length == 16


def test_a_gguf_file_that_breaks_off_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="needs gguf")
    monkeypatch.chdir(tmp_path)

    class Breaks(Pretended):
        def quantise(self, file: Path, out: Path, kind: str) -> None:
            super().quantise(file, out, kind)
            if len(self.called) == 3:  # of the dense model its file and its losses are behind it
                raise RunError("llama.cpp does not quantise")

    monkeypatch.setattr(gguf_quantise, "engine", lambda: llama)
    llama = Breaks([])
    quick = ["dataset.samples=4", "cache=off", "evaluator=[perplexity]", "evaluator.perplexity.samples=4"]
    assert main([*quick, "quantise=gguf", "run.dir=broken", "run.prove=off"]) == 1
    assert "llama.cpp does not quantise" in capsys.readouterr().err
    assert llama.called == ["quantise", "losses", "quantise"]
    assert not [path.name for path in Path("broken").iterdir() if "gguf" in path.name]


def test_a_sweep_takes_a_job_by_what_llama_cpp_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="needs gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gguf_quantise, "engine", lambda: Pretended([]))
    sweep = ["--multirun", "dataset.samples=4", "evaluator=[perplexity]", "evaluator.perplexity.samples=4"]
    sweep += ["cache=off", "quantise=gguf", "sweep.dir=swept"]
    name = "ppl/embedded@128[4]"
    assert main([*sweep, f"sweep.objective='pruned/{name}/gguf-q4_k_m'"]) == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "decoder parameters" in text]
    assert f"{name}/gguf-q4_k_m " in line and f"{name} " not in line
    assert main([*sweep, f"sweep.objective='pruned/{name}'"]) == 1
    message = capsys.readouterr().err
    assert f"sweep.objective='pruned/{name}': expected one of" in message and f"unquantised/{name}" in message


def test_a_forecast_has_the_files_of_gguf(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="needs gguf")
    monkeypatch.setattr(gguf_quantise, "engine", lambda: Pretended([]))
    overrides = ["run.dry=true", "dataset.samples=4", "evaluator=[]", "quantise=gguf", "quantise.type=Q4_0"]
    _, out, err = cli(*overrides)
    assert "quantised afterwards: " in out and f"in files of {tempfile.gettempdir()} for a while: about " in out, err
    measured = pruneexp.run(overrides).metrics
    plain = measured["forecast/bytes/dense"]  # but for FFN widths, filled up, and vectors in float32
    assert measured["forecast/disk/quantise_bytes"] == pytest.approx(plain * (1 + 6 / 32), rel=0.1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["model=embedded", "quantise=gguf", "model.stream=true"], "model.stream=True"),
        (["model=embedded", "quantise=gguf", "quantise.type=Q9_9"], "quantise.type='Q9_9'"),
    ],
)
def test_mistakes_with_gguf(build_from: Callable[..., Any], settings: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_from(*settings)
    assert_told(f"{error.value}\n", named)


def test_families_that_the_file_cannot_hold(loaded: Callable[..., Any]) -> None:
    pytest.importorskip("gguf", reason="needs gguf")
    with pytest.raises(ConfigError) as error:
        GgufQuantise("Q8_0").prepare(loaded("gpt2"))
    assert_told(f"{error.value}\n", "quantise=gguf", "quantise=int8")


def test_without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_engine, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        GgufQuantise("Q8_0").check()
    assert_told(f"{error.value}\n", "quantise=gguf", "pip install 'pruneexp[llama_cpp]'")
