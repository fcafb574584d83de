"""All transfers of one pool's life: which session a message belongs to, and who is gone."""

from __future__ import annotations

from typing import NamedTuple

from memserve.transfer.destination_session import DestinationSession, answer_as_unaware
from memserve.transfer.messages import Prepare, SessionMessage, is_from_source
from memserve.transfer.session import Action, Actions, Lease
from memserve.transfer.source_session import SourceSession, answer_as_stranger
from memserve.types import Owner

Session = SourceSession | DestinationSession


class Step(NamedTuple):
    """Something to do, in order. `session` is None only for a Send."""

    peer: Owner
    session: Session | None
    action: Action


Steps = list[Step]


class SessionTable:
    """Pure like its sessions: whoever holds it performs the steps, and calls `forget` for each
    Forget."""

    def __init__(self) -> None:
        self._sources: dict[int, tuple[Owner, SourceSession]] = {}
        self._destinations: dict[tuple[Owner, int], DestinationSession] = {}
        self._leases: dict[Owner, Lease] = {}
        self._gone: set[Owner] = set()
        self._incarnations = 0

    @property
    def sources(self) -> int:
        return len(self._sources)

    @property
    def destinations(self) -> int:
        """Committed ones that are remembered included."""
        return len(self._destinations)

    @property
    def wake_at(self) -> float:
        """When `on_tick` is due, apart from leases."""
        sources = (session.wake_at for _, session in self._sources.values())
        destinations = (session.wake_at for session in self._destinations.values())
        return min(min(sources, default=float("inf")), min(destinations, default=float("inf")))

    def is_gone(self, peer: Owner) -> bool:
        return peer in self._gone

    def silent(self, peer: Owner, now: float) -> bool:
        """Whether a life has not been heard of for a lease."""
        lease = self._leases.get(peer)
        return lease is None or lease.lapsed(now)

    def heard(self, peer: Owner, now: float) -> None:
        """Anything came from this life."""
        if not self.is_gone(peer):
            self._lease(peer, now).renew(now)

    def begin(self, peer: Owner, session: SourceSession, now: float) -> Steps:
        """Start a transfer to a life that is not gone."""
        self._sources[session.number] = (peer, session)
        return steps(peer, session, session.start(now))

    def lease(self, peer: Owner, now: float) -> Lease:
        """Of a life that is not gone."""
        return self._lease(peer, now)

    def peer_of(self, session: SourceSession) -> Owner:
        return self._sources[session.number][0]

    def on_message(self, peer: Owner, message: SessionMessage, now: float) -> Steps:
        """`peer`: the life that sent it. Messages of lives that are over say nothing."""
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
        for (peer, _), destination in list(self._destinations.items()):
            done += steps(peer, destination, destination.on_tick(now))
        return done

    def on_gone(self, peer: Owner, now: float) -> Steps:
        """A life is known to be over: its process has ended, or it has said so. Nothing that
        it began can land any more."""
        self._gone.add(peer)
        self._leases.pop(peer, None)
        done: Steps = []
        for owner, source in list(self._sources.values()):
            if owner == peer:
                done += steps(owner, source, source.on_gone(now))
        for (owner, _), destination in list(self._destinations.items()):
            if owner == peer:
                done += steps(owner, destination, destination.on_gone(now))
        return done

    def forget(self, peer: Owner, session: Session) -> None:
        """The session has ended."""
        if isinstance(session, SourceSession):
            del self._sources[session.number]
        else:
            del self._destinations[peer, session.number]

    def _open(self, peer: Owner, prepare: Prepare, now: float) -> Steps:
        self._incarnations += 1
        session = DestinationSession(prepare, self._incarnations, self._lease(peer, now))
        self._destinations[peer, prepare.number] = session
        return steps(peer, session, session.start(now))

    def _lease(self, peer: Owner, now: float) -> Lease:
        return self._leases.setdefault(peer, Lease(now))


def steps(peer: Owner, session: Session | None, actions: Actions) -> Steps:
    return [Step(peer, session, action) for action in actions]
