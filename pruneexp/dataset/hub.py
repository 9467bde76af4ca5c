"""Windows of data sets on the Hugging Face hub, by the protocols of the pruning papers' own code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pruneexp.dataset.offline import hub
from pruneexp.dataset.rows import DocumentSource, Rows
from pruneexp.types import ConfigError, RunError, one_line

SPLIT = re.compile(r"(\w+)(?:\[(-?\d*):(-?\d*)\])?")


@dataclass(frozen=True, kw_only=True)
class HubText(DocumentSource):
    """Text of a data set on the hub (or in its local cache). Splits are named as `datasets` does, "train" or
    "validation[:1100]"."""

    path: str
    config: str | None
    revision: str | None
    data_files: dict[str, str] | None
    streaming: bool
    calibration_split: str
    evaluation_split: str

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in ("calibration_split", "evaluation_split"):
            split = SPLIT.fullmatch(getattr(self, part))
            if split is None or (self.streaming and "-" in split[0]):
                expected = "like 'train' or 'train[100:200]'" + (", from its start" if self.streaming else "")
                raise ConfigError(f"{part}={getattr(self, part)!r}: expected a split {expected}")
            if self.data_files is not None and split[1] not in self.data_files:
                raise ConfigError(f"{part}={split[0]!r}: expected one of data_files, {', '.join(self.data_files)}")

    def check(self, calibration: bool = True, evaluation: bool = True) -> None:
        """There is nothing to check without asking the hub."""

    def __hash__(self) -> int:
        return hash(repr(self))  # lists and dicts are among the settings

    def rows(self, part: str) -> Rows:
        documents = self._documents(getattr(self, f"{part}_split"))
        return Rows(getattr(documents, "_fingerprint", None) or "", lambda: documents)

    def key(self, part: str) -> str:
        return f"dataset.{part}_split={getattr(self, f'{part}_split')} (of {self.path})"

    def description(self) -> Mapping[str, Any]:
        as_they_are = ("path", "config", "revision", "data_files", "special_tokens")
        evaluation = {"split": self.evaluation_split, "join": self.evaluation_join, "windows": self.evaluation_windows}
        return {
            "kind": "hub",
            **{name: getattr(self, name) for name in as_they_are},
            **self.drawing(),
            "fields": list(self.fields),
            "calibration": {"split": self.calibration_split, "join": self.calibration_join},
            "evaluation": evaluation,
        }

    def _documents(self, split: str) -> Sequence[Mapping[str, Any]]:
        """The split's documents. Raises RunError where neither the hub nor the cache has them."""
        import datasets

        base, start, stop = SPLIT.fullmatch(split).groups()  # type: ignore[union-attr]
        files = None if self.data_files is None else {base: self.data_files[base]}
        options = {"name": self.config, "revision": self.revision, "data_files": files, "streaming": self.streaming}
        with hub() as unreachable:
            try:
                if not self.streaming:
                    return datasets.load_dataset(self.path, split=split, **options)
                rows = datasets.load_dataset(self.path, split=base, **options).skip(int(start or 0))
                return list(rows.take(int(stop) - int(start or 0)) if stop else rows)
            except Exception as error:  # the client raises OSError, ValueError, RuntimeError, its http library's own
                reason = unreachable or one_line(f"{type(error).__name__}: {error}")
                offline = "offline, use dataset=text dataset.calibration=FILE dataset.evaluation=FILE"
                message = f"dataset.path={self.path}: cannot be loaded from the hub or its cache ({reason}); {offline}"
                raise RunError(message) from error
