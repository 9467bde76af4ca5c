"""A hub of one repository on loopback: what huggingface_hub asks of it, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def small_hub(repository: str, folder: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Serves the files in `folder` as the model `repository`; gives the environment of processes that are to ask it,
    and the files that they have fetched so far."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/api/models/{repository}/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file)}
                    for name, file in sorted(files.items())
                ]
                self._send(json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
                return
            if path.startswith(f"/api/models/{repository}"):
                info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in sorted(files)]}
                self._send(json.dumps(info).encode(), body, {"Content-Type": "application/json"})
                return
            start = f"/{repository}/resolve/"
            name = path.removeprefix(start).partition("/")[2] if path.startswith(start) else ""
            if name not in files:
                self.send_error(404)
                return
            if body:
                fetched.append(name)
            self._send(files[name].read_bytes(), body, {"ETag": f'"{digest(files[name])}"', "X-Repo-Commit": COMMIT})

        def _send(self, content: bytes, body: bool, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    try:
        yield {**os.environ, **settings}, fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
