"""One client's requests of a soak: what was asked, and whether an answer came in some form that
the API has."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from memserve.api.errors import ErrorBody

# Longer than a request waits for an instance that comes back (`instance_wait_seconds`, 30) and is
# then served on a busy machine: who has no answer by now has none.
ANSWER_SECONDS = 120.0
# A reader this slow lets its connection's buffers fill up, both here and in the gateway.
SLOW_BYTES, SLOW_PAUSE = 256, 0.05
_SLOW_BUFFER = 4096  # bytes that the kernel keeps for it

_error = msgspec.json.Decoder(ErrorBody)


class Outcome(StrEnum):
    ANSWERED = "answered"  # whole
    LEFT = "left"  # the client hung up, as it meant to
    REFUSED = "refused"  # 4xx or 503, in the API's form
    FAILED = "failed"  # another status, or an error in the stream, in the API's form
    UNANSWERED = "unanswered"  # no answer in time, or a connection that ended without one


@dataclass(frozen=True, slots=True)
class Reply:
    outcome: Outcome
    status: int | None = None
    text: str = ""  # of all choices, one after the other
    tokens: tuple[int, ...] = ()
    detail: str = ""  # what was wrong


class SoakClient:
    """A connection pool. An async context manager."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> SoakClient:
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=timeout, read_bufsize=1 << 20
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(
        self, path: str, fields: Mapping[str, Any], *, leave_after: int | None = None
    ) -> Reply:
        """`leave_after`: hang up behind so many lines of the stream. Never raises."""
        body = json.dumps({"model": self._model, **fields}).encode()
        return await self.send(path, body, leave_after=leave_after)

    async def send(self, path: str, body: bytes, *, leave_after: int | None = None) -> Reply:
        """The same with a body as it is."""
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(self._url + path, data=body, headers=headers) as answer:
                if answer.content_type == "text/event-stream":
                    return await _read_stream(answer, leave_after)
                return _whole(answer.status, await answer.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return Reply(Outcome.UNANSWERED, detail=repr(error)[:200])

    async def read_slowly(self, path: str, fields: Mapping[str, Any]) -> Reply:
        """Read a stream a few bytes at a time, with hardly a buffer."""
        body = json.dumps({"model": self._model, **fields, "stream": True}).encode()
        place = urlsplit(self._url)
        assert place.hostname is not None
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                received = await _sip(place.hostname, place.port or 80, head.encode() + body)
        except (TimeoutError, OSError) as error:
            return Reply(Outcome.UNANSWERED, detail=repr(error)[:200])
        status = int(received[9:12]) if received.startswith(b"HTTP/1.1 ") else None
        if status == 200:
            ended = b"data: [DONE]" in received or b'"error"' in received
            return Reply(Outcome.ANSWERED if ended else Outcome.UNANSWERED, status)
        return _whole(status or 0, received.partition(b"\r\n\r\n")[2])


async def _sip(host: str, port: int, request: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER)
        await loop.sock_connect(sock, (host, port))
        await loop.sock_sendall(sock, request)
        received = b""
        while data := await loop.sock_recv(sock, SLOW_BYTES):
            received += data
            await asyncio.sleep(SLOW_PAUSE)
        return received


async def _read_stream(answer: aiohttp.ClientResponse, leave_after: int | None) -> Reply:
    texts: list[str] = []
    tokens: list[int] = []
    lines = 0
    async for line in answer.content:
        data = line.strip().removeprefix(b"data:").strip()
        if not line.startswith(b"data:"):
            continue
        if data == b"[DONE]":
            return Reply(Outcome.ANSWERED, answer.status, "".join(texts), tuple(tokens))
        chunk = json.loads(data)
        if "error" in chunk:
            return Reply(Outcome.FAILED, answer.status, detail=str(chunk["error"])[:200])
        _collect(chunk, texts, tokens)
        lines += 1
        if leave_after is not None and lines > leave_after:
            answer.close()
            return Reply(Outcome.LEFT, answer.status)
    return Reply(Outcome.UNANSWERED, answer.status, detail="the stream ended without [DONE]")


def _whole(status: int, body: bytes) -> Reply:
    if status == 200:
        texts: list[str] = []
        tokens: list[int] = []
        _collect(json.loads(body), texts, tokens)
        return Reply(Outcome.ANSWERED, status, "".join(texts), tuple(tokens))
    try:
        detail = _error.decode(body).error.message
    except msgspec.DecodeError:
        return Reply(Outcome.UNANSWERED, status, detail=f"HTTP {status}: {body[:100]!r}")
    refused = 400 <= status < 500 or status == 503
    return Reply(Outcome.REFUSED if refused else Outcome.FAILED, status, detail=detail[:200])


def _collect(answer: Mapping[str, Any], texts: list[str], tokens: list[int]) -> None:
    for choice in answer.get("choices", ()):
        said = choice.get("delta") or choice.get("message") or choice
        texts.append(said.get("content") or said.get("text") or "")
        tokens += choice.get("token_ids") or ()
