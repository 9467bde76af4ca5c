"""Whether the Hugging Face hub can be reached at all, told before its libraries try again and again."""

from __future__ import annotations

import socket
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import unquote, urlsplit

PATIENCE = 3.0  # seconds for one of the hub's addresses to take a connection; how slow it is then does not matter
PROXYS_PATIENCE = 10.0  # seconds for a proxy, which answers once it has reached the hub, or given up


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
    """Why the URL's host takes no connection, none of its addresses or not through the proxy that is set for it; ""
    where it does, and behind proxies that cannot be asked: of another kind than http, or for an http URL."""
    parts, proxies = urlsplit(url), urllib.request.getproxies()
    host, port = parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443)
    named = proxies.get(parts.scheme) or proxies.get("all") or ""
    proxy, through = urlsplit(named if "//" in named else f"http://{named}"), ""
    try:
        if not named or urllib.request.proxy_bypass(host):
            socket.create_connection((host, port), PATIENCE).close()
        elif (parts.scheme, proxy.scheme) == ("https", "http"):
            through = f" through the proxy {proxy.hostname}"
            known = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}".encode()
            headers = {"Proxy-Authorization": f"Basic {b64encode(known).decode()}"} if proxy.username else {}
            with closing(HTTPConnection(proxy.hostname or "", proxy.port or 80, timeout=PROXYS_PATIENCE)) as connection:
                connection.set_tunnel(host, port, headers)
                connection.connect()
    except ValueError:  # an address that cannot be read
        return ""
    except (OSError, HTTPException) as error:
        return f"{url} cannot be reached{through}: {getattr(error, 'strerror', None) or error}"
    return ""
