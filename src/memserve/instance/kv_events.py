"""Publisher of a pool's KV events, blocks stored and removed, in vLLM's format.

The pool's callers only append to a queue. One thread encodes and sends the queue's events of
BATCH_SECONDS as a batch, and answers replay requests. If the queue overflows, events are lost,
and the publisher skips a sequence number so that subscribers notice.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np
import zmq

from memserve.api.kv_events import (
    BEAT_SECONDS,
    MAX_BATCH_ITEMS,
    BlockHash,
    BlockRemoved,
    BlockStored,
    EventBatch,
    KVSnapshot,
    StoredBlocks,
    extra_keys,
)
from memserve.api.namespaces import is_private
from memserve.errors import TransferError
from memserve.instance.event_outlet import REPLAY_BATCHES, EventOutlet
from memserve.pool.listener import StoredRun
from memserve.pool.pool import BlockPool
from memserve.transfer.secret import ClusterKeys
from memserve.types import (
    GENERATION_BITS,
    INDEX_BITS,
    MEDIUM_BITS,
    Medium,
    Namespace,
    RefArray,
    ref_medium,
)

# Delay of events, so that one batch holds the changes of several callers.
BATCH_SECONDS = 0.005
MAX_PENDING = 100_000  # queued changes of the index
# Timeout of a snapshot: many times what the thread needs to reach a mark in the queue.
SNAPSHOT_SECONDS = 30.0

_NAME_MASK = (1 << (GENERATION_BITS + INDEX_BITS + MEDIUM_BITS)) - 1  # without the owner
_MEDIA = {Medium.HBM: "GPU", Medium.DRAM: "CPU"}  # vLLM's names


@dataclass(slots=True)
class _Mark:
    """A place in the queue; `sequence` is the number of the last batch before it."""

    sequence: int = -1
    passed: threading.Event = field(default_factory=threading.Event)


class KVEventPublisher:
    """Publishes the events of one pool, as its listener. `close` it before the pool."""

    def __init__(
        self,
        pool: BlockPool,
        host: str,
        keys: ClusterKeys | None = None,
        buffer_batches: int = REPLAY_BATCHES,
    ) -> None:
        """Start publishing at free ports of `host`. With `keys`, only clients with the cluster's
        secret can connect. Raises ConfigError for a host that cannot be bound.
        """
        self._pool = pool
        self._queue: deque[StoredRun | RefArray | _Mark] = deque()
        self._overflow = False
        self._awake = False
        self._stopping = threading.Event()
        self._encode = msgspec.msgpack.Encoder().encode
        self._instance, self._epoch = pool.owner
        self._outlet = EventOutlet(
            *pool.owner, pool.layout.block_tokens, host, keys, buffer_batches=buffer_batches
        )
        self.info = self._outlet.info
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()
        pool.listen(self)

    @property
    def thread(self) -> threading.Thread:
        """The publishing thread; it must stay alive until `close`."""
        return self._thread

    def close(self) -> None:
        """Send all queued events, and end the thread."""
        self._pool.listen(None)
        self._stopping.set()
        self._wake()
        self._thread.join()
        os.close(self._wake_fd)  # only after `join`: the number may be reused at once

    def snapshot(self) -> bytes:
        """Return an encoded `KVSnapshot`. Waits for the thread to reach a mark in the queue.
        Raises TransferError if the thread has ended or does not reach it."""
        if self._stopping.is_set():
            raise TransferError("KV events are no longer published")
        mark = _Mark()
        runs = self._pool.indexed(lambda: self._put(mark))
        if not mark.passed.wait(SNAPSHOT_SECONDS):
            raise TransferError("the publisher of KV events has stopped")
        return self._encode(
            KVSnapshot(
                instance=self._instance,
                epoch=self._epoch,
                sequence=mark.sequence,
                block_tokens=self._pool.layout.block_tokens,
                blocks=[stored_blocks(run) for run in runs if not is_private(run.namespace)],
            )
        )

    # --- the pool's listener: under its lock ----------------------------------------------

    def stored(self, run: StoredRun) -> None:
        if not is_private(run.namespace):
            self._put(run)

    def removed(self, namespace: str, refs: RefArray) -> None:
        if not is_private(namespace):
            self._put(refs)

    def moved(self, run: StoredRun, old: RefArray) -> None:
        if not is_private(run.namespace):
            self._put(run)
            self._put(old)

    def _put(self, change: StoredRun | RefArray | _Mark) -> None:
        if len(self._queue) >= MAX_PENDING and not isinstance(change, _Mark):
            self._overflow = True
        else:
            self._queue.append(change)
        if not self._awake:
            self._awake = True
            self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # --- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_fd, zmq.POLLIN)
        self._outlet.register(poller)
        last = time.monotonic()
        try:
            while not self._stopping.is_set():
                rest = last + BEAT_SECONDS - time.monotonic()
                ready = dict(poller.poll(max(0, int(1000 * rest))))
                self._outlet.answer(ready)
                if self._wake_fd in ready:
                    os.eventfd_read(self._wake_fd)
                    self._stopping.wait(BATCH_SECONDS)
                before = self._outlet.next
                self._flush()
                now = time.monotonic()
                if now >= last + BEAT_SECONDS and self._outlet.next == before:
                    self._publish([])
                if self._outlet.next != before:
                    last = now
            self._flush()
        finally:
            self._stopping.set()  # `snapshot` must not wait for a thread that has ended
            self._end()

    def _end(self) -> None:
        for mark in self._queue:
            if isinstance(mark, _Mark):
                mark.passed.set()
        self._outlet.close()

    def _flush(self) -> None:
        """Send all queued events."""
        self._awake = False  # before reading the queue: a later `_put` wakes the thread again
        events: list[BlockStored | BlockRemoved] = []
        items = 0  # tokens and hashes
        while self._queue:
            change = self._queue.popleft()
            if isinstance(change, _Mark) or items >= MAX_BATCH_ITEMS:
                self._publish_any(events)
                items = 0
            if isinstance(change, _Mark):
                change.sequence = self._outlet.next - 1
                change.passed.set()
            else:
                events += wire_events(change, self.info.block_tokens)
                items += len(change.data) // 4 if isinstance(change, StoredRun) else len(change)
        self._publish_any(events)
        if self._overflow:
            self._overflow = False
            self._outlet.next += 1  # the gap tells subscribers that events were lost

    def _publish_any(self, events: list[BlockStored | BlockRemoved]) -> None:
        if events:
            self._publish(events)
            events.clear()

    def _publish(self, events: list[BlockStored | BlockRemoved]) -> None:
        payload = self._encode(EventBatch(time.time(), [*events], 0))
        self._outlet.publish(payload)


def wire_events(
    change: StoredRun | RefArray, block_tokens: int
) -> list[BlockStored | BlockRemoved]:
    """Return the events of a run of stored blocks, or of removed blocks given as references."""
    if isinstance(change, StoredRun):
        return [*_stores(change, block_tokens)]
    medium, names = ref_medium(change), change & _NAME_MASK
    return [
        BlockRemoved(names[medium == each].tolist(), name)
        for each, name in _MEDIA.items()
        if (medium == each).any()
    ]


def _stores(run: StoredRun, size: int) -> Iterator[BlockStored]:
    """Yield a BlockStored for each stretch of blocks in one medium; `size`: tokens of a block."""
    medium = ref_medium(run.refs)
    cuts = (np.flatnonzero(np.diff(medium)) + 1).tolist()
    names: list[BlockHash] = (run.refs & _NAME_MASK).tolist()
    tokens = np.frombuffer(run.data, np.int32)
    parent: BlockHash | None = None if run.parent is None else run.parent & _NAME_MASK
    for first, end in zip([0, *cuts], [*cuts, len(names)], strict=True):
        keys = extra_keys(Namespace(run.namespace), end - first) if parent is None else None
        yield BlockStored(
            block_hashes=names[first:end],
            parent_block_hash=parent,
            token_ids=tokens[first * size : end * size].tolist(),
            block_size=size,
            lora_id=None,
            medium=_MEDIA[Medium(int(medium[first]))],
            lora_name=None,
            extra_keys=keys,
        )
        parent = names[end - 1]


def stored_blocks(run: StoredRun) -> StoredBlocks:
    """Return a run of stored blocks in a snapshot's format."""
    return StoredBlocks(
        namespace=Namespace(run.namespace),
        parent=None if run.parent is None else run.parent & _NAME_MASK,
        blocks=(run.refs & _NAME_MASK).astype("<i8").tobytes(),
        tokens=run.data,
    )
