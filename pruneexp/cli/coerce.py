"""A config value to the type that a field's annotation asks for, or a ConfigError that says what was expected."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from pruneexp.conf_files import did_you_mean
from pruneexp.types import ConfigError

NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path", type(None): "null"}
LISTS = (list, tuple)
SCALARS: dict[Any, tuple[tuple[type, ...], Callable[[Any], Any]]] = {  # what is taken, and what becomes of it
    type(None): ((type(None),), lambda value: value),
    bool: ((bool,), bool),
    int: ((int,), int),
    float: ((float, int), float),
    str: ((str, int), str),  # a name such as 2024 arrives as an int; a float would not come back as it was typed
    Path: ((str, int), lambda value: Path(str(value))),
}


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
        raise ConfigError(f"{key}={value!r}: expected {described(annotation)}{_near(value, annotation)}") from None


def takes_text(annotation: Any) -> bool:
    """Whether text is asked for, and no whole number."""
    kind, arguments = _parts(annotation)
    options = arguments if kind is Union else (annotation,)
    return str in options and int not in options


def takes_list(annotation: Any) -> bool:
    kind, arguments = _parts(annotation)
    return any(map(takes_list, arguments)) if kind is Union else _is(kind, Sequence) and kind is not str


def _near(value: Any, annotation: Any) -> str:
    """What to suggest in place of a value that does not fit."""
    options = _literals(annotation)
    if isinstance(value, str) and value in options:
        return f"; did you mean [{value}]?"
    if isinstance(value, bool) and (word := "on" if value else "off") in options:  # as YAML reads the word
        return f'; did you mean "{word}", in quotes?'
    return did_you_mean(str(value), map(str, options))


def described(annotation: Any) -> str:
    kind, arguments = _parts(annotation)
    if kind is Union:
        return " or ".join(described(argument) for argument in arguments)
    if kind is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if kind in NAMES:
        return NAMES[kind]
    if _is(kind, Sequence):
        return f"a list of {described(arguments[0])}" if arguments else "a list"
    if _is(kind, Mapping):
        return "keys with values" + (f" ({described(arguments[1])})" if arguments else "")
    return getattr(annotation, "__name__", str(annotation))


def _parts(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its arguments, and the arguments."""
    kind = typing.get_origin(annotation) or annotation
    return Union if kind is types.UnionType else kind, typing.get_args(annotation)


def _is(kind: Any, base: type) -> bool:
    """Whether it is one of Python's own kinds of `base`, rather than somebody's class."""
    return isinstance(kind, type) and issubclass(kind, base) and kind.__module__ in ("builtins", "collections.abc")


def _literals(annotation: Any) -> tuple[Any, ...]:
    kind, arguments = _parts(annotation)
    return arguments if kind is Literal else tuple(option for each in arguments for option in _literals(each))


def _match(value: Any, annotation: Any) -> Any:
    kind, arguments = _parts(annotation)
    if kind in SCALARS:
        accepted, convert = SCALARS[kind]
        return convert(_one_of(accepted, value))
    if kind is Union:
        return _match_any(value, arguments)
    if kind is Literal:
        # `True == 1`: the type has to agree too.
        if not any(value == option and type(value) is type(option) for option in arguments):
            raise Mismatch
        return value
    if kind is tuple:
        items = _one_of(LISTS, value)
        wanted = arguments[:1] * len(items) if arguments[1:] == (...,) else arguments or (Any,) * len(items)
        if len(items) != len(wanted):
            raise Mismatch
        return tuple(map(_match, items, wanted))
    if _is(kind, Sequence):
        return [_match(item, *arguments or (Any,)) for item in _one_of(LISTS, value)]
    if _is(kind, Mapping):
        of = arguments[1] if arguments else Any
        return {key: _match(item, of) for key, item in _one_of((dict,), value).items()}
    return value


def _match_any(value: Any, annotations: Sequence[Any]) -> Any:
    # Exact types before conversions: 3 for `float | int` stays an int.
    for annotation in sorted(annotations, key=lambda each: each is not type(value)):
        try:
            return _match(value, annotation)
        except Mismatch:
            continue
    raise Mismatch


def _one_of(kinds: tuple[type, ...], value: Any) -> Any:
    if type(value) not in kinds:  # `True` is an int to `isinstance`
        raise Mismatch
    return value
