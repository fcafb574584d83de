"""A transport that misbehaves as a network may, by a plan: for tests of its users."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from memserve.clock import Clock
from memserve.errors import PeerLost, TransferError
from memserve.transfer.base import (
    BlockList,
    Completion,
    LocalRegion,
    Outcome,
    PoolRegions,
    Ticket,
    Transport,
    WriteList,
)
from memserve.types import Owner


@dataclass(frozen=True, slots=True)
class Delay:
    """Nothing is copied before so many seconds have passed."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Drop:
    """Nothing is copied, and nothing is said of it until it is cancelled."""


@dataclass(frozen=True, slots=True)
class Mute:
    """Everything is copied, and nothing is said of it until it is cancelled."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Everything is copied twice."""


@dataclass(frozen=True, slots=True)
class Fail:
    """A part of the blocks is copied; then the connection is said to be broken."""

    part: float = 0.5


Fault = Delay | Drop | Mute | Duplicate | Fail
# What happens to the post of a number, from 0; None: what should.
Plan = Callable[[int], Fault | None]


def listed(*faults: Fault | None) -> Plan:
    """One after the other, and then no more."""
    return lambda number: faults[number] if number < len(faults) else None


def seeded(seed: int, choices: Sequence[Fault | None]) -> Plan:
    """Any of `choices`, the same ones for the same seed, whatever was asked before."""
    return lambda number: random.Random(f"{seed}.{number}").choice(choices)


@dataclass(slots=True)
class _Job:
    """One ticket."""

    peer: Owner
    writes: list[WriteList]  # still to post, one after the other
    start: float  # not before
    failure: TransferError | None  # how it ends, if the writes go well
    inner: Ticket | None = None  # of the write in progress
    cancelled: bool = False
    mute: bool = False


class FaultyTransport:
    """Passes everything on to another transport, but for what the plan says.

    It keeps the contract: each ticket has one completion, and that means drained. Only what a
    delayed post raises comes as a FAILED completion.
    """

    def __init__(self, inner: Transport, plan: Plan, clock: Clock) -> None:
        self.name = inner.name
        self.poll_interval = inner.poll_interval
        self.counters = inner.counters
        self._inner = inner
        self._plan = plan
        self._clock = clock
        self._jobs: dict[Ticket, _Job] = {}
        self._tickets = count(1)
        self._posts = count()

    @property
    def in_flight(self) -> int:
        return len(self._jobs)

    def register(self, regions: Sequence[LocalRegion]) -> None:
        self._inner.register(regions)

    def unregister(self, regions: Sequence[LocalRegion]) -> None:
        self._inner.unregister(regions)

    def describe(self) -> bytes:
        return self._inner.describe()

    def add_peer(self, peer: Owner, memory: PoolRegions, description: bytes) -> None:
        others = {job.peer for job in self._jobs.values() if job.peer.instance == peer.instance}
        for earlier in others - {peer}:
            self.remove_peer(earlier)
        self._inner.add_peer(peer, memory, description)

    def remove_peer(self, peer: Owner) -> None:
        for ticket, job in self._jobs.items():
            if job.peer == peer:
                self.cancel(ticket)
        self._inner.remove_peer(peer)

    def post(self, peer: Owner, writes: WriteList) -> Ticket:
        job = _Job(peer, [writes], self._clock.now(), None)
        match self._plan(next(self._posts)):
            case Delay(seconds):
                job.start += seconds
            case Drop():
                job.start = math.inf
            case Mute():
                job.mute = True
            case Duplicate():
                job.writes = [writes, writes]
            case Fail(part):
                job.writes = [_first(writes, part)]
                job.failure = PeerLost(f"{peer.instance!r}: by plan")
        if job.start <= self._clock.now():
            job.inner = self._inner.post(peer, job.writes.pop())
        ticket = Ticket(next(self._tickets))
        self._jobs[ticket] = job
        return ticket

    def poll(self) -> list[Completion]:
        inner = {each.ticket: each for each in self._inner.poll()}
        return [
            end
            for ticket, job in list(self._jobs.items())
            if (end := self._advance(ticket, job, inner)) is not None
        ]

    def cancel(self, ticket: Ticket) -> None:
        job = self._jobs.get(ticket)
        if job is None:
            return
        job.cancelled = job.cancelled or job.mute or bool(job.writes)
        job.writes.clear()
        if job.inner is not None:
            self._inner.cancel(job.inner)

    def close(self) -> None:
        self._jobs.clear()
        self._inner.close()

    def _advance(
        self, ticket: Ticket, job: _Job, inner: dict[Ticket, Completion]
    ) -> Completion | None:
        if job.inner is not None:
            end = inner.get(job.inner)
            if end is None:
                return None
            job.inner = None
            if end.outcome is not Outcome.DONE:
                return self._end(Completion(ticket, end.outcome, end.error, end.target_drained))
        if job.cancelled:
            return self._end(Completion(ticket, Outcome.CANCELLED))
        if job.writes:
            return self._post_next(ticket, job)
        if job.mute:
            return None
        if job.failure is not None:
            return self._end(Completion(ticket, Outcome.FAILED, job.failure, target_drained=False))
        return self._end(Completion(ticket, Outcome.DONE))

    def _post_next(self, ticket: Ticket, job: _Job) -> Completion | None:
        if job.start > self._clock.now():
            return None
        try:
            job.inner = self._inner.post(job.peer, job.writes.pop())
        except TransferError as error:
            return self._end(Completion(ticket, Outcome.FAILED, error))
        return None

    def _end(self, completion: Completion) -> Completion:
        del self._jobs[completion.ticket]
        return completion


def _first(writes: WriteList, part: float) -> WriteList:
    some = round(len(writes.source) * part)
    source, target = (
        BlockList(blocks.medium[:some], blocks.index[:some])
        for blocks in (writes.source, writes.target)
    )
    return WriteList(source, target, writes.layers, writes.heads)
