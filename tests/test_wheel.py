"""The wheel is the whole program: configs, sweeps and embedded models travel with it, and it runs outside the tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path, site: Path | None = None) -> str:
    """Standard output; only `site` is added to what the interpreter knows."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    ended = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tree and installed by itself."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT), cwd=folder)
    (wheel,) = folder.glob("pruneexp-*.whl")
    run(*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel), cwd=folder)
    return folder / "site"


def files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if "__pycache__" not in path.parts}


@pytest.mark.parametrize(("source", "target"), [("conf", "conf"), ("sweeps", "sweeps"), ("pruneexp", "")])
def test_everything_travels(source: str, target: str, site: Path) -> None:
    missing = files(ROOT / source) - files(site / "pruneexp" / target)
    assert not missing


@pytest.mark.parametrize("model", ["llama", "opt", "bloom"])
def test_the_embedded_models_travel(model: str, site: Path) -> None:
    names = files(site / "pruneexp" / "embedded" / model)
    assert {"config.json", "tokenizer.json"} <= names and any(name.endswith(".safetensors") for name in names)


def test_help_and_the_default_config_from_elsewhere(site: Path, tmp_path: Path) -> None:
    assert "flap_ratios" in run("-m", "pruneexp", "--help", cwd=tmp_path, site=site)
    composed = run("-m", "pruneexp", "--cfg", "job", cwd=tmp_path, site=site)
    assert "_target_: pruneexp.criterion.Flap\n" in composed
    swept = run("-m", "pruneexp", "--cfg", "hydra", "+sweep=flap_ratios", cwd=tmp_path, site=site)
    assert "mode: MULTIRUN" in swept
    assert not list(tmp_path.iterdir())


def test_the_package_that_ran_was_the_installed_one(site: Path, tmp_path: Path) -> None:
    where = run("-c", "import pruneexp; print(pruneexp.__file__)", cwd=tmp_path, site=site)
    assert Path(where.strip()).is_relative_to(site)


def test_the_main_job_runs_from_elsewhere(site: Path, tmp_path: Path) -> None:
    run("-m", "pruneexp", cwd=tmp_path, site=site)
    (folder,) = (tmp_path / "outputs" / "flap").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert abs(metrics["sparsity/decoder"] - 0.2) < 0.05
    assert list((folder / "model").glob("*.safetensors"))
