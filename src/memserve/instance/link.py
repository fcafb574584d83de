"""The way from an instance's calls to its pool and to those of its peers: the contract.

The pool may be in this process (`memserve.transfer.kv_link`) or in that of a vLLM server
(`memserve.vllm.remote_link`).
"""

from __future__ import annotations

from typing import Protocol

from memserve.api.handoff import PoolPeer
from memserve.config import Caching
from memserve.engine.observer import PrefillObserver
from memserve.transfer.kv_link import Pushed
from memserve.types import Namespace, TokenArray


class PrefillStream(PrefillObserver, Protocol):
    """A prompt's KV on its way to a peer while it is computed."""

    async def deliver(self) -> Pushed:
        """All is computed: have it published at the peer. Raises as `KVLink.push`."""

    def close(self) -> None:
        """Cancel what is not on its way for good. Idempotent."""


class KVLink(Protocol):
    """Belongs to one event loop."""

    @property
    def address(self) -> PoolPeer:
        """Where the pool is served."""

    @property
    def caching(self) -> Caching: ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def block_tokens(self) -> int: ...

    @property
    def kv(self) -> str:
        """What the bytes of a block mean: pools in which it differs have nothing to exchange."""

    async def cached(self, tokens: TokenArray, namespace: Namespace) -> int:
        """How many leading tokens have KV in our index. Raises TransferError."""

    async def push(
        self, peer: PoolPeer, tokens: TokenArray, source: Namespace, target: Namespace
    ) -> Pushed:
        """Give a peer what our index has of `tokens` and its index lacks.

        Raises TransferError, or an error of the peer's pool (OutOfBlocks).
        """

    async def stream(
        self, peer: PoolPeer, tokens: TokenArray, source: Namespace, target: Namespace
    ) -> PrefillStream:
        """The observer for a prefill of `tokens`, which sends what is ready of it to a peer.
        Raises TransferError where the peer cannot be reached."""

    async def meet(self, peer: PoolPeer) -> None:
        """Connect to a peer, if that has not been done. Raises TransferError."""

    async def transport(self, peer: PoolPeer) -> str:
        """The name of what KV would go to a peer by, after a round trip to it that moves none.
        Raises TransferError."""

    async def run(self) -> None:
        """Returns when nothing can be moved any more, and the instance is of no use."""

    def forget(self, namespace: Namespace) -> None:
        """Drop all KV of a namespace, and a while later what was pinned or came since."""

    def close(self) -> None:
        """The pool is about to be closed."""
