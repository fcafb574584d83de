"""Parser of a connection's bytes into requests, on httptools (llhttp in its strict mode).

llhttp refuses means of request smuggling: conflicting or repeated lengths, a length beside
`Transfer-Encoding`, bare LF, folded header lines, spaces before a header's colon. This module
refuses requests that a server may not accept and llhttp does: without one valid Host (RFC 9112,
3.2), with other transfer codings than chunked (6.1) or versions than 1.0 and 1.1, CONNECT.

An offer to upgrade (`Connection: Upgrade`) is ignored, as RFC 9110 (7.8) allows. llhttp stops at
such a head, so the head goes without `Upgrade` through a fresh parser, then the bytes behind it.
"""

from __future__ import annotations

import re
from typing import Protocol, cast
from urllib.parse import unquote

import httptools

from memserve.api.errors import ApiError, body_too_large, invalid, method_not_allowed
from memserve.api.http_message import Header, Request
from memserve.api.http_refusals import (
    coding_not_implemented,
    head_too_large,
    too_many_headers,
    version_not_supported,
)
from memserve.api.local_connection import LocalConnection

MAX_HEAD_BYTES = 64 * 1024  # request line and headers, with their separators
MAX_HEADERS = 256  # a browser behind three proxies sends 40

# Bytes to feed at once, unless all belong to one body: most requests whole, or 600 of the shortest.
MAX_SLICE_BYTES = 16 * 1024

# A head of which at most this much came before its last slice is smaller than MAX_HEAD_BYTES.
_SURELY_SMALL = MAX_HEAD_BYTES - MAX_SLICE_BYTES
_HEADER_OVERHEAD = len(b": \r\n")
_LINE_OVERHEAD = len(b"  HTTP/1.1\r\n\r\n")
# Headers that the server itself reads.
_OWN_HEADERS = frozenset(
    (b"host", b"content-length", b"transfer-encoding", b"expect", b"upgrade"),
)
# uri-host [":" port] (RFC 3986, 3.2.2); empty where the target has no authority.
_HOST = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]+(?:%25[\w.~%-]+)?\]"
    rb"|(?:[\w.~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)"
    rb"(?::[0-9]*)?"
)


class Sink(Protocol):
    """Receiver of the parser's events."""

    def requested(self, request: Request) -> None:
        """A request is whole."""

    def expects(self) -> None:
        """The client waits for a 100 before it sends its body (`Expect: 100-continue`)."""

    def headed(self, head: Request) -> None:
        """A head is whole, its body is to come. The sink stops the parser to refuse it."""

    def announced(self, length: int) -> None:
        """A body of `length` bytes is to come."""

    def refused(self, error: ApiError) -> None:
        """A request is not acceptable; the parser has stopped."""


class RequestParser:
    """Parser of one connection. Must be closed: it and httptools' parser refer to each other."""

    __slots__ = (
        "_body",
        "_count",
        "_fed",
        "_headers",
        "_host",
        "_http_10",
        "_keep_alive",
        "_large",
        "_length",
        "_limit",
        "_local",
        "_method",
        "_offer",
        "_parser",
        "_parts",
        "_private",
        "_sink",
        "_stopped",
        "_unasked",
        "_url",
        "_usual",
        "body_size",
        "feed_data",
        "in_head",
        "unfinished",
    )

    def __init__(
        self,
        sink: Sink,
        max_body_bytes: int,
        large: int,
        private: bool,
        unasked: int | None = None,
        local: LocalConnection | None = None,
    ) -> None:
        """Bodies of more than `large` bytes are `announced`. If `unasked` is given, heads with
        bodies of more bytes, or unknown size, are `headed`. `private`, `local`: see `Request`."""
        self._sink = sink
        self._limit = max_body_bytes
        self._large = large
        self._private = private
        self._local = local
        self._unasked = unasked
        self._usual = min(max_body_bytes, large)
        if unasked is not None:
            self._usual = min(self._usual, unasked)
        self._parser = httptools.HttpRequestParser(self)
        # A fast path for at most MAX_SLICE_BYTES: the caller calls `stumbled` with an error that
        # it raises (HttpParserError, HttpParserUpgrade), and `count` if `unfinished`.
        self.feed_data = self._parser.feed_data
        self._host = b""  # the last valid one; a connection's requests mostly have one Host
        self._stopped = False
        # The request that is being read:
        self.unfinished = False  # some bytes of it have come
        self.in_head = True
        self.body_size = 0
        # Bytes since the request's begin, its head's end or its body's last bytes: of a head, or of
        # trailers and chunks' extensions.
        self._fed = 0
        self._url = b""
        self._headers: list[Header] = []
        self._count = 0  # of its headers, without trailers
        self._parts: list[bytes] = []  # parts of the body since `gather`
        self._body = bytearray()  # the body before these
        self._length = 0  # of the body; 0: none, or not known
        self._offer = b""  # its head without the offer to upgrade
        self._method = b""
        self._http_10 = False
        self._keep_alive = True

    def feed(self, data: bytes | memoryview) -> None:
        """Parse bytes: a body's `missing` ones, or MAX_SLICE_BYTES at most. Calls the sink."""
        try:
            self.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.stumbled(data, error)
        if self.unfinished and len(data) <= MAX_SLICE_BYTES:
            self.count(len(data))

    def stumbled(self, data: bytes | memoryview, error: Exception) -> None:
        """Handle an error of `feed_data`."""
        try:
            if isinstance(error, httptools.HttpParserUpgrade):
                self._decline(data, error)
                return
        except httptools.HttpParserError as behind:
            error = behind
        self.refuse(invalid(f"Not HTTP/1.1: {error}"))

    def count(self, size: int) -> None:
        """Count `size` bytes of an unfinished request. The first may belong to the request before,
        so a head is refused at most one slice beyond the limit, and never below it."""
        self._fed += size
        if self._fed > MAX_HEAD_BYTES + MAX_SLICE_BYTES:
            self.refuse(head_too_large(MAX_HEAD_BYTES))

    @property
    def missing(self) -> int:
        """Bytes that the body still lacks; 0 if its length is not known."""
        return self._length - self.body_size if self._length else 0

    @property
    def held(self) -> int:
        """Bytes held of the request that is being read."""
        return self._fed + self.body_size if self.unfinished else 0

    def gather(self) -> None:
        """Join the body's parts, so that small ones take no extra memory. Call it when there is
        nothing more to feed for now."""
        for part in self._parts:
            self._body += part
        self._parts.clear()

    def refuse(self, error: ApiError) -> None:
        """Stop, and call the sink's `refused`, unless stopped already."""
        if not self._stopped:
            self.stop()
            self._sink.refused(error)

    def stop(self) -> None:
        """Ignore all further bytes, and drop the request that is being read."""
        self._stopped = True
        self.unfinished = False
        self._body = bytearray()
        self._start_afresh()

    def close(self) -> None:
        """Free everything. Nothing may be called afterwards."""
        self.stop()
        del self.feed_data
        self._parser = cast(httptools.HttpRequestParser, None)
        self._sink = cast(Sink, None)

    # --- httptools' callbacks

    def on_message_begin(self) -> None:
        self._fed = 0
        self.in_head = True
        self.unfinished = not self._stopped

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value.rstrip()))

    def on_headers_complete(self) -> None:
        if self._stopped:
            return
        self.in_head = False
        length = hosts = 0
        for name, value in self._headers:
            if name in _OWN_HEADERS:
                if name == b"content-length":
                    length = int(value)
                elif name == b"host" and value == self._host:
                    hosts += 1
                else:
                    hosts = -MAX_HEAD_BYTES  # not the fast path: see `_examine`
        parser = self._parser
        self._count = len(self._headers)
        self._keep_alive = parser.should_keep_alive()
        self._method = parser.get_method()
        version = parser.get_http_version()
        if (
            hosts == 1
            and version == "1.1"
            and length <= self._usual
            and self._fed <= _SURELY_SMALL
            and self._count <= MAX_HEADERS
            and self._method != b"CONNECT"
        ):
            self._http_10 = False
            self._length = length
        else:
            try:
                self._examine(version)
            except ApiError as error:
                self.refuse(error)
        self._fed = 0

    def on_body(self, body: bytes) -> None:
        if self._stopped:
            return
        self._fed = 0
        self.body_size += len(body)
        if self.body_size > self._limit:
            self.refuse(body_too_large(self._limit))
        else:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        if self._stopped or self._offer:
            return
        parts = self._parts
        if self._body:
            self.gather()
            body, self._body = bytes(self._body), bytearray()
        else:
            body = parts[0] if len(parts) == 1 else b"".join(parts)
        url, headers = self._url, self._headers
        if len(headers) != self._count:
            del headers[self._count :]  # trailers: no handler reads them
        self._url = b""
        self._headers = []
        self._parts = []
        self._length = self.body_size = 0
        self.unfinished = False
        self._sink.requested(self._request(url, headers, body))

    def _request(self, url: bytes, headers: list[Header], body: bytes) -> Request:
        path, _, query = url.partition(b"?")
        if not path.startswith(b"/"):
            path = _path_of(path)
        return Request(
            self._method.decode("ascii"),
            unquote(path.decode("latin-1")) if b"%" in path else path.decode("latin-1"),
            query,
            headers,
            body,
            self._http_10,
            self._keep_alive,
            url,
            self._private,
            self._local,
        )

    def _start_afresh(self) -> None:
        self._url = b""
        self._headers = []
        self._parts = []
        self._length = self.body_size = 0

    def _examine(self, version: str) -> None:
        """Check a head that is not on the fast path, and set up its body. Raises ApiError."""
        self._http_10 = version == "1.0"
        if version not in ("1.0", "1.1"):
            raise version_not_supported(version)
        self._check_size()
        if self._method == b"CONNECT":
            raise method_not_allowed("CONNECT", self._url.decode("latin-1"), None)
        hosts = length = 0
        expects = offers = False
        codings = b""
        for name, value in self._headers:
            match name:
                case b"host":
                    hosts += 1
                    self._host = _valid_host(value)
                case b"content-length":
                    length = int(value)
                case b"transfer-encoding":
                    codings += value.lower() + b","
                case b"expect":
                    expects = value.lower() == b"100-continue" and not self._http_10
                case b"upgrade":
                    offers = True
        if hosts != 1 and (hosts or not self._http_10):
            raise invalid("A request of HTTP/1.1 has one Host header.")
        if codings:
            self._check_codings(codings)
        if offers and self._parser.should_upgrade():
            self._offer = self._without_offer()
            return
        if length > self._limit:
            raise body_too_large(self._limit)
        self._length = length
        if self._unasked is not None and (codings or length > self._unasked):
            self._sink.headed(self._request(self._url, self._headers, b""))
        if length > self._large and not self._stopped:
            self._sink.announced(length)
        if expects and not self._stopped:
            self._sink.expects()

    def _check_size(self) -> None:
        if len(self._headers) > MAX_HEADERS:
            raise too_many_headers(MAX_HEADERS)
        size = len(self._method) + len(self._url) + _LINE_OVERHEAD
        size += sum(len(name) + len(value) + _HEADER_OVERHEAD for name, value in self._headers)
        if size > MAX_HEAD_BYTES:
            raise head_too_large(MAX_HEAD_BYTES)

    def _check_codings(self, codings: bytes) -> None:
        if self._http_10:
            raise invalid("HTTP/1.0 has no Transfer-Encoding.")
        if codings == b"chunked,":
            return
        if codings.rstrip(b",").split(b",")[-1].strip() != b"chunked":
            raise invalid("The last transfer coding of a request is chunked.")  # else: no end
        raise coding_not_implemented()

    def _without_offer(self) -> bytes:
        """Return the head's bytes without its Upgrade headers."""
        lines = [b"%b: %b\r\n" % header for header in self._headers if header[0] != b"upgrade"]
        version = b"1.0" if self._http_10 else b"1.1"
        return b"%b %b HTTP/%b\r\n%b\r\n" % (self._method, self._url, version, b"".join(lines))

    def _decline(self, data: bytes | memoryview, upgrade: httptools.HttpParserUpgrade) -> None:
        """Go on behind a head that offers an upgrade; `data` may have further such heads."""
        while self._offer:
            head, self._offer = self._offer, b""
            data = memoryview(data)[upgrade.args[0] :]
            self._start_afresh()
            self._parser = httptools.HttpRequestParser(self)
            self.feed_data = self._parser.feed_data
            self.feed_data(head)
            try:
                self.feed_data(data)
            except httptools.HttpParserUpgrade as another:
                upgrade = another


def _valid_host(value: bytes) -> bytes:
    if _HOST.fullmatch(value) is None:
        raise invalid(f"Not a Host: {ascii(value)[1:]}")
    return value


def _path_of(url: bytes) -> bytes:
    """Return the path of an absolute URL, as proxies send; any other target as it is."""
    try:
        return httptools.parse_url(url).path or b"/"
    except httptools.HttpParserInvalidURLError:
        return url
