"""Handshakes: how pools introduce themselves, and which peers are refused."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from memserve.errors import LayoutMismatch, MemserveError, PeerLost, PeerRefused
from memserve.transfer.base import LocalRegion, Transport
from memserve.transfer.conversion import compatibility, meaning
from memserve.transfer.host import own_process
from memserve.transfer.messages import to_failure
from memserve.transfer.peers import Peers
from memserve.transfer.regions import pool_regions
from memserve.transfer.shared_pool import SharedPool
from memserve.transfer.sockets import Arrival, Dealer, PoolSockets, Way
from memserve.transfer.wire import (
    PROTOCOL_VERSION,
    Envelope,
    Hello,
    Kind,
    Mismatch,
    NotWelcome,
    Offer,
    decode,
    encode,
    header,
)
from memserve.types import Epoch, InstanceId, Owner

# The number of connections that end before a Hello after which `connect` fails: a peer closes a
# connection with a wrong secret. A single such end may be a peer that died.
REFUSALS = 2


@dataclass(slots=True, eq=False)
class Dialled:
    """A `connect` call that waits for the first Hello of `instance`."""

    instance: InstanceId
    dealer: Dealer
    outcome: Future[Owner]
    gives_up_at: float
    refusal: PeerRefused | None = None  # the last reason for which no Hello was accepted


class Dialler:
    """Owns dialled connections until the peer's Hello."""

    def __init__(self, sockets: PoolSockets) -> None:
        self._sockets = sockets
        self._waiting: list[Dialled] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self, dialled: Dialled) -> None:
        self._waiting.append(dialled)

    def by(self, path: Way) -> Dialled | None:
        """Return the call that waits for a Hello on this connection."""
        return next((each for each in self._waiting if each.dealer is path), None)

    def succeed(self, dialled: Dialled, owner: Owner) -> None:
        """End the wait with the peer's life, which owns the connection from now on."""
        self._waiting.remove(dialled)
        dialled.outcome.set_result(owner)

    def fail(self, dialled: Dialled, error: MemserveError) -> None:
        self._waiting.remove(dialled)
        self._sockets.hang_up(dialled.dealer)
        dialled.outcome.set_exception(error)

    def abandon(self) -> None:
        """Fail all waits: the pool was closed."""
        for dialled in list(self._waiting):
            self.fail(dialled, PeerLost("the pool was closed"))

    def on_tick(self, now: float) -> list[Dealer]:
        """Fail waits that are due. Return the connections on which Hello is to be repeated."""
        for dialled in list(self._waiting):
            address = dialled.dealer.address
            if dialled.dealer.foreign or dialled.dealer.broken >= REFUSALS:
                text = f"{address} closes the connection: its secret differs from this pool's"
                self.fail(dialled, PeerRefused(text))
            elif now >= dialled.gives_up_at:
                lost = PeerLost(f"no pool has answered at {address}")
                self.fail(dialled, dialled.refusal or lost)
        return [dialled.dealer for dialled in self._waiting]


_ANY_LIFE = Epoch(0)  # the receiver of a Hello: any life at the address


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    malformed: int = 0  # messages that no pool sends; dropped
    mismatched: int = 0  # messages of another protocol version or KV layout; refused
    misdirected: int = 0  # messages to or from a life that is not the current one; dropped
    failed: int = 0  # messages and steps that raised; all transfers with their sender are ended
    unwritten: int = 0  # transfers committed whose blocks were not all written; refused


class Handshakes:
    """Owns this pool's Hello, and the connections on which no Hello has arrived yet."""

    def __init__(
        self, pool: SharedPool, sockets: PoolSockets, transports: list[Transport], peers: Peers
    ) -> None:
        """`transports`: filled here, and read by `peers`."""
        self._pool = pool
        self._sockets = sockets
        self._transports = transports
        self._peers = peers
        self._meaning = meaning(pool.layout)
        self.header = header(pool.layout)
        self._refusal = header(pool.layout, Kind.REFUSAL)
        self._registered: tuple[LocalRegion, ...] = ()
        self._memory_version = -1
        self._edition = 0
        self.dialler = Dialler(sockets)
        self.counters = Counters()

    # --- this pool to its peers -----------------------------------------------------------

    def add_transport(self, transport: Transport) -> None:
        """Raises TransferError."""
        transport.register(self._registered)
        self._transports.append(transport)
        self._introduce_to_all()

    def has_transport(self, name: str) -> bool:
        return any(transport.name == name for transport in self._transports)

    def refresh_memory(self) -> None:
        """Tell transports and peers if the pool's memory has grown or shrunk."""
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

    def greet(self, path: Way, *, answer: bool) -> bool:
        """Send a Hello. Return whether it was queued."""
        offers = tuple(Offer(each.name, each.describe()) for each in self._transports)
        memory = pool_regions(self._pool.layout, self._registered)
        hello = Hello(
            answer, own_process(), memory, offers, self._sockets.unix_address, self._edition
        )
        return self._say(path, hello)

    def greet_the_lost(self) -> None:
        """Send a Hello to addresses whose life has ended: another may have begun there."""
        for peer in self._peers:
            if peer.life is None and peer.dealer is not None:
                self.greet(peer.dealer, answer=True)

    # --- peers to this pool ---------------------------------------------------------------

    def read(self, arrival: Arrival) -> Envelope:
        """Raises Malformed; Mismatch."""
        return decode(arrival.frames, self._meaning)

    def on_hello(
        self, arrival: Arrival, sender: Owner, hello: Hello, silent: bool
    ) -> list[Owner] | None:
        """Return the lives that have certainly ended; None if the sender is refused. `silent`: the
        known life of the sender's instance is silent."""
        dialled = self.dialler.by(arrival.path)
        if dialled is not None and sender.instance != dialled.instance:
            address = dialled.dealer.address
            text = f"{address} is the address of {sender.instance!r}, not {dialled.instance!r}"
            self.dialler.fail(dialled, PeerRefused(text))
            return None
        try:
            compatibility(self._pool.layout, hello.memory.layout)
        except LayoutMismatch as error:
            self.counters.mismatched += 1
            if hello.answer:  # so that the other side reports the mismatch too
                self.greet(arrival.path, answer=False)
            if dialled is not None:
                self.dialler.fail(dialled, error)
            return None
        if sender.instance == self._pool.owner.instance:
            self.counters.misdirected += 1
            return None
        try:
            over = self._peers.introduce(sender, hello, arrival.path, silent)
            peer = self._peers.add(sender.instance)
        except PeerRefused as error:
            self.counters.misdirected += 1
            if dialled is not None:
                dialled.refusal = error
            self._say(arrival.path, NotWelcome(to_failure(error)))
            return None
        if isinstance(arrival.path, bytes):
            peer.route = arrival.path
        if hello.answer:
            self.greet(arrival.path, answer=False)
        if dialled is not None:
            if peer.dealer is not None:
                self._sockets.hang_up(peer.dealer)
            peer.dealer = dialled.dealer
            self.dialler.succeed(dialled, sender)
        return over

    def on_not_welcome(self, arrival: Arrival, message: NotWelcome) -> None:
        """Note the refusal if this pool has dialled the sender; ignore it otherwise."""
        dialled = self.dialler.by(arrival.path)
        if dialled is not None:
            text = message.reason.message
            dialled.refusal = PeerRefused(f"{dialled.dealer.address} refuses: {text}")

    def on_mismatch(self, arrival: Arrival, mismatch: Mismatch) -> None:
        self.counters.mismatched += 1
        if mismatch.kind is Kind.MESSAGE:
            self._sockets.send(arrival.path, self._refusal, b"")
        dialled = self.dialler.by(arrival.path)
        if dialled is None:
            return
        name = dialled.instance
        error: MemserveError
        if mismatch.version != PROTOCOL_VERSION:
            error = PeerRefused(
                f"{name!r} uses version {mismatch.version} of the transfer protocol, "
                f"this pool version {PROTOCOL_VERSION}"
            )
        else:
            error = LayoutMismatch(
                f"{name!r} has KV of layout {mismatch.fingerprint.hex()}, which is not compatible "
                f"with this pool's layout {self._pool.layout.fingerprint}"
            )
        self.dialler.fail(dialled, error)

    def _say(self, path: Way, message: Hello | NotWelcome) -> bool:
        return self._sockets.send(path, self.header, encode(self._pool.owner, _ANY_LIFE, message))

    def _introduce_to_all(self) -> None:
        """Send a Hello on every connection, before messages that rely on its contents."""
        self._edition += 1
        for peer in self._peers:
            for path in (peer.dealer, peer.route):
                if path is not None:
                    self.greet(path, answer=False)
            life = peer.life
            if life is None or life.unix_route is None:
                continue
            if not self.greet(life.unix_route, answer=False):
                life.unix_route = None
