"""What a pool says and does to the messages of its peers. All calls come from one thread."""

from __future__ import annotations

from typing import Protocol

from memserve.errors import PoolError, UnknownPeer
from memserve.transfer.base import Transport
from memserve.transfer.calls import Calls
from memserve.transfer.destination_session import DestinationSession
from memserve.transfer.failures import to_failure
from memserve.transfer.introductions import IntroducedPool, Introductions
from memserve.transfer.links import Arrival, Links
from memserve.transfer.messages import Failure, from_words
from memserve.transfer.path import PathName
from memserve.transfer.peers import Peers
from memserve.transfer.receiver import Receiver, ReceivingPool
from memserve.transfer.sender import Outgoing, Sender, SendingPool
from memserve.transfer.session import (
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
    encode,
)
from memserve.types import Epoch, Owner, intern_owner

_ANYBODY = Epoch(0)  # the receiver of a Hello to whoever is there


class ConversingPool(ReceivingPool, SendingPool, IntroducedPool, Protocol):
    """A pool, as far as its peers are concerned."""


class Conversation:
    """Owns the sessions, and what a pool knows of its peers."""

    def __init__(
        self, pool: ConversingPool, links: Links, transports: list[Transport], path: PathName
    ) -> None:
        self._pool = pool
        self._links = links
        known: list[Transport] = []
        self.peers = Peers(known, path)
        self.introductions = Introductions(pool, links, known, self.peers)
        self.counters = self.introductions.counters
        self.table = SessionTable()
        self.sender = Sender(pool, self.peers)
        self.receiver = Receiver(pool, intern_owner(*pool.owner))
        self.calls = Calls()
        for transport in transports:
            self.introductions.add_transport(transport)
        self.introductions.refresh_memory()

    # --- saying ---------------------------------------------------------------------------

    def say(self, peer: Owner, message: Message) -> None:
        """To one life of a peer; nothing if it is not the current one."""
        known = self.peers.get(peer.instance)
        if known is None or known.life is None or known.life.owner != peer:
            return
        body = encode(self._pool.owner, peer.epoch, message)
        for path in (known.life.shortcut, known.dealer, known.route):
            if path is not None and self._links.send(path, self.introductions.header, body):
                return

    def say_to_all(self, message: Message) -> None:
        for peer in self.peers:
            if peer.life is not None:
                self.say(peer.life.owner, message)

    # --- hearing --------------------------------------------------------------------------

    def on_arrival(self, arrival: Arrival, now: float) -> None:
        try:
            envelope = self.introductions.read(arrival)
        except Malformed:
            self.counters.malformed += 1
            return
        except Mismatch as mismatch:
            self.introductions.on_mismatch(arrival, mismatch)
            return
        if self.table.is_gone(envelope.sender):
            self.counters.misdirected += 1
        elif isinstance(envelope.message, Hello):
            self._on_hello(arrival, envelope.sender, envelope.message, now)
        elif envelope.receiver != self._pool.owner.epoch or not self.peers.is_current(
            envelope.sender
        ):
            # One of the two has begun a new life since they met.
            self.counters.misdirected += 1
            self.introductions.greet(arrival.path, answer=True)
        else:
            self._on_message(arrival, envelope, now)

    def on_beat(self, now: float) -> None:
        """Once a heartbeat."""
        for owner in self.peers.ended():
            self.on_over(owner, now)
        for owner in self.table.forsaken(now):
            if not self.peers.sees(owner):
                self.peers.sever(owner)
                self.perform(self.table.forsake(owner, now), now)
        self.say_to_all(Beat(answer=True))
        self.introductions.greet_the_lost()
        self.receiver.prune()
        for owner in self.receiver.grantees():
            if self.table.silent(owner, now):
                self.receiver.revoke_all(owner)

    def on_tick(self, now: float) -> None:
        """A few times in the shortest retry."""
        self.perform(self.table.on_tick(now), now)
        for peer, message in self.calls.on_tick(now):
            self.say(peer, message)
        for dealer in self.introductions.dialling.on_tick(now):
            self.introductions.greet(dealer, answer=True)

    def on_over(self, owner: Owner, now: float) -> None:
        """A life has certainly ended, and nothing that it wrote can land any more."""
        self.peers.forget(owner)
        self.perform(self.table.on_gone(owner, now), now)
        self.receiver.revoke_all(owner)
        self.calls.on_gone(owner)

    def poll_transports(self, now: float) -> None:
        for transport, completion in self.peers.poll():
            outgoing, actions = self.sender.on_completion(transport, completion, now)
            self.act(outgoing, actions, now)

    @property
    def busy(self) -> bool:
        """Whether `on_tick` is due soon."""
        return self.table.active or self.calls.active or len(self.introductions.dialling) > 0

    # --- doing ----------------------------------------------------------------------------

    def begin(self, outgoing: Outgoing, now: float) -> None:
        """Start a transfer to a life that was current when the caller looked."""
        self.sender.add(outgoing)
        self.perform(self.table.begin(outgoing.peer, outgoing.session, now), now)
        if self.table.is_gone(outgoing.peer):
            self.perform(self.table.on_gone(outgoing.peer, now), now)

    def act(self, outgoing: Outgoing, actions: Actions, now: float) -> None:
        self.perform(steps(outgoing.peer, outgoing.session, actions), now)

    def perform(self, todo: Steps, now: float) -> None:
        for peer, session, action in todo:
            if isinstance(action, Send):
                self.say(peer, action.message)
            elif isinstance(session, SourceSession):
                self._perform_source(peer, session, action, now)
            elif isinstance(session, DestinationSession):
                self._perform_destination(peer, session, action, now)

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
            have, words = self.receiver.allocate(session, source)
        except (PoolError, UnknownPeer) as error:
            return session.on_refused(to_failure(error))
        # The peer must know where these blocks are, before their words.
        self.introductions.refresh_memory()
        return session.on_allocated(have, words, now)

    def _publish(self, peer: Owner, session: DestinationSession, now: float) -> Actions:
        try:
            words = self.receiver.publish(peer, session)
        except PoolError as error:
            return session.on_unpublishable(to_failure(error))
        return session.on_published(words, now)

    # --- inside ---------------------------------------------------------------------------

    def _on_hello(self, arrival: Arrival, sender: Owner, hello: Hello, now: float) -> None:
        over = self.introductions.on_hello(arrival, sender, hello)
        if over is None:
            return
        for owner in over:
            self.on_over(owner, now)
        self.table.heard(sender, now)

    def _on_message(self, arrival: Arrival, envelope: Envelope, now: float) -> None:
        sender, message = envelope.sender, envelope.message
        self.table.heard(sender, now)
        if isinstance(arrival.path, bytes):
            self.peers.add(sender.instance).route = arrival.path
        match message:
            case Hello():
                raise AssertionError("handled before")
            case Beat():
                if message.answer:
                    self.say(sender, Beat(answer=False))
            case Bye():
                self.on_over(sender, now)
            case FreeBlocks():
                self._on_free(sender, message)
            case FreedBlocks():
                self.calls.on_answer(sender, message)
            case _:
                self.perform(self.table.on_message(sender, message, now), now)

    def _on_free(self, peer: Owner, message: FreeBlocks) -> None:
        answer = self.calls.known_answer(peer, message.call)
        if answer is None:
            failure = None
            try:
                self._pool.free_mem(from_words(message.words, intern_owner(*self._pool.owner)))
            except PoolError as error:
                failure = to_failure(error)
            except ValueError as error:
                failure = Failure("ForeignBlock", str(error))
            answer = FreedBlocks(message.call, failure)
            self.calls.remember(peer, answer)
        self.say(peer, answer)
