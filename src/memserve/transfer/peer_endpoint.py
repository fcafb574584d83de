"""`PeerEndpoint`: handles peers' messages and performs the sessions' actions. All calls come from
one thread at a time."""

from __future__ import annotations

import logging

from memserve.errors import ForeignBlock, PoolError, TransferError, UnwrittenBlocks
from memserve.transfer.base import Transport
from memserve.transfer.destination_session import DestinationSession
from memserve.transfer.handles import PeerStats
from memserve.transfer.handshake import Handshakes
from memserve.transfer.messages import from_wire_refs, to_failure
from memserve.transfer.peers import Peers
from memserve.transfer.receiver import Receiver
from memserve.transfer.regions import PathName
from memserve.transfer.remote_frees import RemoteFrees
from memserve.transfer.sender import Outgoing, Sender
from memserve.transfer.session import (
    LEASE,
    Action,
    Actions,
    Allocate,
    CancelWrites,
    Finish,
    Forget,
    Free,
    Publish,
    Quarantine,
    Release,
    Revoke,
    Send,
    Sever,
    Write,
)
from memserve.transfer.shared_pool import SharedPool
from memserve.transfer.sockets import Arrival, PoolSockets
from memserve.transfer.source_session import SourceSession
from memserve.transfer.table import SessionTable, Steps, steps
from memserve.transfer.wire import (
    Beat,
    Bye,
    Envelope,
    FreeBlocks,
    FreedBlocks,
    Hello,
    Malformed,
    Message,
    Mismatch,
    NotWelcome,
    encode,
)
from memserve.types import Owner, intern_owner, retire_owner

log = logging.getLogger(__name__)

# Failures logged with a traceback; later ones are only counted, so that no peer can fill a disk.
MAX_TRACEBACKS = 50


class PeerEndpoint:
    """Owns a pool's sessions, and its knowledge of peers."""

    def __init__(
        self, pool: SharedPool, sockets: PoolSockets, transports: list[Transport], path: PathName
    ) -> None:
        self._pool = pool
        self._sockets = sockets
        known: list[Transport] = []
        self.peers = Peers(known, path)
        self.handshakes = Handshakes(pool, sockets, known, self.peers)
        self.counters = self.handshakes.counters
        self.table = SessionTable()
        self.sender = Sender(pool, self.peers)
        self.receiver = Receiver(pool, intern_owner(*pool.owner))
        self.frees = RemoteFrees()
        for transport in transports:
            self.handshakes.add_transport(transport)
        self.handshakes.refresh_memory()

    def stats(self) -> PeerStats:
        return PeerStats(
            outgoing=self.table.sources,
            incoming=self.table.destinations,
            quarantined=self.receiver.quarantined_blocks + self._pool.freed_by_owner,
            granted=self.receiver.granted_blocks,
            malformed=self.counters.malformed,
            mismatched=self.counters.mismatched,
            strangers=self._sockets.strangers,
            failed=self.counters.failed,
            unwritten=self.counters.unwritten,
        )

    # --- sending --------------------------------------------------------------------------

    def say(self, peer: Owner, message: Message) -> None:
        """Send a message to one life of a peer; dropped if that life is not current."""
        known = self.peers.get(peer.instance)
        if known is None or known.life is None or known.life.owner != peer:
            return
        body = encode(self._pool.owner, peer.epoch, message)
        for path in (known.life.unix_route, known.dealer, known.route):
            if path is not None and self._sockets.send(path, self.handshakes.header, body):
                return

    def say_to_all(self, message: Message) -> None:
        for peer in self.peers:
            if peer.life is not None:
                self.say(peer.life.owner, message)

    # --- events ---------------------------------------------------------------------------

    def on_arrival(self, arrival: Arrival, now: float) -> None:
        try:
            envelope = self.handshakes.read(arrival)
        except Malformed:
            self.counters.malformed += 1
            return
        except Mismatch as mismatch:
            self.handshakes.on_mismatch(arrival, mismatch)
            return
        try:
            self._on_envelope(arrival, envelope, now)
        except Exception:  # noqa: BLE001 - a bug that one peer's message triggers must not end
            # the transfers with other peers; `_leave` logs and counts the error.
            self._leave(envelope.sender, now)

    def report(self, what: str) -> None:
        """Count the exception that is being handled, and log it (the first MAX_TRACEBACKS)."""
        self.counters.failed += 1
        if self.counters.failed <= MAX_TRACEBACKS:
            log.exception("%r: %s", self._pool.owner.instance, what)

    def on_beat(self, now: float) -> None:
        """Send heartbeats, and find lives that have ended; called once per HEARTBEAT."""
        for owner in self.peers.ended():
            self.on_over(owner, now)
        for owner in self.table.abandoned(now):
            if not self.peers.sees(owner):
                self.peers.sever(owner)
                self.perform(self.table.free_abandoned(owner, now), now)
        for owner in self.table.prune(self.peers.known(), now):
            if not self.peers.sees(owner):
                self.on_over(owner, now)
        for peer in self.peers:
            if peer.life is not None:
                peer.life.silent = self.table.silent(peer.life.owner, now)
        self.tell_all(now)
        self.handshakes.greet_the_lost()
        self.receiver.prune()
        for owner in self.receiver.grantees():
            if self.table.silent(owner, now):
                self.receiver.revoke_all(owner)

    def tell_all(self, now: float) -> None:
        """Send a heartbeat to all connected peers."""
        self.say_to_all(self._beat(now, answer=True))

    def on_tick(self, now: float) -> None:
        """Run timers: deadlines, and repeats of messages; called every `service.TICK`."""
        self.perform(self.table.on_tick(now), now)
        for peer, message in self.frees.on_tick(now):
            self.say(peer, message)
        for dealer in self.handshakes.dialler.on_tick(now):
            self.handshakes.greet(dealer, answer=True)

    def on_over(self, owner: Owner, now: float) -> None:
        """Handle the certain end of a life, after which none of its writes can arrive."""
        self.peers.forget(owner)
        self.perform(self.table.on_gone(owner, now), now)
        self.receiver.revoke_all(owner)
        self.frees.on_gone(owner)
        retire_owner(owner)

    def poll_transports(self, now: float) -> None:
        for transport, completion in self.peers.poll():
            outgoing, actions = self.sender.on_completion(transport, completion, now)
            self.act(outgoing, actions, now)

    @property
    def busy(self) -> bool:
        """Whether a timer may be due before the next heartbeat."""
        return self.table.active or self.frees.active or len(self.handshakes.dialler) > 0

    # --- actions of sessions --------------------------------------------------------------

    def begin(self, outgoing: Outgoing, now: float) -> None:
        """Start a transfer; it fails at once if the peer's life has ended since the lookup."""
        self.sender.add(outgoing)
        self.perform(self.table.begin(outgoing.peer, outgoing.session, now), now)
        if self.table.is_gone(outgoing.peer):
            self.perform(self.table.on_gone(outgoing.peer, now), now)

    def act(self, outgoing: Outgoing, actions: Actions, now: float) -> None:
        self.perform(steps(outgoing.peer, outgoing.session, actions), now)

    def perform(self, todo: Steps, now: float) -> None:
        for peer, session, action in todo:
            try:
                if isinstance(action, Send):
                    self.say(peer, action.message)
                elif isinstance(session, SourceSession):
                    self._perform_source(peer, session, action, now)
                elif isinstance(session, DestinationSession):
                    self._perform_destination(peer, session, action, now)
            except Exception:  # noqa: BLE001 - as in `on_arrival`; timers also cause steps
                self._leave(peer, now)

    def _perform_source(
        self, peer: Owner, session: SourceSession, action: Action, now: float
    ) -> None:
        match action:
            case Write():
                actions = self.sender.write(session, action, now)
                self.perform(steps(peer, session, actions), now)
            case CancelWrites():
                self.sender.cancel_writes(session)
            case Finish():
                self.sender.finish(session, action)
            case Release():
                self.sender.release(session)
            case Forget():
                self.sender.forget(session)
                self.table.forget(peer, session)

    def _perform_destination(
        self, peer: Owner, session: DestinationSession, action: Action, now: float
    ) -> None:
        match action:
            case Allocate():
                self.perform(steps(peer, session, self._allocate(peer, session, now)), now)
            case Publish():
                self.perform(steps(peer, session, self._publish(peer, session, now)), now)
            case Quarantine():
                self.receiver.quarantine(session)
            case Free():
                self.receiver.free(session)
            case Revoke():
                self.receiver.revoke(peer, session.number)
            case Sever():
                self.peers.sever(peer)
            case Forget():
                self.table.forget(peer, session)

    def _allocate(self, peer: Owner, session: DestinationSession, now: float) -> Actions:
        try:
            source = self.peers.current(peer.instance).memory.layout
            have, wire_refs = self.receiver.allocate(peer, session, source)
            # The peer must know the regions of these blocks before it gets their wire_refs.
            self.handshakes.refresh_memory()
        except (PoolError, TransferError) as error:
            self.receiver.free(session)
            return session.on_refused(to_failure(error))
        return session.on_allocated(have, wire_refs, now)

    def _publish(self, peer: Owner, session: DestinationSession, now: float) -> Actions:
        try:
            wire_refs = self.receiver.publish(peer, session)
        except (PoolError, TransferError) as error:
            self.counters.unwritten += isinstance(error, UnwrittenBlocks)
            return session.on_unpublishable(to_failure(error))
        return session.on_published(wire_refs, now)

    # --- internal -------------------------------------------------------------------------

    def _beat(self, now: float, *, answer: bool) -> Beat:
        vouched = self._pool.vouched
        return Beat(answer, stalled=vouched is not None and now - vouched >= LEASE)

    def _on_envelope(self, arrival: Arrival, envelope: Envelope, now: float) -> None:
        sender, message = envelope.sender, envelope.message
        if self.table.is_gone(sender):
            self.counters.misdirected += 1
        elif isinstance(message, Hello):
            self._on_hello(arrival, sender, message, now)
        elif isinstance(message, NotWelcome):
            self.handshakes.on_not_welcome(arrival, message)
            if self.peers.is_from(sender, arrival.path):
                self.perform(self.table.fail(sender, message.reason, now), now)
        elif envelope.receiver != self._pool.owner.epoch or not self.peers.is_from(
            sender, arrival.path
        ):
            # One side has restarted since the introduction, or the sender has not introduced itself
            # on this connection, or another process uses the sender's name.
            self.counters.misdirected += 1
            self.handshakes.greet(arrival.path, answer=True)
        else:
            self._on_message(arrival, envelope, now)

    def _leave(self, peer: Owner, now: float) -> None:
        """End all transfers with a life whose message or step failed in this pool. Blocks that the
        life may still write go into quarantine; the life may introduce itself again."""
        self.report(f"error with peer {peer.instance!r}: its transfers end until its next Hello")
        self.peers.leave(peer)
        self.perform(self.table.leave(peer, now), now)

    def _on_hello(self, arrival: Arrival, sender: Owner, hello: Hello, now: float) -> None:
        silent = self._is_silent(sender, now)
        over = self.handshakes.on_hello(arrival, sender, hello, silent)
        if over is None:
            return
        for owner in over:
            self.on_over(owner, now)
        self.table.heard(sender, now)

    def _is_silent(self, newcomer: Owner, now: float) -> bool:
        """Return whether the known life of the newcomer's instance is silent or absent."""
        known = self.peers.get(newcomer.instance)
        return known is None or known.life is None or self.table.silent(known.life.owner, now)

    def _on_message(self, arrival: Arrival, envelope: Envelope, now: float) -> None:
        sender, message = envelope.sender, envelope.message
        self.table.heard(sender, now)
        if isinstance(arrival.path, bytes):
            self.peers.add(sender.instance).route = arrival.path
        match message:
            case Hello() | NotWelcome():
                raise AssertionError("handled before")
            case Beat():
                life = self.peers.current(sender.instance)
                life.silent, life.stalled = False, message.stalled
                if message.answer:
                    self.say(sender, self._beat(now, answer=False))
            case Bye():
                self.on_over(sender, now)
            case FreeBlocks():
                self._on_free(sender, message)
            case FreedBlocks():
                self.frees.on_answer(sender, message)
            case _:
                self.perform(self.table.on_message(sender, message, now), now)

    def _on_free(self, peer: Owner, message: FreeBlocks) -> None:
        answer = self.frees.known_answer(peer, message.call)
        if answer is None:
            failure = None
            try:
                refs = from_wire_refs(message.wire_refs, intern_owner(*self._pool.owner))
                self.receiver.free_granted(peer, refs)
            except PoolError as error:
                failure = to_failure(error)
            except ValueError as error:
                failure = to_failure(ForeignBlock(str(error)))
            answer = FreedBlocks(message.call, failure)
            self.frees.remember(peer, answer)
        self.say(peer, answer)
