"""HTTP endpoints of an instance."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import parse_qs

import msgspec

import memserve
from memserve.api import msgpack
from memserve.api.control import DRAIN_PATH, RESUME_PATH, ROLE_PATH, SHUTDOWN_PATH
from memserve.api.errors import (
    ApiError,
    body_too_large,
    method_not_allowed,
    path_not_found,
    unavailable,
    unsupported_media,
)
from memserve.api.generate import GENERATE_PATH
from memserve.api.handoff import MEET_PATH, PREFILL_PATH, PUSH_PATH
from memserve.api.http_message import EVENTS_HEADERS, Header, Reply, Request
from memserve.api.instance_metrics import (
    BUILD,
    INSTANCE_METRICS,
    STATE,
    report_instance,
    report_state,
)
from memserve.api.interruption import HangUp, caught_up
from memserve.api.kv_events import SNAPSHOT_PATH
from memserve.api.metric import CONTENT_TYPE, MetricSpec, Page
from memserve.api.status import REPORT_PATH, InstanceReport, InstanceState
from memserve.api.timeline import TIMELINE_PATH
from memserve.api.trace_metrics import TraceMetrics
from memserve.api.vllm_metrics import ENGINE, VLLM_INSTANCE_METRICS, report_lora, report_vllm
from memserve.instance import calls
from memserve.instance.calls import CallReader, LargeCalls
from memserve.instance.dispatcher import Run
from memserve.instance.forwarded_run import LOST, ForwardedRun
from memserve.instance.instance import Instance
from memserve.instance.request_trace import describe, pushed, served
from memserve.logs import shown
from memserve.scheduler.profiles import encode_profile
from memserve.tracing.span import SpanCounts, Tracer
from memserve.vllm.forwarder import BrokenOff, ForwardedAnswer

METRICS: tuple[MetricSpec, ...] = (
    *(BUILD, STATE),
    *INSTANCE_METRICS,
    *VLLM_INSTANCE_METRICS,
    *TraceMetrics.metrics,
)


def instance_page(instance: Instance, spans: SpanCounts | None = None) -> bytes:
    """Return the metrics in Prometheus' text format: while the model is being loaded, the state
    alone. `spans`: of the process's tracer, if it has one."""
    identity, stats = instance.identity, instance.stats()
    page = Page(METRICS)
    page.add(BUILD, 1, memserve.__version__)
    report_state(page, identity.id, instance.state)
    if stats is not None:
        report_instance(page, identity.id, stats)
        report_vllm(page, identity.model, ENGINE, stats, instance.info().limits)
        report_lora(page)
        TraceMetrics(spans).write(page)
    return page.text()


log = logging.getLogger(__name__)

_WITH_STATS = REPORT_PATH.partition("?")[2].encode()
_encode = msgspec.json.Encoder().encode
_Call = TypeVar("_Call")
_Handler = Callable[[Request, Reply], Awaitable[None]]


class Health(msgspec.Struct, frozen=True):
    """`GET /health /live /ready`."""

    status: InstanceState


class InstanceApp:
    """`POST /v1/generate /v1/prefill /v1/kv/push /v1/kv/meet /role /drain /resume /shutdown`, `GET
    /health /live /ready /info /stats /profile /kv/snapshot /metrics`."""

    def __init__(self, instance: Instance, tracer: Tracer | None = None) -> None:
        """`tracer`: with the instance's clock; None: calls are not traced."""
        self._instance = instance
        self._tracer = tracer
        self._large = LargeCalls()
        # One large answer is encoded at a time: each encoding thread delays the event loop.
        self._encoding = asyncio.Lock()
        self._routes: dict[str, tuple[str, _Handler]] = {
            GENERATE_PATH: ("POST", self._generate),
            PREFILL_PATH: ("POST", self._prefill),
            PUSH_PATH: ("POST", self._push),
            MEET_PATH: ("POST", self._meet),
            ROLE_PATH: ("POST", self._role),
            DRAIN_PATH: ("POST", self._drain),
            RESUME_PATH: ("POST", self._resume),
            SHUTDOWN_PATH: ("POST", self._shutdown),
            "/health": ("GET", self._health),
            "/live": ("GET", self._live),
            "/ready": ("GET", self._ready),
            "/info": ("GET", self._info),
            "/stats": ("GET", self._stats),
            "/profile": ("GET", self._profile),
            TIMELINE_PATH: ("GET", self._timeline),
            SNAPSHOT_PATH: ("GET", self._kv_snapshot),
            "/metrics": ("GET", self._metrics),
        }

    async def handle(self, request: Request, reply: Reply) -> None:
        """Handle one request: the server's `Handler`."""
        try:
            route = self._routes.get(request.path)
            if route is None:
                raise path_not_found(request.path)
            method, handler = route
            if request.method != method and (method, request.method) != ("GET", "HEAD"):
                raise method_not_allowed(request.method, request.path, method)
            await handler(request, reply)
        except ApiError as error:
            reply.send_error(error)

    async def _generate(self, request: Request, reply: Reply) -> None:
        with served(self._tracer, "generate", request) as span:
            call = await self._read(calls.GENERATE, request)
            if span is not None:
                describe(span, call)
            with HangUp(reply):
                if call.forward is not None:
                    async with self._instance.forward(call, call.forward, span) as forwarded:
                        await _pass_on(forwarded, reply)
                    return
                constraints = await self._instance.constraints(call)
                with self._instance.run(call, constraints, span) as run:
                    await (_stream(run, reply) if call.stream else self._answer(run, reply))

    async def _answer(self, run: Run, reply: Reply) -> None:
        generation = run.generation
        while not generation.finished:
            await run.step()
        if generation.large:
            async with self._encoding:
                body = await asyncio.to_thread(generation.body)
        else:
            body = generation.body()
        reply.send(HTTPStatus.OK, body)

    async def _prefill(self, request: Request, reply: Reply) -> None:
        with served(self._tracer, "prefill", request) as span:
            call = await self._read(calls.PREFILL, request)
            with HangUp(reply) as left:
                _send_result(reply, await self._instance.prefill(call, span))
            if left.happened and span is not None:
                span.error = "cancelled"

    async def _push(self, request: Request, reply: Reply) -> None:
        with served(self._tracer, "push", request) as span:
            call = await self._read(calls.PUSH, request)
            with HangUp(reply) as left:
                result = await self._instance.push(call)
                if span is not None:
                    pushed(span, call, result)
                _send_result(reply, result)
            if left.happened and span is not None:
                span.error = "cancelled"

    async def _meet(self, request: Request, reply: Reply) -> None:
        call = await self._read(calls.MEET, request)
        with HangUp(reply):
            _send_result(reply, await self._instance.meet(call))

    async def _role(self, request: Request, reply: Reply) -> None:
        call = await self._read(calls.ROLE, request)
        self._instance.change_role(call.role)
        await self._info(request, reply)

    async def _drain(self, request: Request, reply: Reply) -> None:
        self._instance.lifecycle.drain()
        await self._info(request, reply)

    async def _resume(self, request: Request, reply: Reply) -> None:
        self._instance.lifecycle.resume()
        await self._info(request, reply)

    async def _shutdown(self, request: Request, reply: Reply) -> None:
        call = await self._read(calls.SHUTDOWN, request)
        self._instance.lifecycle.end(call.restart)
        await self._info(request, reply)

    async def _health(self, request: Request, reply: Reply) -> None:
        self._send_state(reply, await self._instance.healthy())

    async def _live(self, request: Request, reply: Reply) -> None:
        """Whether the process is of use, or will be: while it loads and drains, too."""
        self._send_state(reply, self._instance.state is not InstanceState.DEAD)

    async def _ready(self, request: Request, reply: Reply) -> None:
        """Whether the instance takes requests. Unlike `/health`, this does not ask the engine."""
        self._send_state(reply, self._instance.state is InstanceState.READY)

    def _send_state(self, reply: Reply, good: bool) -> None:
        # Anybody may ask, without a signature, so the answer holds the state only.
        status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        reply.send(status, _encode(Health(self._instance.state)))

    async def _info(self, request: Request, reply: Reply) -> None:
        info = self._instance.info()
        if request.query == _WITH_STATS:
            both = msgspec.structs.asdict(info)
            info = InstanceReport(**both, stats=self._instance.stats())
        reply.send(HTTPStatus.OK, _encode(info))

    async def _stats(self, request: Request, reply: Reply) -> None:
        stats = self._instance.stats()
        if stats is None:
            raise unavailable("The model is being loaded.", "instance_starting")
        reply.send(HTTPStatus.OK, _encode(stats))

    async def _timeline(self, request: Request, reply: Reply) -> None:
        asked = parse_qs(request.query.decode("latin-1")).get("request", [""])
        found = self._instance.timelines.find(asked[0])
        if found is None:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"This instance does not know request {shown(asked[0])!r}, or no longer.",
                code="request_not_found",
            )
        reply.send(HTTPStatus.OK, _encode(found))

    async def _profile(self, request: Request, reply: Reply) -> None:
        profile = self._instance.profile()
        if profile is None:
            raise unavailable("This instance has no cost model, or not yet.", "no_profile")
        reply.send(HTTPStatus.OK, encode_profile(profile))

    async def _kv_snapshot(self, request: Request, reply: Reply) -> None:
        reply.send(HTTPStatus.OK, await self._instance.kv_snapshot(), media=msgpack.HEADER)

    async def _metrics(self, request: Request, reply: Reply) -> None:
        counts = None if self._tracer is None else self._tracer.counts
        media = (b"content-type", CONTENT_TYPE.encode())
        reply.send(HTTPStatus.OK, instance_page(self._instance, counts), media=media)

    async def _read(self, reader: CallReader[_Call], request: Request) -> _Call:
        if len(request.body) > reader.max_bytes:
            raise body_too_large(reader.max_bytes)
        if reader.media == msgpack.MEDIA and msgpack.HEADER not in request.headers:
            raise unsupported_media(request.path, reader.media)
        return await self._large.read(reader, request.body)


def _send_result(reply: Reply, result: msgspec.Struct) -> None:
    """Send the result of another instance's call, as msgpack."""
    reply.send(HTTPStatus.OK, msgpack.encode(result), media=msgpack.HEADER)


async def _stream(run: Run, reply: Reply) -> None:
    last = False
    try:
        while not last:
            data = await run.step()
            last = run.generation.finished
            if not data:
                continue
            if not reply.started:
                reply.start(HTTPStatus.OK, EVENTS_HEADERS)
            if last:
                reply.end(data)
            else:
                reply.write(data)
                await caught_up(reply)
    except ApiError as error:
        if not reply.started:
            raise
        log.warning("an answer broke off: %s", error)
        reply.end(error.event())


async def _pass_on(run: ForwardedRun, reply: Reply) -> None:
    """Send a vLLM server's answer unchanged. Raises ApiError if the server is lost before its
    first bytes."""
    try:
        async for data in run.pieces():
            if not reply.started:
                reply.start(run.answer.status, _headers_of(run.answer))
            if data:
                reply.write(data)
                await caught_up(reply)
    except BrokenOff as error:
        log.warning("%s", error)
        if not reply.started:
            raise unavailable("The vLLM server was lost.", LOST) from error
        return  # without the end of the body, so that the client notices the loss
    if not reply.started:
        reply.start(run.answer.status, _headers_of(run.answer))
    reply.end()


def _headers_of(answer: ForwardedAnswer) -> list[Header]:
    headers = [(b"content-type", answer.media.encode("latin-1", "replace"))]
    if answer.retry_after is not None:
        headers.append((b"retry-after", answer.retry_after.encode("latin-1", "replace")))
    return headers
