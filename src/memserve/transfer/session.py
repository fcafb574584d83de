"""One transfer as two state machines: no sockets, no clock, no memory.

S is the source, D the destination. D allocates; then S writes; then D publishes.

    S                                                   D
    PREPARING  -- Prepare -------------------------->   allocates
    WRITING    <------------------------- Prepared --   OPEN
       writes, in any number of rounds ............>
    COMMITTING -- Commit --------------------------->   publishes
    ENDED      <------------------------ Committed --   COMMITTED (remembered for a while)

Short cuts: D answers Prepare with AlreadyHave (its index has it all) or Refused; both end it.

Abort, from any state of S before ENDED (cancelled, a write failed, deadline, D silent):

    ABORTING   -- Abort(NO) ------------------------>   QUARANTINED, if S's writes may still land
       transport drains the writes
    ABORTING   -- Abort(YES) ----------------------->   frees
    ENDED      <-------------------------- Aborted --   ENDED

D gives up (S silent, or told to): QUARANTINED, and it asks Query(stop) until S has drained.
D never frees blocks that S may write to because of a lapsed lease, but for one of these reasons:
S said drained (Abort YES or SEVERED; a Commit says it too); S's life is over (`on_gone`); or S is
on another host and has been silent for `QUARANTINE_TIMEOUT`, by when TCP has given up its
connections.

What makes lost, repeated and late messages harmless:
- S repeats Prepare, Commit and Abort until they are answered; D repeats Query.
- Each Prepared names an attempt. S writes to the first one that it hears of and to no
  other; Commit and Abort name it. A late Prepare may make D open another one: S aborts it.
- Once ABORTING, S never writes again; once QUARANTINED, D never publishes.
- S forgets a transfer only when its writes have drained. So it answers a Query about a
  transfer it does not know with Abort(YES), and no Abort has to be delivered for ever.
- D answers a Commit or Abort about an attempt it does not know with Aborted.

A side that hears nothing from the other life (not even heartbeats) for `LEASE` gives up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from memserve.config import TransferMode
from memserve.transfer.messages import Failure, Prepare, SessionMessage

# Seconds. A life is silent after LEASE: five missed heartbeats, more than a loaded machine
# delays. An unanswered message is repeated after RETRY_FIRST, then at doubled intervals up to
# RETRY_MAX, so that several tries fit into a LEASE. A transfer that makes no progress for
# DEADLINE is aborted though the other side lives: longer than any LEASE, or a dead peer would
# look like a slow one. REMEMBER is how long D knows what it committed: as long as S may ask.
HEARTBEAT = 1.0
LEASE = 5.0
RETRY_FIRST = 0.25
RETRY_MAX = 2.0
DEADLINE = 60.0
REMEMBER = DEADLINE + 2 * LEASE
# Of a host that has died nobody says that it is gone. The kernel gives up a TCP connection whose
# other side is not there after 16 minutes at most (UCX, by its own probes, after 16 s); blocks
# that such a silent peer of another host might write to come back after this.
QUARANTINE_TIMEOUT = 1200.0


class Lease:
    """When a peer's life was last heard of."""

    __slots__ = ("heard",)

    def __init__(self, now: float) -> None:
        self.heard = now

    def renew(self, now: float) -> None:
        self.heard = now

    def lapsed(self, now: float) -> bool:
        return now - self.heard >= LEASE

    def forsaken(self, now: float) -> bool:
        return now - self.heard >= QUARANTINE_TIMEOUT


# --- actions --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send to the other side; it may get lost."""

    message: SessionMessage


class Round(NamedTuple):
    """A part of the transfer that is ready to be written."""

    first: int  # block of the transfer
    last: int  # behind the last one
    layers: range | None  # None: all


def rounds_of(blocks: int, layers: int, mode: TransferMode) -> list[Round]:
    """All of a transfer: whole blocks, or layer by layer."""
    if mode == "by-request-agg":
        return [Round(0, blocks, None)]
    return [Round(0, blocks, range(at, at + 1)) for at in range(layers)]


@dataclass(frozen=True, slots=True)
class Write:
    """S: copy blocks `round` to `wire_refs`, and say `on_write_done(serial, ...)` when drained."""

    serial: int
    round: Round
    wire_refs: bytes


@dataclass(frozen=True, slots=True)
class CancelWrites:
    """S: hurry up; every write still needs its `on_write_done`."""


@dataclass(frozen=True, slots=True)
class Finish:
    """S: tell the caller, once; behind the Release, unless writes still drain.

    `wire_refs`: all blocks at D from number `have` on, or all."""

    failure: Failure | None
    wire_refs: bytes = b""
    have: int = 0


@dataclass(frozen=True, slots=True)
class Release:
    """S: the source blocks are read no more."""


@dataclass(frozen=True, slots=True)
class Allocate:
    """D: match, pin and allocate, then say `on_allocated` or `on_refused`."""

    prepare: Prepare


@dataclass(frozen=True, slots=True)
class Publish:
    """D: insert, or hand over to S; then say `on_published` or `on_unpublishable`."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """D: let go of everything but the blocks that may still be written to."""


@dataclass(frozen=True, slots=True)
class Free:
    """D: let go of everything; nobody writes any more."""


@dataclass(frozen=True, slots=True)
class Sever:
    """D: have the transport forget S, so that nothing in its buffers can land."""


@dataclass(frozen=True, slots=True)
class Revoke:
    """D: take back what was handed over to S; it does not know that it has it."""


@dataclass(frozen=True, slots=True)
class Forget:
    """The session has ended; for D after it has been remembered long enough."""


Action = (
    Send
    | Write
    | CancelWrites
    | Finish
    | Release
    | Allocate
    | Publish
    | Quarantine
    | Free
    | Sever
    | Revoke
    | Forget
)
Actions = list[Action]


class Retry:
    """When to repeat what was not answered."""

    __slots__ = ("_wait", "at")

    def __init__(self) -> None:
        self.at = float("inf")
        self._wait = RETRY_FIRST

    def start(self, now: float) -> None:
        self._wait = RETRY_FIRST
        self.at = now + self._wait

    def stop(self) -> None:
        self.at = float("inf")

    def due(self, now: float) -> bool:
        """Whether it is time; then the next time is set."""
        if now < self.at:
            return False
        self._wait = min(2 * self._wait, RETRY_MAX)
        self.at = now + self._wait
        return True
