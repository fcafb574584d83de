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
    """Blocks on their way to a peer.

    `sent`: blocks that went over, once it is done; less than asked if the peer had some.
    """

    def __init__(self, instance: InstanceId, refs: RefArray, cancel: Callable[[], None]) -> None:
        self.instance = instance
        self.sent = 0
        self._refs = refs
        self._cancel = cancel
        self._outcome: Future[RefArray] = Future()

    @property
    def refs(self) -> RefArray:
        """The peer's blocks [n]; empty until they are known.

        After a plain transfer without `dst` they are this caller's, to free with `free_mem`;
        after one with insert they are the peer's index's, which may evict them.
        """
        return self._refs

    @property
    def done(self) -> bool:
        return self._outcome.done()

    def result(self, timeout: float | None = None) -> RefArray:
        """`refs`, when every byte is there (and published); the source blocks are no longer
        pinned then. After a failure they are until what was being written has drained, which
        `cancel` and the peer's death do not wait for. Raises TransferTimeout after
        `timeout` seconds, and the transfer goes on; TransferCancelled; PeerLost; OutOfBlocks
        and other errors of the peer's pool; TransferError."""
        try:
            return self._outcome.result(timeout)
        except FutureTimeout as error:
            if self._outcome.done():
                raise
            raise TransferTimeout(
                f"transfer to {self.instance!r} is not done after {timeout:g} s"
            ) from error

    def cancel(self) -> None:
        """Stop, unless the commit is on its way already. `result` says which it was."""
        self._cancel()

    def on_done(self, call: Callable[[], None]) -> None:
        """Have `call` called at the end, on the pool's I/O thread: it must not block."""
        self._outcome.add_done_callback(lambda _: call())

    def succeed(self, refs: RefArray, sent: int) -> None:
        self._refs = refs
        self.sent = sent
        self._outcome.set_result(refs)

    def fail(self, error: MemserveError) -> None:
        self._outcome.set_exception(error)


class OpenTransfer(Transfer):
    """A transfer whose blocks become ready bit by bit; nothing is visible before `commit`."""

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
        """Blocks `first`..`last` have their final bytes in these layers (all, if None).

        Raises TransferError after `commit`."""
        if self._sealed:
            raise TransferError("no write may follow the commit")
        self._write(Round(first, self._blocks if last is None else last, layers))

    def commit(self) -> None:
        """There was the last write: publish when all are there."""
        if not self._sealed:
            self._sealed = True
            self._seal()


class PeerStats(msgspec.Struct, frozen=True):
    """What goes on with peers; the counters only grow."""

    outgoing: int = 0  # transfers from here that have not ended
    incoming: int = 0  # transfers to here, committed ones that are remembered included
    quarantined: int = 0  # blocks that a peer may still write to, and nobody may have
    granted: int = 0  # blocks that peers have allocated here
    malformed: int = 0  # messages
    mismatched: int = 0  # messages of another protocol version or layout
    strangers: int = 0  # connections without the secret
    failed: int = 0  # messages and steps that could not be handled
    unwritten: int = 0  # transfers that were committed and not written
