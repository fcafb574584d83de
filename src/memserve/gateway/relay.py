"""Relay of calls to an instance, and of the answer's bytes to the client. If the instance is lost,
another one continues the answer."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from http import HTTPStatus

import msgspec

from memserve.api import msgpack
from memserve.api.errors import ApiError, invalid, unavailable
from memserve.api.generate import GenerateCall, PrefillPeer
from memserve.api.http_message import JSON_HEADER, Header, Headers, Reply
from memserve.api.interruption import Interruption
from memserve.api.limits import MAX_ANSWER_BYTES
from memserve.api.status import MemberKind
from memserve.clock import Clock
from memserve.cluster.member import Member
from memserve.cluster.membership import Membership
from memserve.gateway.pace import Pace
from memserve.gateway.refusals import no_instance, stopping
from memserve.gateway.request_trace import RequestTrace
from memserve.gateway.route import Route
from memserve.gateway.stream import ClientStream
from memserve.gateway.upstream import Upstream
from memserve.gateway.upstream_connection import Flow, Unreachable
from memserve.tokens import from_ids
from memserve.types import Epoch, InstanceId, Role

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # instances per call: one that crashes instances must not crash all of them
LOOK_SECONDS = 0.1  # between looks for an instance, while a call has none
_Lives = set[tuple[InstanceId, Epoch | None]]  # of members
# As int: looking up an enumeration's member takes longer than the comparison.
_OK, _FULL = HTTPStatus.OK.value, HTTPStatus.TOO_MANY_REQUESTS.value
_NO_PROMPT = from_ids((0,))
_REFUSALS = (HTTPStatus.SERVICE_UNAVAILABLE.value, _FULL)


class Answer:
    """Outcome of a call, for log and metrics. Filled while the call is relayed."""

    __slots__ = ("broken", "failovers", "first_token", "key", "pace", "pauses", "route", "trace")

    def __init__(self) -> None:
        self.key: str | None = None  # the name of the API key that was shown
        self.trace: RequestTrace | None = None  # None: traces are off
        self.route: Route | None = None  # the last one tried
        self.first_token: float | None = None  # clock time of its write to the client; streams only
        self.broken = False  # the stream ended with an error
        self.failovers = 0  # times that another instance continued a stream
        self.pauses: list[float] = []  # seconds without bytes for the client, one per failover
        self.pace: Pace | None = None  # of a stream's tokens; None: nobody asks


class Attempt:
    """A call at one instance, and the instance's answer: the `Sink` of `Upstream.call`."""

    def __init__(self, route: Route, reply: Reply, stream: ClientStream | None) -> None:
        self.status = 0
        self.retry_after: bytes | None = None
        self.media: bytes | None = None  # content type of the answer
        self.lost: str | None = None  # how the instance failed; None: it has not
        self.too_large = False  # the body exceeds MAX_ANSWER_BYTES, and was not read to its end
        self.on_too_large: Callable[[], None] | None = None
        self._parts: list[bytes] = []  # of the body, unless it is streamed
        self._size = 0
        self._route = route
        self._reply = reply
        self._stream = stream
        self._streaming = False
        self._first = True

    def begin(self, flow: Flow) -> None:
        reply = self._reply
        reply.on_flow = lambda paused: flow.pause() if paused else flow.resume()
        if not reply.writable:
            flow.pause()

    def head(self, status: int, retry_after: bytes | None, media: bytes | None) -> None:
        self.status, self.retry_after, self.media = status, retry_after, media
        self._streaming = self._stream is not None and status == _OK

    def received(self, data: bytes, last: bool) -> None:
        if self._streaming and self._stream is not None:
            self._stream.received(data, last)
        else:
            # Nothing is sent before the body is whole: until then another instance may answer.
            self._size += len(data)
            if self._size <= MAX_ANSWER_BYTES:
                self._parts.append(data)
            elif not self.too_large:
                self.too_large = True
                self._parts.clear()
                if self.on_too_large is not None:
                    self.on_too_large()
        if self._first and self.status == _OK and self._begun:
            self._first = False
            self._route.first_token()

    @property
    def _begun(self) -> bool:
        """Whether the bytes received so far show that a token has been generated."""
        return self._stream is None or self._stream.tells_token

    @property
    def body(self) -> bytes:
        """The body received so far; empty if it is streamed."""
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    @property
    def header(self) -> Header:
        """The body's content-type header."""
        return JSON_HEADER if self.media is None else (b"content-type", self.media)

    @property
    def refused(self) -> bool:
        return self.status in _REFUSALS


class Relay:
    """Relays calls, each to one instance at a time and to at most MAX_ATTEMPTS in all."""

    def __init__(
        self,
        upstream: Upstream,
        membership: Membership,
        plan: Callable[[GenerateCall, Sequence[Member]], Route],
        clock: Clock,
        instance_wait: float,
    ) -> None:
        """`plan`: `GlobalRouter.plan`. `instance_wait`: seconds that a call waits while no instance
        is ready."""
        self._upstream = upstream
        self._membership = membership
        self._plan = plan
        self._clock = clock
        self._instance_wait = instance_wait
        self._loop = asyncio.get_running_loop()
        self._under_way: defaultdict[InstanceId, set[Interruption]] = defaultdict(set)
        self._stopping = False

    def instance_lost(self, member: Member) -> None:
        """Interrupt the calls at a member that will not answer any more."""
        for attempt in self._under_way[member.id]:
            attempt.interrupt()

    def stop(self) -> None:
        """Interrupt all calls; their clients get an error."""
        self._stopping = True
        for attempts in self._under_way.values():
            for attempt in attempts:
                attempt.interrupt()

    async def run(self, call: GenerateCall, reply: Reply, headers: Headers, answer: Answer) -> None:
        """Relay a call until its client has an answer. Raises ApiError if that fails before
        anything is sent to the client."""
        stream = ClientStream(call, reply, headers, self._clock) if call.stream else None
        trace = answer.trace
        if stream is not None and len(call.prompts) * call.n == 1:
            stream.pace = answer.pace  # of several sequences, times between tokens say nothing
        if stream is not None and trace is not None and trace.id is not None:
            stream.finish_reasons = []
        tried: _Lives = set()
        refusal: Attempt | None = None
        while (route := await self._route(call, tried, reply, refusal is None)) is not None:
            member = route.member
            tried.add((member.id, member.epoch))
            answer.route = route
            attempt = await self._try(route, call, reply, stream, answer.trace)
            if stream is not None:
                answer.first_token, answer.pauses = stream.first_token, stream.pauses
                if trace is not None:
                    trace.streamed(stream)
            if reply.gone or reply.ended:
                return
            if attempt.too_large:  # another instance's answer would be, too
                raise _too_large()
            if attempt.lost is not None:
                log.warning("%s: %s failed: %s", call.id, member.id, attempt.lost)
                if stream is not None:
                    if stream.finish() or not stream.resumable or stream.refused:
                        break
                    call = _behind(call, stream, answer)
            elif attempt.refused:
                # 429 (a full queue) tells the client more than 503 (an instance that goes away).
                if refusal is None or attempt.status == _FULL:
                    refusal = attempt
            elif reply.started:  # the instance does not continue the stream
                log.warning("%s: %s refuses to go on: %r", call.id, member.id, attempt.body)
            else:
                reply.send(attempt.status, attempt.body, headers, attempt.header)
                if trace is not None:
                    trace.answered(attempt.body)
                return
        self._end(reply, headers, stream, answer, refusal, bool(tried))

    async def _route(
        self,
        call: GenerateCall,
        tried: _Lives,
        reply: Reply,
        patient: bool,
    ) -> Route | None:
        """Return the next route; None: there is none. With `patient`, wait up to `instance_wait`
        seconds for an instance that starts or comes back."""
        route = self._next(call, tried)
        if route is not None or not patient or len(tried) == MAX_ATTEMPTS:
            return route
        log.warning("%s: no instance is ready", call.id)
        until = self._clock.now() + self._instance_wait
        while route is None and self._clock.now() < until:
            if self._stopping or reply.gone or not self._membership.expects():
                break
            await asyncio.sleep(LOOK_SECONDS)
            route = self._next(call, tried)
        return route

    def _next(self, call: GenerateCall, tried: _Lives) -> Route | None:
        if self._stopping or len(tried) == MAX_ATTEMPTS:
            return None
        members = self._takers(call, tried)
        return self._plan(call, members) if members else None

    def _takers(self, call: GenerateCall, tried: _Lives) -> Sequence[Member]:
        """Return the members that may take the call, without those that were tried. A forwarded
        one goes to vLLM servers: if its prompt is not what the server computes, prefill instances
        take it only as a last resort."""
        kind = None
        if call.own_engine:
            kind = MemberKind.MEMSERVE
        elif call.forward is not None:
            kind = MemberKind.VLLM
        members = self._membership.ready(kind)
        if tried:
            members = [member for member in members if (member.id, member.epoch) not in tried]
        unwanted = None
        if call.own_engine and call.sampling.prompt_logprobs is not None:
            unwanted = Role.DECODE  # who computes the prompt has its scores, so it answers, too
        elif call.forward is not None and not call.forward.renders:
            unwanted = Role.PREFILL
        if unwanted is None:
            return members
        return [member for member in members if member.role is not unwanted] or members

    async def _try(
        self,
        route: Route,
        call: GenerateCall,
        reply: Reply,
        stream: ClientStream | None,
        trace: RequestTrace | None,
    ) -> Attempt:
        member = route.member
        lines = b""
        if trace is not None:
            trace.decided(route)
            lines = trace.attempt(route, call)
        attempt = Attempt(route, reply, stream)
        if stream is not None:
            stream.begin_attempt()
        interruption = Interruption(self._loop)
        under_way = self._under_way[member.id]
        under_way.add(interruption)
        reply.on_gone = attempt.on_too_large = interruption.interrupt
        try:
            with interruption:
                await self._upstream.call(
                    member.address, msgpack.encode(_planned(call, route)), attempt, lines
                )
            if interruption.happened:
                attempt.lost = "given up"
            elif stream is not None and attempt.status == _OK and not stream.complete:
                attempt.lost = "ended before the answer did"
        except Unreachable as error:
            attempt.lost = str(error)
            self._membership.doubt(member)
        finally:
            under_way.discard(interruption)
            reply.on_gone = reply.on_flow = attempt.on_too_large = None
            route.ended()
            if trace is not None:
                trace.attempted(attempt.status, attempt.lost)
        return attempt

    def _end(
        self,
        reply: Reply,
        headers: Headers,
        stream: ClientStream | None,
        answer: Answer,
        refusal: Attempt | None,
        tried: bool,
    ) -> None:
        """End a call for which no instance is left: send an error or the instances' refusal, or
        raise ApiError."""
        if reply.ended or reply.gone:
            return
        if stream is not None and (reply.started or stream.error is not None):
            answer.broken = True
            stream.fail(self._failure().event())
        elif refusal is None or self._stopping:
            raise self._failure() if tried else no_instance()
        else:
            retry = (b"retry-after", refusal.retry_after or b"1")
            reply.send(refusal.status, refusal.body, (*headers, retry), refusal.header)

    def _failure(self) -> ApiError:
        if self._stopping:
            return stopping()
        return unavailable("The instance that had this request was lost.", "instance_lost")


def _too_large() -> ApiError:
    return invalid(
        f"The answer is larger than {MAX_ANSWER_BYTES} bytes: ask for fewer tokens, choices or "
        "logprobs, or for a stream.",
        code="answer_too_large",
    )


def _behind(call: GenerateCall, stream: ClientStream, answer: Answer) -> GenerateCall:
    """Return the call that continues behind the tokens which the client has."""
    if not (tokens := stream.tokens()):
        return call
    answer.failovers += 1
    return msgspec.structs.replace(call, resumed=tokens)


def _planned(call: GenerateCall, route: Route) -> GenerateCall:
    moves = route.prefill or route.fetch is not None
    if call.forward is not None and not (moves and call.forward.renders):
        # The vLLM server computes the prompt from the body.
        return msgspec.structs.replace(call, prompts=(_NO_PROMPT,))
    if not moves:
        return call
    return msgspec.structs.replace(
        call,
        prefill=tuple(map(_peer, route.prefill)),
        fetch=None if route.fetch is None else _peer(route.fetch),
    )


def _peer(member: Member) -> PrefillPeer:
    return PrefillPeer(member.id, member.address, member.pool_address)
