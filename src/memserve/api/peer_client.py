"""The HTTP client with which processes of a cluster call each other.

Requests are signed, and answers without a valid proof are refused. Every failure, from a host
name that cannot be encoded to an answer that cannot be decoded, raises one error: `PeerError`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import NamedTuple, NoReturn, Self, TypeVar

import aiohttp
import msgspec
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from memserve.api.audience import origin_of
from memserve.api.errors import ApiError, ErrorBody, ErrorDetail
from memserve.api.http_message import JSON_MEDIA
from memserve.api.serving import IDLE_CONNECTION_SECONDS
from memserve.api.signatures import CONTENT_HEADER, PROOF_HEADER, Signer, digest_of
from memserve.api.tls import unchecked_tls
from memserve.hosts import is_loopback

CONNECT_SECONDS = 2.0  # a process accepts at once, or it is gone
# Default limit: many times the size of any description or statistics.
MAX_ANSWER_BYTES = 16 * 1024 * 1024
# Tries of a request, each after a 401 that names another life. One life takes two; if several
# processes listen at one address, as a gateway's workers do, each connection may meet another.
TRIES = 8
_SHOWN = 300  # characters of an answer or error that go into a PeerError

_error = msgspec.json.Decoder(ErrorBody)
_NO_HEADERS: Mapping[str, str] = {}
T = TypeVar("T")

# Errors of decoders on invalid bytes: msgspec's own, wrong UTF-8 and numbers (ValueError), too
# deep nesting, and numbers out of range.
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)


class PeerError(Exception):
    """No usable answer. `refused`: the connection was refused, so no process listens there.
    `status`, `detail`: of the peer's error answer, if it gave one."""

    def __init__(
        self,
        message: str,
        *,
        refused: bool = False,
        status: int | None = None,
        detail: ErrorDetail | None = None,
    ) -> None:
        super().__init__(message)
        self.refused = refused
        self.status = status
        self.detail = detail

    def as_api_error(self) -> ApiError | None:
        """Return the peer's error answer, to pass on; None if it gave none."""
        if self.status is None or self.detail is None:
            return None
        return ApiError(
            HTTPStatus(self.status),
            self.detail.message,
            type=self.detail.type,
            param=self.detail.param,
            code=self.detail.code,
        )


class PeerAnswer(NamedTuple):
    """An answer of any status."""

    status: int
    body: bytes


class PeerClient:
    """Calls processes of the cluster by URL. A context manager, or `close` it."""

    def __init__(self, signer: Signer | None, tls: ssl.SSLContext | None = None) -> None:
        """`signer`: None only in tests, for unsigned requests. `tls`: how https:// peers are
        verified; None: by the machine's own authorities."""
        self.signer = signer
        self._tls: ssl.SSLContext | bool = True if tls is None else tls
        self._within = unchecked_tls()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def call(
        self,
        method: str,
        url: str,
        decode: Callable[[bytes], T],
        body: bytes = b"",
        *,
        media: str = JSON_MEDIA,
        seconds: float | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
        headers: Mapping[str, str] = _NO_HEADERS,
        address: str | None = None,
    ) -> T:
        """Return the decoded body of a 200 answer. Raises PeerError, also for other statuses.

        `media`: the content type of `body`.
        `seconds`: timeout of the whole call; None: only connecting has one, for answers that may
        wait in a queue. `headers`: further ones, which are not signed. `address`: see `ask`.
        """
        answer = await self.ask(
            method,
            url,
            body,
            media=media,
            seconds=seconds,
            max_bytes=max_bytes,
            headers=headers,
            address=address,
        )
        if answer.status != HTTPStatus.OK:
            _refused(answer)
        return decoded(decode, answer.body, url)

    async def ask(
        self,
        method: str,
        url: str,
        body: bytes = b"",
        *,
        media: str = JSON_MEDIA,
        seconds: float | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
        headers: Mapping[str, str] = _NO_HEADERS,
        address: str | None = None,
    ) -> PeerAnswer:
        """Return an answer of any status (of a signed request: but 401). Raises PeerError.

        `address`: the IP address to connect to, of several that the URL's name has. The request
        is signed for the name, and a certificate must be the name's."""
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)
        given = {"content-type": media, **headers} if body else {**headers}
        try:
            return await self._ask(method, URL(url), body, given, timeout, max_bytes, address)
        except aiohttp.ClientConnectorError as error:
            nobody = isinstance(error.os_error, ConnectionRefusedError)
            # aiohttp's own text has an object's address in it.
            raise PeerError(f"no connection: {_said(error.os_error)}", refused=nobody) from error
        except TimeoutError as error:
            raise PeerError("no answer in time") from error
        except (aiohttp.ClientError, HttpProcessingError, OSError, *DECODE_ERRORS) as error:
            raise PeerError(_said(error)) from error

    async def _ask(
        self,
        method: str,
        url: URL,
        body: bytes,
        headers: dict[str, str],
        limits: aiohttp.ClientTimeout,
        max_bytes: int,
        address: str | None,
    ) -> PeerAnswer:
        signer = self.signer
        to = limits, max_bytes, address
        if signer is None:
            return (await self._exchange(method, url, body, headers, *to))[0]
        origin, target = origin_of(str(url)), url.raw_path_qs.encode()
        digest = await digest_of(body)
        for left in reversed(range(TRIES)):
            signed = signer.sign(origin, method.encode(), target, digest, address)
            headers["authorization"] = signed.authorization.decode()
            answer, told = await self._exchange(method, url, body, headers, *to)
            if answer.status == HTTPStatus.UNAUTHORIZED:
                challenge = told.get("www-authenticate", "")
                proof = _bytes(told, PROOF_HEADER)
                if left and signer.learn(origin, challenge, proof, signed, address):
                    continue
                _refused(answer)
            content = _bytes(told, CONTENT_HEADER)
            if not signer.proves_content(signed, answer.status, answer.body, content):
                raise PeerError("whoever answers there does not have the cluster's secret")
            return answer
        raise AssertionError("the last try returns or raises")

    async def _exchange(
        self,
        method: str,
        url: URL,
        body: bytes,
        headers: dict[str, str],
        limits: aiohttp.ClientTimeout,
        max_bytes: int,
        address: str | None,
    ) -> tuple[PeerAnswer, dict[str, str]]:
        named = address is not None
        async with self._session.request(
            method,
            url.with_host(address) if address is not None else url,
            data=body or None,
            headers={**headers, "host": url.authority} if named else headers,
            timeout=limits,
            ssl=self._within if is_loopback(url.host or "") else self._tls,
            server_hostname=url.host if named and url.scheme == "https" else None,
            allow_redirects=False,  # members never redirect
        ) as answer:
            parts = bytearray()
            async for part in answer.content.iter_any():
                parts += part
                if len(parts) > max_bytes:
                    raise PeerError(f"the answer is larger than {max_bytes} bytes")
            wanted = ("www-authenticate", PROOF_HEADER.decode(), CONTENT_HEADER.decode())
            told = {name: answer.headers[name] for name in wanted if name in answer.headers}
            return PeerAnswer(answer.status, bytes(parts)), told


def _bytes(told: Mapping[str, str], name: bytes) -> bytes | None:
    value = told.get(name.decode())
    return None if value is None else value.encode("latin-1", "replace")


def decoded(decode: Callable[[bytes], T], body: bytes, source: str) -> T:
    """Return the decoded body of a peer's answer. Raises PeerError, which names `source`."""
    try:
        return decode(body)
    except DECODE_ERRORS as error:
        raise PeerError(
            f"{source[:_SHOWN]} does not answer as it should: {_said(error)}"
        ) from error


def _refused(answer: PeerAnswer) -> NoReturn:
    try:
        detail = _error.decode(answer.body).error
    except DECODE_ERRORS:
        text = answer.body[:_SHOWN].decode(errors="replace")
        detail = ErrorDetail(text, "server_error")
    message = f"{answer.status} {detail.message[:_SHOWN]}"
    known = answer.status in HTTPStatus._value2member_map_ and answer.status >= 400
    if not known:
        raise PeerError(message)
    raise PeerError(message, status=answer.status, detail=detail)


def _said(error: BaseException) -> str:
    return (str(error) or repr(error))[:_SHOWN]
