"""Contract of an instance's access to its pool and to the pools of peers.

Implementations: `memserve.transfer.kv_link` for a pool in this process, and
`memserve.vllm.remote_link` for a pool in a vLLM server's process.
"""

from __future__ import annotations

from typing import Protocol

from memserve.api.handoff import PoolPeer
from memserve.config import Caching
from memserve.engine.observer import PrefillObserver
from memserve.transfer.kv_link import Pushed
from memserve.types import Namespace, TokenArray


class PrefillStream(PrefillObserver, Protocol):
    """Observer of a prefill that sends the KV to a peer while it is computed."""

    async def deliver(self) -> Pushed:
        """Finish the transfer after the prefill: the peer's index gets the blocks. Raises the
        errors of `KVLink.push`."""

    def close(self) -> None:
        """Cancel the transfer unless it is delivered. Idempotent."""


class KVLink(Protocol):
    """An instance's pool, and transfers to the pools of peers. Used on one event loop."""

    @property
    def address(self) -> PoolPeer:
        """Instance id and endpoint of the pool, for peers."""

    @property
    def caching(self) -> Caching: ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def block_tokens(self) -> int: ...

    @property
    def kv(self) -> str:
        """Fingerprint of the KV in hex. Only pools with equal fingerprints exchange KV."""

    async def cached(self, tokens: TokenArray, namespace: Namespace) -> int:
        """Return the number of leading tokens with KV in this pool's index. Raises
        TransferError."""

    async def push(
        self, peer: PoolPeer, tokens: TokenArray, source: Namespace, target: Namespace
    ) -> Pushed:
        """Send a peer the blocks of `tokens` that this pool's index has and the peer's lacks.

        Raises TransferError, or an error of the peer's pool (OutOfBlocks).
        """

    async def stream(
        self, peer: PoolPeer, tokens: TokenArray, source: Namespace, target: Namespace
    ) -> PrefillStream:
        """Return the observer for a prefill of `tokens`, which sends completed blocks to a peer.
        Raises the errors of `meet`."""

    async def meet(self, peer: PoolPeer) -> None:
        """Connect to a peer unless connected. Raises TransferError, LayoutMismatch."""

    async def transport(self, peer: PoolPeer) -> str:
        """Return the name of the transport to a peer, after a round trip that moves no KV.
        Raises TransferError, LayoutMismatch."""

    async def until_lost(self, peer: PoolPeer) -> str:
        """Wait until a peer's instance is lost, by the pools' leases, or cannot be reached; return
        the reason."""

    async def run(self) -> None:
        """Tell peers that this event loop runs. Returns when KV can no longer be moved; the
        instance then has to end."""

    def forget(self, namespace: Namespace) -> None:
        """Drop all KV of a namespace now, and repeatedly for some minutes, for blocks that are
        pinned now or inserted later."""

    def close(self) -> None:
        """Stop all background work. Call before the pool is closed."""
