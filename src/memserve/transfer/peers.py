"""The instances that a pool knows: which life of each is current, and how to reach it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memserve.errors import LayoutMismatch, TransferError, UnknownPeer
from memserve.transfer.base import Completion, PoolRegions, Transport
from memserve.transfer.links import Dealer
from memserve.transfer.path import PathName, choose_transport
from memserve.transfer.process import ProcessTag, is_known_dead, is_visible
from memserve.transfer.regions import host_id
from memserve.transfer.shortcut import Neighbour, is_shortcut
from memserve.transfer.wire import Hello
from memserve.types import InstanceId, Owner


@dataclass(slots=True, eq=False)
class Life:
    """One life of a peer, as it introduced itself."""

    owner: Owner
    process: ProcessTag
    memory: PoolRegions
    hello: Hello
    transport: Transport | None = None  # None: no way to write into its memory
    obstacle: str = ""  # why there is none
    shortcut: Neighbour | None = None  # if it is on this host


@dataclass(slots=True, eq=False)
class Peer:
    """One instance."""

    instance: InstanceId
    dealer: Dealer | None = None  # our connection to it
    route: bytes | None = None  # its connection to us
    life: Life | None = None  # the current one, if it is there

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
        return self._by_instance.setdefault(instance, Peer(instance))

    def current(self, instance: InstanceId) -> Life:
        """Raises UnknownPeer."""
        peer = self._by_instance.get(instance)
        if peer is None:
            known = ", ".join(sorted(self._by_instance)) or "none"
            raise UnknownPeer(f"instance {instance!r} is not connected; connected: {known}")
        if peer.life is None:
            raise UnknownPeer(f"instance {instance!r} is not there now")
        return peer.life

    def is_current(self, owner: Owner) -> bool:
        peer = self._by_instance.get(owner.instance)
        return peer is not None and peer.life is not None and peer.life.owner == owner

    def introduce(self, owner: Owner, hello: Hello) -> list[Owner] | None:
        """A life says who it is, or that its memory changed. Returns the lives that this ends
        for certain; None if it is an earlier life than the one that is known."""
        peer = self.add(owner.instance)
        known = peer.life
        over: list[Owner] = []
        if known is not None and known.owner != owner:
            if owner.epoch < known.owner.epoch:
                return None
            self.drop(known.owner)
            if not is_visible(known.process) or is_known_dead(known.process):
                over.append(known.owner)
            else:
                self._watched[known.owner] = known.process
        elif known is not None and hello.edition < known.hello.edition:
            return over  # on its way for longer than a later one
        peer.life = Life(owner, hello.process, hello.memory, hello)
        if hello.memory.host == host_id() and is_shortcut(hello.shortcut):
            peer.life.shortcut = Neighbour(hello.shortcut)
        self._choose_transport(peer.life)
        return over

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

    def _choose_transport(self, life: Life) -> None:
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
