"""Whether the Hugging Face hub can be reached at all, told before its libraries try again and again."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 3.0  # seconds for one of the hub's addresses to take a connection; how slow it is then does not matter


@contextmanager
def hub() -> Iterator[str]:
    """Inside, the hub's libraries take what their caches hold and ask no network that is not there: each of their
    requests would be repeated for half a minute. Gives why the hub cannot be reached, "" where it can be or where they
    are offline already (HF_HUB_OFFLINE)."""
    from datasets import config
    from huggingface_hub import constants

    settings: list[Any] = [config, constants]
    before = [each.HF_HUB_OFFLINE for each in settings]
    why = "" if any(before) else unreachable(constants.ENDPOINT)
    try:
        for each in settings if why else ():
            each.HF_HUB_OFFLINE = True
        yield why
    finally:
        for each, offline in zip(settings, before, strict=True):
            each.HF_HUB_OFFLINE = offline


def unreachable(url: str) -> str:
    """Why no address of the URL's host takes a connection, "" where one does. Behind a proxy nothing can be told."""
    parts = urlsplit(url)
    if {parts.scheme, "all"} & set(urllib.request.getproxies()):
        return ""
    port = parts.port or {"http": 80}.get(parts.scheme, 443)
    try:
        socket.create_connection((parts.hostname, port), PATIENCE).close()
    except OSError as error:
        return f"{url} cannot be reached: {error.strerror or error}"
    return ""
