"""A pruned checkpoint in every form is the same model, and what cannot be is refused in one line, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pruneexp.export import KEYS, main, write
from pruneexp.export.folders import place_file
from pruneexp.files import check_replaceable, process_name
from pruneexp.model import Model
from pruneexp.model.modeling_pruned import family_of
from pruneexp.surgery import pad_, save, shrink_
from pruneexp.surgery.forms import stock_class
from pruneexp.types import ConfigError, Plan, SitePlan
from tests.cases import each
from tests.conftest import FAMILIES
from tests.messages import assert_told, says
from tests.tiny_families import of_every_family, tiny_config_of, tiny_model

pytestmark = pytest.mark.usefixtures("modules_cache")

PADDED = of_every_family(lambda family: family.experts is None)  # mixtures are not padded
# beyond a rounding in float32, which norms of the stock code compute in, padding changes nothing of these
IN_FLOAT64 = ("llama", "opt", "bloom", "gpt2", "granite", "falcon_rw", "smollm3", "mistral_sliding", "phi3")
IN_FLOAT64 += ("falcon_7b", "falcon_40b", "stablelm_2_12b", "seed_oss", "seed_oss_plain")
VARIANTS = ("falcon_rw", "falcon_40b", "stablelm_2_12b", "seed_oss_plain")
PARTS = [(*PADDED, *VARIANTS)[first::8] for first in range(8)]
Checkpoint = Callable[..., Path]


def pruned_(model: Model, case: str, biases: bool) -> None:
    """Uneven widths with both sublayers of layer 1 emptied; "uniform": two thirds of every site; "whole": nothing."""
    rng, sites, out_projections = torch.Generator().manual_seed(3), {}, {}
    for index in range(len(model.layers)):
        block = model.block(index)
        for site in block.sites:
            count = max(1, site.units - 1 - site.layer) if site.layer != 1 else 0
            count = {"uneven": count, "uniform": site.units * 2 // 3, "whole": site.units}[case]
            kept = torch.randperm(site.units, generator=rng)[:count].sort().values.tolist()
            sites[site.name] = SitePlan(site.kind, site.units, tuple(kept))
            if biases:
                weight = block.weights[site.name].out_projection[:, site.keep_C(kept)] * 1.5
                bias = torch.randn(len(weight), generator=rng, dtype=weight.dtype) * 0.1
                out_projections[site.name] = (weight, bias)
    shrink_(model, Plan(sites), out_projections)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Checkpoint:
    """Folders of pruned tiny models."""
    from pruneexp.model import ModelSource

    made: dict[tuple[str, str, bool], Path] = {}

    def folder(name: str, case: str = "uneven", biases: bool = False) -> Path:
        key = (name, case, biases)
        if key not in made:
            dense = tmp_path_factory.mktemp(name)
            if name in FAMILIES:
                dense = tiny_folder(name)
            else:
                tiny_model(name).save_pretrained(dense)
            model = ModelSource(name, str(dense), None, "float64", "cpu", False, False, 4).load()
            pruned_(model, case, biases)
            made[key] = tmp_path_factory.mktemp(name) / "model"
            save(model, made[key])
        return made[key]

    return folder


@pytest.fixture
def tokens_NT() -> torch.Tensor:
    return torch.randint(3, 64, (4, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(folder: Path, tokens_NT: torch.Tensor, dtype: torch.dtype = torch.float64, remote: bool = False) -> Any:
    """As any user would, with transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, dtype=dtype).eval()
    return model(tokens_NT).logits


def run_of(checkpoint: Path, folder: Path) -> Path:
    """A finished run with that checkpoint."""
    shutil.copytree(checkpoint, folder / "model")
    (folder / "status.json").write_text(json.dumps({"status": "done"}))
    (folder / "metrics.json").write_text("{}")
    return folder


def takes_biases(name: str) -> bool:
    """Whether the stock class gives both out-projections a bias, where its config's flags say so: found without the
    table of `pruneexp.surgery.stock_widths`."""
    if name in ("mistral_sliding", "falcon_7b", "falcon_40b"):
        return False  # LLaMA has Mistral's biases, without the window; of Falcon's flag the table says nothing
    config = tiny_config_of(name)
    flags = {key: True for key, value in config.to_dict().items() if "bias" in key and isinstance(value, bool)}
    biased, family = type(config)(**{**config.to_dict(), **flags}), family_of(config)
    with torch.device("meta"):
        layer = stock_class(config.model_type)._from_config(biased).base_model.get_submodule(family.layers)[0]
    return all(layer.get_submodule(path).bias is not None for path in (family.attention_out, family.mlp_out))


@pytest.mark.slow
@pytest.mark.parametrize("names", PARTS, ids=" ".join)
def test_padded_is_remote_code_is_the_pruned_model(
    names: tuple[str, ...],
    checkpoint: Checkpoint,
    tokens_NT: torch.Tensor,
    tmp_path: Path,
    subtests: pytest.Subtests,
) -> None:
    for name in names:
        with subtests.test(name=name):
            (tmp_path / name).mkdir()
            padded_is_remote_code_is_the_pruned_model(name, checkpoint, tokens_NT, tmp_path / name)


def padded_is_remote_code_is_the_pruned_model(
    name: str, checkpoint: Checkpoint, tokens_NT: torch.Tensor, tmp_path: Path
) -> None:
    source = checkpoint(name, biases=takes_biases(name))
    padded, remote = tmp_path / "padded", tmp_path / "remote"
    assert main([str(source), "format=padded", f"out={padded}", "prove=in_place"]) == 0
    assert main([str(source), "format=remote_code", f"out={remote}", "prove=off"]) == 0
    expected = logits(source, tokens_NT, remote=True)
    exact = 1e-10 if name in IN_FLOAT64 else 1e-6  # norms of the stock code compute in float32
    torch.testing.assert_close(logits(remote, tokens_NT, remote=True), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(padded, tokens_NT), expected, rtol=exact, atol=exact)
    single = logits(source, tokens_NT, torch.float32, remote=True)
    torch.testing.assert_close(logits(padded, tokens_NT, torch.float32), single, rtol=1e-4, atol=1e-5)
    config = json.loads((padded / "config.json").read_text())
    assert not config["model_type"].startswith("pruned_") and "auto_map" not in config
    assert not any("Pruned" in architecture for architecture in config["architectures"])
    assert config["dtype"] == "float64"


@pytest.mark.slow
@pytest.mark.usefixtures("forked_proofs")
def test_a_run_proved_in_a_clean_process(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run = run_of(checkpoint("llama", biases=True), tmp_path / "run")
    assert main([str(run), "format=padded", "multiple=16", f"out={tmp_path / 'out'}"]) == 0
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["form"] == "stock" and record["class"] in ("LlamaForCausalLM", "GraniteForCausalLM")
    assert record["max_logit_difference"] < 1e-5 and record["greedy_tokens_equal"]
    assert record["why"].endswith("48 FFN channels")  # 39 of 40 are left in the widest layer
    assert record["source"] == str(run)


@pytest.mark.parametrize(
    ("name", "case", "kind"),
    [
        ("llama", "uneven", "remote_code"),
        ("llama", "uniform", "stock"),
        ("bloom", "uniform", "remote_code"),
        ("opt", "whole", "stock"),
    ],
)
def test_auto_is_the_simplest_faithful_form(
    name: str,
    case: str,
    kind: str,
    checkpoint: Checkpoint,
    tokens_NT: torch.Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = checkpoint(name, case), tmp_path / "out"
    assert main([str(source), f"out={out}", "prove=in_place"]) == 0
    assert f"format: {kind} (" in capsys.readouterr().out
    expected = logits(source, tokens_NT, remote=True)
    torch.testing.assert_close(logits(out, tokens_NT, remote=kind != "stock"), expected, rtol=0, atol=0)
    if kind == "stock":  # and the other way round, though a stock form exists
        assert main([str(out), "format=remote_code", f"out={tmp_path / 'again'}", "prove=off"]) == 0
        assert "auto_map" in json.loads((tmp_path / "again" / "config.json").read_text())
        torch.testing.assert_close(logits(tmp_path / "again", tokens_NT, remote=True), expected, rtol=0, atol=0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    capsys.readouterr()  # transformers' own progress, where a model was made just now
    assert main(arguments) == code
    line = capsys.readouterr().err
    assert line.startswith("pruneexp-export: ") and line.count("\n") == 1
    return line


@each(
    "arguments, named, typed",
    [
        (["out=x"], "RUN_FOLDER", ["none", "pruneexp-export --help"]),
        (["a", "b", "out=x"], "RUN_FOLDER", ["a b", "pruneexp-export --help"]),
        (["a"], "out", ["out=PATH"]),
        (["a", "out=x", "format=paded"], "format=paded", ["format=padded"]),
        (["a", "out=x", "fromat=padded"], "fromat", ["format", "out", "overwrite", "stream"]),
        (["a", "out=x", "fromat=padded"], "fromat", ["did you mean format?"]),
        (["a", "out=x", "out=y"], "out=y", ["twice"]),
        (["a", "out=x", "overwrite=yes"], "overwrite=yes", ["true", "false"]),
        (["a", "out=x", "prove=of"], "prove=of", ["prove=off"]),
        (["a", "out=x", "multiple=8"], "multiple=8", ["format=padded"]),
        (["a", "out=x", "dtype=float16"], "dtype=float16", ["format=gguf"]),
        (["a", "out=my.gguf"], "out=my.gguf", ["format=gguf", "folder"]),
        (["a", "out=my.gguf", "format=stock"], "out=my.gguf", ["format=gguf", "folder"]),
        (["a", "out=x", "format=gguf", "dtype=int8"], "dtype=int8", ["float32", "bfloat16", "float16"]),
        (["a", "out=x", "stream=yes"], "stream=yes", ["auto", "true", "false"]),
        (["a", "out=x", "format=padded", "multiple=0"], "multiple=0", [">= 1"]),
        (["a", "out=x", "--force"], "--force", ["key=value"]),
        (["nowhere", "out=x"], "RUN_FOLDER='nowhere'", ["no such folder"]),
        ([__file__, "out=x"], f"RUN_FOLDER={__file__!r}", ["file"]),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str],
    named: str,
    typed: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_told(refused(capsys, *arguments).removeprefix("pruneexp-export: "), named, *typed)
    assert not list(tmp_path.iterdir())


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {key}=" in text for key in KEYS)


def test_runs_that_have_nothing_to_export(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"out={tmp_path / 'out'}"
    (tmp_path / "empty").mkdir()
    assert "holds no run and no checkpoint" in refused(capsys, str(tmp_path / "empty"), out)
    run = run_of(checkpoint("llama"), tmp_path / "run")
    (run / "model" / "adapter").mkdir()
    assert "recovery.merge=true" in refused(capsys, str(run), out)
    shutil.rmtree(run / "model")
    assert "run.save=true" in refused(capsys, str(run), out)
    (run / "status.json").write_text(json.dumps({"status": "failed"}))
    assert says(refused(capsys, str(run), out), "failed")
    assert not (tmp_path / "out").exists()


def test_where_it_may_not_write(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = run_of(checkpoint("llama"), tmp_path / "run"), tmp_path / "out"
    assert "lies inside" in refused(capsys, str(run), f"out={run / 'model' / 'export'}")
    assert "lies inside" in refused(capsys, str(run), f"out={run}")
    assert "a folder of its own" in refused(capsys, str(run), f"out={tmp_path}", "overwrite=true")
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "overwrite=true" in refused(capsys, str(run), f"out={out}")
    assert "replaces earlier exports alone" in refused(capsys, str(run), f"out={out}", "overwrite=true")
    assert (out / "mine.txt").read_text() == "mine"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
    assert "are free there" in refused(capsys, str(run), f"out={tmp_path / 'new'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_an_earlier_export_is_replaced(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, out = str(checkpoint("llama")), tmp_path / "out"
    assert main([source, "format=remote_code", f"out={out}", "prove=off"]) == 0
    assert main([source, "format=padded", f"out={out}", "prove=off", "overwrite=true"]) == 0
    assert not (out / "modeling_pruned.py").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_appears_meanwhile_is_not_replaced(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, written = str(checkpoint("llama")), tmp_path / "out", write._written

    def meanwhile(*arguments: Any) -> Any:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        return written(*arguments)

    monkeypatch.setattr(write, "_written", meanwhile)
    assert "exists; expected a new folder" in refused(capsys, source, f"out={out}", "prove=off")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "mine.txt").read_text() == "mine"


def test_a_link_stays_and_what_killed_exports_left_leaves(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, out, disk = str(checkpoint("llama")), tmp_path / "out", tmp_path / "disk"
    disk.mkdir()
    out.symlink_to(disk / "export")
    machine = process_name().partition("-")[2]
    for left in (".tmp", ".tmp.partial"):
        (disk / f".export.{2**22 + 1}-{machine}{left}").mkdir()
    for again in ((), ("overwrite=true",)):
        assert main([source, "format=remote_code", f"out={out}", "prove=off", *again]) == 0
        assert out.is_symlink() and (disk / "export" / "config.json").is_file()
        assert [path.name for path in disk.iterdir()] == ["export"]


def test_where_a_disk_is_mounted_nothing_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(ConfigError, match="is where a disk is mounted.*; expected a folder in it"):
        check_replaceable(tmp_path, "export.json", "export", overwrite=False)


def test_a_file_is_not_placed_without_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_keys: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "written").write_bytes(b"weights")
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        place_file(tmp_path / "written", tmp_path / "out.gguf", {"form": "gguf"})
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


def test_forms_that_are_not_there(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"out={tmp_path / 'out'}"
    line = refused(capsys, str(checkpoint("llama")), "format=stock", out)
    assert "heads in layers" in line and "FFN channels in layers" in line
    assert says(line, "format=padded") and says(line, "format=remote_code")
    line = refused(capsys, str(checkpoint("qwen3", biases=True)), "format=stock", out)
    assert says(line, "format=remote_code") and not says(line, "format=padded")
    line = refused(capsys, str(checkpoint("qwen3", biases=True)), "format=padded", out)
    assert "biases that pruning added" in line
    line = refused(capsys, str(checkpoint("bloom")), "format=padded", "multiple=7", out)
    assert "bloom's config cannot say" in line and "divides 192" in line
    assert not list(tmp_path.iterdir())


def test_padding_that_would_round(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pruneexp.model import ModelSource

    model = ModelSource("half", str(checkpoint("olmo2")), None, "bfloat16", "cpu", False, False, 4).load()
    save(model, tmp_path / "half")
    line = refused(capsys, str(tmp_path / "half"), "format=padded", f"out={tmp_path / 'out'}")
    assert says(line, "bfloat16") and says(line, "format=remote_code")


def test_another_model_is_not_kept(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Model, padding: Any) -> None:
        pad_(model, padding)
        with torch.no_grad():
            model.layers[0].get_submodule(model.family.mlp_out).weight.mul_(1.5)

    monkeypatch.setattr("pruneexp.export.checkpoint.pad_", wrong)
    arguments = (str(checkpoint("opt")), "format=padded", f"out={tmp_path / 'out'}", "prove=in_place")
    assert "computes something else" in refused(capsys, *arguments, code=1)
    assert not list(tmp_path.iterdir())
