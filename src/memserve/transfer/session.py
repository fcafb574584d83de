"""The transfer protocol, its timeouts, and the actions of its two state machines.

S is the source (`source_session`), D the destination (`destination_session`). Both are pure: no
sockets, no clock, no memory. D allocates; then S writes; then D publishes.

    S                                                   D
    PREPARING  -- Prepare -------------------------->   allocates
    WRITING    <------------------------- Prepared --   OPEN
       writes, in any number of rounds ............>
    COMMITTING -- Commit --------------------------->   publishes
    ENDED      <------------------------ Committed --   COMMITTED (remembered for a while)

Short cuts: D answers Prepare with AlreadyHave (its index has all blocks) or Refused. Both messages
end the transfer.

Abort, from any state of S before ENDED (cancelled, a write failed, deadline, D silent):

    ABORTING   -- Abort(NO) ------------------------>   QUARANTINED, if S's writes may still land
       transport drains the writes
    ABORTING   -- Abort(YES) ----------------------->   frees
    ENDED      <-------------------------- Aborted --   ENDED

D gives up (S silent, or a local reason): QUARANTINED; D sends Query(stop) until S has drained.
A lapsed lease alone never frees blocks that S may write to. D frees them if: S reported them
drained (Abort YES or SEVERED, or Commit); or S's life is over (`on_gone`); or S is on another host
and has been silent for `QUARANTINE_TIMEOUT`, after which TCP has given up its connections.

Lost, repeated and late messages are harmless:
- S repeats Prepare, Commit and Abort until D answers; D repeats Query.
- Each Prepared names an attempt. S accepts the first Prepared that arrives and writes to no other
  attempt; Commit and Abort name the attempt. A late Prepare may open another attempt at D, which
  S aborts.
- Once ABORTING, S posts no write; once QUARANTINED, D never publishes.
- S forgets a transfer only when its writes have drained. So S answers a Query about an unknown
  transfer with Abort(YES), and need not repeat an Abort for ever.
- D answers a Commit or Abort for an unknown attempt with Aborted.

A side that hears nothing from the other life (not even heartbeats) for `LEASE` gives up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from memserve.config import TransferMode
from memserve.transfer.messages import Failure, Prepare, SessionMessage

# Seconds. A life is silent after LEASE: five missed heartbeats, more than a loaded machine delays
# them. An unanswered message is repeated after RETRY_FIRST, then at doubled intervals up to
# RETRY_MAX; several tries fit into a LEASE. S aborts a transfer without progress for DEADLINE even
# if D lives; DEADLINE exceeds LEASE, so that a dead peer is reported as lost, not as slow. D
# remembers a committed transfer for REMEMBER: as long as S may repeat its Commit.
HEARTBEAT = 1.0
LEASE = 5.0
RETRY_FIRST = 0.25
RETRY_MAX = 2.0
DEADLINE = 60.0
REMEMBER = DEADLINE + 2 * LEASE
# Seconds after which quarantined blocks of a silent peer on another host are freed: no process
# reports the death of a host. The kernel gives up a TCP connection to a dead host after at most
# 16 minutes (UCX, by its own probes, after 16 s).
QUARANTINE_TIMEOUT = 1200.0


class Lease:
    """The time (seconds) of the last message from a peer's life."""

    __slots__ = ("heard",)

    def __init__(self, now: float) -> None:
        self.heard = now

    def renew(self, now: float) -> None:
        self.heard = now

    def lapsed(self, now: float) -> bool:
        return now - self.heard >= LEASE

    def abandoned(self, now: float) -> bool:
        return now - self.heard >= QUARANTINE_TIMEOUT


# --- actions --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to the other side; the message may get lost."""

    message: SessionMessage


class Round(NamedTuple):
    """Blocks `first` to `last - 1` of the transfer, ready to be written."""

    first: int
    last: int
    layers: range | None  # None: all


def rounds_of(blocks: int, layers: int, mode: TransferMode) -> list[Round]:
    """Return the rounds that write a whole transfer: one, or one for each layer."""
    if mode == "by-request-agg":
        return [Round(0, blocks, None)]
    return [Round(0, blocks, range(at, at + 1)) for at in range(layers)]


@dataclass(frozen=True, slots=True)
class Write:
    """S: copy the blocks of `round` to `wire_refs`; then call `on_write_done(serial, ...)`."""

    serial: int
    round: Round
    wire_refs: bytes


@dataclass(frozen=True, slots=True)
class CancelWrites:
    """S: cancel all posted writes. Each write still needs its `on_write_done`."""


@dataclass(frozen=True, slots=True)
class Finish:
    """S: report the outcome to the caller, once; after Release, unless writes still drain.

    `wire_refs`: all blocks of the transfer at D. `have`: how many of them D did not need."""

    failure: Failure | None
    wire_refs: bytes = b""
    have: int = 0


@dataclass(frozen=True, slots=True)
class Release:
    """S: unpin the source blocks; no write reads them any more."""


@dataclass(frozen=True, slots=True)
class Allocate:
    """D: match, pin and allocate; then call `on_allocated` or `on_refused`."""

    prepare: Prepare


@dataclass(frozen=True, slots=True)
class Publish:
    """D: insert the blocks, or grant them to S; call `on_published` or `on_unpublishable`."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """D: release the pins, but keep the blocks that S may still write to."""


@dataclass(frozen=True, slots=True)
class Free:
    """D: release the pins and free the blocks; no write is in flight."""


@dataclass(frozen=True, slots=True)
class Sever:
    """D: drop the transport's connection to S, so that no buffered byte can still be written."""


@dataclass(frozen=True, slots=True)
class Revoke:
    """D: free the blocks granted to S. S does not know of the grant."""


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop the session, which has ended (a committed D: after REMEMBER)."""


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
    """The timer for repeating an unanswered message; `at` is infinite when stopped."""

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
        """Return True, and set the next time, if `now` has reached the timer; else False."""
        if now < self.at:
            return False
        self._wait = min(2 * self._wait, RETRY_MAX)
        self.at = now + self._wait
        return True
