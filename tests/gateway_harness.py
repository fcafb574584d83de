"""Instances that are nothing but a script, and a client that takes a reply apart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import httptools
import msgspec

from memserve.api.chunks import DONE, Piece, StreamFormat, usage
from memserve.api.generate import CallKind, FinishReason, GenerateCall
from memserve.api.http_message import Reply, Request
from memserve.api.status import InstanceInfo, InstanceState
from memserve.cluster.membership import Membership
from memserve.tokens import NO_TOKENS
from memserve.types import Epoch, InstanceId, Role

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
POST = Request("POST", "/v1/completions", b"", [], b"", False, True, b"/v1/completions")
Parts = Sequence[bytes]
Script = Callable[[GenerateCall], Parts]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Client:
    """The wire under a reply, and what comes over it."""

    def __init__(self, request: Request = POST) -> None:
        self.reply = Reply(self, request)
        self.writes: list[bytes] = []
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.begun = asyncio.Event()
        self.complete = False
        self.keeps_alive: bool | None = None
        self._parser = httptools.HttpResponseParser(self)

    def send(self, data: bytes) -> None:
        self.writes.append(data)
        self._parser.feed_data(data)

    def replied(self, keep_alive: bool) -> None:
        self.keeps_alive = keep_alive

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name] = value

    def on_body(self, body: bytes) -> None:
        self.body += body
        self.begun.set()

    def on_message_complete(self) -> None:
        self.complete = True

    @property
    def events(self) -> list[bytes]:
        """Payloads; the last one must have come whole."""
        assert not self.body or self.body.endswith(b"\n\n")
        return [e.removeprefix(b"data: ") for e in self.body.split(b"\n\n")[:-1]]

    def text(self, choice: int = 0) -> str:
        """A choice's text, as its chunks add up to it."""
        parts = []
        for event in self.events:
            if event == b"[DONE]":
                continue
            for part in json.loads(event).get("choices", ()):
                if part["index"] == choice:
                    said = part["delta"].get("content", "") if "delta" in part else part["text"]
                    parts.append(said)
        return "".join(parts)


def answer_to(call: GenerateCall, length: int = 6, hold_back: bool = True) -> list[bytes]:
    """An instance's stream, one event for each token; behind `call.resumed`.

    The token at position i of choice c is 10 * c + i, and its text `<token>`; that of every
    third one comes with the next one's.
    """
    form = StreamFormat(call)
    count = len(call.prompts) * call.n
    resumed = call.resumed or (NO_TOKENS,) * count
    events = []
    for position in range(length):
        for choice in range(count):
            if position < len(resumed[choice]):
                continue
            token = 10 * choice + position
            last = position == length - 1
            text = "" if hold_back and position % 3 == 2 and not last else f"<{token}>"
            if hold_back and position and position % 3 == 0:
                text = f"<{token - 1}>" + text
            piece = Piece(
                choice, text, [token], finish_reason=FinishReason.LENGTH if last else None
            )
            role = call.kind is CallKind.CHAT and position == 0
            events.append(form.event(piece, role))
    if call.include_usage:
        prompt = sum(map(len, call.prompts))
        events.append(form.usage(usage(prompt, length * count, 0)))
    return [*events, DONE]


@asynccontextmanager
async def impostor(script: Parts | Script, calls: list[GenerateCall]) -> AsyncIterator[str]:
    """An instance's address; each call is answered with its script's parts, one write and one
    turn of the loop for each, and then hung up on."""
    tasks: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        call = msgspec.msgpack.decode(await reader.readexactly(length), type=GenerateCall)
        calls.append(call)
        for part in script(call) if callable(script) else script:
            writer.write(part)
            await asyncio.sleep(0.002)  # so that it is a read of its own, mostly
        writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(answer(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()


def ready_members(*addresses: str) -> Membership:
    membership = Membership()
    for number, address in enumerate(addresses):
        name, role = InstanceId(f"i{number}"), Role.COLOCATED
        info = InstanceInfo(name, Epoch(1), role, InstanceState.READY, 1, "m")
        membership.answered(membership.join(address), info, None)
    return membership
