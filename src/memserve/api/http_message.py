"""A handler's request, and its reply: whole, or as a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol

import msgspec

from memserve.api.errors import ApiError
from memserve.api.local_connection import LocalConnection

Header = tuple[bytes, bytes]
Headers = Iterable[Header]
Body = bytes | bytearray

JSON_MEDIA = "application/json"
JSON_HEADER = (b"content-type", JSON_MEDIA.encode())
EVENTS_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
)
_BAD = 400  # statuses from here on are errors
_STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus
}


class Request(msgspec.Struct, frozen=True, eq=False):
    """A whole request. Header names are in lower case."""

    method: str
    path: str  # decoded, without the query
    query: bytes
    headers: list[Header]
    body: bytes
    http_10: bool
    keep_alive: bool  # the client may send another request
    target: bytes  # as received
    private: bool = False  # no third party can listen: TLS, or within this machine
    local: LocalConnection | None = None  # its connection, if within this machine; else None

    def header(self, name: bytes) -> bytes | None:
        """Return a header's first value, or None; `name` in lower case."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


class Wire(Protocol):
    """The connection under a reply."""

    def send(self, data: bytes) -> None: ...

    def replied(self, keep_alive: bool) -> None:
        """The reply is complete."""


class Reply:
    """The answer to one request. Its handler owns it; writing to a client that has gone is no
    error and does nothing.

    `on_gone` is called once when the client hangs up before the end; `on_flow` with True when
    the client reads too slowly for what was written, with False when it has caught up. `refusal`:
    the body of a whole answer with an error's status. `added`
    returns further headers for the answer's status and body; the body is None if it is not whole
    before the first byte is sent.
    """

    __slots__ = (
        "_bare",
        "_chunked",
        "_http_10",
        "_keep_alive",
        "_pending",
        "_wire",
        "added",
        "ended",
        "gone",
        "on_flow",
        "on_gone",
        "refusal",
        "started",
        "status",
        "writable",
    )

    def __init__(self, wire: Wire, request: Request, writable: bool = True) -> None:
        self._wire = wire
        self._http_10 = request.http_10
        self._bare = request.method == "HEAD"
        self._keep_alive = request.keep_alive
        self._chunked = False
        self._pending = b""  # the head of a stream, until its first bytes
        self.status = 0  # 0: nothing was sent
        self.refusal: Body = b""
        self.started = False
        self.ended = False
        self.gone = False
        self.writable = writable
        self.on_gone: Callable[[], None] | None = None
        self.on_flow: Callable[[bool], None] | None = None
        self.added: Callable[[int, Body | None], Headers] | None = None

    def send(
        self, status: int, body: bytes, headers: Headers = (), media: Header = JSON_HEADER
    ) -> None:
        """Send a whole answer."""
        length = (b"content-length", b"%d" % len(body))
        self.started = True
        if status >= _BAD:
            self.refusal = body
        head = self._head(status, (media, length, *headers), b"" if self._bare else body)
        self._finish(head if self._bare else head + body)

    def send_error(self, error: ApiError, headers: Headers = ()) -> None:
        self.send(error.status, error.body(), (*headers, *error.headers()))

    def start(
        self, status: int, headers: Headers, *, sized: bool = False, whole: Body | None = None
    ) -> None:
        """Begin a stream. `sized`: `headers` have its length. `whole`: the whole body, if it is
        known already; it is still to be written."""
        self.started = True
        framing: tuple[Header, ...] = ()
        if not sized and not self._bare:
            if self._http_10:
                self._keep_alive = False  # closing the connection ends the stream
            else:
                self._chunked = True
                framing = ((b"transfer-encoding", b"chunked"),)
        if whole is not None and self._bare:
            whole = b""
        self._pending = self._head(status, (*headers, *framing), whole)

    def write(self, data: bytes) -> None:
        """Send bytes of a stream, at least one, at once, as one write."""
        if self._bare:
            return
        if self._chunked:
            data = b"%b%x\r\n%b\r\n" % (self._pending, len(data), data)
        elif self._pending:
            data = self._pending + data
        self._pending = b""
        if not self.gone:
            self._wire.send(data)

    def end(self, data: bytes = b"") -> None:
        """End a stream, with its last bytes."""
        if self._bare:
            data = b""
        if self._chunked:
            last = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            data = b"%b%b0\r\n\r\n" % (self._pending, last)
        else:
            data = self._pending + data
        self._pending = b""
        self._finish(data)

    def abort(self) -> None:
        """Close the connection without ending the stream: the client sees that it is incomplete."""
        self._keep_alive = False
        self._finish(b"")

    def hung_up(self) -> None:
        """Note that the client has gone; called by the connection."""
        self.gone = True
        tell, self.on_gone, self.on_flow = self.on_gone, None, None
        if tell is not None:
            tell()

    def _finish(self, data: bytes) -> None:
        if self.ended:
            raise RuntimeError("a reply ends once")
        self.ended = True
        self.on_gone = self.on_flow = None
        if not self.gone:
            if data:
                self._wire.send(data)
            self._wire.replied(self._keep_alive)

    def _head(self, status: int, headers: Headers, whole: Body | None) -> bytes:
        self.status = status
        if self.added is not None:
            headers = (*headers, *self.added(status, whole))
        parts = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status, _date()]
        for name, value in headers:
            if name == b"connection":
                self._keep_alive = self._keep_alive and value.lower() != b"close"
            else:
                parts += (name, b": ", value, b"\r\n")
        if not self._keep_alive:
            parts.append(b"connection: close\r\n")
        elif self._http_10:
            parts.append(b"connection: keep-alive\r\n")
        parts.append(b"\r\n")
        return b"".join(parts)


class _Date:
    second = 0
    line = b""


def _date() -> bytes:
    """Return the Date header line, made once a second."""
    now = int(time.time())
    if now != _Date.second:
        _Date.second = now
        _Date.line = b"date: %b\r\n" % formatdate(now, usegmt=True).encode()
    return _Date.line
