"""`Transfer` and `OpenTransfer`, the caller's handles of a transfer, and `PeerStats`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import msgspec

from memserve.errors import MemserveError, TransferError, TransferTimeout
from memserve.transfer.session import Round
from memserve.types import InstanceId, RefArray


class Transfer:
    """The caller's handle of a transfer to a peer. `sent`: number of blocks sent, set at the end;
    fewer than the source blocks if the peer's index had some of them."""

    def __init__(self, instance: InstanceId, refs: RefArray, cancel: Callable[[], None]) -> None:
        self.instance = instance
        self.sent = 0
        self._refs = refs
        self._cancel = cancel
        self._outcome: Future[RefArray] = Future()

    @property
    def refs(self) -> RefArray:
        """References [n] to the peer's blocks; empty until they are known.

        After a plain transfer without `dst` the caller owns them, and frees them with `free_mem`;
        after one with insert the peer's index owns them, and may evict them.
        """
        return self._refs

    @property
    def done(self) -> bool:
        return self._outcome.done()

    def result(self, timeout: float | None = None) -> RefArray:
        """Wait for the end; return `refs`. All bytes are then at the peer (and published), and the
        source blocks are unpinned. After a failure they stay pinned until the posted writes have
        drained. Raises TransferTimeout after `timeout` seconds, and the transfer goes on;
        TransferCancelled; PeerLost; OutOfBlocks and other errors of the peer's pool;
        TransferError."""
        try:
            return self._outcome.result(timeout)
        except FutureTimeout as error:
            if self._outcome.done():
                raise
            raise TransferTimeout(
                f"transfer to {self.instance!r} is not done after {timeout:g} s"
            ) from error

    def cancel(self) -> None:
        """Abort unless Commit is sent; `result` tells the outcome."""
        self._cancel()

    def on_done(self, call: Callable[[], None]) -> None:
        """Call `call` at the end, on the transfer thread; it must not block."""
        self._outcome.add_done_callback(lambda _: call())

    def succeed(self, refs: RefArray, sent: int) -> None:
        self._refs = refs
        self.sent = sent
        self._outcome.set_result(refs)

    def fail(self, error: MemserveError) -> None:
        self._outcome.set_exception(error)


class OpenTransfer(Transfer):
    """A transfer that the caller writes part by part; the peer publishes nothing before
    `commit`."""

    def __init__(
        self,
        instance: InstanceId,
        refs: RefArray,
        cancel: Callable[[], None],
        write: Callable[[Round], None],
        seal: Callable[[], None],
        blocks: int,
    ) -> None:
        super().__init__(instance, refs, cancel)
        self._blocks = blocks
        self._sealed = False
        self._write = write
        self._seal = seal

    def write(self, layers: range | None = None, first: int = 0, last: int | None = None) -> None:
        """Write blocks `first` to `last - 1`, which have their final bytes in these layers (None:
        all). Raises TransferError after `commit`."""
        if self._sealed:
            raise TransferError("no write may follow the commit")
        self._write(Round(first, self._blocks if last is None else last, layers))

    def commit(self) -> None:
        """Have the peer publish the blocks once all writes have ended. Idempotent."""
        if not self._sealed:
            self._sealed = True
            self._seal()


class PeerStats(msgspec.Struct, frozen=True):
    """Numbers of open transfers and blocks with peers, and counters since the start."""

    outgoing: int = 0  # transfers from here that have not ended
    incoming: int = 0  # transfers to here, committed ones that are remembered included
    quarantined: int = 0  # blocks that are not reused, because a peer may still write to them
    granted: int = 0  # blocks that peers have allocated here
    malformed: int = 0  # messages
    mismatched: int = 0  # messages of another protocol version or layout
    strangers: int = 0  # connections without the secret
    failed: int = 0  # messages and steps that could not be handled
    unwritten: int = 0  # transfers that a peer committed without writing all blocks
