"""The gateway's ASGI application. The endpoints that generate go around every framework."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from memserve.api.asgi import ClientGone, HangUp, header, read_body, send_error
from memserve.api.errors import ApiError, method_not_allowed, unavailable
from memserve.api.generate import GenerateCall
from memserve.api.status import Limits
from memserve.clock import Clock
from memserve.cluster.membership import Membership
from memserve.gateway.admin import CHAT_PATH, COMPLETIONS_PATH, admin_app
from memserve.gateway.call_builder import CallBuilder
from memserve.gateway.metrics import GatewayMetrics
from memserve.gateway.relay import Answer, Relay, no_instance

log = logging.getLogger(__name__)

MAX_REQUEST_ID = 256  # bytes of X-Request-Id that are echoed
HUNG_UP = 499  # the status of a request whose client has left, in log and metrics

_Build = Callable[[bytes, Limits], Awaitable[GenerateCall]]


class GatewayApp:
    """Takes requests, and counts those that run until it is drained."""

    def __init__(
        self,
        calls: CallBuilder,
        membership: Membership,
        relay: Relay,
        clock: Clock,
        max_body_bytes: int,
    ) -> None:
        self._membership = membership
        self._relay = relay
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._metrics = GatewayMetrics(membership)
        self._generating: dict[str, _Build] = {
            CHAT_PATH: calls.chat,
            COMPLETIONS_PATH: calls.completion,
        }
        self._admin: ASGIApp = admin_app(
            calls.model, membership, self._metrics, lambda: self._draining
        )
        self._draining = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def drain(self) -> None:
        """Refuse new requests. What runs goes on."""
        self._draining = True

    async def idle(self) -> None:
        """Returns when no request is running."""
        await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        build = self._generating.get(scope["path"])
        if build is None:
            await self._admin(scope, receive, send)
            return
        self._running += 1
        self._idle.clear()
        self._metrics.running.inc()
        try:
            await self._generate(build, scope, receive, send)
        finally:
            self._metrics.running.dec()
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _generate(self, build: _Build, scope: Scope, receive: Receive, send: Send) -> None:
        started = self._clock.now()
        answer = Answer()
        request_id = header(scope, b"x-request-id")
        echoed = () if request_id is None else ((b"x-request-id", request_id[:MAX_REQUEST_ID]),)
        call: GenerateCall | None = None
        try:
            call = await self._accept(build, scope, receive)
            if request_id is None:
                echoed = ((b"x-request-id", call.id.encode()),)
            with HangUp(receive) as hang_up:
                await self._relay.run(call, send, echoed, answer)
            if hang_up.happened:
                answer.status = HUNG_UP
                self._metrics.hang_ups.inc()
        except ApiError as error:
            answer.status = error.status
            await send_error(send, error, echoed)
        except ClientGone:
            answer.status = HUNG_UP
        self._record(scope["path"], request_id, call, answer, started)

    async def _accept(self, build: _Build, scope: Scope, receive: Receive) -> GenerateCall:
        if self._draining:
            raise unavailable("The gateway is shutting down.", "gateway_draining", close=True)
        if scope["method"] != "POST":
            raise method_not_allowed(scope["method"], scope["path"], "POST")
        body = await read_body(scope, receive, self._max_body_bytes)
        limits = self._limits()
        call = await build(body, limits)
        self._metrics.prompt_tokens.inc(sum(map(len, call.prompts)))
        return call

    def _limits(self) -> Limits:
        """Those of the smallest instance: what is accepted, any of them can serve."""
        known = [m.limits for m in self._membership.ready() if m.limits is not None]
        if not known:
            raise no_instance()
        return known[0] if len(known) == 1 else min(known, key=lambda limits: limits.max_tokens)

    def _record(
        self,
        path: str,
        request_id: bytes | None,
        call: GenerateCall | None,
        answer: Answer,
        started: float,
    ) -> None:
        now = self._clock.now()
        metrics = self._metrics
        metrics.requests.labels(path, str(int(answer.status))).inc()
        metrics.whole.observe(now - started)
        if answer.first_byte is not None:
            metrics.first_token.observe(answer.first_byte - started)
        if answer.broken:
            metrics.broken.inc()
        log.info(
            "%s request=%s call=%s instance=%s status=%d%s prompt_tokens=%s first=%s total=%.4f",
            path,
            "-" if request_id is None else request_id.decode("latin-1"),
            "-" if call is None else call.id,
            answer.instance or "-",
            answer.status,
            " broken" if answer.broken else "",
            "-" if call is None else sum(map(len, call.prompts)),
            "-" if answer.first_byte is None else f"{answer.first_byte - started:.4f}",
            now - started,
        )
