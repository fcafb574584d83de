"""`SourceSession`: the state machine of the side that writes; `session` has the protocol."""

from __future__ import annotations

from enum import Enum

from memserve.transfer.messages import (
    WIRE_REF_BYTES,
    Abort,
    Aborted,
    AlreadyHave,
    Commit,
    Committed,
    Drained,
    Failure,
    Keep,
    Prepare,
    Prepared,
    Query,
    Refused,
    SessionMessage,
)
from memserve.transfer.session import (
    DEADLINE,
    LEASE,
    Actions,
    CancelWrites,
    Finish,
    Forget,
    Lease,
    Release,
    Retry,
    Round,
    Send,
    Write,
)


class SourceState(Enum):
    PREPARING = "preparing"
    WRITING = "writing"
    COMMITTING = "committing"
    ABORTING = "aborting"
    ENDED = "ended"


class SourceSession:
    """S: writes blocks into a peer's pool. Methods return the actions to perform, in order."""

    def __init__(self, prepare: Prepare, lease: Lease, deadline: float = DEADLINE) -> None:
        """`lease`: of the destination's life. `deadline`: seconds without progress before abort."""
        self.prepare = prepare
        self.number = prepare.number
        self.state = SourceState.PREPARING
        self._lease = lease
        self._idle_timeout = deadline
        self._deadline = float("inf")
        self._retry = Retry()
        self._attempt = 0
        self._have = 0
        self._wire_refs = b""
        self._waiting: list[Round] = []  # rounds that came before Prepared
        self._sealed = False
        self._serial = 0
        self._writing: set[int] = set()
        self._drained = Drained.YES
        self._released = False
        self._unsure = False  # whether the destination may have committed
        self._gone = False  # whether the destination's life is over: no message reaches it

    def start(self, now: float) -> Actions:
        self._deadline = now + self._idle_timeout
        self._retry.start(now)
        return [Send(self.prepare)]

    def write(self, round: Round, now: float) -> Actions:
        """Write another round; no effect after a failure. Raises ValueError after `seal`."""
        if self._sealed:
            raise ValueError("no round may follow the last one")
        self._deadline = now + self._idle_timeout
        if self.state is SourceState.PREPARING:
            self._waiting.append(round)
            return []
        if self.state is not SourceState.WRITING:
            return []
        return self._write(round)

    def seal(self, now: float) -> Actions:
        """Accept no more rounds; commit when all rounds are written."""
        self._sealed = True
        return self._commit_if_written(now)

    def cancel(self, now: float) -> Actions:
        """Abort; no effect once Commit is sent: D's answer then decides the outcome."""
        if self.state not in (SourceState.PREPARING, SourceState.WRITING):
            return []
        return self._abort(Failure("TransferCancelled", "cancelled"), now)

    def fail(self, failure: Failure, now: float) -> Actions:
        """Abort for a local reason; no effect once Commit is sent."""
        if self.state not in (SourceState.PREPARING, SourceState.WRITING):
            return []
        return self._abort(failure, now)

    def on_message(self, message: SessionMessage, now: float) -> Actions:
        if self.state is SourceState.ENDED:
            return answer_as_stranger(message)
        match message:
            case Prepared():
                return self._on_prepared(message, now)
            case AlreadyHave() if self.state is SourceState.PREPARING:
                have = len(message.wire_refs) // WIRE_REF_BYTES
                return self._end(Finish(None, message.wire_refs, have))
            case Refused() if self.state is SourceState.PREPARING:
                return self._end(Finish(message.failure))
            case Committed() if self._awaits(SourceState.COMMITTING, message.attempt):
                return self._end(Finish(None, message.wire_refs, self._have))
            case Aborted():
                return self._on_aborted(message)
            case Query():
                return self._on_query(message, now)
        return []

    def on_write_done(
        self, serial: int, failure: Failure | None, drained: Drained, now: float
    ) -> Actions:
        """Handle the end of a write. `drained`: whether late bytes may still reach its target."""
        self._writing.remove(serial)
        if drained is Drained.SEVERED:
            self._drained = Drained.SEVERED
        if self.state is SourceState.ABORTING:
            return [] if self._writing else self._all_drained(now)
        if failure is not None:
            return self._abort(failure, now)
        self._deadline = now + self._idle_timeout
        return self._commit_if_written(now)

    def on_gone(self, now: float) -> Actions:
        """Handle the end of the destination's life, whose memory is gone."""
        if self.state is SourceState.ENDED:
            return []
        if self.state is not SourceState.ABORTING:
            finish = Finish(Failure("PeerLost", "the destination is gone"))
            actions: Actions = (
                [finish, CancelWrites()] if self._writing else [*self._release(), finish]
            )
        else:
            actions = []
        self.state = SourceState.ABORTING
        self._retry.stop()
        self._deadline = float("inf")
        self._gone = True  # the session ends when all writes have
        return actions if self._writing else actions + self._end(None)

    def on_tick(self, now: float) -> Actions:
        if self.state is SourceState.ENDED:
            return []
        silent = self._lease.lapsed(now)
        if self.state is SourceState.ABORTING:
            if silent and self._is_quiet():
                return self._end(None)  # D sends a Query when it is back
            return [Send(self._abort_message())] if self._retry.due(now) else []
        if silent:
            return self._abort(Failure("PeerLost", f"no message for {LEASE:g} s"), now)
        if now >= self._deadline:
            text = f"no progress for {self._idle_timeout:g} s while {self.state.value}"
            return self._abort(Failure("TransferTimeout", text), now)
        if self._retry.due(now):
            if self.state is SourceState.PREPARING:
                return [Send(self.prepare)]
            return [Send(Commit(self.number, self._attempt))]
        return []

    def _awaits(self, state: SourceState, attempt: int) -> bool:
        return self.state is state and attempt == self._attempt

    def _on_prepared(self, message: Prepared, now: float) -> Actions:
        if self.state is not SourceState.PREPARING:
            if message.attempt == self._attempt:
                return []
            return answer_as_stranger(message)
        if message.have + len(message.wire_refs) // WIRE_REF_BYTES != self.prepare.blocks:
            return []
        self.state = SourceState.WRITING
        self._attempt = message.attempt
        self._have = message.have
        self._wire_refs = message.wire_refs
        self._retry.stop()
        self._deadline = now + self._idle_timeout
        actions: Actions = []
        for round in self._waiting:
            actions += self._write(round)
        self._waiting.clear()
        return actions + self._commit_if_written(now)

    def _on_aborted(self, message: Aborted) -> Actions:
        if self._awaits(SourceState.COMMITTING, message.attempt):
            lost = Failure("TransferAborted", "the destination gave up before the commit")
            return self._end(Finish(message.failure or lost))
        if self._awaits(SourceState.ABORTING, message.attempt) and not self._writing:
            return self._end(None)
        return []

    def _on_query(self, message: Query, now: float) -> Actions:
        if self.state is SourceState.PREPARING:
            # D's Prepared may still be in flight. An Abort(YES) now would have D free the blocks,
            # and S would write into them when it accepts the Prepared.
            if message.stop:
                return self._abort(Failure("TransferAborted", "the destination gave up"), now)
            return [Send(Keep(self.number, message.attempt))]
        if message.attempt != self._attempt:
            return answer_as_stranger(message)
        if self.state is SourceState.ABORTING:
            return [Send(self._abort_message())]
        if message.stop:
            return self._abort(Failure("TransferAborted", "the destination gave up"), now)
        return [Send(Keep(self.number, self._attempt))]

    def _write(self, round: Round) -> Actions:
        first = max(round.first, self._have)
        if first >= round.last:
            return []
        self._serial += 1
        self._writing.add(self._serial)
        at, to = ((block - self._have) * WIRE_REF_BYTES for block in (first, round.last))
        return [Write(self._serial, round._replace(first=first), self._wire_refs[at:to])]

    def _commit_if_written(self, now: float) -> Actions:
        if self.state is not SourceState.WRITING or not self._sealed or self._writing:
            return []
        self.state = SourceState.COMMITTING
        self._retry.start(now)
        return [Send(Commit(self.number, self._attempt))]

    def _abort(self, failure: Failure, now: float) -> Actions:
        self._unsure = self.state is SourceState.COMMITTING
        self.state = SourceState.ABORTING
        self._deadline = float("inf")
        self._retry.start(now)
        if not self._writing:
            return [*self._release(), Finish(failure), *self._all_drained(now)]
        return [Finish(failure), CancelWrites(), Send(self._abort_message())]

    def _all_drained(self, now: float) -> Actions:
        """Release the source blocks, and let D free its blocks: all writes have drained."""
        if self._gone or (self._lease.lapsed(now) and self._is_quiet()):
            return self._end(None)
        self._retry.start(now)
        return [*self._release(), Send(self._abort_message())]

    def _is_quiet(self) -> bool:
        """Return whether `answer_as_stranger`, a plain Abort(YES), would be a correct answer."""
        return not self._writing and not self._unsure and self._drained is Drained.YES

    def _abort_message(self) -> Abort:
        drained = Drained.NO if self._writing else self._drained
        return Abort(self.number, self._attempt, drained, revoke=True)

    def _end(self, finish: Finish | None) -> Actions:
        self.state = SourceState.ENDED
        self._retry.stop()
        self._deadline = float("inf")
        actions: Actions = [] if finish is None else [finish]
        return [*self._release(), *actions, Forget()]

    def _release(self) -> Actions:
        if self._released:
            return []
        self._released = True
        return [Release()]


def answer_as_stranger(message: SessionMessage) -> Actions:
    """Return S's answer about a transfer or attempt that S does not know: Abort(YES), because S
    is not writing to it and never will."""
    if isinstance(message, Prepared | Query):
        return [Send(Abort(message.number, message.attempt, Drained.YES))]
    return []
