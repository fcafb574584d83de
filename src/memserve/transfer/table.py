"""`SessionTable`: the sessions of one pool, the leases of its peers, and the lives that have
ended."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

from memserve.transfer.destination_session import (
    DestinationSession,
    DestinationState,
    answer_as_unaware,
)
from memserve.transfer.messages import (
    Failure,
    Prepare,
    Refused,
    SessionMessage,
    is_from_source,
)
from memserve.transfer.session import Action, Actions, Lease, Send
from memserve.transfer.source_session import SourceSession, answer_as_stranger
from memserve.types import Owner

# Ended lives that are remembered, so that their late messages are dropped.
GONE = 4096
# Maximum of open transfers from one life: far more than an instance computes at a time.
MAX_OPEN = 4096
# Maximum of remembered committed transfers of all lives: enough for a thousand a second during
# REMEMBER. The answer about an older one is Aborted.
MAX_REMEMBERED = 70_000

Session = SourceSession | DestinationSession
_Key = tuple[Owner, int]


class Step(NamedTuple):
    """One action of a session. `session` is None only for a Send."""

    peer: Owner
    session: Session | None
    action: Action


Steps = list[Step]


class SessionTable:
    """The sessions of one pool. No I/O: the caller performs the returned steps, and calls `forget`
    for each Forget."""

    def __init__(self) -> None:
        self._sources: dict[int, tuple[Owner, SourceSession]] = {}
        self._destinations: dict[_Key, DestinationSession] = {}
        # Committed sessions only wait to be forgotten, the oldest first; there may be thousands.
        self._active: set[_Key] = set()
        self._remembered: deque[tuple[_Key, DestinationSession]] = deque()
        self._leases: dict[Owner, Lease] = {}
        self._gone: OrderedDict[Owner, None] = OrderedDict()  # the last GONE of them
        self._attempts = 0

    @property
    def sources(self) -> int:
        return len(self._sources)

    @property
    def destinations(self) -> int:
        """Number of incoming sessions, with remembered committed ones."""
        return len(self._destinations)

    @property
    def active(self) -> bool:
        """Whether `on_tick` may have something to do before the next heartbeat."""
        return bool(self._sources or self._active)

    def is_gone(self, peer: Owner) -> bool:
        return peer in self._gone

    def silent(self, peer: Owner, now: float) -> bool:
        """Return whether no message has come from a life for a LEASE."""
        lease = self._leases.get(peer)
        return lease is None or lease.lapsed(now)

    def heard(self, peer: Owner, now: float) -> None:
        """Renew the lease of a life: a message has come from it."""
        if not self.is_gone(peer):
            self._lease(peer, now).renew(now)

    def begin(self, peer: Owner, session: SourceSession, now: float) -> Steps:
        """Start a transfer to a life that is not gone."""
        self._sources[session.number] = (peer, session)
        return steps(peer, session, session.start(now))

    def lease(self, peer: Owner, now: float) -> Lease:
        """Return the lease of a life that has not ended."""
        return self._lease(peer, now)

    def peer_of(self, session: SourceSession) -> Owner:
        return self._sources[session.number][0]

    def on_message(self, peer: Owner, message: SessionMessage, now: float) -> Steps:
        """Handle a message of the life `peer`; messages of ended lives are dropped."""
        if self.is_gone(peer):
            return []
        self.heard(peer, now)
        session: Session | None
        if is_from_source(message):
            session = self._destinations.get((peer, message.number))
            if session is None and isinstance(message, Prepare):
                return self._open(peer, message, now)
            if session is None:
                return steps(peer, None, answer_as_unaware(message))
            return steps(peer, session, session.on_message(message, now))
        owner, session = self._sources.get(message.number, (peer, None))
        if session is None or owner != peer:
            return steps(peer, None, answer_as_stranger(message))
        return steps(peer, session, session.on_message(message, now))

    def on_tick(self, now: float) -> Steps:
        done: Steps = []
        for peer, source in list(self._sources.values()):
            done += steps(peer, source, source.on_tick(now))
        for key in list(self._active):
            destination = self._destinations[key]
            if destination.state is DestinationState.COMMITTED:
                self._active.discard(key)
                self._remembered.append((key, destination))
                destination.slim()
            else:
                done += steps(key[0], destination, destination.on_tick(now))
        while self._remembered and self._remembered[0][1].forget_at <= now:
            key, destination = self._remembered.popleft()
            if self._destinations.get(key) is destination:
                done += steps(key[0], destination, destination.on_tick(now))
        while len(self._remembered) > MAX_REMEMBERED:
            key, destination = self._remembered.popleft()
            if self._destinations.get(key) is destination:
                done += steps(key[0], destination, destination.on_gone(now))
        return done

    def on_gone(self, peer: Owner, now: float) -> Steps:
        """End all sessions with a life that has certainly ended: none of its writes can still
        arrive."""
        self._gone[peer] = None
        if len(self._gone) > GONE:
            self._gone.popitem(last=False)
        self._leases.pop(peer, None)
        done: Steps = []
        for owner, source in list(self._sources.values()):
            if owner == peer:
                done += steps(owner, source, source.on_gone(now))
        for (owner, _), destination in list(self._destinations.items()):
            if owner == peer:
                done += steps(owner, destination, destination.on_gone(now))
        return done

    def abandoned(self, now: float) -> set[Owner]:
        """Return the lives with blocks in quarantine here that were silent for QUARANTINE_TIMEOUT.
        If they are on other hosts, none of their writes can still arrive."""
        return {
            peer
            for peer, number in self._active
            if self._destinations[peer, number].state is DestinationState.QUARANTINED
            and self._lease(peer, now).abandoned(now)
        }

    def free_abandoned(self, peer: Owner, now: float) -> Steps:
        """Free the blocks that are in quarantine because of a life. If that life is heard again,
        its transfers are aborted."""
        done: Steps = []
        for owner, number in list(self._active):
            destination = self._destinations[owner, number]
            if owner == peer and destination.state is DestinationState.QUARANTINED:
                done += steps(owner, destination, destination.on_gone(now))
        return done

    def prune(self, current: set[Owner], now: float) -> list[Owner]:
        """Forget the leases of silent lives without sessions. Returns those of the `current` lives
        that were silent for QUARANTINE_TIMEOUT."""
        used = {peer for peer, _ in self._destinations}
        used.update(peer for peer, _ in self._sources.values())
        lost = []
        for peer, lease in list(self._leases.items()):
            if not lease.abandoned(now):
                continue
            if peer in current:
                lost.append(peer)
            elif peer not in used:
                del self._leases[peer]
        return lost

    def fail(self, peer: Owner, failure: Failure, now: float) -> Steps:
        """Fail the outgoing transfers to a life."""
        done: Steps = []
        for owner, source in list(self._sources.values()):
            if owner == peer:
                done += steps(owner, source, source.fail(failure, now))
        return done

    def leave(self, peer: Owner, now: float) -> Steps:
        """Fail the transfers to a life, and stop those from it."""
        failure = Failure("TransferError", f"an error ended the transfers with {peer.instance!r}")
        done = self.fail(peer, failure, now)
        for owner, number in list(self._active):
            if owner == peer:
                destination = self._destinations[owner, number]
                done += steps(owner, destination, destination.stop(now))
        return done

    def forget(self, peer: Owner, session: Session) -> None:
        """Drop a session that has ended."""
        if isinstance(session, SourceSession):
            self._sources.pop(session.number, None)
        else:
            self._destinations.pop((peer, session.number), None)
            self._active.discard((peer, session.number))

    def _open(self, peer: Owner, prepare: Prepare, now: float) -> Steps:
        if len(self._active) >= MAX_OPEN and self._open_of(peer) >= MAX_OPEN:
            failure = Failure("TransferError", f"{MAX_OPEN} transfers are open, the maximum")
            return steps(peer, None, [Send(Refused(prepare.number, failure))])
        self._attempts += 1
        session = DestinationSession(prepare, self._attempts, self._lease(peer, now))
        self._destinations[peer, prepare.number] = session
        self._active.add((peer, prepare.number))
        return steps(peer, session, session.start(now))

    def _open_of(self, peer: Owner) -> int:
        return sum(owner == peer for owner, _ in self._active)

    def _lease(self, peer: Owner, now: float) -> Lease:
        return self._leases.setdefault(peer, Lease(now))


def steps(peer: Owner, session: Session | None, actions: Actions) -> Steps:
    return [Step(peer, session, action) for action in actions]
