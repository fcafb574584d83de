"""`Sender` performs the actions of `SourceSession`s: pins, writes, and reports to callers."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.errors import MemserveError, PoolError, TransferError
from memserve.pool.results import Match
from memserve.transfer.base import BlockList, Completion, Outcome, Ticket, Transport, WriteList
from memserve.transfer.handles import Transfer
from memserve.transfer.messages import Drained, Failure, from_wire_refs, to_error, to_failure
from memserve.transfer.peers import Peers
from memserve.transfer.session import Actions, Finish, Write
from memserve.transfer.shared_pool import SharedPool
from memserve.transfer.source_session import SourceSession
from memserve.types import Owner, RefArray, intern_owner


@dataclass(slots=True, eq=False)
class Outgoing:
    """One transfer."""

    session: SourceSession
    peer: Owner
    handle: Transfer
    source: RefArray
    pins: Match | None  # pins on the cached source blocks; None: no block is cached


class Sender:
    """Owns the pins on the blocks that are sent."""

    def __init__(self, pool: SharedPool, peers: Peers) -> None:
        self._pool = pool
        self._peers = peers
        self._outgoing: dict[SourceSession, Outgoing] = {}
        self._writes: dict[tuple[Transport, Ticket], tuple[Outgoing, Write]] = {}

    def __len__(self) -> int:
        return len(self._outgoing)

    @property
    def all(self) -> list[Outgoing]:
        return list(self._outgoing.values())

    def add(self, outgoing: Outgoing) -> None:
        self._outgoing[outgoing.session] = outgoing

    def write(self, session: SourceSession, write: Write, now: float) -> Actions:
        """Post a write; return the session's actions if posting fails, else none."""
        outgoing = self._outgoing[session]
        try:
            life = self._peers.current(outgoing.peer.instance)
            if life.owner != outgoing.peer or life.transport is None:
                raise TransferError(life.obstacle or "the peer has restarted")
            first, last, layers = write.round
            target = from_wire_refs(write.wire_refs, 0)
            writes = WriteList(
                BlockList.of(outgoing.source[first:last]), BlockList.of(target), layers
            )
            ticket = life.transport.post(outgoing.peer, writes)
        except (TransferError, PoolError, ValueError) as error:
            failure = (
                to_failure(error)
                if isinstance(error, MemserveError)
                else Failure("TransferError", str(error))
            )
            return session.on_write_done(write.serial, failure, Drained.YES, now)
        self._writes[life.transport, ticket] = (outgoing, write)
        return []

    def cancel_writes(self, session: SourceSession) -> None:
        for (transport, ticket), (outgoing, _) in self._writes.items():
            if outgoing.session is session:
                transport.cancel(ticket)

    def on_completion(
        self, transport: Transport, completion: Completion, now: float
    ) -> tuple[Outgoing, Actions]:
        """Handle the end of a write; return its transfer and the session's actions."""
        outgoing, write = self._writes.pop((transport, completion.ticket))
        failure = None
        if completion.outcome is not Outcome.DONE:
            error = completion.error or TransferError(f"the write was {completion.outcome}")
            failure = to_failure(error)
        else:
            # The caller may have freed blocks meanwhile; their bytes may be another prompt's.
            try:
                self._pool.require_live(outgoing.source[write.round.first : write.round.last])
            except PoolError as error:
                failure = to_failure(error)
        drained = Drained.YES if completion.target_drained else Drained.SEVERED
        return outgoing, outgoing.session.on_write_done(write.serial, failure, drained, now)

    def finish(self, session: SourceSession, finish: Finish) -> None:
        """Report the outcome to the caller."""
        outgoing = self._outgoing[session]
        name = outgoing.peer.instance
        if finish.failure is not None:
            outgoing.handle.fail(to_error(finish.failure, name))
            return
        try:
            refs = from_wire_refs(finish.wire_refs, intern_owner(*outgoing.peer))
        except (ValueError, OverflowError) as error:
            outgoing.handle.fail(TransferError(f"invalid block references of {name!r}: {error}"))
            return
        outgoing.handle.succeed(refs, len(outgoing.source) - finish.have)

    def release(self, session: SourceSession) -> None:
        pins = self._outgoing[session].pins
        if pins is not None:
            pins.release()

    def forget(self, session: SourceSession) -> None:
        del self._outgoing[session]
