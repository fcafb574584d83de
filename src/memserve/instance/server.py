"""HTTP endpoints of an instance, as a bare ASGI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import parse_qs

import msgspec
from starlette.types import Message, Receive, Scope, Send

import memserve
from memserve.api import msgpack
from memserve.api.asgi import (
    ClientGone,
    HangUp,
    read_body,
    send_body,
    send_error,
    start_events,
)
from memserve.api.control import DRAIN_PATH, RESUME_PATH, ROLE_PATH, SHUTDOWN_PATH
from memserve.api.errors import (
    ApiError,
    method_not_allowed,
    path_not_found,
    unavailable,
    unsupported_media,
)
from memserve.api.forward import Forward
from memserve.api.generate import GENERATE_PATH, GenerateCall
from memserve.api.handoff import MEET_PATH, PREFILL_PATH, PUSH_PATH
from memserve.api.instance_metrics import (
    BUILD,
    INSTANCE_METRICS,
    STATE,
    report_instance,
    report_state,
)
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
from memserve.tracing.span import Span, SpanCounts, Tracer
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
_Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            route = self._routes.get(scope["path"])
            if route is None:
                raise path_not_found(scope["path"])
            method, handler = route
            if scope["method"] != method:
                raise method_not_allowed(scope["method"], scope["path"], method)
            await handler(scope, receive, send)
        except ApiError as error:
            await send_error(send, error)
        except ClientGone:
            return

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        with served(self._tracer, "generate", scope) as span:
            call = await self._read(calls.GENERATE, scope, receive)
            if span is not None:
                describe(span, call)
            if call.forward is not None:
                await self._forward(call, call.forward, receive, send, span)
                return
            with HangUp(receive):
                constraints = await self._instance.constraints(call)
                with self._instance.run(call, constraints, span) as run:
                    await (_stream(run, send) if call.stream else self._answer(run, send))

    async def _answer(self, run: Run, send: Send) -> None:
        generation = run.generation
        while not generation.finished:
            await run.step()
        if generation.large:
            async with self._encoding:
                body = await asyncio.to_thread(generation.body)
        else:
            body = generation.body()
        await send_body(send, HTTPStatus.OK, body)

    async def _forward(
        self,
        call: GenerateCall,
        forward: Forward,
        receive: Receive,
        send: Send,
        span: Span | None,
    ) -> None:
        with HangUp(receive):
            async with self._instance.forward(call, forward, span) as run:
                await _pass_on(run, send)

    async def _prefill(self, scope: Scope, receive: Receive, send: Send) -> None:
        with served(self._tracer, "prefill", scope) as span:
            call = await self._read(calls.PREFILL, scope, receive)
            with HangUp(receive) as left:
                result = await self._instance.prefill(call, span)
                await _send_result(send, result)
            if left.happened and span is not None:
                span.error = "cancelled"

    async def _push(self, scope: Scope, receive: Receive, send: Send) -> None:
        with served(self._tracer, "push", scope) as span:
            call = await self._read(calls.PUSH, scope, receive)
            with HangUp(receive) as left:
                result = await self._instance.push(call)
                if span is not None:
                    pushed(span, call, result)
                await _send_result(send, result)
            if left.happened and span is not None:
                span.error = "cancelled"

    async def _meet(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = await self._read(calls.MEET, scope, receive)
        with HangUp(receive):
            result = await self._instance.meet(call)
            await _send_result(send, result)

    async def _role(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = await self._read(calls.ROLE, scope, receive)
        self._instance.change_role(call.role)
        await self._info(scope, receive, send)

    async def _drain(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._instance.lifecycle.drain()
        await self._info(scope, receive, send)

    async def _resume(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._instance.lifecycle.resume()
        await self._info(scope, receive, send)

    async def _shutdown(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = await self._read(calls.SHUTDOWN, scope, receive)
        self._instance.lifecycle.end(call.restart)
        await self._info(scope, receive, send)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._send_state(send, await self._instance.healthy())

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whether the process is of use, or will be: while it loads and drains, too."""
        await self._send_state(send, self._instance.state is not InstanceState.DEAD)

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whether the instance takes requests. Unlike `/health`, this does not ask the engine."""
        await self._send_state(send, self._instance.state is InstanceState.READY)

    async def _send_state(self, send: Send, good: bool) -> None:
        # Anybody may ask, without a signature, so the answer holds the state only.
        status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        await send_body(send, status, _encode(Health(self._instance.state)))

    async def _info(self, scope: Scope, receive: Receive, send: Send) -> None:
        info = self._instance.info()
        if scope["query_string"] == _WITH_STATS:
            both = msgspec.structs.asdict(info)
            info = InstanceReport(**both, stats=self._instance.stats())
        await send_body(send, HTTPStatus.OK, _encode(info))

    async def _stats(self, scope: Scope, receive: Receive, send: Send) -> None:
        stats = self._instance.stats()
        if stats is None:
            raise unavailable("The model is being loaded.", "instance_starting")
        await send_body(send, HTTPStatus.OK, _encode(stats))

    async def _timeline(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("request", [""])
        found = self._instance.timelines.find(asked[0])
        if found is None:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"This instance does not know request {shown(asked[0])!r}, or no longer.",
                code="request_not_found",
            )
        await send_body(send, HTTPStatus.OK, _encode(found))

    async def _profile(self, scope: Scope, receive: Receive, send: Send) -> None:
        profile = self._instance.profile()
        if profile is None:
            raise unavailable("This instance has no cost model, or not yet.", "no_profile")
        await send_body(send, HTTPStatus.OK, encode_profile(profile))

    async def _kv_snapshot(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._instance.kv_snapshot()
        await send_body(send, HTTPStatus.OK, body, media=msgpack.HEADER)

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        media = (b"content-type", CONTENT_TYPE.encode())
        counts = None if self._tracer is None else self._tracer.counts
        page = instance_page(self._instance, counts)
        await send_body(send, HTTPStatus.OK, page, media=media)

    async def _read(self, reader: CallReader[_Call], scope: Scope, receive: Receive) -> _Call:
        body = await read_body(scope, receive, reader.max_bytes)
        if reader.media == msgpack.MEDIA and msgpack.HEADER not in scope["headers"]:
            raise unsupported_media(scope["path"], reader.media)
        return await self._large.read(reader, body)


async def _send_result(send: Send, result: msgspec.Struct) -> None:
    """Send the result of another instance's call, as msgpack."""
    await send_body(send, HTTPStatus.OK, msgpack.encode(result), media=msgpack.HEADER)


async def _stream(run: Run, send: Send) -> None:
    started = False
    try:
        while not run.generation.finished:
            data = await run.step()
            if not data:
                continue
            if not started:
                started = True
                await start_events(send)
            more = not run.generation.finished
            await send({"type": "http.response.body", "body": data, "more_body": more})
    except ApiError as error:
        if not started:
            raise
        log.warning("an answer broke off: %s", error)
        await send({"type": "http.response.body", "body": error.event()})


async def _pass_on(run: ForwardedRun, send: Send) -> None:
    """Send a vLLM server's answer unchanged. Raises ApiError if the server is lost before its
    first bytes."""
    started = False
    try:
        async for data in run.pieces():
            if not started:
                started = True
                await send(_head_of(run.answer))
            await send({"type": "http.response.body", "body": data, "more_body": True})
    except BrokenOff as error:
        log.warning("%s", error)
        if not started:
            raise unavailable("The vLLM server was lost.", LOST) from error
        return  # without the end of the body, so that the client notices the loss
    if not started:
        await send(_head_of(run.answer))
    await send({"type": "http.response.body", "body": b""})


def _head_of(answer: ForwardedAnswer) -> Message:
    headers = [(b"content-type", answer.media.encode("latin-1", "replace"))]
    if answer.retry_after is not None:
        headers.append((b"retry-after", answer.retry_after.encode("latin-1", "replace")))
    return {"type": "http.response.start", "status": answer.status, "headers": headers}
