"""The model card of what a run and an export write, and what a run or an export may replace of it."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pruneexp import progress
from pruneexp.__main__ import main
from pruneexp.experiment import deliver
from pruneexp.experiment.card import Card, Written, base_model, card_text, command, front_matter, license_of
from pruneexp.export import main as export
from tests.furnished import TRAVELLING, furnished_folder

pytestmark = pytest.mark.slow

SOURCE_CARD = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nlanguage: en\n---\n# Tiny\n"
QUICK = ["dataset=embedded", "dataset.samples=4", "dataset.length=32", "evaluator=[perplexity,size]", "cache=off"]
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = furnished_folder(tmp_path_factory.mktemp("source") / "Tiny-Llama")
    (folder / "README.md").write_text(SOURCE_CARD)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source_folder: Path) -> Run:
    """Runs the command on the furnished model in `tmp_path`; its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(progress, "BAR_AFTER", 3600.0)

    def make(*typed: str, code: int = 0, folder: str = "run") -> Path:
        words = ["model=hf", f"model.path={source_folder}", f"run.dir={folder}", "run.prove=off", *QUICK, *typed]
        assert main(words) == code
        return tmp_path / folder

    return make


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Metadata as the Hub reads it, and the text."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == front_matter((folder / "README.md").read_text())
    return card.data.to_dict(), card.text


@pytest.mark.parametrize("stream", ["false", "true"])
def test_the_card_of_a_run(stream: str, run: Run, source_folder: Path) -> None:
    folder = run("recipe=flap", "sparsity.ratio=0.3", f"model.stream={stream}", "model.batch_size=2")
    data, text = card_of(folder / "model")
    assert data == {
        "base_model": "Tiny-Llama",
        "license": "other",
        "license_name": "tiny",
        "license_link": "LICENSE",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruneexp", "pruned", "structured-pruning", "flap"],
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    for when in ("dense", "pruned"):
        assert f"{metrics[f'{when}/params']:,}" in text and f"{metrics[f'{when}/ppl/embedded@32']:,.4g}" in text
    assert "`ppl/embedded@32`" in text and "| FFN channels | 128 |" in text
    assert "pruneexp model=hf model.path=Tiny-Llama dataset=embedded" in text and "recipe=flap" in text
    assert str(source_folder.parent) not in text and "run.dir" not in text
    assert ("trust_remote_code=True" in text) == ("auto_map" in (folder / "model" / "config.json").read_text())
    for path in TRAVELLING:
        assert (folder / "model" / path).read_bytes() == (source_folder / path).read_bytes()


def test_a_run_replaces_what_it_wrote_and_nothing_else(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run()
    listed = json.loads((folder / "proof.json").read_text())["files"]
    there = sorted(p.relative_to(folder / "model").as_posix() for p in (folder / "model").rglob("*") if p.is_file())
    assert listed == there and {"README.md", "additional_chat_templates/rag.jinja", "LICENSE"} <= set(listed)
    (folder / "model" / "additional_chat_templates" / "mine.jinja").write_text("mine")
    capsys.readouterr()
    run("run.overwrite=true", code=2)
    refused = "model/, where the checkpoint goes, holds additional_chat_templates/mine.jinja, which no run writes"
    assert refused in capsys.readouterr().err
    (folder / "model" / "additional_chat_templates" / "mine.jinja").unlink()
    (folder / "model" / ".README.md.17.tmp").touch()  # of a run that was killed as it wrote
    run("run.overwrite=true", "run.save=false")
    assert not (folder / "model").exists() and not (folder / "proof.json").exists()


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_run_that_was_killed_behind_its_checkpoint_makes_room(
    stream: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(deliver, "check_source", broken)
        folder = run(f"model.stream={stream}", code=1)
    assert (folder / "model" / "LICENSE").exists() and not (folder / "metrics.json").exists()
    run(f"model.stream={stream}")
    assert (folder / "model" / "README.md").exists() and (folder / "metrics.json").exists()


def test_a_run_of_an_older_version_is_replaced_and_exported(run: Run, tmp_path: Path) -> None:
    folder = run()
    (folder / "proof.json").write_text(json.dumps({"form": "remote_code", "why": "", "prove": "off"}))
    for name in (*TRAVELLING, "README.md"):  # which older versions did not write, or not under these names
        if not name.startswith(("tokenizer", "generation", "chat_template")):
            (folder / "model" / name).unlink()
    (folder / "model" / "additional_chat_templates").rmdir()
    assert export([str(folder), "format=padded", f"out={tmp_path / 'out'}", "prove=off"]) == 0
    data, text = card_of(tmp_path / "out")
    assert data["base_model"] == "Tiny-Llama" and "`ppl/embedded@32`" in text and "trust_remote_code" not in text
    (folder / "model" / "README.md").write_text("mine")
    run("run.overwrite=true", code=2)
    (folder / "model" / "README.md").unlink()
    run("run.overwrite=true")
    assert (folder / "model" / "LICENSE").exists()


@pytest.mark.parametrize(
    ("format", "library", "said"),
    [
        ("remote_code", "transformers", "trust_remote_code=True"),
        ("padded", "transformers", "stock architecture (`"),
        ("vllm", "vllm", "vllm serve"),
        ("gguf", "gguf", "llama-cli -m model.gguf"),
    ],
)
def test_cards_of_exports(format: str, library: str, said: str, run: Run, tmp_path: Path) -> None:
    if format == "gguf":
        pytest.importorskip("gguf")
    folder, out = run("search=serve_safe", "search.multiple=8", "sparsity.ratio=0.3"), tmp_path / "out"
    assert export([str(folder), f"format={format}", f"out={out}", "prove=off"]) == 0
    own, of_run = card_of(out), card_of(folder / "model")
    assert own[0] == {**of_run[0], "library_name": library}
    assert ("Zeros fill every layer" in own[1]) == (format == "padded")  # larger than its figures
    assert said in own[1] and ("target_modules" in own[1]) == (library == "transformers")
    for part in ("## What was removed", "## Figures", "## The command that made it", "## Uploading it"):
        assert own[1].count(part) == 1
    record = json.loads((out / "export.json").read_text())
    there = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert sorted(record["files"]) == there and {"README.md", "LICENSE", "NOTICE"} <= set(there)


def test_an_export_replaces_what_it_wrote_and_nothing_else(
    source_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [str(source_folder), f"out={out}", "prove=off", "overwrite=true"]
    assert export(words) == export(words) == 0
    assert (out / "README.md").read_text() == SOURCE_CARD  # nothing has been pruned
    (out / "mine.txt").write_text("mine")
    capsys.readouterr()
    assert export(words) == 2
    assert "holds mine.txt, which no export wrote" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "mine"
    record = json.loads((out / "export.json").read_text())
    del record["files"]  # as older versions wrote it
    (out / "export.json").write_text(json.dumps(record))
    assert export(words) == 0 and not (out / "mine.txt").exists()


@pytest.mark.parametrize("how", ["process", "in_place", "stream"])
def test_the_record_names_the_tolerance_that_holds(how: str, source_folder: Path, tmp_path: Path) -> None:
    typed = ["stream=true"] if how == "stream" else [f"prove={how}", "stream=false"]
    assert export([str(source_folder), f"out={tmp_path / 'out'}", "format=remote_code", *typed]) == 0
    assert json.loads((tmp_path / "out" / "export.json").read_text())["tolerance"] == 1e-3


def test_linear_layers_of_the_card_take_an_adapter(run: Run) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = run("search=uniform") / "model"
    names = json.loads(card_of(folder)[1].partition("target_modules=")[2].partition(")")[0])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=names))
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.get_decoder().layers.modules())
    assert len(names) == 7 and sum("lora_A" in name for name, _ in adapted.named_parameters()) == 14 <= linears


def test_the_card_of_layers_without_sublayers_takes_an_adapter(run: Run) -> None:
    """What is left of those bears a linear layer's name, which adapters by name would run into."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = run("search=sublayers", "criterion=flap", "sparsity.ratio=0.2", "compensator=bias") / "model"
    target = json.loads(card_of(folder)[1].partition("target_modules=")[2].partition(")")[0])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=target))
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.get_decoder().layers.modules())
    assert target == "all-linear" and linears and any("lora_A" in name for name, _ in adapted.named_parameters())


def test_the_id_of_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def at(name: str, card: str = "", config: str = "{}", path: str | None = None) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config)
        (folder / "README.md").write_text(card)
        return base_model(str(folder) if path is None else path, folder)

    assert base_model("org/Model-1.0", tmp_path) == "org/Model-1.0"
    assert base_model("gpt2", tmp_path) == "gpt2"
    assert base_model("embedded:llama", tmp_path) == "pruneexp-embedded-llama"
    assert at("some/Model-1.0") == "Model-1.0"
    assert at("my model (new)") == "my-model-new"
    assert at("some/Model-1.0", path="some/Model-1.0") == "Model-1.0"  # a folder that looks like an id
    assert at("hub/models--org--Model-2/snapshots/0123abc") == "org/Model-2"
    child = "---\nbase_model: org/Parent\n---\nSee [it](https://huggingface.co/org/model-1.0), not a/Model-1.0-Other."
    assert at("other/Model-1.0", child) == "org/model-1.0"
    assert at("other/Model-3", child) == "Model-3"  # its base is not what was pruned
    assert at("other/Model-4", config='{"_name_or_path": "org/Tuned"}') == "org/Tuned"
    assert at("other/Model-5", config='{"_name_or_path": "/home/me/model"}') == "Model-5"
    assert at("other/Model-6", config='{"_name_or_path": "checkpoints/last"}') == "Model-6"
    ours = card_text(Card("org/First"), Written("stock", "LlamaForCausalLM", "4.46"))
    assert at("run/model", ours) == "org/First"  # pruned once more


def test_licenses(tmp_path: Path) -> None:
    for card, expected in {
        SOURCE_CARD: {"license": "other", "license_name": "tiny", "license_link": "LICENSE"},
        "---\r\nlicense: mit\r\n---\r\nx": {"license": "mit"},
        "---\nlicense: [mit\n---\n": {},
        "no metadata": {},
    }.items():
        (tmp_path / "README.md").write_text(card, newline="")
        assert license_of(tmp_path) == expected
    assert license_of(None) == license_of(tmp_path / "nowhere") == {}


def test_commands_without_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    typed = {
        "model.path=/home/me/my model": "'model.path=my model'",
        "model.path=org/Model": "model.path=org/Model",
        "model.path=texts": "model.path=texts",
        "model.path=../up/Model": "model.path=Model",
        "dataset.calibration=~/texts/a.txt": "dataset.calibration=a.txt",
        "evaluator.zeroshot.tasks=[a,b]": "'evaluator.zeroshot.tasks=[a,b]'",
        "x=[/data/one.npy,'/data/two.npy']": """'x=[one.npy,'"'"'two.npy'"'"']'""",
        "run.dir=/somewhere": "",
        "+sweep.dir=x": "",
        "tracker.project=secret": "",
        "cache=off": "",
    }
    for text, expected in typed.items():
        assert command([text]) == f"pruneexp {expected}".strip()
    job = ["+sweep=flap_ratios", "run.save=true", "sweep.dir=x", "recipe=flap"]  # the sweep's file chooses the model
    assert command(job) == "pruneexp +sweep=flap_ratios run.save=true recipe=flap"
    assert command(job[1:]) == "pruneexp recipe=flap"


def test_a_run_without_settings_has_a_command_too() -> None:
    assert "```sh\npruneexp\n```" in card_text(Card("model", overrides=()), Written("stock"))
    assert "## The command" not in card_text(Card("model"), Written("stock"))  # of older runs nobody knows it


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_are_as_open_as_the_umask_says(mask: int, run: Run, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        run("recovery=lora", "recovery.steps=1", "recovery.merge=false", "cache=on", "cache.dir=kept")
        run("model.stream=true", folder="streamed")
        assert export([str(tmp_path / "streamed"), f"out={tmp_path / 'out'}", "prove=off", "stream=true"]) == 0
        assert export([str(tmp_path / "streamed"), f"out={tmp_path / 'padded'}", "prove=off", "format=padded"]) == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    kinds = ("run/model/model.safetensors", "run/model/adapter/adapter_model.safetensors", "out/model.safetensors")
    assert all(tmp_path / name in files for name in kinds) and list((tmp_path / "kept").glob("*.safetensors"))
    modes = {path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in files}
    assert {name: oct(mode) for name, mode in modes.items() if mode != 0o666 & ~mask} == {}
