"""`PoolLink`: asyncio interface of a pool's transfers: connects to peers, pushes and streams KV."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from time import monotonic

import msgspec
import numpy as np

from memserve.api.handoff import PoolPeer
from memserve.api.status import LinkTotals, PoolTotals
from memserve.config import Caching, TransferMode
from memserve.errors import PeerLost, PoolError, TransferError, TransferTimeout, UnknownPeer
from memserve.transfer.conversion import meaning
from memserve.transfer.kv_stream import KVStream, ended
from memserve.transfer.mempool import MemPool
from memserve.transfer.session import HEARTBEAT, LEASE
from memserve.types import InstanceId, Medium, Namespace, TokenArray

log = logging.getLogger(__name__)

_ALL: TokenArray = np.empty(0, dtype=np.int32)
# Seconds between the first two deletes of `PoolLink.forget`. A cancelled step or transfer may still
# hold pins, or insert KV; this is longer than a step, and longer than a LEASE, after which the
# transfer of a silent peer is not committed any more. On an overloaded machine both may take
# longer: LINGER_DELETES further deletes follow, at doubled intervals.
LINGER_SECONDS = 2 * LEASE
LINGER_DELETES = 5
# Seconds for which `meet` repeats a peer's last error instead of connecting again.
REFUSED_SECONDS = 1.0
MAX_REFUSED = 1024  # peers whose last error is remembered
LOOK_SECONDS = 0.1  # between looks at a peer's lease in `until_lost`


@dataclass(frozen=True, slots=True)
class Pushed:
    """Numbers of whole blocks of a prompt: sent, and already in the peer's index. `transport`:
    how; "" if none were, or it is not known."""

    sent: int = 0
    already_present: int = 0
    transport: str = ""


def totals_of(pool: MemPool) -> PoolTotals:
    """Return a pool's totals for the instance's statistics. Does not wait for other threads."""
    totals = msgspec.convert(pool.stats(), PoolTotals, from_attributes=True)
    links = {
        name: LinkTotals(counted.ended, counted.bytes_moved, counted.pieces, counted.seconds)
        for name, counted in pool.link_counters().items()
    }
    return msgspec.structs.replace(totals, quarantined=pool.quarantined_blocks, links=links)


class PoolLink:
    """Transfers of one pool for one event loop; the pool runs them on its own threads."""

    def __init__(
        self, pool: MemPool, address: PoolPeer, caching: Caching, mode: TransferMode
    ) -> None:
        """`address`: where `pool` is served."""
        # Only a vLLM server's pool has no HBM; its peers, with equal KV, are vLLM servers, too.
        self._hbm = bool(pool.extents(Medium.HBM))
        self._hbm_mappable = all(extent.segment is not None for extent in pool.extents(Medium.HBM))
        self.address = address
        self.caching = caching
        self._pool = pool
        self._mode = mode
        self._peers: dict[InstanceId, str] = {}
        self._meetings: dict[PoolPeer, asyncio.Task[None]] = {}
        self._refused: dict[PoolPeer, tuple[float, TransferError | PoolError]] = {}
        self._lingering: set[asyncio.TimerHandle] = set()

    @property
    def block_bytes(self) -> int:
        return self._pool.layout.block_bytes

    @property
    def block_tokens(self) -> int:
        return self._pool.layout.block_tokens

    @property
    def kv(self) -> str:
        """The fingerprint of the KV: SHA-256 over everything but its placement, as hex."""
        return meaning(self._pool.layout).hex()

    async def cached(self, tokens: TokenArray, namespace: Namespace) -> int:
        """Return the number of leading tokens whose KV is in the local index."""
        with self._pool.match(tokens, namespace) as match:
            return match.tokens

    async def push(
        self, peer: PoolPeer, tokens: TokenArray, source: Namespace, target: Namespace
    ) -> Pushed:
        """Send the cached KV of `tokens` to a peer, without blocks that the peer's index has.

        Raises TransferError, or an error of the peer's pool (OutOfBlocks).
        """
        try:
            return await self._push(peer, tokens, source, target)
        except (PeerLost, UnknownPeer):
            self.lost(peer)
            raise

    async def stream(
        self, peer: PoolPeer, tokens: TokenArray, source: Namespace, target: Namespace
    ) -> LinkedStream:
        """Return an observer for the prefill of `tokens`, which sends ready KV to a peer.

        The caller calls `deliver` when all KV is computed, and `close` in any case. Raises as
        `meet`.
        """
        await self.meet(peer)
        medium = self.medium_at(peer)
        return LinkedStream(self, self._pool, self._mode, peer, tokens, source, target, medium)

    async def meet(self, peer: PoolPeer) -> None:
        """Connect to a peer unless it is connected. Raises TransferError, LayoutMismatch.

        Concurrent calls share one attempt. For REFUSED_SECONDS after a failure, calls raise the
        same error at once: an attempt can take seconds and occupies a thread.
        """
        if self._peers.get(peer.id) == peer.address:
            return
        until, error = self._refused.get(peer, (0.0, None))
        if error is not None and monotonic() < until:
            raise error.with_traceback(None)
        meeting = self._meetings.get(peer)
        if meeting is None:
            meeting = self._meetings[peer] = asyncio.ensure_future(self._meet(peer))
            meeting.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(meeting)

    async def _meet(self, peer: PoolPeer) -> None:
        try:
            await asyncio.to_thread(self._pool.connect, peer.id, peer.address)
        except (TransferError, PoolError) as error:
            if len(self._refused) >= MAX_REFUSED:
                self._refused.clear()
            self._refused[peer] = monotonic() + REFUSED_SECONDS, error
            raise
        else:
            self._refused.pop(peer, None)
            self._peers[peer.id] = peer.address
        finally:
            del self._meetings[peer]

    async def until_lost(self, peer: PoolPeer) -> str:
        """Wait until a peer's instance is lost; return the reason. The instance is lost if its pool
        cannot be reached, is silent for a LEASE, reports a stalled process, or has restarted."""
        try:
            await self.meet(peer)
        except (TransferError, PoolError) as error:
            if not self._pool.hears(peer.id):  # the peer may have connected to this pool
                return str(error)
        life = self._pool.heard_life(peer.id)
        # Polled, because the transfer thread renews the lease.
        while life is not None and self._pool.heard_life(peer.id) == life:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_SECONDS)
        self.lost(peer)
        return f"{peer.id} is silent"

    async def run(self) -> None:
        """Tell peers that this event loop runs, until cancelled. The pool's owner watches the
        pool's threads."""
        while True:
            self._pool.vouch()
            await asyncio.sleep(HEARTBEAT)

    async def transport(self, peer: PoolPeer) -> str:
        """Return the name of the transport to a peer, after a round trip without KV.
        Raises TransferError, LayoutMismatch."""
        await self.meet(peer)
        try:
            name = await asyncio.to_thread(self._pool.transport_to, peer.id)
            if not self._pool.hears(peer.id):
                raise PeerLost(f"{peer.id} serves no calls")
            return name
        except (PeerLost, UnknownPeer):
            self.lost(peer)
            raise

    def medium_at(self, peer: PoolPeer) -> Medium:
        """Return where a peer, which is connected, receives KV: in HBM, or in DRAM if it has no
        HBM or keeps it on a GPU that its transport does not reach."""
        reached = self._hbm_mappable or self.transport_name(peer) != "shm"
        return Medium.HBM if self._hbm and reached else Medium.DRAM

    def transport_name(self, peer: PoolPeer) -> str:
        """Return the name of the transport to a peer, without asking it; "" if it has gone."""
        try:
            return self._pool.transport_to(peer.id, ask=False)
        except (TransferError, PoolError):
            return ""

    def lost(self, peer: PoolPeer) -> None:
        """Mark a peer as disconnected: the next `meet` connects again."""
        self._peers.pop(peer.id, None)

    def forget(self, namespace: Namespace) -> None:
        """Delete a namespace's KV now, and LINGER_DELETES times later, for KV that is pinned now or
        inserted later."""
        self._pool.delete(_ALL, namespace)
        self._forget_later(namespace, LINGER_SECONDS, LINGER_DELETES)

    def _forget_later(self, namespace: Namespace, seconds: float, times: int) -> None:
        def forget_again() -> None:
            self._lingering.discard(handle)
            self._pool.delete(_ALL, namespace)
            if times > 1:
                self._forget_later(namespace, 2 * seconds, times - 1)

        handle = asyncio.get_running_loop().call_later(seconds, forget_again)
        self._lingering.add(handle)

    def close(self) -> None:
        """Cancel timers and connection attempts, before the pool closes."""
        for handle in self._lingering:
            handle.cancel()
        self._lingering.clear()
        for meeting in list(self._meetings.values()):
            meeting.cancel()

    async def _push(
        self, peer: PoolPeer, tokens: TokenArray, source: Namespace, target: Namespace
    ) -> Pushed:
        await self.meet(peer)
        with self._pool.match(tokens, source) as match:
            if not match.tokens:
                return Pushed()
            transfer = self._pool.transfer_with_insert(
                peer.id,
                tokens[: match.tokens],
                match.refs,
                namespace=target,
                mode=self._mode,
                medium=self.medium_at(peer),
            )
            await ended(transfer)
            transfer.result(0)
            present = len(match.refs) - transfer.sent
            return Pushed(transfer.sent, present, self.transport_name(peer))


class LinkedStream(KVStream):
    """A KVStream of a PoolLink that falls back to a push of the cached KV."""

    def __init__(
        self,
        link: PoolLink,
        pool: MemPool,
        mode: TransferMode,
        peer: PoolPeer,
        tokens: TokenArray,
        source: Namespace,
        target: Namespace,
        medium: Medium,
    ) -> None:
        super().__init__(pool, mode, peer, tokens, source, target, medium)
        self._link = link

    async def deliver(self) -> Pushed:
        """Publish the computed KV at the peer. Raises as `PoolLink.push`."""
        try:
            sent = await self.finish()
            return Pushed(sent, self.blocks - sent, self._link.transport_name(self.peer))
        except (PeerLost, UnknownPeer, TransferTimeout):
            self._link.lost(self.peer)
            raise
        except (TransferError, PoolError) as error:
            # The peer had no free blocks, or the sequence was preempted: `push` sends the KV.
            log.info("KV was not sent to %s while it was computed: %s", self.peer.id, error)
        return await self._link.push(self.peer, self.tokens, self.source, self.target)
