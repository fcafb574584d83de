"""`Peers`: the instances that a pool knows, the current life of each, and the way to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from memserve.clock import MonotonicClock
from memserve.errors import LayoutMismatch, PeerRefused, TransferError, UnknownPeer
from memserve.transfer.base import Completion, PoolRegions, Transport
from memserve.transfer.host import ProcessTag, host_id, is_known_dead, is_visible
from memserve.transfer.regions import PathName, choose_transport
from memserve.transfer.sockets import Dealer, Way
from memserve.transfer.unix_socket import UnixAddress, is_unix_socket
from memserve.transfer.wire import Hello
from memserve.types import InstanceId, Owner

# Maximum of instances that a pool knows at a time: far more than a cluster has, and less than
# MAX_OWNERS.
MAX_PEERS = 4096
# Remembered connections of one life: the current one, and those that broke recently.
ROUTES = 4
_clock = MonotonicClock()


@dataclass(slots=True, eq=False)
class PeerSession:
    """One life of a peer (an instance and an epoch), as its Hello described it."""

    owner: Owner
    process: ProcessTag
    memory: PoolRegions
    hello: Hello
    unix_address: UnixAddress | None = None  # its socket, if it is on this host
    # ROUTER names of its last connections to this pool on which a Hello came.
    routes: deque[bytes] = field(default_factory=lambda: deque(maxlen=ROUTES))
    transport: Transport | None = None  # None: no transport reaches its memory
    obstacle: str = ""  # why `transport` is None
    unix_route: UnixAddress | None = None  # `unix_address`; None after a datagram failed
    silent: bool = False  # no message for a LEASE, as of this pool's last beat
    stalled: bool = False  # the `stalled` of its last Beat

    @property
    def lost(self) -> bool:
        """Whether callers must stop waiting for this life's instance."""
        return self.silent or self.stalled


@dataclass(slots=True, eq=False)
class Peer:
    """One instance."""

    instance: InstanceId
    dealer: Dealer | None = None  # connection from this pool
    route: bytes | None = None  # connection to this pool: its name in the ROUTER
    life: PeerSession | None = None  # the current life; None: not connected

    @property
    def path(self) -> Dealer | bytes | None:
        return self.dealer or self.route


class Peers:
    """Known instances and their lives. A replaced life whose process may still run is *watched*: it
    may still write here, so its blocks are not reused before its process has ended."""

    def __init__(self, transports: Sequence[Transport], path: PathName) -> None:
        """`transports`: the caller may add to the list later."""
        self._transports = transports
        self._path = path
        self._by_instance: dict[InstanceId, Peer] = {}
        self._watched: dict[Owner, ProcessTag] = {}
        self._busy_since: dict[str, float] = {}  # last poll, by transport with tickets in flight

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._by_instance.values()))

    def get(self, instance: InstanceId) -> Peer | None:
        return self._by_instance.get(instance)

    def add(self, instance: InstanceId) -> Peer:
        """Return the peer, added if it is new. Raises PeerRefused for more than MAX_PEERS."""
        peer = self._by_instance.get(instance)
        if peer is None:
            if len(self._by_instance) >= MAX_PEERS:
                raise PeerRefused(f"this pool knows {MAX_PEERS} instances, the maximum")
            peer = self._by_instance[instance] = Peer(instance)
        return peer

    def known(self) -> set[Owner]:
        """Return the current lives."""
        return {peer.life.owner for peer in self if peer.life is not None}

    def current(self, instance: InstanceId) -> PeerSession:
        """Return the current life of an instance. Raises UnknownPeer."""
        peer = self._by_instance.get(instance)
        if peer is None:
            known = ", ".join(sorted(self._by_instance)) or "none"
            raise UnknownPeer(f"instance {instance!r} is not connected; connected: {known}")
        if peer.life is None:
            raise UnknownPeer(f"instance {instance!r} was connected and is not now")
        return peer.life

    def is_from(self, owner: Owner, way: Way) -> bool:
        """Return whether `owner` is a current life that has said Hello on `way`. The kernel names
        the socket that a datagram came from, ZeroMQ the connection of a frame."""
        peer = self._by_instance.get(owner.instance)
        if peer is None or peer.life is None or peer.life.owner != owner:
            return False
        if isinstance(way, UnixAddress):
            return way == peer.life.unix_address
        return way in peer.life.routes if isinstance(way, bytes) else way is peer.dealer

    def introduce(self, owner: Owner, hello: Hello, way: Way, silent: bool) -> list[Owner]:
        """Take a Hello of a new life, or of a known one whose memory changed. `silent`: the known
        life of this instance is silent. Returns the lives that have certainly ended.

        Raises PeerRefused while another life of the instance is heard: messages do not show which
        of two lives is the later one, so the current life stays.
        """
        peer = self.add(owner.instance)
        known = peer.life
        over: list[Owner] = []
        if known is not None and known.owner != owner:
            over = self._replace(known, peer, way, silent)
            known = None
        if known is not None and hello.edition < known.hello.edition:
            life = known  # a later Hello overtook this one
        else:
            life = peer.life = PeerSession(owner, hello.process, hello.memory, hello)
            if known is not None:
                life.routes = known.routes
                life.stalled = known.stalled  # until its next Beat
            if hello.memory.host == host_id() and is_unix_socket(hello.unix_socket):
                life.unix_address = life.unix_route = UnixAddress(hello.unix_socket)
            self._choose_transport(life)
        self._watched.pop(owner, None)
        if isinstance(way, bytes) and way not in life.routes:
            life.routes.append(way)
        return over

    def _replace(self, known: PeerSession, peer: Peer, way: Way, silent: bool) -> list[Owner]:
        """Drop a known life for another one; return it in a list if it has certainly ended."""
        dead = is_known_dead(known.process)
        # Another process answers at the known life's address.
        moved_in = peer.dealer is not None and way is peer.dealer
        if not (dead or moved_in or silent):
            raise PeerRefused(
                f"another life of {known.owner.instance!r} (epoch {known.owner.epoch}) is connected"
            )
        self.drop(known.owner)
        if is_visible(known.process) and not dead:
            self._watched[known.owner] = known.process
            return []
        # A silent life on another host may still have writes under way.
        return [known.owner] if dead or moved_in else []

    def ended(self) -> list[Owner]:
        """Return the lives whose processes have ended since the last call."""
        lives = dict(self._watched)
        lives.update((peer.life.owner, peer.life.process) for peer in self if peer.life is not None)
        over = [owner for owner, process in lives.items() if is_known_dead(process)]
        for owner in over:
            self.forget(owner)
        return over

    def sees(self, owner: Owner) -> bool:
        """Return whether `ended` will report the end of this life."""
        peer = self._by_instance.get(owner.instance)
        if peer is not None and peer.life is not None and peer.life.owner == owner:
            return is_visible(peer.life.process)
        return owner in self._watched

    def drop(self, owner: Owner) -> None:
        """Stop writing to this life."""
        for transport in self._transports:
            transport.remove_peer(owner)

    def forget(self, owner: Owner) -> None:
        """Forget a life that has ended."""
        self.drop(owner)
        self._watched.pop(owner, None)
        peer = self._by_instance.get(owner.instance)
        if peer is not None and peer.life is not None and peer.life.owner == owner:
            peer.life = None
            peer.route = None
            if peer.dealer is None:
                del self._by_instance[owner.instance]

    def leave(self, owner: Owner) -> None:
        """Drop a life's messages until its next Hello."""
        peer = self._by_instance.get(owner.instance)
        if peer is None or peer.life is None or peer.life.owner != owner:
            return
        process = peer.life.process
        self.forget(owner)
        if is_visible(process):
            self._watched[owner] = process

    def sever(self, owner: Owner) -> None:
        """Replace the transport's connection to a life, so that no buffered byte can still be
        written."""
        self.drop(owner)
        peer = self._by_instance.get(owner.instance)
        if peer is not None and peer.life is not None and peer.life.owner == owner:
            self._choose_transport(peer.life)

    def poll(self) -> list[tuple[Transport, Completion]]:
        """Return the writes that have ended, on any transport."""
        ended: list[tuple[Transport, Completion]] = []
        for transport in self._transports:
            if not transport.in_flight:
                continue
            begin = self._busy_since.pop(transport.name, _clock.now())
            ended += [(transport, completion) for completion in transport.poll()]
            now = _clock.now()
            transport.counters.seconds += now - begin
            if transport.in_flight:
                self._busy_since[transport.name] = now
        return ended

    @property
    def poll_interval(self) -> float | None:
        """Seconds until the next `poll`; None while no write is in flight."""
        busy = [each.poll_interval for each in self._transports if each.in_flight]
        return min(busy) if busy else None

    def _choose_transport(self, life: PeerSession) -> None:
        ours = {transport.name: transport for transport in self._transports}
        offers = {offer.transport: offer.description for offer in life.hello.offers}
        life.transport = None
        try:
            name = choose_transport(ours.keys(), offers.keys(), life.memory, self._path)
            ours[name].add_peer(life.owner, life.memory, offers[name])
        except (TransferError, LayoutMismatch) as error:
            life.obstacle = str(error)
        else:
            life.transport = ours[name]
