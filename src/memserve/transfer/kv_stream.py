"""`KVStream`: sends a prompt's KV into a peer's pool while the engine computes the KV.

The engine reports blocks that are ready, and the stream writes them at once: cached blocks when
the sequence is admitted, then the blocks of each chunk (`by-layer`: of each layer). The peer
publishes nothing before all blocks are written.

Blocks must be neither freed nor evicted while the transfer reads them. The sequence owns or pins
its blocks until the engine releases it; then the stream pins the cached ones. The stream keeps
superseded blocks, which the sequence replaced by equal blocks of the index. A preempted sequence
loses its memory: the stream cancels the transfer, and the next admission opens another one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress

from memserve.api.handoff import PoolPeer
from memserve.config import TransferMode
from memserve.errors import PoolError, TransferError, TransferTimeout
from memserve.pool.results import Match
from memserve.transfer.handles import OpenTransfer, Transfer
from memserve.transfer.mempool import MemPool
from memserve.transfer.session import DEADLINE
from memserve.types import Medium, Namespace, RefArray, TokenArray

log = logging.getLogger(__name__)

# Seconds that an open transfer may wait for the next block: longer than any prefill step. The
# engine ends every sequence, so the limit only matters after an error. When all KV is computed,
# `finish` allows DEADLINE for the rest.
STEP_SECONDS = 600.0


class KVStream:
    """Sends the KV of one prefill (a `PrefillObserver`). The event loop calls `finish` and
    `close`; the engine calls `begin`."""

    def __init__(
        self,
        pool: MemPool,
        mode: TransferMode,
        peer: PoolPeer,
        tokens: TokenArray,
        source: Namespace,
        target: Namespace,
        medium: Medium,
    ) -> None:
        """`peer`: connected. `source`, `target`: namespaces of the KV here and at the peer.
        `medium`: where the peer receives it."""
        block_tokens = pool.layout.block_tokens
        self.blocks = len(tokens) // block_tokens
        self.peer = peer
        self.tokens = tokens[: self.blocks * block_tokens]
        self.source = source
        self.target = target
        self._medium = medium
        self._pool = pool
        self._mode = mode
        self._lock = threading.Lock()  # guards the fields below
        self._attempt: _StreamAttempt | None = None  # the transfer of the last admission
        self._refusal: TransferError | PoolError | None = None  # why that admission has none
        self._closed = False

    def begin(self, refs: RefArray) -> _StreamAttempt | None:
        with self._lock:
            if self._closed or (self._attempt is not None and self._attempt.complete):
                return None
            self._attempt = self._refusal = None
            try:
                transfer = self._pool.open_transfer(
                    self.peer.id,
                    refs,
                    tokens=self.tokens,
                    namespace=self.target,
                    medium=self._medium,
                    idle_timeout=STEP_SECONDS,
                )
            except (TransferError, PoolError) as error:
                self._refusal = error
                return None
            self._attempt = _StreamAttempt(self, self._pool, self._mode, transfer)
            return self._attempt

    async def finish(self) -> int:
        """Commit when all KV is computed, and wait until the peer has published the blocks.
        Returns the number of blocks sent.

        Raises TransferError, or an error of the peer's pool (OutOfBlocks).
        """
        with self._lock:
            attempt, refusal = self._attempt, self._refusal
        if attempt is None:
            raise refusal or TransferError("nothing was computed")
        attempt.commit()
        try:
            async with asyncio.timeout(DEADLINE):
                await ended(attempt.transfer)
        except TimeoutError as error:
            text = f"KV did not reach {self.peer.id} within {DEADLINE:g} s"
            raise TransferTimeout(text) from error
        attempt.let_go()  # the transfer thread may not have run it yet
        attempt.transfer.result(0)
        return attempt.transfer.sent

    def close(self) -> None:
        """Cancel the transfer unless its Commit is sent. Idempotent."""
        with self._lock:
            self._closed = True
            attempt = self._attempt
        if attempt is not None:
            attempt.cancel()


class _StreamAttempt:
    """The transfer of one admission, and the blocks it reads (a `PrefillWatch`). Thread-safe."""

    def __init__(
        self, stream: KVStream, pool: MemPool, mode: TransferMode, transfer: OpenTransfer
    ) -> None:
        self.by_layer = mode == "by-layer"
        self.transfer = transfer
        self.complete = False  # every block is computed
        self._stream = stream
        self._pool = pool
        layers = pool.layout.layers
        cut = range(layers) if mode == "by-request" else ()
        self._pieces: list[range | None] = [range(layer, layer + 1) for layer in cut] or [None]
        self._lock = threading.Lock()  # guards the fields below
        self._unready = stream.blocks * layers  # (block, layer) pairs that are not computed
        self._wanted = False  # `commit` was called
        self._ended = False
        self._superseded: list[RefArray] = []
        self._pins: Match | None = None
        transfer.on_done(self.let_go)

    def ready(self, first: int, last: int, layer: int | None) -> None:
        pieces = self._pieces if layer is None else [range(layer, layer + 1)]
        layers = self._pool.layout.layers if layer is None else 1
        with self._lock, _unless_closed():
            if self._ended:  # the transfer failed, or the peer has all blocks
                return
            for piece in pieces:
                self.transfer.write(piece, first, last)
            self._unready -= (last - first) * layers
            self._commit_if_ready()

    def superseded(self, refs: RefArray) -> None:
        with self._lock:
            if not self._ended:
                self._superseded.append(refs)
                return
        self._pool.free_mem(refs)

    def released(self, computed: int) -> None:
        self.complete = computed == self._stream.blocks
        if not self.complete:
            self.cancel()
            return
        with self._lock, suppress(PoolError):  # the pool may be closed
            if not self._ended:
                self._pins = self._pool.match(self._stream.tokens, self._stream.source)

    def commit(self) -> None:
        """Commit when the last block is ready; on a GPU its `ready` call may still be pending."""
        with self._lock, _unless_closed():
            self._wanted = True
            self._commit_if_ready()

    def cancel(self) -> None:
        with _unless_closed():
            self.transfer.cancel()

    def _commit_if_ready(self) -> None:
        if self._wanted and not self._unready and not self._ended:
            self.transfer.commit()

    def let_go(self) -> None:
        """Release the blocks of the ended transfer. After a failure, writes in flight may still
        read them, into target blocks that are never published. Idempotent."""
        with self._lock:
            self._ended = True
            if self._pins is not None:
                self._pins.release()
            superseded, self._superseded = self._superseded, []
            with suppress(PoolError):  # the pool may be closed
                for refs in superseded:
                    self._pool.free_mem(refs)


def _unless_closed() -> suppress:
    """Ignore TransferError of a closed pool, which has failed its transfers already."""
    return suppress(TransferError)


async def ended(transfer: Transfer) -> None:
    """Wait for the transfer's end, with any outcome. Cancelling the wait cancels the transfer."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def on_done() -> None:
        loop.call_soon_threadsafe(ended.set)

    transfer.on_done(on_done)
    try:
        await ended.wait()
    except asyncio.CancelledError:
        transfer.cancel()
        raise
