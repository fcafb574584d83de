"""`Admission`: bounded, fair queues of requests, in the gateway, while instances are full.

While instances have room, requests are admitted at once. Otherwise they wait here, where their
order can still change, instead of in an instance's queue:

- tenants take turns by predicted prefill seconds (start-time fair queueing: the tenant with the
  least admitted seconds goes first; an idle tenant earns no credit);
- within a tenant, lower priority values go first; they do not pass other tenants' requests, unless
  the operator has made the tenant privileged;
- at equal priority a short prompt passes longer ones, but only those that arrived less than
  `overtaking` times their own cost, and less than `longest_overtaking`, before it;
- queues are bounded; a request over the limit is refused with a time to retry.

No I/O and no clock: the caller passes the time, and calls `next` whenever there may be room.
"""

from __future__ import annotations

import heapq
import math
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import NewType

from memserve.errors import ConfigError

Tenant = NewType("Tenant", bytes)  # `tenant_id` of an API key's name, or of a cache_salt

_TENANT_BYTES = 16
_TENANT_KEY = secrets.token_bytes(16)  # of this process: ids do not reveal keys or salts

_MAX_IDLE_TENANTS = 10_000  # remembered; bounded, since each request may have another salt
_MANY_VOID = 64  # void entries in `_turns` before they are removed
_MIN_RETRY, _MAX_RETRY = 1, 600  # seconds


def tenant_id(name: bytes) -> Tenant:
    """Return a digest of a tenant's name, of fixed size, so that no client data is kept. Constant
    within a process."""
    return Tenant(blake2b(name, digest_size=_TENANT_BYTES, key=_TENANT_KEY).digest())


NOBODY = tenant_id(b"")  # the tenant of requests without API key and `cache_salt`


@dataclass(frozen=True, slots=True)
class Grant:
    """An operator's settings of a tenant. Raises ConfigError for a weight that is not above 0 and
    finite."""

    weight: float = 1.0  # 2: twice the share of a tenant with 1
    privileged: bool = False  # its priorities also count against other tenants' requests

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"a tenant's weight of {self.weight} is not above 0 and finite")


NO_GRANT = Grant()


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Limits on admitted and on waiting requests."""

    # Predicted prefill seconds of the admitted requests per instance, with nothing cached: enough
    # to keep the instance busy, and so few that most waiting requests can still be reordered.
    prefill_seconds: float = 10.0
    requests: int = 128  # admitted per instance: twice the sequences that decode at once
    waiting: int = 256  # per tenant
    waiting_of_all: int = 4096  # all tenants together
    overtaking: float = 2.0  # multiple of a prompt's cost
    longest_overtaking: float = 30.0  # seconds


class TicketState(Enum):
    WAITING = "waiting"
    ADMITTED = "admitted"
    PREFILLED = "prefilled"  # counts as a request, no longer as prefill seconds
    LEFT = "left"


class Ticket:
    """One request's place in `Admission`. `cost`: prefill seconds. Changed by `Admission` only."""

    __slots__ = ("cost", "entered", "priority", "state", "tenant")

    def __init__(self, tenant: Tenant, cost: float, priority: int, now: float) -> None:
        self.tenant = tenant
        self.cost = cost
        self.priority = priority
        self.entered = now
        self.state = TicketState.WAITING

    @property
    def admitted(self) -> bool:
        return self.state in (TicketState.ADMITTED, TicketState.PREFILLED)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason of an HTTP 429. `retry_after`: whole seconds, for the header `Retry-After`."""

    retry_after: int
    waiting: int
    limit: int
    of_all: bool  # `limit` is `waiting_of_all`, else `waiting`

    def __str__(self) -> str:
        whose = "of all tenants" if self.of_all else "of this tenant"
        return f"{self.waiting} requests {whose} are waiting; at most {self.limit} may wait"


# A tenant's entry in the heap of turns: rank, seconds given, number, tenant.
_Turn = tuple[int, float, int, Tenant]


class _Queue:
    """One tenant's waiting tickets. `given`: its virtual time, prefill seconds over weight."""

    def __init__(self, given: float, grant: Grant) -> None:
        self.given = given
        self.grant = grant
        self.turn = -1  # number of its valid entry among the turns; its other entries are void
        self.waiting = 0
        self.seconds = 0.0  # cost of the waiting tickets, in sum
        self._heap: list[tuple[int, float, int, Ticket]] = []

    def push(self, ticket: Ticket, order: float, number: int) -> None:
        heapq.heappush(self._heap, (ticket.priority, order, number, ticket))
        self.waiting += 1
        self.seconds += ticket.cost

    @property
    def rank(self) -> int:
        """Priority of a privileged tenant's first ticket; 0 for other tenants. Lower goes first."""
        if not self.grant.privileged:
            return 0
        while self._heap and self._heap[0][-1].state is not TicketState.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else 0

    def pop(self) -> Ticket:
        """Remove and return the first waiting ticket. Raises IndexError if none waits."""
        while True:
            ticket = heapq.heappop(self._heap)[-1]
            if ticket.state is TicketState.WAITING:
                self.drop(ticket)
                return ticket

    def drop(self, ticket: Ticket) -> None:
        """Stop counting a ticket. Its heap entry, if still there, is skipped or swept later."""
        self.waiting -= 1
        self.seconds = self.seconds - ticket.cost if self.waiting else 0.0

    def sweep(self) -> None:
        """Remove the entries of tickets that no longer wait, if they are the majority. Call after
        a ticket's state has changed."""
        if len(self._heap) > 2 * self.waiting + 16:
            self._heap = [entry for entry in self._heap if entry[-1].state is TicketState.WAITING]
            heapq.heapify(self._heap)


class Admission:
    """Admits requests while there is room, in a fair order between tenants."""

    def __init__(self, limits: AdmissionLimits | None = None, instances: int = 0) -> None:
        self.limits = limits or AdmissionLimits()
        self._instances = instances
        self._queues: OrderedDict[Tenant, _Queue] = OrderedDict()
        self._turns: list[_Turn] = []  # heap of waiting tenants; one valid entry each
        self._grants: Mapping[Tenant, Grant] = {}
        self._reached = 0.0  # virtual time: `given` of the tenant admitted last, before its cost
        self._number = 0
        self._tenants = 0  # tenants with waiting tickets
        self._waiting_seconds = 0.0  # cost of all waiting tickets
        self.waiting = 0
        self.admitted = 0
        self.prefill_seconds = 0.0  # cost of admitted tickets that are not prefilled
        self._prefills = 0  # number of these

    def resize(self, instances: int) -> None:
        """Set the number of instances that compute prompts. Call `next` afterwards."""
        self._instances = instances

    def grant(self, grants: Mapping[Tenant, Grant]) -> None:
        """Replace all grants; tenants without one get `NO_GRANT`."""
        self._grants = dict(grants)
        for tenant, queue in self._queues.items():
            queue.grant = self._grants.get(tenant, NO_GRANT)
            if queue.waiting:
                self._take_turn(tenant, queue)

    def grant_of(self, tenant: Tenant) -> Grant:
        return self._grants.get(tenant, NO_GRANT)

    def enter(self, tenant: Tenant, cost: float, priority: int, now: float) -> Ticket | Refusal:
        """Add a request whose prompt takes `cost` seconds to compute. Returns a refusal, or a
        ticket, which is admitted at once or returned by `next` later. The caller must call `leave`
        for every ticket."""
        ticket = Ticket(tenant, cost, priority, now)
        queue = self._queue(tenant)
        if not self.waiting and self._has_room():
            self._admit(ticket, queue)
            return ticket
        if queue.waiting >= self.limits.waiting:
            return Refusal(self._retry_after(queue), queue.waiting, self.limits.waiting, False)
        if self.waiting >= self.limits.waiting_of_all:
            limit = self.limits.waiting_of_all
            return Refusal(self._retry_after(queue), self.waiting, limit, True)
        passed = min(self.limits.overtaking * cost, self.limits.longest_overtaking)
        away, rank = not queue.waiting, queue.rank
        if away:
            # An idle tenant's virtual time catches up with that of the waiting ones.
            queue.given = max(queue.given, self._reached)
            self._tenants += 1
        queue.push(ticket, now + passed, self._next_number())
        if away or queue.rank != rank:
            self._take_turn(tenant, queue)
        self.waiting += 1
        self._waiting_seconds += cost
        return ticket

    def next(self, now: float) -> Ticket | None:
        """Admit and return one waiting ticket, if there is room. Call until it returns None."""
        if not self.waiting or not self._has_room():
            return None
        while True:
            turn = heapq.heappop(self._turns)
            if self._is_valid(turn):
                break
        tenant = turn[-1]
        queue = self._queues[tenant]
        ticket = queue.pop()
        self._stopped_waiting(ticket, queue)
        self._admit(ticket, queue)
        if queue.waiting:
            self._take_turn(tenant, queue)
        return ticket

    def prefilled(self, ticket: Ticket) -> None:
        """Report that a ticket's prompt is computed. Call `next` afterwards."""
        if ticket.state is TicketState.ADMITTED:
            ticket.state = TicketState.PREFILLED
            self._prefill_ended(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Report that a request ended or gave up waiting. Repeats are ignored. Call `next`
        afterwards."""
        before, ticket.state = ticket.state, TicketState.LEFT
        if before is TicketState.WAITING:
            queue = self._queues[ticket.tenant]
            queue.drop(ticket)
            queue.sweep()
            self._stopped_waiting(ticket, queue)
            if queue.waiting and queue.grant.privileged:
                self._take_turn(ticket.tenant, queue)  # the rank may have changed
        elif before is not TicketState.LEFT:
            self.admitted -= 1
            if before is TicketState.ADMITTED:
                self._prefill_ended(ticket)

    def waits(self, tenant: Tenant) -> int:
        """Return the number of waiting requests of a tenant."""
        queue = self._queues.get(tenant)
        return 0 if queue is None else queue.waiting

    def _has_room(self) -> bool:
        """Return whether another request may be admitted. The last one may exceed
        `prefill_seconds`, so that a prompt of any length can be admitted."""
        return (
            self.prefill_seconds < self._instances * self.limits.prefill_seconds
            and self.admitted < self._instances * self.limits.requests
        )

    def _admit(self, ticket: Ticket, queue: _Queue) -> None:
        ticket.state = TicketState.ADMITTED
        self.admitted += 1
        self._prefills += 1
        self.prefill_seconds += ticket.cost
        began = max(self._reached, queue.given)
        queue.given = began + ticket.cost / queue.grant.weight
        # A privileged ticket with a priority may have passed tenants that were given less.
        if not (queue.grant.privileged and ticket.priority):
            self._reached = began

    def _prefill_ended(self, ticket: Ticket) -> None:
        self._prefills -= 1
        self.prefill_seconds -= ticket.cost
        if not self._prefills:
            self.prefill_seconds = 0.0  # remove accumulated rounding errors

    def _queue(self, tenant: Tenant) -> _Queue:
        queue = self._queues.get(tenant)
        if queue is None:
            queue = self._queues[tenant] = _Queue(self._reached, self.grant_of(tenant))
            self._forget_idle()
        else:
            self._queues.move_to_end(tenant)
        return queue

    def _forget_idle(self) -> None:
        """Drop the least recently used queues without waiting tickets, beyond
        `_MAX_IDLE_TENANTS`."""
        while len(self._queues) > _MAX_IDLE_TENANTS + self._tenants:
            tenant, queue = self._queues.popitem(last=False)
            if queue.waiting:
                self._queues[tenant] = queue

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _take_turn(self, tenant: Tenant, queue: _Queue) -> None:
        queue.turn = self._next_number()
        if len(self._turns) > 2 * self._tenants + _MANY_VOID:
            self._turns = [turn for turn in self._turns if self._is_valid(turn)]
            heapq.heapify(self._turns)
        heapq.heappush(self._turns, (queue.rank, queue.given, queue.turn, tenant))

    def _is_valid(self, turn: _Turn) -> bool:
        _, _, number, tenant = turn
        queue = self._queues.get(tenant)
        return queue is not None and queue.turn == number and queue.waiting > 0

    def _stopped_waiting(self, ticket: Ticket, queue: _Queue) -> None:
        self.waiting -= 1
        self._tenants -= not queue.waiting
        self._waiting_seconds -= ticket.cost
        if not self.waiting:
            self._waiting_seconds = 0.0
            self._turns.clear()  # only void entries are left

    def _retry_after(self, queue: _Queue) -> int:
        """Return predicted seconds, `_MIN_RETRY` to `_MAX_RETRY`, until half of the tenant's queue
        is computed, with the other tenants' turns in between, so that a retry finds room."""
        mine = queue.seconds / 2
        others = min(mine * (self._tenants - 1), self._waiting_seconds - queue.seconds)
        ahead = mine + others
        if not queue.waiting:  # refused by `waiting_of_all`: half of all queues
            ahead = self._waiting_seconds / 2
        seconds = ahead / max(self._instances, 1)
        return min(max(math.ceil(seconds), _MIN_RETRY), _MAX_RETRY)
