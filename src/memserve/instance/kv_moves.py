"""Bytes of KV that an instance has exchanged with each other instance."""

from __future__ import annotations

from copy import copy

from memserve.api.status import MAX_MOVE_PEERS, PeerMoves
from memserve.types import InstanceId


class KVMoves:
    """Counters by the other instance, of at most MAX_MOVE_PEERS. One event loop's."""

    def __init__(self) -> None:
        self._by_peer: dict[InstanceId, PeerMoves] = {}

    def received(self, peer: InstanceId, size: int) -> None:
        """Count `size` bytes that came from `peer`."""
        if size and (moves := self._of(peer)) is not None:
            moves.received += size

    def returned(self, peer: InstanceId, size: int) -> None:
        """Count `size` bytes given back to `peer`."""
        if size and (moves := self._of(peer)) is not None:
            moves.returned += size

    def totals(self) -> dict[InstanceId, PeerMoves]:
        return {peer: copy(moves) for peer, moves in self._by_peer.items()}

    def _of(self, peer: InstanceId) -> PeerMoves | None:
        known = self._by_peer.get(peer)
        if known is None and len(self._by_peer) < MAX_MOVE_PEERS:
            known = self._by_peer[peer] = PeerMoves()
        return known
