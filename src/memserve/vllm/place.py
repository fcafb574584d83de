"""The address of a vLLM server, and requests to it."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from memserve.errors import EngineStopped

ASK_SECONDS = 10.0
# Idle connections are closed after this. vLLM closes them after 5 s, and a request that is sent at
# that moment is lost.
IDLE_SECONDS = 2.5


@dataclass(frozen=True, slots=True)
class ServerPlace:
    """Address and API key of a vLLM server.

    `url`: its HTTP URL without a path. `path`: its Unix socket; the host in `url` is then unused.
    `key`: its API key, or None."""

    url: str = "http://vllm"
    path: Path | None = None
    key: str | None = field(default=None, repr=False)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    def connector(self) -> aiohttp.BaseConnector:
        """Return a connector without a limit of connections. Needs a running event loop."""
        if self.path is not None:
            return aiohttp.UnixConnector(str(self.path), limit=0, keepalive_timeout=IDLE_SECONDS)
        return aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)

    def ask(self, path: str) -> bytes:
        """Return the body of the answer to `GET path`. Blocks for up to ASK_SECONDS per socket
        operation. Raises OSError, HTTPException, or EngineStopped if the status is not 200."""
        connection = self._connection()
        try:
            connection.request("GET", path, headers=self.headers)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != HTTPStatus.OK:
            raise EngineStopped(f"the vLLM server answers {path} with {response.status}")
        return body

    def is_healthy(self) -> bool:
        try:
            self.ask("/health")
        except (OSError, HTTPException, EngineStopped):
            return False
        return True

    def _connection(self) -> HTTPConnection:
        if self.path is not None:
            return _UnixConnection(self.path)
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        return kind(parts.netloc, timeout=ASK_SECONDS)


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("vllm", timeout=ASK_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ASK_SECONDS)
        self.sock.connect(str(self._path))
