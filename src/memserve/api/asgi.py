"""ASGI adapter to the HTTP server, and helpers for bodies, answers and hang-ups.

Only for endpoints that are not on the hot path. The adapter gives an application HEAD as GET, and
drops the answer's body. Errors that an application answers in anything but JSON (as frameworks do
when a handler fails) get OpenAI's shape here.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from types import TracebackType
from typing import Self

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memserve.api.errors import ApiError, body_too_large
from memserve.api.http_message import (
    EVENTS_HEADERS,
    JSON_HEADER,
    JSON_MEDIA,
    Headers,
    Reply,
    Request,
)
from memserve.api.http_server import Handler

_encode = msgspec.json.Encoder().encode


class JsonResponse(Response):
    """Answer of a Starlette route, encoded by msgspec. Bytes are JSON already."""

    media_type = JSON_MEDIA

    def render(self, content: object) -> bytes:
        return content if isinstance(content, bytes) else _encode(content)


class ClientGone(Exception):
    """The client hung up before its request was complete."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return a request header's first value, or None; `name` in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Return the request's body. Raises ApiError (413) if it is larger than `limit` bytes, and
    ClientGone.

    The server below drops the rest of a refused body as it arrives.
    """
    length = header(scope, b"content-length")
    if length is not None and int(length) > limit:
        raise body_too_large(limit)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body = message.get("body", b"")
        if len(body) > limit:
            raise body_too_large(limit)
        return bytes(body)
    parts = bytearray()
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts += message.get("body", b"")
        if len(parts) > limit:
            raise body_too_large(limit)
        if not message.get("more_body", False):
            return bytes(parts)
        message = await receive()


async def send_body(
    send: Send,
    status: int,
    body: bytes,
    headers: Headers = (),
    media: tuple[bytes, bytes] = JSON_HEADER,
) -> None:
    """Send a whole answer."""
    length = (b"content-length", b"%d" % len(body))
    await send(
        {"type": "http.response.start", "status": status, "headers": [media, length, *headers]}
    )
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError, headers: Headers = ()) -> None:
    await send_body(send, error.status, error.body(), (*headers, *error.headers()))


async def start_events(send: Send, headers: Headers = ()) -> None:
    """Begin a stream of server-sent events."""
    await send(
        {
            "type": "http.response.start",
            "status": HTTPStatus.OK,
            "headers": [*EVENTS_HEADERS, *headers],
        }
    )


class Interruption:
    """`with Interruption() as lost:` is a block that `lost.interrupt()` ends from outside.

    The block's task is cancelled where it waits, and goes on behind the block, with `happened`
    set. Any other cancellation passes through.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """`loop`: the running loop, if known; looking it up takes a system call."""
        self.happened = False
        self._loop = loop
        self._task: asyncio.Task[object] | None = None

    def interrupt(self) -> None:
        if self._task is not None and not self.happened:
            self.happened = True
            self._task.cancel()

    def __enter__(self) -> Self:
        self._task = asyncio.current_task(self._loop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        task, self._task = self._task, None
        if not self.happened or task is None:
            return False
        task.uncancel()
        return kind is asyncio.CancelledError


class HangUp(Interruption):
    """A block that ends when the client hangs up. Enter it once the body has been read."""

    def __init__(self, receive: Receive) -> None:
        super().__init__()
        self._watch = asyncio.ensure_future(self._until_disconnect(receive))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._watch.cancel()
        return super().__exit__(kind, error, trace)

    async def _until_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.interrupt()


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
