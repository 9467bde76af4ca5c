"""A config value to the type that a field's annotation asks for, or a ConfigError that says what was expected."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from pruneexp.conf_files import did_you_mean
from pruneexp.types import ConfigError

NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path", type(None): "null"}


class Mismatch(Exception):
    """This value is not of this type."""


def coerced(value: Any, annotation: Any, key: str, typed: str | None = None) -> Any:
    """`value` as `annotation` has it: whole numbers become floats, lists become tuples, whole numbers become text where
    text is asked for. Annotations that a config cannot hold (protocols, classes) let everything pass. `typed`: the
    value as it was written, where that is known."""
    try:
        return _match(value, annotation)
    except Mismatch:
        if takes_text(annotation) and isinstance(value, (float, bool)):
            read = f"{key}={typed}: read as {value!r}" if typed else f"{key}={value!r}"
            quoted = f""", as in "{key}='{typed}'\"""" if typed else ""
            raise ConfigError(f"{read}; expected {described(annotation)}, in quotes{quoted}") from None
        near = did_you_mean(str(value), [str(option) for option in _literals(annotation)])
        raise ConfigError(f"{key}={value!r}: expected {described(annotation)}{near}") from None


def takes_text(annotation: Any) -> bool:
    """Whether text is asked for, and no whole number."""
    options = (
        typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    )
    return str in options and int not in options


def described(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(described(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin in (list, tuple, set, frozenset) or (origin is not None and issubclass(origin, Sequence)):
        return f"a list of {described(arguments[0])}" if arguments else "a list"
    if annotation in (list, tuple):
        return "a list"
    if annotation is dict or (origin is not None and issubclass(origin, Mapping)):
        return "keys with values" + (f" ({described(arguments[1])})" if arguments else "")
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _literals(annotation: Any) -> tuple[Any, ...]:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return arguments
    return tuple(option for argument in arguments for option in _literals(argument))


def _match(value: Any, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in SCALARS:
        return SCALARS[annotation](value)
    if origin in (Union, types.UnionType):
        return _match_any(value, arguments)
    if origin is Literal:
        # `True == 1`: the type has to agree too.
        if not any(value == option and type(value) is type(option) for option in arguments):
            raise Mismatch
        return value
    if origin is tuple or annotation is tuple:
        return _match_tuple(_a_list(value), arguments)
    if annotation is list or (origin is not None and isinstance(origin, type) and issubclass(origin, Sequence)):
        return [_match(item, arguments[0]) if arguments else item for item in _a_list(value)]
    if annotation is dict or (origin is not None and isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise Mismatch
        return {key: _match(item, arguments[1]) if arguments else item for key, item in value.items()}
    return value


def _match_any(value: Any, annotations: Sequence[Any]) -> Any:
    # Exact types before conversions: 3 for `float | int` stays an int.
    for annotation in annotations:
        if annotation is type(value):
            return value
    for annotation in annotations:
        try:
            return _match(value, annotation)
        except Mismatch:
            continue
    raise Mismatch


def _match_tuple(items: list[Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if not arguments:
        return tuple(items)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_match(item, arguments[0]) for item in items)
    if len(items) != len(arguments):
        raise Mismatch
    return tuple(_match(item, argument) for item, argument in zip(items, arguments, strict=True))


def _a_list(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise Mismatch
    return list(value)


def _none(value: Any) -> None:
    if value is not None:
        raise Mismatch


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Mismatch
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Mismatch
    return value


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Mismatch
    return float(value)


def _str(value: Any) -> str:
    # A name such as 2024 arrives as an int; a float would not come back as it was typed.
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Mismatch
    return value


def _path(value: Any) -> Path:
    return Path(_str(value))


SCALARS = {type(None): _none, None: _none, bool: _bool, int: _int, float: _float, str: _str, Path: _path}
