"""ASGI adapter to the HTTP server, with bodies and answers of Starlette's routes.

Only for endpoints that are not on the hot path. The adapter gives an application HEAD as GET, and
drops the answer's body. Errors that an application answers in anything but JSON (as frameworks do
when a handler fails) get OpenAI's shape here.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import msgspec
from starlette.requests import Request as StarletteRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Scope

from memserve.api.errors import ApiError, body_too_large
from memserve.api.http_message import JSON_HEADER, JSON_MEDIA, Reply, Request
from memserve.api.http_server import Handler

_encode = msgspec.json.Encoder().encode


class JsonResponse(Response):
    """Answer of a Starlette route, encoded by msgspec. Bytes are JSON already."""

    media_type = JSON_MEDIA

    def render(self, content: object) -> bytes:
        return content if isinstance(content, bytes) else _encode(content)


async def read_body(request: StarletteRequest, limit: int) -> bytes:
    """Return a route's body. Raises ApiError (413) if it is larger than `limit` bytes."""
    body = await request.body()
    if len(body) > limit:
        raise body_too_large(limit)
    return body


def asgi_handler(app: ASGIApp) -> Handler:
    """Return a handler for the server that runs an ASGI application."""

    async def handle(request: Request, reply: Reply) -> None:
        exchange = _Exchange(request, reply)
        await app(_scope(request), exchange.receive, exchange.send)

    return handle


def _scope(request: Request) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.0" if request.http_10 else "1.1",
        "method": "GET" if request.method == "HEAD" else request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.target.partition(b"?")[0],
        "query_string": request.query,
        "root_path": "",
        "headers": request.headers,
        "client": None,
        "server": None,
    }


class _Exchange:
    """One request and its answer as ASGI messages. Raises RuntimeError in an application that
    breaks the protocol; the server then ends the reply."""

    def __init__(self, request: Request, reply: Reply) -> None:
        self._reply = reply
        self._body: bytes | None = request.body
        self._bare = request.method == "HEAD"
        self._gone = asyncio.Event()
        self._flowing = asyncio.Event()
        if reply.writable:
            self._flowing.set()
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._left: int | None = None  # bytes missing to the announced content-length
        self._plain: list[bytes] | None = None  # the body of an error that is not JSON
        reply.on_gone, reply.on_flow = self._hung_up, self._flow

    async def receive(self) -> Message:
        if self._body is not None:
            message = {"type": "http.request", "body": self._body, "more_body": False}
            self._body = None
            return message
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start(message["status"], list(message["headers"]))
            return
        if message["type"] != "http.response.body" or not self._status:
            raise RuntimeError(f"{message['type']} is not what comes next in an answer")
        data, more = message.get("body", b""), message.get("more_body", False)
        if self._plain is not None:
            self._plain.append(data)
            if not more:
                text = b"".join(self._plain).decode(errors="replace")
                kept = [one for one in self._headers if not one[0].lower().startswith(b"content-")]
                self._reply.send_error(_plain_error(self._status, text), kept)
                self._gone.set()
            return
        await self._pass_on(data, more)

    async def _pass_on(self, data: bytes, more: bool) -> None:
        reply = self._reply
        if self._left is not None and not self._bare:
            self._left -= len(data)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("an answer is not as long as it says")
        if not reply.started:
            whole = None if more else data
            reply.start(self._status, self._headers, sized=self._left is not None, whole=whole)
        if not more:
            reply.end(data)
            self._gone.set()  # ASGI: `receive` returns a disconnect after the answer
            return
        if data:
            reply.write(data)
        if not reply.writable:
            await self._flowing.wait()

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self._status:
            raise RuntimeError("an answer begins once")
        media = length = None
        for name, value in headers:
            match name.lower():
                case b"content-type":
                    media = value
                case b"content-length":
                    length = int(value)
        self._status, self._headers, self._left = status, headers, length
        if status >= HTTPStatus.BAD_REQUEST and not (media or b"").startswith(JSON_HEADER[1]):
            self._plain = []

    def _hung_up(self) -> None:
        self._gone.set()
        self._flowing.set()

    def _flow(self, paused: bool) -> None:
        if paused:
            self._flowing.clear()
        else:
            self._flowing.set()


def _plain_error(status: int, text: str) -> ApiError:
    known = HTTPStatus(status)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        # The application's text may have internals; the log has it.
        return ApiError(known, f"{known.phrase}.", type="server_error", code="internal_error")
    return ApiError(known, text or f"{known.phrase}.")
