"""What a `_target_` is: the class or function behind it, and what may be set of it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pruneexp.conf_files import did_you_mean
from pruneexp.types import ConfigError, one_line

Parameters = Mapping[str, inspect.Parameter]


def located(target: Any, key: str) -> Callable[..., Any]:
    """The class or function behind a dotted path; the current directory's modules count. Raises ConfigError."""
    module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    if not module:
        raise ConfigError(f"{key}={target!r}: expected a dotted path to a class, such as package.module.Class")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file that is called datasets.py must not hide a library
    try:
        symbol = getattr(importlib.import_module(module), name)
    except AttributeError:
        near = did_you_mean(name, dir(sys.modules[module]), f"{module}.{{}}")
        raise ConfigError(f"{key}={target!r}: module {module} has no {name}{near}") from None
    except Exception as error:
        raise ConfigError(f"{key}={target!r}: cannot import it: {type(error).__name__}: {one_line(error)}") from error
    if not callable(symbol):
        raise ConfigError(f"{key}={target!r}: expected a class or a function, found {type(symbol).__name__}")
    return symbol


def signature(target: Callable[..., Any]) -> tuple[Parameters, dict[str, Any]]:
    parameters = inspect.signature(target).parameters
    holder = target.__init__ if inspect.isclass(target) and not dataclasses.is_dataclass(target) else target
    try:
        return parameters, typing.get_type_hints(holder)
    except (NameError, TypeError):
        return parameters, {}  # annotations that only a type checker can read: the class checks its fields itself
