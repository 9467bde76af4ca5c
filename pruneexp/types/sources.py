"""Who feeds evidence: what each `source` of the protocol `Evidence` stands for.

"reader" is the input of a site's out-projection, "writer" that of its in-projections: the names that evidence of users
already has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pruneexp.types.nouns import ConfigError

ALWAYS = "always"
Sequential = bool | Literal["always"]  # of a criterion: see `Criterion`


@dataclass(frozen=True)
class Source:
    """`collector`: what collects it: the walk layer by layer, in the pass that all such evidence shares; the walk
    sublayer by sublayer; or whole passes through the model, before the walk."""

    collector: Literal["walk", "site_walk", "whole_model"]
    differentiates: bool = False  # by backward passes, through a model held in memory
    probes: bool = False  # by the losses of many structures, of a model held in memory


SOURCES: Mapping[str, Source] = {
    "reader": Source("walk"),
    "writer": Source("walk"),
    "block": Source("walk"),
    "wanted": Source("site_walk"),
    "probe": Source("whole_model", probes=True),
    "gradient": Source("whole_model", differentiates=True),
    "influence": Source("whole_model", differentiates=True),
    "zeroth_order": Source("whole_model"),
}


def source_of(kind: Any) -> Source:
    """Raises ConfigError for a kind of evidence whose source nothing feeds."""
    name: str = getattr(kind, "source", "")
    if name not in SOURCES:
        kind_name = getattr(kind, "__name__", type(kind).__name__)
        raise ConfigError(f"{kind_name}.source={name!r}: expected one of {', '.join(SOURCES)}")
    return SOURCES[name]


def collected_by(collector: Literal["walk", "site_walk", "whole_model"], kinds: Iterable[Any]) -> tuple[Any, ...]:
    """Those of `kinds` that `collector` feeds."""
    return tuple(kind for kind in kinds if source_of(kind).collector == collector)
