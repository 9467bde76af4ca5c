"""What somebody's own part may leave out, and what that means: filled in once, where parts come together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pruneexp.types.nouns import ConfigError, Measured
from pruneexp.types.sources import source_of

Defaults = Mapping[str, Any]


def _nothing(*_: Any, **__: Any) -> None: ...


def _zero(*_: Any) -> int:
    return 0


def _two_zeros(*_: Any) -> tuple[int, int]:
    return 0, 0


EVIDENCE: Defaults = {
    "by_window": False,
    "per_sample": False,
    "fits": False,
    "least_windows": 1,
    "wide": False,
    "by_unit": False,
    "of": None,
    "passes": _two_zeros,
    "held_bytes": None,  # what `empty` lays out
}
CRITERION: Defaults = {
    "sequential": False,
    "few_tokens": False,
    "judges": ("attention", "mlp"),
    "lost": _zero,
    "working_bytes": _zero,
    "kept_bytes": _two_zeros,
}
COMPENSATOR: Defaults = {"few_tokens": False, "working_bytes": _zero, "settled": None}
SEARCH: Defaults = {
    "local": False,
    "granularity": ("heads", "channels"),
    "heads": None,  # a count for all layers, in place of the ratio
    "probes": False,
    "check": _nothing,
    "spends": None,
    "refits": 0,
    "rebalanced": None,
    "rescored": None,
    "warning": _nothing,
    "starts": {},
    "held_out": 0.0,
    "objective": "next_token",
    "tries": 0.0,
}
RECOVERY: Defaults = {"seen": None, "looks": _zero, "batch": 0, "layerwise": False, "merge": True}
SPARSITY: Defaults = {"batch": 1, "phase": "decode", "table": None}
EVALUATOR: Defaults = {
    "streams": False,
    "check": _nothing,
    "prepare": _nothing,
    "longest": _nothing,  # None: not known
    "windows": _nothing,  # None: it reads none
    "against": lambda *_: Measured({}),
    "measured_on": _nothing,
    "lacks_bos": lambda *_: False,
    "bos": False,
    "dataset": None,
    "prompts": None,
    "length": None,
    "batch_size": 1,
}
DATASET: Defaults = {
    "samples": None,
    "length": None,
    "evaluation_samples": None,
    "contiguous": False,
    "bos": None,  # its windows are used as they are
    "origins": None,
    "apart": None,
    "check": _nothing,
    "key": lambda *seen: f"dataset ({seen[-1]})",
    "description": lambda *_: {"kind": "own"},
}
AUGMENTATION: Defaults = {"working_bytes": _zero}
QUANTISE: Defaults = {
    "in_place": False,
    "check": _nothing,
    "prepare": _nothing,
    "scratch_bytes": _zero,
    "measured_on": _nothing,
}
TRACKER: Defaults = {"summarise": None}


def filled(part: Any, defaults: Defaults) -> Any:
    """Gives a part, an object or a class, the default of every member that it lacks, and returns it. Raises ConfigError
    where the part takes no attributes."""
    for name, value in defaults.items():
        if hasattr(part, name) or name in getattr(part, "__dataclass_fields__", ()):
            continue
        try:
            if isinstance(part, type):
                setattr(part, name, value)
            else:
                object.__setattr__(part, name, value)  # of frozen dataclasses, too
        except (AttributeError, TypeError):
            kind = part if isinstance(part, type) else type(part)
            cannot = f"{kind.__name__} has no {name} and cannot be given one"
            raise ConfigError(f"{cannot}; expected a class with it") from None
    return part


def fill_in(package: Mapping[str, Any], defaults: Defaults, apart: Sequence[type] = ()) -> None:
    """Gives the classes of a package, named there and defined within it, the defaults of what they lack; those
    `apart` are left as they are."""
    for kind in package.values():
        if isinstance(kind, type) and kind.__module__.startswith(package["__name__"]) and kind not in apart:
            filled(kind, defaults)


def evidence_kinds(wanted: Any) -> tuple[Any, ...]:
    """The kinds of evidence that a method names, as a tuple: none, one or several. Raises ConfigError where one is no
    kind of evidence, or its source is unknown."""
    kinds = wanted if isinstance(wanted, tuple) else () if wanted is None else (wanted,)
    for kind in kinds:
        if hasattr(kind, "source"):
            source_of(kind)
        needed = ("source", "empty", *["update_"] * isinstance(kind, type))  # a value stands for what its `empty` gives
        if absent := [name for name in needed if not hasattr(kind, name)]:
            what = f"{kind!r} has no {' and no '.join(absent)}"
            expected = f"expected statistics with {', '.join(needed)}, several of them as a tuple, or None"
            raise ConfigError(f"{what}; {expected}")
        filled(kind, EVIDENCE)
    return kinds
