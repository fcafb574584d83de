"""Sends a call to an instance and its answer's bytes to the client."""

from __future__ import annotations

import logging
from collections import defaultdict
from http import HTTPStatus
from typing import NamedTuple

import aiohttp
import msgspec
from starlette.types import Send

from memserve.api.asgi import Headers, Interruption, send_body, start_events
from memserve.api.errors import ApiError, unavailable
from memserve.api.generate import GENERATE_PATH, GenerateCall, PrefillPeer
from memserve.clock import Clock
from memserve.cluster.membership import Member, Membership
from memserve.gateway.router import Plan, Router
from memserve.types import InstanceId

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # a call that takes instances down must not take all of them
_HEADERS = {"Content-Type": "application/json"}
_EVENT_END = b"\n\n"
_REFUSALS = (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS)

_encode = msgspec.json.Encoder().encode


class Answer:
    """What happened to a call, for the log and the metrics. Filled while it is relayed."""

    def __init__(self) -> None:
        self.status = 0  # 0: nothing was sent to the client
        self.instance: InstanceId | None = None  # the last one tried
        self.first_byte: float | None = None  # when it reached the client; streams only
        self.broken = False  # ended by an error in mid-stream


class _InstanceLost(Exception):
    """An instance failed while it had the call."""


class _Refusal(NamedTuple):
    """An instance's answer that another instance may improve on."""

    status: int
    body: bytes
    retry_after: str | None


class Relay:
    """Relays calls. An instance that fails before its first byte is replaced by another."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        membership: Membership,
        router: Router,
        clock: Clock,
    ) -> None:
        self._session = session
        self._membership = membership
        self._router = router
        self._clock = clock
        self._under_way: defaultdict[InstanceId, set[Interruption]] = defaultdict(set)
        self._stopping = False

    def instance_lost(self, member: Member) -> None:
        """End what is under way to a member that will not answer any more."""
        for attempt in self._under_way[member.id]:
            attempt.interrupt()

    def stop(self) -> None:
        """End everything that is under way, with an error."""
        self._stopping = True
        for attempts in self._under_way.values():
            for attempt in attempts:
                attempt.interrupt()

    async def run(self, call: GenerateCall, send: Send, headers: Headers, answer: Answer) -> None:
        """Answer a client. Raises ApiError if nothing has been sent to it yet."""
        tried: set[InstanceId] = set()
        refusal: _Refusal | None = None
        while (plan := self._next(call, tried)) is not None:
            member = plan.member
            tried.add(member.id)
            answer.instance = member.id
            body = _encode(_with_prefill(call, plan))
            try:
                refused = await self._try(member, call, body, send, headers, answer)
            except _InstanceLost:
                if answer.status:
                    answer.broken = True
                    await send({"type": "http.response.body", "body": self._failure().event()})
                    return
            else:
                if refused is None:
                    return
                # A full queue says more than an instance that is going away.
                if refusal is None or refused.status == HTTPStatus.TOO_MANY_REQUESTS:
                    refusal = refused
        if refusal is None or self._stopping:
            raise self._failure() if tried else no_instance()
        answer.status = refusal.status
        retry = (b"retry-after", (refusal.retry_after or "1").encode())
        await send_body(send, refusal.status, refusal.body, (*headers, retry))

    def _next(self, call: GenerateCall, tried: set[InstanceId]) -> Plan | None:
        if self._stopping or len(tried) == MAX_ATTEMPTS:
            return None
        members = [member for member in self._membership.ready() if member.id not in tried]
        return self._router.plan(call, members) if members else None

    async def _try(
        self,
        member: Member,
        call: GenerateCall,
        body: bytes,
        send: Send,
        headers: Headers,
        answer: Answer,
    ) -> _Refusal | None:
        """None: the client has its answer. Raises _InstanceLost."""
        attempt = Interruption()
        self._under_way[member.id].add(attempt)
        try:
            with attempt:
                return await self._exchange(member, call, body, send, headers, answer)
            log.warning("%s: given up at %s", call.id, member.id)
            raise _InstanceLost
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("%s: %s failed: %r", call.id, member.id, error)
            self._membership.missed(member)
            raise _InstanceLost from error
        finally:
            self._under_way[member.id].discard(attempt)

    async def _exchange(
        self,
        member: Member,
        call: GenerateCall,
        body: bytes,
        send: Send,
        headers: Headers,
        answer: Answer,
    ) -> _Refusal | None:
        url = member.address + GENERATE_PATH
        async with self._session.post(url, data=body, headers=_HEADERS) as response:
            if response.status in _REFUSALS:
                retry_after = response.headers.get("Retry-After")
                return _Refusal(response.status, await response.read(), retry_after)
            if call.stream and response.status == HTTPStatus.OK:
                await self._stream(response.content, send, headers, answer)
            else:
                # Whole before the first byte goes out: until then another may answer.
                whole = await response.read()
                answer.status = response.status
                await send_body(send, response.status, whole, headers)
        return None

    async def _stream(
        self, content: aiohttp.StreamReader, send: Send, headers: Headers, answer: Answer
    ) -> None:
        """Relay events whole, so that an error event can follow the last one at any time."""
        rest = b""
        done = False
        while not done:
            data = rest + await content.readany()
            done = content.at_eof()
            end = len(data) if done else _end_of_events(data)
            data, rest = data[:end], data[end:]
            if not data and not done:
                continue
            if not answer.status:
                answer.status = HTTPStatus.OK
                answer.first_byte = self._clock.now()
                await start_events(send, headers)
            await send({"type": "http.response.body", "body": data, "more_body": not done})

    def _failure(self) -> ApiError:
        if self._stopping:
            return unavailable("The gateway is shutting down.", "gateway_stopping", close=True)
        return unavailable("The instance that had this request was lost.", "instance_lost")


def _end_of_events(data: bytes) -> int:
    """Where the last event that is whole ends."""
    end = data.rfind(_EVENT_END)
    return end + len(_EVENT_END) if end >= 0 else 0


def _with_prefill(call: GenerateCall, plan: Plan) -> GenerateCall:
    if not plan.prefill:
        return call
    peers = tuple(PrefillPeer(member.id, member.address) for member in plan.prefill)
    return msgspec.structs.replace(call, prefill=peers)


def no_instance() -> ApiError:
    return unavailable("No instance is ready.", "no_instance")
