"""The instances that a pool knows: which life of each is current, and how to reach it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from memserve.errors import LayoutMismatch, PeerRefused, TransferError, UnknownPeer
from memserve.transfer.base import Completion, PoolRegions, Transport
from memserve.transfer.host import ProcessTag, is_known_dead, is_visible
from memserve.transfer.regions import PathName, choose_transport, host_id
from memserve.transfer.sockets import Dealer, Way
from memserve.transfer.unix_socket import UnixAddress, is_unix_socket
from memserve.transfer.wire import Hello
from memserve.types import InstanceId, Owner

# Instances that a pool knows at a time: more than any cluster has, and fewer than there are numbers
# for owners.
MAX_PEERS = 4096
# Connections that one life has to us: one, and those that broke a moment ago.
ROUTES = 4


@dataclass(slots=True, eq=False)
class PeerSession:
    """One life of a peer, as it introduced itself."""

    owner: Owner
    process: ProcessTag
    memory: PoolRegions
    hello: Hello
    unix_address: UnixAddress | None = None  # its socket, if it is on this host
    # Its connections to us, on which it has said who it is; the last few.
    routes: deque[bytes] = field(default_factory=lambda: deque(maxlen=ROUTES))
    transport: Transport | None = None  # None: no way to write into its memory
    obstacle: str = ""  # why there is none
    unix_route: UnixAddress | None = None  # `unix_address`, while it takes what is sent there


@dataclass(slots=True, eq=False)
class Peer:
    """One instance."""

    instance: InstanceId
    dealer: Dealer | None = None  # our connection to it
    route: bytes | None = None  # its connection to us
    life: PeerSession | None = None  # the current one, if it is there

    @property
    def path(self) -> Dealer | bytes | None:
        return self.dealer or self.route


class Peers:
    """Follows lives. A life whose process may still run, though a later one has taken its
    name, is watched: what it writes must not land in blocks of others."""

    def __init__(self, transports: Sequence[Transport], path: PathName) -> None:
        """`transports`: shared with whoever adds one later."""
        self._transports = transports
        self._path = path
        self._by_instance: dict[InstanceId, Peer] = {}
        self._watched: dict[Owner, ProcessTag] = {}

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._by_instance.values()))

    def get(self, instance: InstanceId) -> Peer | None:
        return self._by_instance.get(instance)

    def add(self, instance: InstanceId) -> Peer:
        """Raises PeerRefused where there are too many."""
        peer = self._by_instance.get(instance)
        if peer is None:
            if len(self._by_instance) >= MAX_PEERS:
                raise PeerRefused(f"{MAX_PEERS} instances are known here, and no more can be")
            peer = self._by_instance[instance] = Peer(instance)
        return peer

    def known(self) -> set[Owner]:
        """The current lives."""
        return {peer.life.owner for peer in self if peer.life is not None}

    def current(self, instance: InstanceId) -> PeerSession:
        """Raises UnknownPeer."""
        peer = self._by_instance.get(instance)
        if peer is None:
            known = ", ".join(sorted(self._by_instance)) or "none"
            raise UnknownPeer(f"instance {instance!r} is not connected; connected: {known}")
        if peer.life is None:
            raise UnknownPeer(f"instance {instance!r} is not there now")
        return peer.life

    def is_from(self, owner: Owner, way: Way) -> bool:
        """Whether a current life has introduced itself on the way that a message of its came.
        The kernel says whose socket a datagram is from, and ZeroMQ which connection a frame."""
        peer = self._by_instance.get(owner.instance)
        if peer is None or peer.life is None or peer.life.owner != owner:
            return False
        if isinstance(way, UnixAddress):
            return way == peer.life.unix_address
        return way in peer.life.routes if isinstance(way, bytes) else way is peer.dealer

    def introduce(self, owner: Owner, hello: Hello, way: Way, silent: bool) -> list[Owner]:
        """A life says who it is, or that its memory changed. `silent`: nothing is heard of the
        life that is known by this name. Returns the lives that this ends for certain.

        Raises PeerRefused while another life of its name is there: which of two is the later one
        nobody can tell from what they say, so the one that is heard of keeps the name.
        """
        peer = self.add(owner.instance)
        known = peer.life
        over: list[Owner] = []
        if known is not None and known.owner != owner:
            over = self._replace(known, peer, way, silent)
            known = None
        if known is not None and hello.edition < known.hello.edition:
            life = known  # it was on its way for longer than a later one
        else:
            life = peer.life = PeerSession(owner, hello.process, hello.memory, hello)
            if known is not None:
                life.routes = known.routes
            if hello.memory.host == host_id() and is_unix_socket(hello.unix_socket):
                life.unix_address = life.unix_route = UnixAddress(hello.unix_socket)
            self._choose_transport(life)
        self._watched.pop(owner, None)
        if isinstance(way, bytes) and way not in life.routes:
            life.routes.append(way)
        return over

    def _replace(self, known: PeerSession, peer: Peer, way: Way, silent: bool) -> list[Owner]:
        """Another life takes the place of a known one; returns that one if it is over."""
        dead = is_known_dead(known.process)
        # Somebody else answers where it listened, so it does so no more.
        moved_in = peer.dealer is not None and way is peer.dealer
        if not (dead or moved_in or silent):
            raise PeerRefused(
                f"another {known.owner.instance!r} is here (epoch {known.owner.epoch}), and alive"
            )
        self.drop(known.owner)
        if is_visible(known.process) and not dead:
            self._watched[known.owner] = known.process
            return []
        # Of a life on another host that is only silent, writes may still be under way.
        return [known.owner] if dead or moved_in else []

    def ended(self) -> list[Owner]:
        """Lives whose processes have ended since the last call."""
        lives = dict(self._watched)
        lives.update((peer.life.owner, peer.life.process) for peer in self if peer.life is not None)
        over = [owner for owner, process in lives.items() if is_known_dead(process)]
        for owner in over:
            self.forget(owner)
        return over

    def sees(self, owner: Owner) -> bool:
        """Whether `ended` would tell of the end of this life."""
        peer = self._by_instance.get(owner.instance)
        if peer is not None and peer.life is not None and peer.life.owner == owner:
            return is_visible(peer.life.process)
        return owner in self._watched

    def drop(self, owner: Owner) -> None:
        """Do not write to this life any more."""
        for transport in self._transports:
            transport.remove_peer(owner)

    def forget(self, owner: Owner) -> None:
        """A life is over."""
        self.drop(owner)
        self._watched.pop(owner, None)
        peer = self._by_instance.get(owner.instance)
        if peer is not None and peer.life is not None and peer.life.owner == owner:
            peer.life = None
            peer.route = None
            if peer.dealer is None:
                del self._by_instance[owner.instance]

    def leave(self, owner: Owner) -> None:
        """Do not talk to a life before it has introduced itself again."""
        peer = self._by_instance.get(owner.instance)
        if peer is None or peer.life is None or peer.life.owner != owner:
            return
        process = peer.life.process
        self.forget(owner)
        if is_visible(process):
            self._watched[owner] = process

    def sever(self, owner: Owner) -> None:
        """Forget the connection that a life's writes came through, and begin another."""
        self.drop(owner)
        peer = self._by_instance.get(owner.instance)
        if peer is not None and peer.life is not None and peer.life.owner == owner:
            self._choose_transport(peer.life)

    def poll(self) -> list[tuple[Transport, Completion]]:
        """Writes that have ended, on any transport."""
        return [
            (transport, completion)
            for transport in self._transports
            if transport.in_flight
            for completion in transport.poll()
        ]

    @property
    def poll_interval(self) -> float | None:
        """Seconds until the next `poll`; None while nothing is in flight."""
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
