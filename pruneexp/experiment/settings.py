"""A composed experiment as objects: one choice of every group, and the run's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pruneexp.cache import Cache, NoCache
from pruneexp.files import typed_folder
from pruneexp.model import ModelSource
from pruneexp.model.given import GivenModel
from pruneexp.pruning import Method
from pruneexp.tracker import check_folder
from pruneexp.types import (
    Augmentation,
    Compensator,
    ConfigError,
    Criterion,
    Dataset,
    Evaluator,
    Quantise,
    Recovery,
    Search,
    Sparsity,
    Tracker,
)


@dataclass(frozen=True)
class RunSettings:
    """Where a run's record goes and what of it is kept; `prove` says how a saved checkpoint is checked."""

    dir: str | None
    name: str | None
    overwrite: bool
    save: bool
    prove: Literal["process", "in_place", "off"]
    dry: bool

    def __post_init__(self) -> None:
        if self.folder is None and self.name is not None:
            if self.name in ("", ".", "..") or any(sign in self.name for sign in "/\\\0"):
                raise ConfigError(f"name={self.name!r}: expected a plain name, used as the end of a folder's name")

    @property
    def folder(self) -> Path | None:
        """`dir` as a path. Raises ConfigError."""
        return None if self.dir is None else typed_folder("dir", self.dir, "outputs/<recipe>/<date_time>")


@dataclass(frozen=True)
class Experiment:
    """One choice of every group, and the run's own settings. `config`: the composed config; `job`: recipe, sweep."""

    model: ModelSource | GivenModel
    dataset: Dataset
    augmentation: Augmentation
    criterion: Criterion
    sparsity: Sparsity
    search: Search
    compensator: Compensator
    recovery: Recovery
    quantise: Quantise
    evaluators: Mapping[str, Evaluator]
    tracker: Tracker
    cache: Cache | NoCache
    run: RunSettings
    seed: int
    config: Mapping[str, Any]
    job: Mapping[str, Any]

    @property
    def method(self) -> Method:
        """What decides which units leave, and what makes up for them."""
        return Method(self.criterion, self.sparsity, self.search, self.compensator)

    def check(self, recorded: bool = True) -> None:
        """What files and the machine can tell without loading a weight. `recorded`: a run folder is to be written.
        Raises ConfigError."""
        folder = self.run.folder
        if folder is not None:
            check_folder(folder, self.run.overwrite)
        elif recorded and not self.run.dry:
            check_folder(Path("outputs", self.job["recipe"]), overwrite=True)
        self.model.check(weights=not self.run.dry)
        source = self.model.local_folder()
        if source is not None and folder is not None and source.resolve() == (folder / "model").resolve():
            raise ConfigError(f"run.dir={self.run.dir!r}: its model/ is the model to prune; expected another folder")
        self.cache.check()
        self.dataset.check(evaluation=False)
        self.quantise.check()
        for evaluator in self.evaluators.values():
            evaluator.check()
