"""What lies beside a checkpoint's weights travels with the model: from the Hub, into run folders and exports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pruneexp.evaluator.generation import end_tokens
from pruneexp.export import main as export
from pruneexp.model import ModelSource
from pruneexp.model.companions import FETCHED, TRAVELS, matching_files
from pruneexp.surgery import remote_code_form, save
from tests.furnished import EMBEDDED, OTHERS, TRAVELLING, furnished_folder
from tests.small_hub import small_hub


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnished_folder(tmp_path_factory.mktemp("furnished") / "Tiny-Llama")


def same_bytes(folder: Path, source: Path, names: Any) -> None:
    for name in names:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name


def test_what_travels(furnished: Path) -> None:
    assert matching_files(furnished) == TRAVELLING
    assert set(matching_files(furnished, FETCHED)) == {*TRAVELLING, "config.json"}
    assert len(set(TRAVELS)) == len(TRAVELS)


@pytest.mark.slow
def test_a_hub_repository_comes_with_all_of_it(furnished: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pruneexp.model import ModelSource; from pruneexp.surgery import save\n"
        "source = ModelSource('x', 'somebody/Tiny-Llama', None, 'auto', 'cpu', False, False, 4)\n"
        "described = source.folder(weights=False)\n"
        "assert not list(described.glob('*.safetensors')), 'not yet'\n"
        "save(source.load(), Path(sys.argv[1]))\n"
    )
    (furnished / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    try:
        with small_hub("somebody/Tiny-Llama", furnished) as (environment, fetched):
            environment = {**environment, "HF_HOME": str(tmp_path / "home")}
            command = [sys.executable, "-c", code, str(tmp_path / "out")]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
    finally:
        (furnished / "README.md").unlink()
    assert sorted(fetched) == sorted([*TRAVELLING, "README.md", "config.json", "model.safetensors"])
    same_bytes(tmp_path / "out", furnished, TRAVELLING)


@pytest.mark.parametrize("form", ["stock", "remote_code"])
def test_a_saved_model_has_all_of_it_byte_for_byte(form: str, furnished: Path, tmp_path: Path, source: Any) -> None:
    model = source(furnished).load()
    save(model, tmp_path / "out", remote_code_form(model, "asked for") if form == "remote_code" else None)
    same_bytes(tmp_path / "out", furnished, TRAVELLING)
    assert not [name for name in OTHERS if (tmp_path / "out" / name).exists()]


@pytest.mark.parametrize("format", ["stock", "remote_code", "padded", "vllm", "gguf"])
@pytest.mark.parametrize("stream", ["false", "true"])
def test_exports_have_it_too(format: str, stream: str, furnished: Path, tmp_path: Path) -> None:
    if format == "gguf":
        pytest.importorskip("gguf")
    out = tmp_path / "out"
    assert export([str(furnished), f"format={format}", f"out={out}", "prove=off", f"stream={stream}"]) == 0
    legal = [name for name in TRAVELLING if name.lower().startswith(("license", "notice", "use_policy"))]
    assert len(legal) == 5
    same_bytes(out, furnished, [*legal, "generation_config.json"] if format == "gguf" else TRAVELLING)


def test_a_model_without_generation_settings_is_given_none(tiny: Any, tmp_path: Path, source: Any) -> None:
    folder = tmp_path / "dense"
    tiny("llama").module.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    save(source(folder).load(), tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize("stream", [False, True])
def test_generation_stops_where_the_settings_say(stream: bool, furnished: Path, source: Any) -> None:
    model = source(furnished, stream=stream).load()
    assert end_tokens(model.module) == {2, 7, 9, 11}
    assert model.module.generation_config.repetition_penalty == 1.3


def read(folder: Path, **settings: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **settings)


@pytest.fixture
def bare(tmp_path: Path, tiny: Any) -> Callable[..., Path]:
    """A tiny model's folder with the embedded tokenizer, its settings as given."""

    def make(settings: dict[str, Any] | None) -> Path:
        tiny("llama").module.save_pretrained(tmp_path / "dense")
        (tmp_path / "dense" / "tokenizer.json").write_bytes((EMBEDDED / "tokenizer.json").read_bytes())
        if settings is not None:
            (tmp_path / "dense" / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path / "dense"

    return make


@pytest.mark.parametrize("settings", [None, {"eos_token": "</s>"}])
def test_a_tokenizer_that_went_by_the_models_type_is_named(
    settings: dict[str, Any] | None, bare: Callable[..., Path], tmp_path: Path, source: Any
) -> None:
    model = source(bare(settings)).load()
    save(model, tmp_path / "out", remote_code_form(model, "asked for"))
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written.pop("tokenizer_class") and written == (settings or {})
    same_bytes(tmp_path / "out", tmp_path / "dense", ["tokenizer.json"])
    text = "The old baker sees a red boat."
    for trust in (False, True):
        loaded = read(tmp_path / "out", trust_remote_code=trust)
        assert loaded(text).input_ids == model.tokenizer(text).input_ids
        assert loaded.eos_token == model.tokenizer.eos_token
    save(model, tmp_path / "stock")  # of the source's own type: nothing is added
    assert (tmp_path / "stock" / "tokenizer_config.json").exists() == (settings is not None)


def test_a_tokenizers_own_code_does_not_travel_and_is_not_asked_for(
    bare: Callable[..., Path], tmp_path: Path, source: Any
) -> None:
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    model = source(bare({**own, "eos_token": "</s>"})).load()
    save(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    assert read(tmp_path / "out", trust_remote_code=True).eos_token == "</s>"


@pytest.mark.parametrize("change", ["word", "template", "token"])
def test_a_tokenizer_that_was_changed_in_memory_is_written_anew(change: str, furnished: Path, tmp_path: Path) -> None:
    model = ModelSource("tiny", str(furnished), None, "auto", "cpu", False, False, 4).load(read(furnished))
    if change == "word":
        model.tokenizer.add_tokens(["<new>"])
    elif change == "template":
        model.tokenizer.chat_template = "new"
    else:
        model.tokenizer.eos_token = "<pad>"
    save(model, tmp_path / "out")
    written = read(tmp_path / "out")
    assert len(written) == len(model.tokenizer)
    assert (written.chat_template, written.eos_token) == (model.tokenizer.chat_template, model.tokenizer.eos_token)
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    same_bytes(tmp_path / "out", furnished, ["generation_config.json", "LICENSE"])


def test_how_a_tokenizer_was_called_changes_nothing(furnished: Path, tmp_path: Path) -> None:
    model = ModelSource("tiny", str(furnished), None, "auto", "cpu", False, False, 4).load(read(furnished))
    model.tokenizer(["a b c", "a"], padding=True, truncation=True, max_length=2)
    save(model, tmp_path / "out")
    same_bytes(tmp_path / "out", furnished, TRAVELLING)


def test_a_model_without_a_folder_is_written_by_transformers(furnished: Path, tmp_path: Path, source: Any) -> None:
    model = source(furnished).load()
    model.source_folder = None
    model.module.generation_config.do_sample = True
    save(model, tmp_path / "out")
    assert read(tmp_path / "out")("a boat").input_ids == model.tokenizer("a boat").input_ids
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 7, 9, 11]
    assert not (tmp_path / "out" / "LICENSE").exists()


def test_generation_settings_that_transformers_calls_invalid_are_written_all_the_same(
    tmp_path: Path, tiny: Any
) -> None:
    model = tiny("llama")
    model.source_folder, settings = None, model.module.generation_config
    settings.eos_token_id = [2, 7]
    settings.save_pretrained(tmp_path)
    save(model, tmp_path / "plain")
    same_bytes(tmp_path / "plain", tmp_path, ["generation_config.json"])
    settings.temperature = 0.9  # without do_sample: so published, and then changed
    save(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["temperature"], written["eos_token_id"]) == (0.9, [2, 7])


def test_stop_tokens_go_into_the_gguf(furnished: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    assert export([str(furnished), "format=gguf", f"out={tmp_path / 'out'}", "prove=off"]) == 0
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    tokens = {name: int(fields[f"tokenizer.ggml.{name}_token_id"].contents()) for name in ("eos", "eot", "eom")}
    assert tokens == {"eos": 2, "eot": 7, "eom": 9}
    notes = json.loads((tmp_path / "out" / "export.json").read_text())["notes"]
    assert any("not told to stop at 11" in note for note in notes)


@pytest.mark.slow
def test_llama_cpp_stops_at_all_of_them(furnished: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, to read the file with llama.cpp")
    assert export([str(furnished), "format=gguf", f"out={tmp_path / 'out'}", "prove=off"]) == 0
    code = (
        "import sys, xllamacpp\n"
        "asked = xllamacpp.CommonParams()\n"
        "asked.model.path, asked.n_ctx, asked.verbosity = sys.argv[1], 64, 10\n"
        "asked.n_parallel, asked.warmup = 1, False\n"
        "xllamacpp.Server(asked)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out" / "model.gguf")]
    stops = set()
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        assert server.stderr is not None
        for line in server.stderr:  # only what it has read of the file is of interest, not whether it serves
            if found_there := re.search(r"EOG token += (\d+)", line):
                stops.add(int(found_there[1]))
            elif stops:
                break
        server.kill()
    assert stops == {2, 7, 9}
