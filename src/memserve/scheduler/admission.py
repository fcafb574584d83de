"""Who may start when there is more to do than instances can: bounded, fair, short ones soon.

While instances have room, every request is let through at once. Beyond that requests wait
here, where their order can still be chosen, instead of in an instance's queue:

- tenants take turns, measured in predicted prefill seconds (start-time fair queueing: the one
  that was given the least goes first; whoever was away does not save up);
- a tenant's requests go by priority, lower first, and never ahead of other tenants' for it,
  unless the operator has granted that tenant so;
- of equal priority, a short prompt passes long ones, but a prompt only lets those pass that
  arrive within `patience` times its own cost, and `longest_patience` at most;
- a tenant's queue is bounded; who finds it full is told when to come back.

No I/O; the caller says what time it is, and asks `next` whenever something may have changed.
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
_TENANT_KEY = secrets.token_bytes(16)  # of this process: ids say nothing about what they are of

_MAX_IDLE_TENANTS = 10_000  # whose share is remembered; a salt may be new with every request
_MANY_VOID = 64  # entries that are skipped, of those who came and went: more are swept out
_MIN_RETRY, _MAX_RETRY = 1, 600  # seconds


def tenant_id(name: bytes) -> Tenant:
    """Who takes turns with others, in a fixed size: what clients send is not kept. The same in
    one process."""
    return Tenant(blake2b(name, digest_size=_TENANT_BYTES, key=_TENANT_KEY).digest())


NOBODY = tenant_id(b"")  # of requests that show neither a key nor a salt


@dataclass(frozen=True, slots=True)
class Grant:
    """What an operator lets a tenant do. Raises ConfigError for a weight that is none."""

    weight: float = 1.0  # 2: twice the share of others
    privileged: bool = False  # its priorities order its requests among everybody's

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"a tenant's weight of {self.weight} is not above 0 and finite")


NO_GRANT = Grant()


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How much is let through, and how much may wait."""

    # Of each instance. The sum of predicted prefills, with nothing cached: enough for it never
    # to run dry, and little enough for the order to be chosen here.
    prefill_seconds: float = 10.0
    requests: int = 128  # as many as are decoded at once, and as many again
    waiting: int = 256  # of each tenant
    waiting_of_all: int = 4096
    patience: float = 2.0
    longest_patience: float = 30.0  # seconds


class TicketState(Enum):
    WAITING = "waiting"
    ADMITTED = "admitted"
    PREFILLED = "prefilled"  # its prompt is computed: only its answer counts
    LEFT = "left"


class Ticket:
    """One request's place. Changed by `Admission` alone."""

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
    """429. `retry_after`: whole seconds, for the header of that name."""

    retry_after: int
    waiting: int
    limit: int
    of_all: bool  # the limit is that of all tenants together

    def __str__(self) -> str:
        whose = "in all" if self.of_all else "of this tenant"
        return f"{self.waiting} requests {whose} are waiting and at most {self.limit} may"


# Rank, seconds given, number, tenant.
_Turn = tuple[int, float, int, Tenant]


class _Queue:
    """One tenant's waiting tickets. `given`: prefill seconds that it was given, virtually."""

    def __init__(self, given: float, grant: Grant) -> None:
        self.given = given
        self.grant = grant
        self.turn = -1  # number of its entry among the turns; others of it are void
        self.waiting = 0
        self.seconds = 0.0  # of those
        self._heap: list[tuple[int, float, int, Ticket]] = []

    def push(self, ticket: Ticket, order: float, number: int) -> None:
        heapq.heappush(self._heap, (ticket.priority, order, number, ticket))
        self.waiting += 1
        self.seconds += ticket.cost

    @property
    def rank(self) -> int:
        """Among all tenants: those that are not privileged are equals."""
        if not self.grant.privileged:
            return 0
        while self._heap and self._heap[0][-1].state is not TicketState.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else 0

    def pop(self) -> Ticket:
        """IndexError if none waits."""
        while True:
            ticket = heapq.heappop(self._heap)[-1]
            if ticket.state is TicketState.WAITING:
                self.drop(ticket)
                return ticket

    def drop(self, ticket: Ticket) -> None:
        """It does not wait any more. Its entry is skipped, or swept out with others like it."""
        self.waiting -= 1
        self.seconds = self.seconds - ticket.cost if self.waiting else 0.0

    def sweep(self) -> None:
        """Call after the state of a ticket has changed."""
        if len(self._heap) > 2 * self.waiting + 16:
            self._heap = [entry for entry in self._heap if entry[-1].state is TicketState.WAITING]
            heapq.heapify(self._heap)


class Admission:
    """Lets requests through while there is room, in a fair order."""

    def __init__(self, limits: AdmissionLimits | None = None, instances: int = 0) -> None:
        self.limits = limits or AdmissionLimits()
        self._instances = instances
        self._queues: OrderedDict[Tenant, _Queue] = OrderedDict()
        self._turns: list[_Turn] = []  # tenants that wait; all but one of each are void
        self._grants: Mapping[Tenant, Grant] = {}
        self._reached = 0.0  # what tenants that wait were given, at least
        self._number = 0
        self._tenants = 0  # that wait
        self._waiting_seconds = 0.0
        self.waiting = 0
        self.admitted = 0
        self.prefill_seconds = 0.0  # of those that are admitted and not computed
        self._prefills = 0

    def resize(self, instances: int) -> None:
        """So many instances compute prompts now. Ask `next` afterwards."""
        self._instances = instances

    def grant(self, grants: Mapping[Tenant, Grant]) -> None:
        """What tenants may do from now on; those that are not named, what everybody may."""
        self._grants = dict(grants)
        for tenant, queue in self._queues.items():
            queue.grant = self._grants.get(tenant, NO_GRANT)
            if queue.waiting:
                self._take_turn(tenant, queue)

    def grant_of(self, tenant: Tenant) -> Grant:
        return self._grants.get(tenant, NO_GRANT)

    def enter(self, tenant: Tenant, cost: float, priority: int, now: float) -> Ticket | Refusal:
        """A request whose prompt takes `cost` seconds to compute. The ticket may be admitted
        already; otherwise `next` will return it. Every ticket must `leave`."""
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
        passed = min(self.limits.patience * cost, self.limits.longest_patience)
        away, rank = not queue.waiting, queue.rank
        if away:
            # Whoever was away begins where the others are.
            queue.given = max(queue.given, self._reached)
            self._tenants += 1
        queue.push(ticket, now + passed, self._next_number())
        if away or queue.rank != rank:
            self._take_turn(tenant, queue)
        self.waiting += 1
        self._waiting_seconds += cost
        return ticket

    def next(self, now: float) -> Ticket | None:
        """Admit one that waits, if there is room. Ask until None."""
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
        """Its prompt is computed. Ask `next` afterwards."""
        if ticket.state is TicketState.ADMITTED:
            ticket.state = TicketState.PREFILLED
            self._prefill_ended(ticket)

    def leave(self, ticket: Ticket) -> None:
        """It ended, or gave up waiting; a second time is ignored. Ask `next` afterwards."""
        before, ticket.state = ticket.state, TicketState.LEFT
        if before is TicketState.WAITING:
            queue = self._queues[ticket.tenant]
            queue.drop(ticket)
            queue.sweep()
            self._stopped_waiting(ticket, queue)
            if queue.waiting and queue.grant.privileged:
                self._take_turn(ticket.tenant, queue)  # its rank may be another
        elif before is not TicketState.LEFT:
            self.admitted -= 1
            if before is TicketState.ADMITTED:
                self._prefill_ended(ticket)

    def waits(self, tenant: Tenant) -> int:
        """How many requests of a tenant wait."""
        queue = self._queues.get(tenant)
        return 0 if queue is None else queue.waiting

    def _has_room(self) -> bool:
        """One request may go over the limit, so that every prompt can be computed some time."""
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
        if not (queue.grant.privileged and ticket.priority):  # else it may have passed others
            self._reached = began

    def _prefill_ended(self, ticket: Ticket) -> None:
        self._prefills -= 1
        self.prefill_seconds -= ticket.cost
        if not self._prefills:
            self.prefill_seconds = 0.0  # and with it what rounding left

    def _queue(self, tenant: Tenant) -> _Queue:
        queue = self._queues.get(tenant)
        if queue is None:
            queue = self._queues[tenant] = _Queue(self._reached, self.grant_of(tenant))
            self._forget_idle()
        else:
            self._queues.move_to_end(tenant)
        return queue

    def _forget_idle(self) -> None:
        """Of too many tenants, those without a waiting request that came the longest ago."""
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
            self._turns.clear()  # what is left of it is void

    def _retry_after(self, queue: _Queue) -> int:
        """Until half of the tenant's queue should be computed: those who come back find room.
        Meanwhile the other tenants take their turns."""
        mine = queue.seconds / 2
        others = min(mine * (self._tenants - 1), self._waiting_seconds - queue.seconds)
        ahead = mine + others
        if not queue.waiting:  # all tenants together have filled it
            ahead = self._waiting_seconds / 2
        seconds = ahead / max(self._instances, 1)
        return min(max(math.ceil(seconds), _MIN_RETRY), _MAX_RETRY)
