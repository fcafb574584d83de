"""Processes of the gateway benchmark: `python -m memserve.bench.gateway_process`.

`backend GAP_SECONDS` answers each generating call with the number of chunks that it asks for;
`load JSON` sends requests and prints its measurements; `gateway POLICY WORKERS URL...` is
memserve's, with a vocabulary and no model; `relay URL` passes bytes on without parsing.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from http import HTTPStatus
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec
import numpy as np
import uvloop

from memserve.api.audience import Audience
from memserve.api.errors import ApiError
from memserve.api.generate import GENERATE_PATH
from memserve.api.local_connection import LocalConnection
from memserve.api.serving import bind, url_of
from memserve.api.signatures import SCHEME, Verifier, body_digest
from memserve.api.status import (
    REPORT_PATH,
    EngineTotals,
    InstanceReport,
    InstanceState,
    InstanceStats,
    Latencies,
    Limits,
    PoolTotals,
)
from memserve.cluster.watchdog import exit_with_parent
from memserve.config import ClusterConfig, GatewayConfig, ModelConfig, Policy
from memserve.secrets import cluster_secret
from memserve.types import Epoch, InstanceId, Role

MODULE = "memserve.bench.gateway_process"
MODEL = "echo"
VOCABULARY = 50_000
POOL_TOKENS = 1 << 20
_EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,'
    b'"model":"echo","choices":[{"index":0,"text":" word","logprobs":null,'
    b'"finish_reason":null}]}\n\n'
)
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n%b\r\n"
)
_DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_PLAIN = _chunk(_EVENT)
_NAMED = _chunk(b":0 12345\n" + _EVENT)  # in the form of an instance's events
_END = _chunk(_DONE) + b"0\r\n\r\n"


class _Sampling(msgspec.Struct, frozen=True):
    max_tokens: int = 8


class _Call(msgspec.Struct):
    """The part of a memserve gateway's call that the backend reads."""

    sampling: _Sampling = _Sampling()


class _Request(msgspec.Struct):
    """The part of an OpenAI request that the backend reads."""

    max_tokens: int = 0


_calls = msgspec.msgpack.Decoder(_Call)
_client_requests = msgspec.json.Decoder(_Request)


def _described(url: bytes, body: bytes) -> bytes | None:
    """Return the JSON body for a GET, with which gateways and routers probe an instance."""
    if body:
        return None
    if url in (b"/info", REPORT_PATH.encode()):
        # Limits with room for all concurrent requests, since the backend answers them at once, and
        # the prediction of waits for memory would cost the gateway CPU time.
        limits = Limits(VOCABULARY, 8192, POOL_TOKENS, 8192, 16, "float32", "cpu", 1)
        identity = InstanceId("echo"), Epoch(1), Role.COLOCATED, InstanceState.READY
        totals = EngineTotals()
        stats = InstanceStats(totals, PoolTotals(), Latencies())
        return _encode(InstanceReport(*identity, os.getpid(), MODEL, limits, stats=stats))
    if url == b"/v1/models":
        return b'{"object":"list","data":[{"id":"echo","object":"model","max_model_len":8192}]}'
    return b'{"model_path":"echo","model_id":"echo","served_model_name":"echo","status":"ok"}'


class Backend(asyncio.Protocol):
    """One connection to the backend."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        gap: float,
        verifier: Verifier | None = None,
        describe: Callable[[bytes, bytes], bytes | None] = _described,
    ) -> None:
        """`verifier`: checks signed calls; other routers' calls are unsigned. `describe`: from
        target and body of a request (of a GET: none) to the whole body of its answer; None: it
        asks for a stream."""
        self._loop = loop
        self._gap = gap
        self._describe = describe
        self._verifier = verifier
        self._local = LocalConnection()
        self._authorization: bytes | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._url = self._body = self._event = b""
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:  # routers try HTTP/2 too
            self._transport.close()

    def on_message_begin(self) -> None:
        self._url = self._body = b""
        self._authorization = None

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"authorization":
            self._authorization = value

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        whole = self._describe(self._url, self._body)
        proof = b""
        authorization = self._authorization or b""
        signed = authorization.startswith(SCHEME) and not self._local.lets_in(authorization)
        if self._verifier is not None and signed:
            method, digest = self._parser.get_method(), body_digest(self._body)
            try:
                given = self._verifier.check(authorization, method, self._url, digest)
            except ApiError as error:
                self._transport.write(_challenged(error))
                return
            proof = _lines(given.headers(HTTPStatus.OK, whole) + self._local.proven(given))
        if whole is not None:
            self._transport.write(_whole(whole, proof))
            return
        if self._url == GENERATE_PATH.encode():
            self._left, self._event = _calls.decode(self._body).sampling.max_tokens, _NAMED
        else:
            self._left, self._event = _client_requests.decode(self._body).max_tokens, _PLAIN
        self._transport.write(_HEAD % proof)
        self._step()

    def _step(self) -> None:
        if self._transport.is_closing():
            return
        self._left -= 1
        if not self._left:
            self._transport.write(self._event + _END)
            return
        self._transport.write(self._event)
        if self._gap:
            self._loop.call_later(self._gap, self._step)
        else:
            self._loop.call_soon(self._step)


def _whole(body: bytes, proof: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
    return head % (proof, len(body)) + body


def _challenged(error: ApiError) -> bytes:
    head = b"HTTP/1.1 401 Unauthorized\r\n%bcontent-length: 0\r\n\r\n"
    return head % _lines(error.headers())


def _lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%b: %b\r\n" % header for header in headers)


async def _backend(gap: float) -> None:
    loop = asyncio.get_running_loop()
    sock = bind("127.0.0.1", 0)
    audience = Audience()
    audience.add_socket(sock)
    verifier = Verifier(cluster_secret(), audience)
    server = await loop.create_server(lambda: Backend(loop, gap, verifier), sock=sock)
    print(url_of(sock), flush=True)
    await server.serve_forever()


class _Side(asyncio.Protocol):
    """One of the two connections of the relay."""

    def __init__(self, other: _Side | None = None) -> None:
        self.other = other
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._early: list[bytes] = []  # bytes received before `join`

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.close()

    def join(self, other: _Side) -> None:
        self.other = other
        other.transport.writelines(self._early)


async def _relay(backend: str) -> None:
    """Run the relay: two reads and two writes per request, the least of any gateway."""
    loop, parts = asyncio.get_running_loop(), urlsplit(backend)
    joining: set[asyncio.Task[None]] = set()

    async def join(client: _Side) -> None:
        _, other = await loop.create_connection(
            lambda: _Side(client), parts.hostname or "", parts.port or 80
        )
        client.join(other)

    def accepted() -> _Side:
        client = _Side()
        task = loop.create_task(join(client))
        joining.add(task)
        task.add_done_callback(joining.discard)
        return client

    sock = bind("127.0.0.1", 0)
    server = await loop.create_server(accepted, sock=sock)
    print(url_of(sock), flush=True)
    await server.serve_forever()


class LoadConfig(msgspec.Struct, frozen=True):
    """The load. Each stream is a connection that sends its next request after the last answer's
    end."""

    host: str
    port: int
    streams: int
    chunks: int
    seconds: float
    prompt_tokens: int
    texts: bool = False  # send the bytes of the token ids as a text


class LoadSeen(msgspec.Struct, frozen=True):
    requests: int
    seconds: float
    failed: int
    gaps: list[float]  # between reads of one stream, seconds


class ClientRequest(msgspec.Struct, frozen=True):
    model: str
    prompt: list[int] | str
    max_tokens: int
    stream: bool = True


class _Client(asyncio.Protocol):
    """One connection of the load generator, with one request after the other."""

    def __init__(self, load: _Load, requests: Sequence[bytes], turn: int) -> None:
        self._load = load
        self._requests = requests
        self._turn = turn
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._last = 0.0
        self._events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self._load.closed()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def _send(self) -> None:
        if time.perf_counter() > self._load.until:
            self._transport.close()
            return
        self._turn += 1
        self._last, self._events = 0.0, 0
        self._transport.write(self._requests[self._turn % len(self._requests)])

    def on_body(self, body: bytes) -> None:
        now = time.perf_counter()
        if self._last:
            self._load.gaps.append(now - self._last)
        self._last = now
        self._events += body.count(b"\n\n")

    def on_message_complete(self) -> None:
        self._load.requests += 1
        self._load.failed += self._events != self._load.config.chunks + 1
        self._send()


class _Load:
    def __init__(self, config: LoadConfig) -> None:
        self.config = config
        self.until = time.perf_counter() + config.seconds
        self.requests = self.failed = 0
        self.gaps: list[float] = []
        self._open = config.streams
        self._done = asyncio.Event()

    def closed(self) -> None:
        self._open -= 1
        if not self._open:
            self._done.set()

    async def run(self) -> LoadSeen:
        loop, config = asyncio.get_running_loop(), self.config
        requests = _requests(config)
        started = time.perf_counter()
        for number in range(config.streams):
            client = _Client(self, requests, number * len(requests) // config.streams)
            await loop.create_connection(partial(_same, client), config.host, config.port)
        await self._done.wait()
        return LoadSeen(self.requests, time.perf_counter() - started, self.failed, self.gaps)


def _same(client: _Client) -> _Client:
    return client


def _requests(config: LoadConfig) -> list[bytes]:
    """Return 256 requests; groups of 16 prompts share their first half."""
    rng = np.random.default_rng(1)
    half = config.prompt_tokens // 2
    shared = rng.integers(10_000, VOCABULARY, (16, half))
    requests = []
    for number in range(256):
        own = rng.integers(10_000, VOCABULARY, config.prompt_tokens - half)
        prompt = [*shared[number % 16].tolist(), *own.tolist()]
        body = _encode(
            ClientRequest(
                MODEL, " ".join(map(str, prompt)) if config.texts else prompt, config.chunks
            )
        )
        requests.append(
            b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body
        )
    return requests


async def _load(config: LoadConfig) -> None:
    seen = await _Load(config).run()
    sys.stdout.buffer.write(_encode(seen))


def _gateway(arguments: Sequence[str]) -> int:
    import tokenizers
    from tokenizers.models import WordLevel

    from memserve.gateway.run import run_gateway
    from memserve.gateway.workers import WorkerPlace, run_workers
    from memserve.models.tokenizer import Tokenizer

    parser = argparse.ArgumentParser("gateway")
    parser.add_argument("policy", type=lambda name: msgspec.convert(name, Policy))
    parser.add_argument("workers", type=int)
    parser.add_argument("members", nargs="*")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--worker", type=WorkerPlace.parse)
    parser.add_argument("--exit-with-parent", action="store_true")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)  # log lines have a prefix, unlike the URL
    if given.exit_with_parent:
        exit_with_parent()
    gateway = GatewayConfig(port=given.port, policy=given.policy, workers=given.workers)
    if given.worker is None and gateway.workers > 1:
        return run_workers(gateway, ["gateway", *arguments], module=MODULE)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(tokenizers.Tokenizer(WordLevel({**words, "a": VOCABULARY}, "a")))
    config = ClusterConfig(model=ModelConfig(served_name=MODEL), gateway=gateway)
    return run_gateway(config, given.members, tokenizer, worker=given.worker)


def main(kind: str, *arguments: str) -> int:
    if kind == "backend":
        uvloop.run(_backend(float(arguments[0])))
    elif kind == "relay":
        uvloop.run(_relay(arguments[0]))
    elif kind == "load":
        uvloop.run(_load(msgspec.json.decode(arguments[0], type=LoadConfig)))
    else:
        return _gateway(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
