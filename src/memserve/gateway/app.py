"""The gateway's request handler. Endpoints that generate bypass the web framework."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from http import HTTPStatus

import msgspec
from fastapi import APIRouter

from memserve.api.errors import ApiError, method_not_allowed
from memserve.api.forward import WHOLE_PATHS, ForwardPath
from memserve.api.generate import GenerateCall
from memserve.api.guard import Guard
from memserve.api.http_message import Header, Reply, Request
from memserve.api.http_server import Handler
from memserve.api.interruption import HangUp
from memserve.api.metric import MetricSource
from memserve.api.openai import NotUnderstood
from memserve.api.peer_client import PeerClient
from memserve.api.serving import MAX_BODY_BYTES
from memserve.api.status import Limits, MemberKind
from memserve.clock import Clock
from memserve.cluster.membership import Membership
from memserve.gateway.access import Access, Client
from memserve.gateway.admin import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    Decisions,
    Troubles,
    admin_app,
)
from memserve.gateway.admission_queue import AdmissionQueue, ClientLeft
from memserve.gateway.asgi import asgi_handler
from memserve.gateway.call_builder import INLINE_CHARACTERS, CallBuilder, with_session
from memserve.gateway.cluster_admin import repeated_join
from memserve.gateway.figures import figures_routes
from memserve.gateway.forward_builder import ForwardBuilder
from memserve.gateway.metrics import GatewayMetrics
from memserve.gateway.pace import Pace
from memserve.gateway.planning import PlannerBoard, planner_routes
from memserve.gateway.refusals import draining, no_instance, no_member_can
from memserve.gateway.relay import Answer, Relay
from memserve.gateway.request_line import CLIENT_LEFT, MAX_REQUEST_ID, RequestLine, read_reason
from memserve.gateway.request_trace import RequestTrace
from memserve.gateway.responses import INPUT_TOKENS_PATH, RESPONSES_PATH, Responses
from memserve.gateway.siblings import Siblings
from memserve.gateway.tokenization import Tokenization
from memserve.scheduler.admission import NOBODY, Tenant, tenant_id
from memserve.tracing.span import Tracer
from memserve.types import Epoch

log = logging.getLogger(__name__)

HUNG_UP = 499  # status, in log and metrics, of a request whose client has left
FAILED = 500  # statuses from here on are logged as warnings
# A gateway that starts knows only the configured instances. Other instances register again every
# 2 s (`instance.join`), so a gateway without members waits at least that long for one.
INTRODUCTION_SECONDS = 3.0
LARGE_BODY_BYTES = 64 * 1024
LOOK_SECONDS = 0.05  # between looks for an instance, while none has been met yet

_Build = Callable[[bytes, Limits], Awaitable[GenerateCall]]
_Native = Callable[[bytes, Limits], Awaitable[bytes]]  # returns JSON


class GatewayApp:
    """Handles requests, and counts the running ones, so that a drain can wait for them."""

    def __init__(
        self,
        calls: CallBuilder,
        membership: Membership,
        relay: Relay,
        clock: Clock,
        queue: AdmissionQueue,
        decisions: Decisions,
        counted: Iterable[MetricSource],
        instance_wait: float,
        access: Access,
        peers: PeerClient,
        forwards: ForwardBuilder,
        access_log: bool = True,
        siblings: Siblings | None = None,
        troubles: Troubles | None = None,
        tracer: Tracer | None = None,
        *,
        responses: Responses,
        tokenization: Tokenization,
        planning: PlannerBoard,
        policy: str,
        max_body_bytes: int = MAX_BODY_BYTES,
        more: Callable[[Siblings | None], APIRouter] | None = None,
    ) -> None:
        """`counted`: whose metrics `/metrics` has beside its own. `instance_wait`: seconds after
        the start for which requests wait for an instance. `tracer`: with the same clock; None:
        requests are not traced. `policy`: of scheduling, its name. `max_body_bytes`: of a body
        that was compressed. `more`: returns further routes, of all workers or of this one."""
        self._draining = False
        self._began = clock.now()
        self._instance_wait = instance_wait
        self._membership = membership
        self._siblings = siblings
        self._relay = relay
        self._queue = queue
        self._clock = clock
        self._access_log = access_log
        self._tracer = tracer
        self._access = access
        self._metrics = GatewayMetrics(membership, policy, calls.model)
        for source in (*counted, planning):
            self._metrics.register(source)
        self._forwards = forwards
        self._threads = calls.threads
        self._generating: dict[str, _Build] = {
            CHAT_PATH: self._or_forward(calls.chat, ForwardPath.CHAT),
            COMPLETIONS_PATH: self._or_forward(calls.completion, ForwardPath.COMPLETIONS),
        }
        self._responses = responses
        self._max_body_bytes = max_body_bytes
        # Answered by the gateway itself, unless the cluster has vLLM servers alone.
        self._native: dict[str, _Native] = {
            ForwardPath.TOKENIZE.value: tokenization.tokenize,
            ForwardPath.DETOKENIZE.value: tokenization.detokenize,
        }
        # Served only while the cluster has a vLLM server.
        self._forwarding: dict[str, _Build] = {
            path.value: partial(forwards.build, path) for path in WHOLE_PATHS
        }
        admin = calls.model, membership, peers, self._metrics, lambda: self._draining, decisions
        figures = membership, self._metrics, queue, clock
        app = admin_app(*admin, siblings, troubles)
        app.include_router(figures_routes(*figures, siblings))
        if more is not None:
            app.include_router(more(siblings))
        app.include_router(planner_routes(planning, siblings))
        self._admin: Handler = asgi_handler(app)
        # Requests of sibling workers: answered for this worker alone, and not passed on again.
        app = admin_app(*admin, troubles=troubles)
        app.include_router(figures_routes(*figures, None))
        if more is not None:
            app.include_router(more(None))
        app.include_router(planner_routes(planning, None))
        self.handle_sibling: Handler = Guard(
            responses.for_siblings(asgi_handler(app)), access.verifier
        )
        self._smallest: tuple[Epoch, Limits] | None = None  # membership epoch, and limits then
        self._idle = asyncio.Event()
        self._idle.set()

    def drain(self) -> None:
        """Refuse new requests. Running requests go on."""
        self._draining = True

    async def idle(self) -> None:
        """Return when no generating request is running."""
        await self._idle.wait()

    async def handle(self, request: Request, reply: Reply) -> None:
        """Handle one request: the server's `Handler`."""
        if request.path == INPUT_TOKENS_PATH and request.method != "OPTIONS":
            count = partial(self._responses.count, request)
            await self._answer(count, request, reply, forwards=False)
            return
        build = self._generating.get(request.path)
        if build is None and request.path in self._forwarding and request.method != "OPTIONS":
            has = self._membership.has
            if has(MemberKind.VLLM) and not has(MemberKind.MEMSERVE):
                build = self._forwarding[request.path]
            elif request.path == RESPONSES_PATH:
                exchange = self._responses.begin(request, reply)
                build, reply = exchange.build, exchange.reply
            elif request.path in self._native:
                if await self._answer(self._native[request.path], request, reply):
                    return
                build = self._forwarding[request.path]
            elif has(MemberKind.VLLM):
                build = self._forwarding[request.path]
        if build is None or request.method == "OPTIONS":
            await self._administer(request, reply)
            return
        self._begin()
        try:
            work = self._generate(build, request, reply)
            del request
            await work
        finally:
            self._end()

    def _begin(self) -> None:
        """Count a running request, which a drain waits for."""
        self._metrics.running += 1
        self._idle.clear()

    def _end(self) -> None:
        self._metrics.running -= 1
        if not self._metrics.running:
            self._idle.set()

    def _or_forward(self, build: _Build, path: ForwardPath) -> _Build:
        """Return `build` with a fallback: if the cluster has a vLLM server, a request that raises
        NotUnderstood is forwarded to it, and one for the built-in engine if no instance has that.
        """

        async def understand(body: bytes, limits: Limits) -> GenerateCall:
            has = self._membership.has
            try:
                call = await build(body, limits)
                if not call.own_engine or has(MemberKind.MEMSERVE) or not has(MemberKind.VLLM):
                    return call
            except NotUnderstood:
                if not has(MemberKind.VLLM):
                    raise
            return await self._forwards.build(path, body, limits)

        return understand

    async def _administer(self, request: Request, reply: Reply) -> None:
        if self._access.preflight(request, reply):
            return
        try:
            if request.path in self._generating or (
                request.method == "OPTIONS" and request.path in self._forwarding
            ):
                raise method_not_allowed(request.method, request.path, "POST")
            await self._access.admit(request, reply)
            if request.path in self._forwarding:
                raise no_member_can(request.path)
            if self._responses.serves(request.path):
                await self._responses.answer(request, reply)
                return
            if (view := repeated_join(self._membership, request, self._siblings)) is not None:
                reply.send(HTTPStatus.OK, view)
                return
        except ApiError as error:
            reply.send_error(error)
            return
        await self._admin(request, reply)

    async def _answer(
        self, native: _Native, request: Request, reply: Reply, forwards: bool = True
    ) -> bool:
        """Answer a request that generates nothing. Return False if it is for a vLLM server, which
        is possible with `forwards` alone."""
        self._begin()
        try:
            if self._draining:
                raise draining()
            self._access.client(request, reply)
            if request.method != "POST":
                raise method_not_allowed(request.method, request.path, "POST")
            with HangUp(reply):
                limits = self._limits() or await self._first_limits(reply)
                body = await native(
                    await self._threads.whole(request, self._max_body_bytes), limits
                )
                reply.send(HTTPStatus.OK, body)
        except NotUnderstood as error:
            if forwards and self._membership.has(MemberKind.VLLM):
                return False
            reply.send_error(error)
        except ApiError as error:
            reply.send_error(error)
        except ClientLeft:
            pass
        finally:
            self._end()
        self._metrics.requests[request.path, HUNG_UP if reply.gone else reply.status] += 1
        return True

    async def _generate(self, build: _Build, request: Request, reply: Reply) -> None:
        started = self._clock.now()
        metrics = self._metrics
        answer = Answer()
        answer.pace = Pace(metrics.inter_token_seconds, metrics.time_per_output_token_seconds)
        if self._tracer is not None:
            answer.trace = RequestTrace(self._tracer, request, started)
        given = request.header(b"x-request-id")
        headers: tuple[Header, ...] = ()
        if given is not None:
            headers = ((b"x-request-id", given[:MAX_REQUEST_ID]),)
        call: GenerateCall | None = None
        try:
            client = self._access.client(request, reply)
            if client.key is not None:
                answer.key = client.key.name
            # Tokenised on the event loop.
            if len(request.body) <= INLINE_CHARACTERS and not request.header(b"content-encoding"):
                call = await self._accept(build, request, reply, client)
            else:
                call = await self._accept_large(build, request, reply, client)
            if answer.trace is not None:
                answer.trace.accepted(call, len(request.body))
            if len(request.body) > LARGE_BODY_BYTES:
                # Free the body before the answer, which may take long.
                request = msgspec.structs.replace(request, body=b"")
            if given is None:
                headers = ((b"x-request-id", call.id.encode()),)
            call = await self._queue.enter(call, _tenant(request, call, client), reply)
            if answer.trace is not None:
                answer.trace.admitted()
            if not reply.gone:
                await self._relay.run(call, reply, headers, answer)
        except ApiError as error:
            reply.send_error(error, headers)
        except ClientLeft:
            log.debug("a client left while its request waited")
        finally:
            if call is not None:
                self._queue.leave(call.id)
        self._record(request, given, call, reply, answer, started)

    async def _accept(
        self, build: _Build, request: Request, reply: Reply, client: Client
    ) -> GenerateCall:
        if self._draining:
            raise draining()
        if request.method != "POST":
            raise method_not_allowed(request.method, request.path, "POST")
        limits = self._limits() or await self._first_limits(reply)
        call = await build(await self._threads.whole(request, self._max_body_bytes), limits)
        session = request.header(b"x-session-id")
        if session:
            call = with_session(call, session)
        if (salt := client.salted(call.cache_salt)) != call.cache_salt:
            call = msgspec.structs.replace(call, cache_salt=salt)
        self._metrics.prompt_tokens += sum(map(len, call.prompts))
        return call

    async def _accept_large(
        self, build: _Build, request: Request, reply: Reply, client: Client
    ) -> GenerateCall:
        """Call `_accept`, and cancel it if the client leaves: its body is then not tokenised.
        Raises ApiError, ClientLeft."""
        with HangUp(reply):
            return await self._accept(build, request, reply, client)
        raise ClientLeft

    async def _first_limits(self, reply: Reply) -> Limits:
        """Wait for an instance and return its limits. Raises ApiError (draining, or no instance
        in time), ClientLeft."""
        while (limits := self._limits()) is None:
            if self._draining:
                raise draining()
            if reply.gone:
                raise ClientLeft
            wait = self._instance_wait
            if not self._membership.members:
                wait = min(wait, INTRODUCTION_SECONDS)
            if self._clock.now() - self._began >= wait:
                raise no_instance()
            await asyncio.sleep(LOOK_SECONDS)
        return limits

    def _limits(self) -> Limits | None:
        """Return the limits of the ready instance with the smallest `max_tokens`: any instance
        can serve an accepted request. Without a ready instance: the last ones; None before any."""
        epoch = self._membership.epoch
        if self._smallest is not None and self._smallest[0] == epoch:
            return self._smallest[1]
        known = [m.limits for m in self._membership.ready() if m.limits is not None]
        if known:
            self._smallest = (epoch, min(known, key=lambda limits: limits.max_tokens))
        return None if self._smallest is None else self._smallest[1]

    def _record(
        self,
        request: Request,
        request_id: bytes | None,
        call: GenerateCall | None,
        reply: Reply,
        answer: Answer,
        started: float,
    ) -> None:
        took = self._clock.now() - started
        first = None if answer.first_token is None else answer.first_token - started
        status = HUNG_UP if reply.gone and not reply.ended else reply.status
        if answer.trace is not None:
            answer.trace.end(status, answer.first_token, answer.broken)
        metrics = self._metrics
        metrics.requests[request.path, status] += 1
        metrics.request_seconds.observe(took)
        metrics.client_hang_ups += status == HUNG_UP
        metrics.streams_broken += answer.broken
        metrics.failovers += answer.failovers
        if first is not None:
            metrics.time_to_first_token_seconds.observe(first)
        if reply.ended and not answer.broken:
            if answer.pace is not None:
                answer.pace.ended()
            if status == HTTPStatus.OK:
                metrics.answer_seconds.observe(took)
        for pause in answer.pauses:
            metrics.failover_pause_seconds.observe(pause)
        bad = status >= FAILED or answer.broken or answer.failovers
        level = logging.WARNING if bad else logging.INFO
        if (bad or self._access_log) and log.isEnabledFor(level):
            reason = read_reason(reply.refusal) if status != HUNG_UP else CLIENT_LEFT
            line = RequestLine(request, request_id, call, answer, status, first, took, reason)
            log.log(level, line)


def _tenant(request: Request, call: GenerateCall, client: Client) -> Tenant:
    """Return the tenant in admission: the API key's tenant. Where the gateway has no keys, an id
    of the Authorization header, or else of the cache salt; NOBODY without either."""
    if client.key is not None:
        return client.turns
    key = request.header(b"authorization")
    if key is not None:
        return tenant_id(b"key:" + key)
    return tenant_id(b"salt:" + call.cache_salt.encode()) if call.cache_salt else NOBODY
