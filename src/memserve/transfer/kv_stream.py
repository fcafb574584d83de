"""A prompt's KV on its way into a peer's pool while it is still being computed.

The engine says which blocks are ready, and each goes at once: cached ones when the sequence is
admitted, then those of each chunk, with `by-layer` those of each layer. Nothing is visible at
the peer before all is there.

Blocks must be neither freed nor evicted while they are read. Until the sequence lets go they are
its own, or pinned by it; those that another sequence's replaced are kept here; and when it lets
go, the stream pins what is in the index. A sequence that is preempted takes its memory with it:
the transfer is cancelled, and the next admission opens another one.
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
from memserve.transfer.mempool import MemPool
from memserve.transfer.pending import OpenTransfer, Transfer
from memserve.transfer.session import DEADLINE
from memserve.types import Namespace, RefArray, TokenArray

log = logging.getLogger(__name__)

# How long a transfer is left open without a block to send. The engine ends every sequence, so
# this only bounds what an error could hold: longer than any step of a prefill takes. Once all is
# computed, what is under way has DEADLINE, as a push without progress has.
STEP_SECONDS = 600.0


class KVStream:
    """Observes one prefill (`PrefillObserver`). `finish` and `close` belong to the event loop,
    the rest to the engine."""

    def __init__(
        self,
        pool: MemPool,
        mode: TransferMode,
        peer: PoolPeer,
        tokens: TokenArray,
        source: Namespace,
        target: Namespace,
    ) -> None:
        """To a peer that is connected. `source`, `target`: namespaces here and there."""
        block_tokens = pool.layout.block_tokens
        self.blocks = len(tokens) // block_tokens
        self.peer = peer
        self.tokens = tokens[: self.blocks * block_tokens]
        self.source = source
        self.target = target
        self._pool = pool
        self._mode = mode
        self._lock = threading.Lock()  # guards what follows
        self._leg: _StreamAttempt | None = None  # of the last admission
        self._refusal: TransferError | PoolError | None = None  # why it has none
        self._closed = False

    def begin(self, refs: RefArray) -> _StreamAttempt | None:
        with self._lock:
            if self._closed or (self._leg is not None and self._leg.complete):
                return None
            self._leg = self._refusal = None
            try:
                transfer = self._pool.open_transfer(
                    self.peer.id,
                    refs,
                    tokens=self.tokens,
                    namespace=self.target,
                    idle_timeout=STEP_SECONDS,
                )
            except (TransferError, PoolError) as error:
                self._refusal = error
                return None
            self._leg = _StreamAttempt(self, self._pool, self._mode, transfer)
            return self._leg

    async def finish(self) -> int:
        """All is computed: publish it at the peer. Returns how many blocks it lacked.

        Raises TransferError, or an error of the peer's pool (OutOfBlocks).
        """
        with self._lock:
            leg, refusal = self._leg, self._refusal
        if leg is None:
            raise refusal or TransferError("nothing was computed")
        leg.commit()
        try:
            async with asyncio.timeout(DEADLINE):
                await ended(leg.transfer)
        except TimeoutError as error:
            text = f"KV did not reach {self.peer.id} within {DEADLINE:g} s"
            raise TransferTimeout(text) from error
        leg.let_go()  # or the pool's thread might not be done with that yet
        leg.transfer.result(0)
        return leg.transfer.sent

    def close(self) -> None:
        """Cancel what is not on its way for good. Idempotent."""
        with self._lock:
            self._closed = True
            leg = self._leg
        if leg is not None:
            leg.cancel()


class _StreamAttempt:
    """One transfer, and what it reads (`PrefillWatch`). Called from several threads."""

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
        self._lock = threading.Lock()  # guards what follows
        self._unready = stream.blocks * layers  # blocks, once for each layer
        self._wanted = False  # the commit
        self._ended = False
        self._superseded: list[RefArray] = []
        self._pins: Match | None = None
        transfer.on_done(self.let_go)

    def ready(self, first: int, last: int, layer: int | None) -> None:
        pieces = self._pieces if layer is None else [range(layer, layer + 1)]
        layers = self._pool.layout.layers if layer is None else 1
        with self._lock, _unless_closed():
            if self._ended:  # it failed, or the peer has it all
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
        with self._lock, suppress(PoolError):  # a pool that was closed
            if not self._ended:
                self._pins = self._pool.match(self._stream.tokens, self._stream.source)

    def commit(self) -> None:
        """As soon as the last block is ready: on a GPU the word of it may be under way."""
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
        """The transfer has ended. Where it failed, some of this may still be read, for a target
        that nobody will ever see. Idempotent."""
        with self._lock:
            self._ended = True
            if self._pins is not None:
                self._pins.release()
            superseded, self._superseded = self._superseded, []
            with suppress(PoolError):  # a pool that was closed
                for refs in superseded:
                    self._pool.free_mem(refs)


def _unless_closed() -> suppress:
    """A pool that was closed has ended its transfers and told their callers."""
    return suppress(TransferError)


async def ended(transfer: Transfer) -> None:
    """Returns when the transfer has ended, however. Cancelling this cancels the transfer."""
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
