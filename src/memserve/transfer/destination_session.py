"""`DestinationSession`: the state machine of the side that receives; `session` has the protocol."""

from __future__ import annotations

from enum import Enum

import msgspec

from memserve.transfer.messages import (
    Abort,
    Aborted,
    AlreadyHave,
    Commit,
    Committed,
    Drained,
    Failure,
    Prepare,
    Prepared,
    Query,
    Refused,
    SessionMessage,
)
from memserve.transfer.session import (
    LEASE,
    REMEMBER,
    Actions,
    Allocate,
    Forget,
    Free,
    Lease,
    Publish,
    Quarantine,
    Retry,
    Revoke,
    Send,
    Sever,
)


class DestinationState(Enum):
    ALLOCATING = "allocating"
    OPEN = "open"
    QUARANTINED = "quarantined"
    COMMITTED = "committed"
    ENDED = "ended"


class DestinationSession:
    """D: receives blocks from one life of a peer. Methods return actions to perform in order."""

    def __init__(self, prepare: Prepare, attempt: int, lease: Lease) -> None:
        """`attempt`: positive, unique within this pool's life. `lease`: of the source's life."""
        self.prepare = prepare
        self.number = prepare.number
        self.attempt = attempt
        self.state = DestinationState.ALLOCATING
        self._lease = lease
        self._retry = Retry()
        self._idle_since = 0.0
        self.forget_at = float("inf")  # set when the session is committed
        self._final: SessionMessage | None = None  # the answer to repeat in COMMITTED
        self._prepared: Prepared | None = None

    def start(self, now: float) -> Actions:
        self._idle_since = now
        return [Allocate(self.prepare)]

    def on_allocated(self, have: int, wire_refs: bytes, now: float) -> Actions:
        """The index has `have` leading blocks. `wire_refs`: the other blocks; all blocks if the
        index has all."""
        if have == self.prepare.blocks and self.prepare.tokens is not None:
            return [Free(), *self._committed(AlreadyHave(self.number, wire_refs), now)]
        self.state = DestinationState.OPEN
        self._prepared = Prepared(self.number, self.attempt, have, wire_refs)
        return [Send(self._prepared)]

    def on_refused(self, failure: Failure) -> Actions:
        self.state = DestinationState.ENDED
        return [Send(Refused(self.number, failure)), Forget()]

    def on_published(self, wire_refs: bytes, now: float) -> Actions:
        return self._committed(Committed(self.number, self.attempt, wire_refs), now)

    def on_unpublishable(self, failure: Failure) -> Actions:
        self.state = DestinationState.ENDED
        return [Free(), Send(Aborted(self.number, self.attempt, failure)), Forget()]

    def on_message(self, message: SessionMessage, now: float) -> Actions:
        if self.state is DestinationState.ENDED:
            return answer_as_unaware(message)
        if self.state is DestinationState.OPEN:
            self._idle_since = now
            self._retry.stop()
        match message:
            case Prepare():
                return self._on_prepare()
            case Commit():
                return self._on_commit(message, now)
            case Abort():
                return self._on_abort(message, now)
        return []

    def slim(self) -> None:
        """Drop the tokens, which are not needed after the commit."""
        self.prepare = msgspec.structs.replace(self.prepare, tokens=None)
        self._prepared = None

    def stop(self, now: float) -> Actions:
        """Give up for a local reason; no effect after the commit."""
        if self.state is DestinationState.ALLOCATING:
            self.state = DestinationState.ENDED
            return [Free(), Forget()]
        return self._quarantine(now) if self.state is DestinationState.OPEN else []

    def on_gone(self, now: float) -> Actions:
        """Handle the end of the source's life, after which none of its writes can arrive."""
        state, self.state = self.state, DestinationState.ENDED
        if state in (DestinationState.OPEN, DestinationState.QUARANTINED):
            return [Free(), Forget()]
        return [Forget()] if state is DestinationState.COMMITTED else []

    def on_tick(self, now: float) -> Actions:
        if self.state is DestinationState.COMMITTED:
            if now < self.forget_at:
                return []
            self.state = DestinationState.ENDED
            return [Forget()]
        if self.state is DestinationState.OPEN and self._lease.lapsed(now):
            return self._quarantine(now)
        if self.state is DestinationState.QUARANTINED:
            return [Send(self._query())] if self._retry.due(now) else []
        if self.state is DestinationState.OPEN and now - self._idle_since >= LEASE:
            if self._retry.at == float("inf"):
                self._retry.start(now)
                return [Send(self._query())]
            if self._retry.due(now):
                return [Send(self._query())]
        return []

    def _on_prepare(self) -> Actions:
        if self.state is DestinationState.COMMITTED and self._final is not None:
            return [Send(self._final)]
        if self.state is DestinationState.QUARANTINED:
            return [Send(self._query())]
        return [] if self._prepared is None else [Send(self._prepared)]

    def _on_commit(self, message: Commit, now: float) -> Actions:
        if message.attempt != self.attempt:
            return answer_as_unaware(message)
        if self.state is DestinationState.OPEN:
            return [Publish()]
        if self.state is DestinationState.QUARANTINED:  # too late; but S's writes have drained
            return self._aborted(Drained.YES, message.attempt)
        return [] if self._final is None else [Send(self._final)]

    def _on_abort(self, message: Abort, now: float) -> Actions:
        if message.attempt not in (0, self.attempt):
            return answer_as_unaware(message)
        if self.state is DestinationState.COMMITTED:
            if not message.revoke:  # an answer to a Query from before the commit
                return []
            self.state = DestinationState.ENDED
            answer = Aborted(self.number, message.attempt)
            return [Revoke(), Send(answer), Forget()]
        if message.drained is not Drained.NO:
            return self._aborted(message.drained, message.attempt)
        if self.state is DestinationState.OPEN:
            return self._quarantine(now)[:-1]  # without the Query: S reports when it has drained
        return []

    def _aborted(self, drained: Drained, attempt: int) -> Actions:
        self.state = DestinationState.ENDED
        answer = Aborted(self.number, attempt)
        sever: Actions = [Sever()] if drained is Drained.SEVERED else []
        return [*sever, Free(), Send(answer), Forget()]

    def _quarantine(self, now: float) -> Actions:
        self.state = DestinationState.QUARANTINED
        self._retry.start(now)
        return [Quarantine(), Send(self._query())]

    def _query(self) -> Query:
        stop = self.state is DestinationState.QUARANTINED
        return Query(self.number, self.attempt, stop)

    def _committed(self, final: SessionMessage, now: float) -> Actions:
        self.state = DestinationState.COMMITTED
        self._final = final
        self._retry.stop()
        self.forget_at = now + REMEMBER
        return [Send(final)]


def answer_as_unaware(message: SessionMessage) -> Actions:
    """Return D's answer about a transfer or attempt that D does not know: Aborted."""
    if isinstance(message, Commit | Abort):
        return [Send(Aborted(message.number, message.attempt))]
    return []
