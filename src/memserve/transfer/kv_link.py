"""An instance's pool and those of its peers, for the event loop: pushes of cached KV."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from time import monotonic

import numpy as np

from memserve.api.handoff import PoolPeer
from memserve.config import Caching, TransferMode
from memserve.errors import PeerLost, PoolError, TransferError, TransferTimeout, UnknownPeer
from memserve.transfer.conversion import meaning
from memserve.transfer.kv_stream import KVStream, ended
from memserve.transfer.mempool import MemPool
from memserve.transfer.session import LEASE
from memserve.types import InstanceId, Medium, Namespace, TokenArray

log = logging.getLogger(__name__)

_ALL: TokenArray = np.empty(0, dtype=np.int32)
# What has ended for us may still hold pins, or put KV into the index: a cancelled step or
# transfer on its last way. Longer than a step, and than a LEASE, after which the transfer of a
# silent peer is never committed.
LINGER_SECONDS = 2 * LEASE
# How long a peer counts as one that cannot be reached, once that was found out.
REFUSED_SECONDS = 1.0
MAX_REFUSED = 1024  # peers that are remembered as such


@dataclass(frozen=True, slots=True)
class Pushed:
    """Whole blocks of a prompt: those that went over, and those that the peer had already."""

    sent: int = 0
    already_present: int = 0


class PoolLink:
    """Belongs to one event loop; the pool does the rest on threads of its own."""

    def __init__(
        self, pool: MemPool, address: PoolPeer, caching: Caching, mode: TransferMode
    ) -> None:
        """`address` is where `pool` is served."""
        # A pool without HBM is a vLLM server's, and so are those that hold the same KV.
        self._medium = Medium.HBM if pool.extents(Medium.HBM) else Medium.DRAM
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
        """What the bytes of a block mean, as hex."""
        return meaning(self._pool.layout).hex()

    async def cached(self, tokens: TokenArray, namespace: Namespace) -> int:
        """How many leading tokens have KV in our index."""
        with self._pool.match(tokens, namespace) as match:
            return match.tokens

    async def push(
        self, peer: PoolPeer, tokens: TokenArray, source: Namespace, target: Namespace
    ) -> Pushed:
        """Give a peer what our index has of `tokens` and its index lacks.

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
        """An observer for the prefill of `tokens`, which sends what is ready of it to a peer.

        Its owner calls `deliver` when all is computed, and `close` in any case. Raises
        TransferError where the peer cannot be reached.
        """
        await self.meet(peer)
        return LinkedStream(self, self._pool, self._mode, peer, tokens, source, target)

    async def meet(self, peer: PoolPeer) -> None:
        """Connect to a peer, if that has not been done. Raises TransferError, LayoutMismatch.

        Once for all who ask; and one that could not be reached a moment ago is not asked again: to
        find that out takes seconds, and a thread.
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

    async def run(self) -> None:
        """Never returns: whoever owns the pool watches its threads."""
        await asyncio.Event().wait()

    async def transport(self, peer: PoolPeer) -> str:
        """The name of what KV would go to a peer by, after a round trip to it that moves none.
        Raises TransferError."""
        await self.meet(peer)
        try:
            return await asyncio.to_thread(self._pool.transport_to, peer.id)
        except (PeerLost, UnknownPeer):
            self.lost(peer)
            raise

    def lost(self, peer: PoolPeer) -> None:
        """It is to be met anew the next time."""
        self._peers.pop(peer.id, None)

    def forget(self, namespace: Namespace) -> None:
        """Drop all KV of a namespace, and a while later what was pinned or came since."""
        self._pool.delete(_ALL, namespace)

        def forget_again() -> None:
            self._lingering.discard(handle)
            self._pool.delete(_ALL, namespace)

        handle = asyncio.get_running_loop().call_later(LINGER_SECONDS, forget_again)
        self._lingering.add(handle)

    def close(self) -> None:
        """The pool is about to be closed."""
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
                medium=self._medium,
            )
            await ended(transfer)
            transfer.result(0)
            return Pushed(transfer.sent, len(match.refs) - transfer.sent)


class LinkedStream(KVStream):
    """The stream of a link, which sends again what did not go over the first time."""

    def __init__(
        self,
        link: PoolLink,
        pool: MemPool,
        mode: TransferMode,
        peer: PoolPeer,
        tokens: TokenArray,
        source: Namespace,
        target: Namespace,
    ) -> None:
        super().__init__(pool, mode, peer, tokens, source, target)
        self._link = link

    async def deliver(self) -> Pushed:
        """Publish at the peer what was computed. Raises as `PoolLink.push`."""
        try:
            sent = await self.finish()
            return Pushed(sent, self.blocks - sent)
        except (PeerLost, UnknownPeer, TransferTimeout):
            self._link.lost(self.peer)
            raise
        except (TransferError, PoolError) as error:
            # The peer had no room then, or the sequence lost its memory.
            log.info("KV was not sent to %s while it was computed: %s", self.peer.id, error)
        return await self._link.push(self.peer, self.tokens, self.source, self.target)
