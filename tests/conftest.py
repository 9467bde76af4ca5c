"""Tiny models of every family, made on the spot, and the pieces that tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

# Tests run side by side: threads of their own would only wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PARITY = Path(__file__).parent / "data" / "flap_tiny"
FAMILIES = ("llama", "opt", "bloom")


@pytest.fixture(autouse=True)
def fresh_hydra() -> None:
    """Hydra keeps one global instance: each test starts without the last one's."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()


@pytest.fixture(scope="session", autouse=True)
def config_files_parsed_once() -> Iterator[None]:
    """Hydra's own config files and ours are the same in every test, and parsing them takes a third of composing."""
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    from pruneexp.conf_files import conf_folder

    def once(load: Callable[[Any, str], Any], folder: str) -> Callable[[Any, str], Any]:
        kept: dict[tuple[str, str, int], Any] = {}

        def load_config(source: Any, config_path: str) -> Any:
            if source.path != folder:
                return load(source, config_path)
            file = Path(source.path, source._normalize_file_name(config_path))
            key = (source.provider, config_path, file.stat().st_mtime_ns if file.is_file() else 0)
            if key not in kept:
                kept[key] = load(source, config_path)
            return deepcopy(kept[key])  # Hydra changes what it is given

        return load_config

    with pytest.MonkeyPatch.context() as patch:
        Plugins.instance()  # registers the sources, of classes of its own
        for scheme, folder in (("file", str(conf_folder())), ("pkg", "hydra.conf")):
            kind = SourcesRegistry.instance().resolve(scheme)
            patch.setattr(kind, "load_config", once(kind.load_config, folder))
        yield


def tiny_config(family: str) -> Any:
    """Three layers, six query heads of 8 (llama: three KV groups), 40 FFN channels (bloom: 4 x hidden)."""
    import transformers

    common = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "llama":
        return transformers.LlamaConfig(
            hidden_size=48,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            **common,
        )
    if family == "opt":
        return transformers.OPTConfig(
            hidden_size=48,
            ffn_dim=40,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=64,
            word_embed_proj_dim=48,
            dropout=0.0,
            **common,
        )
    return transformers.BloomConfig(hidden_size=48, n_layer=3, n_head=6, **common)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint folders of tiny random models (float64, weights large enough for every part to matter)."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            from transformers import AutoModelForCausalLM

            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(family)).double()
            for name, parameter in model.named_parameters():
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.15)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture
def source() -> Callable[..., Any]:
    """A ModelSource of a folder, with everything else at its plainest."""
    from pruneexp.model import ModelSource

    def make(path: Path | str, **settings: Any) -> Any:
        plain = {"name": "tiny", "revision": None, "dtype": "auto", "device": "cpu", "stream": False}
        plain |= {"trust_remote_code": False, "batch_size": 4}
        return ModelSource(path=str(path), **{**plain, **settings})

    return make


@pytest.fixture
def tiny(tiny_folder: Callable[[str], Path], source: Callable[..., Any]) -> Callable[..., Any]:
    """A loaded tiny model of a family."""
    return lambda family, **settings: source(tiny_folder(family), **settings).load()


@pytest.fixture
def loaded(tmp_path: Path, tiny_folder: Callable[[str], Path], source: Callable[..., Any]) -> Callable[..., Any]:
    """A tiny model of a family, in float64, or of a folder."""
    from tests.tiny_families import TINY, tiny_model

    def load(name: str, path: Path | None = None) -> Any:
        if path is None and name in TINY:
            path = tmp_path / name
            tiny_model(name).save_pretrained(path)
        return source(path or tiny_folder(name), name=name, dtype="float64").load()

    return load


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of the module's own for modeling files that transformers copies: the user's stays as it is.

    transformers parses such a file for its imports at each load, here once: it is the same one in every checkpoint.
    """
    from transformers import dynamic_module_utils

    parse, parsed = dynamic_module_utils.get_imports, dict[bytes, list[str]]()

    def get_imports(filename: str) -> list[str]:
        text = Path(filename).read_bytes()
        if text not in parsed:
            parsed[text] = parse(filename)
        return parsed[text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(dynamic_module_utils, "get_imports", get_imports)
        yield


@pytest.fixture(scope="session")
def forking() -> Iterator[Any]:
    from tests import clean_process

    with clean_process.forking() as forks:
        yield forks


@pytest.fixture
def forked_proofs(forking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs in a clean process fork it, which saves its imports; for tests of what is proved, not of the process."""
    from pruneexp.surgery import prove

    monkeypatch.setattr(prove, "subprocess", forking)


@pytest.fixture
def tokens_NT() -> torch.Tensor:
    return torch.randint(3, 96, (10, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def build_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """An Experiment from command-line overrides, in a folder of its own."""

    def make(*overrides: str) -> Any:
        from hydra.types import RunMode

        from pruneexp.cli.build import build
        from pruneexp.cli.compose import compose_raw, composed, open_hydra

        monkeypatch.chdir(tmp_path)
        return build(composed(compose_raw(open_hydra(), list(overrides), RunMode.RUN)))

    return make


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in `tmp_path`: its exit code, stdout, stderr."""
    from pruneexp import progress
    from pruneexp.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(progress, "BAR_AFTER", 3600.0)
    before = signal.getsignal(signal.SIGTERM)

    def run(*typed: str) -> tuple[int, str, str]:
        try:
            code = main(typed)
        finally:
            signal.signal(signal.SIGTERM, before)
        return code, *capfd.readouterr()

    return run
