"""Queue of requests that wait while instances are saturated, in the order of `Admission`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import msgspec

from memserve.api.errors import ApiError, queue_full
from memserve.api.generate import GenerateCall
from memserve.api.http_message import Reply
from memserve.clock import Clock
from memserve.gateway.refusals import no_instance, stopping
from memserve.scheduler.admission import Admission, Grant, Refusal, Tenant, Ticket

_COST_STEP = 64  # tokens; prompts of one step have one cost, which is cached
_MAX_COSTS = 4096


class ClientLeft(Exception):
    """The client has left: its request needs no answer."""


class AdmissionQueue:
    """Makes requests wait until `Admission` admits them. Belongs to the event loop. Every request
    that has entered must `leave`."""

    def __init__(
        self,
        admission: Admission,
        prefill_seconds: Callable[[int], float],
        clock: Clock,
        instance_wait: float,
    ) -> None:
        """`prefill_seconds`: seconds of a prefill, by prompt tokens, with nothing cached.
        `instance_wait`: seconds without an instance until waiting requests are refused."""
        self._admission = admission
        self._prefill_seconds = prefill_seconds
        self._clock = clock
        self._instance_wait = instance_wait
        self._costs: dict[int, float] = {}
        self._tickets: dict[str, Ticket] = {}
        self._waiters: dict[Ticket, asyncio.Future[None]] = {}
        self._stopping = False
        self._none_since: float | None = None  # since when there is no instance; None: there is

    @property
    def waiting(self) -> int:
        return self._admission.waiting

    async def enter(self, call: GenerateCall, tenant: Tenant, reply: Reply) -> GenerateCall:
        """Wait until the call may start; return the call to send to an instance. It keeps its
        priority only if its tenant is privileged: an instance's queue knows no tenants, so a
        priority there goes before all of them. Raises ApiError, ClientLeft."""
        tokens = sum(map(len, call.prompts))
        ticket = self._admission.enter(tenant, self._cost(tokens), call.priority, self._clock.now())
        if isinstance(ticket, Refusal):
            raise queue_full(f"Too many requests: {ticket}.", ticket.retry_after)
        self._tickets[call.id] = ticket
        if not ticket.admitted:
            await self._wait(call, ticket, reply)
        if call.priority and not self._admission.grant_of(tenant).privileged:
            return msgspec.structs.replace(call, priority=0)
        return call

    def grant(self, grants: Mapping[Tenant, Grant]) -> None:
        """Set the tenants' grants from now on; a tenant that is not named has the default one."""
        self._admission.grant(grants)
        self._let_through()

    def prefilled(self, call_id: str) -> None:
        """Mark a call's prompt as computed. Unknown ids are ignored."""
        ticket = self._tickets.get(call_id)
        if ticket is not None:
            self._admission.prefilled(ticket)
            if self._waiters:
                self._let_through()

    def leave(self, call_id: str) -> None:
        """End a call, with any outcome. A second time is ignored."""
        ticket = self._tickets.pop(call_id, None)
        if ticket is not None:
            self._admission.leave(ticket)
            if self._waiters:
                self._let_through()

    def resize(self, instances: int) -> None:
        """Set how many instances compute prompts, and forget cached costs. Called periodically:
        after `instance_wait` seconds without instances, waiting requests are refused."""
        self._costs.clear()
        self._admission.resize(instances)
        if instances:
            self._none_since = None
            self._let_through()
            return
        now = self._clock.now()
        if self._none_since is None:
            self._none_since = now
        elif now - self._none_since >= self._instance_wait:
            self._refuse(no_instance)

    def stop(self) -> None:
        """Refuse waiting requests, and later ones that would have to wait."""
        self._stopping = True
        self._refuse(stopping)

    def _refuse(self, error: Callable[[], ApiError]) -> None:
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(error())

    async def _wait(self, call: GenerateCall, ticket: Ticket, reply: Reply) -> None:
        if self._stopping or reply.gone:
            self.leave(call.id)
            raise stopping() if self._stopping else ClientLeft
        waiter = self._waiters[ticket] = asyncio.get_running_loop().create_future()

        def client_left() -> None:
            if not waiter.done():
                waiter.set_exception(ClientLeft())

        reply.on_gone = client_left
        try:
            await waiter
        except (ApiError, ClientLeft, asyncio.CancelledError):
            self.leave(call.id)
            raise
        finally:
            reply.on_gone = None
            del self._waiters[ticket]

    def _let_through(self) -> None:
        now = self._clock.now()
        while (ticket := self._admission.next(now)) is not None:
            waiter = self._waiters.get(ticket)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _cost(self, tokens: int) -> float:
        step = tokens // _COST_STEP
        cost = self._costs.get(step)
        if cost is None:
            if len(self._costs) >= _MAX_COSTS:
                self._costs.clear()
            cost = self._costs[step] = self._prefill_seconds(max(tokens, 1))
        return cost
