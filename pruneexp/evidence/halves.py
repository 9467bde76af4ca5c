"""Evidence of every other window apart: what one half was fitted to can be judged by the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pruneexp.types import Site
from pruneexp.types.defaults import EVIDENCE, filled


@dataclass(frozen=True)
class Halves:
    """A kind of evidence that holds two of `kind`, of alternate windows. What is collected is `Halved`.

    An expert sees the tokens of many windows as one run: each run is then split in two.
    """

    kind: Any

    least_windows: ClassVar[int] = 4  # two are the least to fit to, and to judge by

    def empty(self, site: Site) -> Halved:
        return Halved(self.kind.empty(site), self.kind.empty(site), site.expert is not None)

    @property
    def of(self) -> Any:
        return self.kind.of and self._of

    def _of(self, site: Site, keep_C: Tensor) -> Halved:
        return Halved(self.kind.of(site, keep_C), self.kind.of(site, keep_C), site.expert is not None)

    @property
    def held_bytes(self) -> Any:
        own = self.kind.held_bytes
        return own and (lambda *what: 2 * own(*what))

    def __getattr__(self, name: str) -> Any:
        """All else is as of `kind`."""
        if name not in (*EVIDENCE, "source"):
            raise AttributeError(name)
        return getattr(filled(self.kind, EVIDENCE), name)


@dataclass(frozen=True)
class Halved:
    """Evidence of windows 0, 2, 4, ... and of windows 1, 3, 5, ... (`runs`: of the first half of each run of tokens,
    and of the second). `windows`: how many were seen."""

    first: Any
    second: Any
    runs: bool = False
    windows: int = 0

    def update_(self, *seen: Tensor) -> Halved:
        windows, tokens = seen[0].shape[:2]
        if self.runs:
            parts = [[x[:, : tokens // 2] for x in seen], [x[:, tokens // 2 :] for x in seen]]
        else:
            parts = [[x[(turn + self.windows) % 2 :: 2] for x in seen] for turn in (0, 1)]
        first, second = (
            half.update_(*part) if part[0].shape[:2].numel() else half
            for half, part in zip((self.first, self.second), parts, strict=True)
        )
        return Halved(first, second, self.runs, self.windows + windows)

    def merge(self, other: Halved) -> Halved:
        """The other's windows come behind these."""
        first, second = (other.first, other.second) if self.windows % 2 == 0 else (other.second, other.first)
        return Halved(self.first.merge(first), self.second.merge(second), self.runs, self.windows + other.windows)

    @property
    def whole(self) -> Any:
        """Evidence of all windows."""
        return self.first.merge(self.second)
