"""What a pool says and does to the messages of its peers. All calls come from one thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from memserve.errors import LayoutMismatch, MemserveError, PeerRefused, PoolError
from memserve.transfer.base import LocalRegion, Transport
from memserve.transfer.calls import Calls
from memserve.transfer.destination_session import DestinationSession
from memserve.transfer.dialling import Dialling
from memserve.transfer.failures import to_failure
from memserve.transfer.links import Arrival, Dealer, Links, is_shortcut
from memserve.transfer.messages import Failure, from_words
from memserve.transfer.path import PathName
from memserve.transfer.peers import Life, Peers
from memserve.transfer.process import own_process
from memserve.transfer.receiver import Receiver, ReceivingPool
from memserve.transfer.regions import host_id, pool_regions
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
    PROTOCOL_VERSION,
    Beat,
    Bye,
    Envelope,
    FreeBlocks,
    FreedBlocks,
    Hello,
    Kind,
    Malformed,
    Message,
    Mismatch,
    Offer,
    decode,
    encode,
    header,
)
from memserve.types import Epoch, Owner, intern_owner

_ANYBODY = Epoch(0)  # the receiver of a Hello to whoever is there


class ConversingPool(ReceivingPool, SendingPool, Protocol):
    """A pool, as far as its peers are concerned."""

    memory_version: int  # grows whenever `local_regions` changes

    def local_regions(self) -> tuple[LocalRegion, ...]:
        """Its memory as it is now."""
        ...


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    malformed: int = 0  # messages that no pool sends; dropped
    mismatched: int = 0  # messages of another protocol version or KV layout; refused
    misdirected: int = 0  # messages to or from a life that is not the current one; dropped


class Conversation:
    """Owns the sessions, and what a pool knows of its peers."""

    def __init__(
        self, pool: ConversingPool, links: Links, transports: list[Transport], path: PathName
    ) -> None:
        self._pool = pool
        self._links = links
        self._transports: list[Transport] = []
        self._fingerprint = bytes.fromhex(pool.layout.fingerprint)
        self._header = header(self._fingerprint)
        self._registered: tuple[LocalRegion, ...] = ()
        self._memory_version = -1
        self.peers = Peers(self._transports, path)
        self.table = SessionTable()
        self.sender = Sender(pool, self.peers)
        self.receiver = Receiver(pool, intern_owner(*pool.owner))
        self.calls = Calls()
        self.counters = Counters()
        self.dialling = Dialling(links)
        for transport in transports:
            self.add_transport(transport)
        self.refresh_memory()

    # --- this side's memory ---------------------------------------------------------------

    def add_transport(self, transport: Transport) -> None:
        """Raises TransferError."""
        transport.register(self._registered)
        self._transports.append(transport)
        self._introduce_to_all()

    def has_transport(self, name: str) -> bool:
        return any(transport.name == name for transport in self._transports)

    def refresh_memory(self) -> None:
        """The pool's memory may have grown or shrunk: tell transports and peers."""
        if self._memory_version == self._pool.memory_version:
            return
        self._memory_version = self._pool.memory_version
        present = self._pool.local_regions()
        known = {each.region for each in self._registered}
        wanted = {each.region for each in present}
        added = [each for each in present if each.region not in known]
        gone = [each for each in self._registered if each.region not in wanted]
        for transport in self._transports:
            transport.register(added)
            transport.unregister(gone)
        self._registered = present
        self._introduce_to_all()

    # --- saying ---------------------------------------------------------------------------

    def greet(self, path: Dealer | bytes, *, answer: bool) -> None:
        """Say who this is."""
        offers = tuple(Offer(each.name, each.describe()) for each in self._transports)
        memory = pool_regions(self._pool.layout, self._registered)
        hello = Hello(answer, own_process(), memory, offers, self._links.shortcut)
        self._links.send(path, self._header, encode(self._pool.owner, _ANYBODY, hello))

    def say(self, peer: Owner, message: Message) -> None:
        """To one life of a peer; nothing if it is not the current one."""
        known = self.peers.get(peer.instance)
        if known is None or known.life is None or known.life.owner != peer:
            return
        body = encode(self._pool.owner, peer.epoch, message)
        for path in (known.life.shortcut, known.dealer, known.route):
            if path is not None and self._links.send(path, self._header, body):
                return

    def say_to_all(self, message: Message) -> None:
        for peer in self.peers:
            if peer.life is not None:
                self.say(peer.life.owner, message)

    # --- hearing --------------------------------------------------------------------------

    def on_arrival(self, arrival: Arrival, now: float) -> None:
        try:
            envelope = decode(arrival.frames, self._fingerprint)
        except Malformed:
            self.counters.malformed += 1
            return
        except Mismatch as mismatch:
            self._on_mismatch(arrival, mismatch)
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
            self.greet(arrival.path, answer=True)
        else:
            self._on_message(arrival, envelope, now)

    def on_beat(self, now: float) -> None:
        """Once a heartbeat."""
        for owner in self.peers.ended():
            self.on_over(owner, now)
        self.say_to_all(Beat(answer=True))
        for peer in self.peers:
            if peer.life is None and peer.dealer is not None:
                self.greet(peer.dealer, answer=True)
        self.receiver.prune()
        for owner in self.receiver.grantees():
            if self.table.silent(owner, now):
                self.receiver.revoke_all(owner)

    def on_tick(self, now: float) -> None:
        """A few times in the shortest retry."""
        self.perform(self.table.on_tick(now), now)
        for peer, message in self.calls.on_tick(now):
            self.say(peer, message)
        for dealer in self.dialling.on_tick(now):
            self.greet(dealer, answer=True)

    def on_over(self, owner: Owner, now: float) -> None:
        """A life has certainly ended, and nothing that it wrote can land any more."""
        peer = self.peers.get(owner.instance)
        if peer is not None and peer.life is not None and peer.life.owner == owner:
            self._cut_short(peer.life)
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
        return self.table.active or self.calls.active or len(self.dialling) > 0

    # --- doing ----------------------------------------------------------------------------

    def begin(self, outgoing: Outgoing, now: float) -> None:
        """Start a transfer to a life that is current."""
        self.sender.add(outgoing)
        self.perform(self.table.begin(outgoing.peer, outgoing.session, now), now)

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
                self.perform(steps(peer, session, self._allocate(session, now)), now)
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

    def _allocate(self, session: DestinationSession, now: float) -> Actions:
        try:
            have, words = self.receiver.allocate(session)
        except PoolError as error:
            return session.on_refused(to_failure(error))
        self.refresh_memory()  # the peer must know where these blocks are, before their words
        return session.on_allocated(have, words, now)

    def _publish(self, peer: Owner, session: DestinationSession, now: float) -> Actions:
        try:
            words = self.receiver.publish(peer, session)
        except PoolError as error:
            return session.on_unpublishable(to_failure(error))
        return session.on_published(words, now)

    # --- inside ---------------------------------------------------------------------------

    def _on_hello(self, arrival: Arrival, sender: Owner, hello: Hello, now: float) -> None:
        if hello.memory.layout.fingerprint != self._pool.layout.fingerprint:
            self.counters.malformed += 1  # its header said otherwise
            return
        dialled = self.dialling.by(arrival.path)
        if dialled is not None and (sender.instance != dialled.instance):
            text = f"at {dialled.dealer.address} is {sender.instance!r}, not {dialled.instance!r}"
            self.dialling.fail(dialled, PeerRefused(text))
            return
        if sender.instance == self._pool.owner.instance:
            self.counters.misdirected += 1
            return
        peer = self.peers.add(sender.instance)
        before = peer.life
        over = self.peers.introduce(sender, hello)
        if over is None:
            self.counters.misdirected += 1
            return
        if before is not None and before.owner != sender:
            self._cut_short(before)
        for owner in over:
            self.on_over(owner, now)
        self.table.heard(sender, now)
        if isinstance(arrival.path, bytes):
            peer.route = arrival.path
        if hello.answer:
            self.greet(arrival.path, answer=False)
        if dialled is not None:
            if peer.dealer is not None:
                self._links.hang_up(peer.dealer)
            peer.dealer = dialled.dealer
            self.dialling.succeed(dialled, sender)
        life = self.peers.current(sender.instance)
        reachable = hello.memory.host == host_id() and is_shortcut(hello.shortcut)
        if peer.dealer is not None and life.shortcut is None and reachable:
            life.shortcut = self._links.dial(hello.shortcut)

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

    def _on_mismatch(self, arrival: Arrival, mismatch: Mismatch) -> None:
        self.counters.mismatched += 1
        if mismatch.kind is Kind.MESSAGE:
            self._links.send(arrival.path, header(self._fingerprint, Kind.REFUSAL), b"")
        dialled = self.dialling.by(arrival.path)
        if dialled is None:
            return
        name = dialled.instance
        error: MemserveError
        if mismatch.version != PROTOCOL_VERSION:
            error = PeerRefused(
                f"{name!r} speaks version {mismatch.version} of the protocol, "
                f"this is version {PROTOCOL_VERSION}"
            )
        else:
            error = LayoutMismatch(
                f"KV layout {mismatch.fingerprint.hex()} of {name!r} is not this pool's, "
                f"{self._fingerprint.hex()}"
            )
        self.dialling.fail(dialled, error)

    def _cut_short(self, life: Life) -> None:
        """Hang up the shortcut to a life."""
        shortcut, life.shortcut = life.shortcut, None
        if shortcut is not None:
            self._links.hang_up(shortcut)

    def _introduce_to_all(self) -> None:
        for peer in self.peers:
            shortcut = None if peer.life is None else peer.life.shortcut
            for path in (shortcut, peer.dealer, peer.route):
                if path is not None:
                    self.greet(path, answer=False)
