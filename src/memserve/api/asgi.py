"""ASGI, where speed is not all: an adapter to the server, and bodies, answers, hang-ups."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from types import TracebackType
from typing import Self

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memserve.api.errors import ApiError, body_too_large
from memserve.api.http_message import EVENTS_HEADERS, JSON_HEADER, Headers, Reply, Request
from memserve.api.http_server import Handler


class ClientGone(Exception):
    """The client hung up before its request was complete."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """A request header's value; `name` in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The request's body. Raises ApiError (413) without reading more than `limit` bytes.

    The server below throws the rest of a refused body away as it arrives.
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
    """A whole answer."""
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

    The block's task is cancelled where it waits, and goes on after the block; `happened` tells
    it. A cancellation from elsewhere goes through.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """`loop` is the running one; it takes a system call to ask for it."""
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
    """The server's handler that runs an ASGI application."""

    async def handle(request: Request, reply: Reply) -> None:
        await app(_scope(request), *_channels(request, reply))

    return handle


def _scope(request: Request) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.0" if request.http_10 else "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.target.partition(b"?")[0],
        "query_string": request.query,
        "root_path": "",
        "headers": request.headers,
        "client": None,
        "server": None,
    }


def _channels(request: Request, reply: Reply) -> tuple[Receive, Send]:
    gone = asyncio.Event()
    flowing = asyncio.Event()
    flowing.set()
    body: bytes | None = request.body
    head: tuple[int, list[tuple[bytes, bytes]]] = (0, [])

    def hung_up() -> None:
        gone.set()
        flowing.set()

    def flow(paused: bool) -> None:
        if paused:
            flowing.clear()
        else:
            flowing.set()

    async def receive() -> Message:
        nonlocal body
        if body is not None:
            message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal head
        if message["type"] == "http.response.start":
            head = (message["status"], list(message["headers"]))
            return
        data, more = message.get("body", b""), message.get("more_body", False)
        if not reply.started:
            sized = any(name.lower() == b"content-length" for name, _ in head[1])
            reply.start(*head, sized=sized)
        if not more:
            reply.end(data)
            gone.set()  # as far as the application can tell
            return
        if data:
            reply.write(data)
        if not reply.writable:
            await flowing.wait()

    reply.on_gone, reply.on_flow = hung_up, flow
    if not reply.writable:
        flowing.clear()
    return receive, send
