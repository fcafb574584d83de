"""Forwarding of whole client requests to a vLLM server, and of its answers as they arrive.

An instance uses it beside the sequences of its engine (`engine.py`), on its event loop.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus

import aiohttp
import msgspec

from memserve.api.errors import internal, invalid, unavailable
from memserve.api.forward import Forward
from memserve.api.generate import GenerateCall
from memserve.api.namespaces import cache_salt_of
from memserve.engine.request import EngineInfo
from memserve.errors import MemserveError, QueueFull
from memserve.types import Namespace
from memserve.vllm.place import ServerPlace

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0  # a server accepts at once, unless it gets no CPU time
_DENIED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_OPEN, _CLOSE = ord("{"), ord("}")
_JSON = {"content-type": "application/json"}
_encode = msgspec.json.Encoder().encode


class BrokenOff(MemserveError):
    """The server ended an answer before it was complete."""


class ForwardedAnswer:
    """A server's answer: status and headers, and the body as it arrives."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.media = response.headers.get("content-type", "application/json")
        self.retry_after = response.headers.get("retry-after")
        self._content = response.content

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the bytes of the body as they arrive. Raises BrokenOff."""
        try:
            async for data in self._content.iter_any():
                yield data
        except (aiohttp.ClientError, OSError) as error:
            raise BrokenOff(f"the vLLM server broke off its answer: {error!r}") from error


class Forwarder:
    """Forwards requests to the server at `place`."""

    def __init__(self, place: ServerPlace, info: EngineInfo) -> None:
        """`info`: of that server; `model` is the name in its API."""
        self._place = place
        self._info = info
        self._session: aiohttp.ClientSession | None = None
        self._sequences = 0  # running or queued at the server

    @asynccontextmanager
    async def answer(
        self,
        call: GenerateCall,
        forward: Forward,
        namespace: Namespace,
        sending: Callable[[], Mapping[str, str]],
    ) -> AsyncIterator[ForwardedAnswer]:
        """Send a call's forwarded request and yield the answer. Leaving the context early closes
        the connection, and the server drops the request. `sending` is called when the body goes
        to the server, and returns further headers. Raises ApiError, or QueueFull if the sequences
        in flight would exceed `max_running + max_waiting`."""
        body = forwarded_body(call, forward, namespace, self._info.model)
        most = self._info.max_running + self._info.max_waiting
        if self._sequences + call.n > most:
            raise QueueFull(self._sequences, most)
        self._sequences += call.n
        try:
            async with await self._post(forward, body, sending()) as response:
                if response.status in _DENIED:
                    log.error("the vLLM server answers with %d", response.status)
                    raise internal("The vLLM server does not let its instance in.", "server_denies")
                yield ForwardedAnswer(response)
        finally:
            self._sequences -= call.n

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _post(
        self, forward: Forward, body: bytes, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
            self._session = aiohttp.ClientSession(
                connector=self._place.connector(), timeout=timeout, headers=self._place.headers
            )
        try:
            return await self._session.post(
                self._place.url + forward.path.value,
                data=body,
                headers={**headers, **_JSON},
                allow_redirects=False,
            )
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            log.warning("the vLLM server cannot be asked: %r", error)
            raise unavailable("The vLLM server does not answer.", "server_lost") from error


def forwarded_body(call: GenerateCall, forward: Forward, namespace: Namespace, model: str) -> bytes:
    """Return the JSON body for the server: the client's fields, overridden by `model`, `cache_salt`
    and `priority` of the call. Raises ApiError if the client's body is no JSON object."""
    body = forward.body
    if len(body) < 2 or body[0] != _OPEN or body[-1] != _CLOSE:
        raise invalid("what is forwarded is no JSON object", "forward")
    given: dict[str, str | int] = {"model": model}
    if forward.salted and (salt := cache_salt_of(namespace)) is not None:
        given["cache_salt"] = salt
    if forward.prioritised and call.priority:
        given["priority"] = call.priority
    comma = b"" if not body[1:-1].strip() else b","
    return body[:-1] + comma + _encode(given)[1:]
