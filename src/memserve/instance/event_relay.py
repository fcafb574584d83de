"""Relay of a vLLM server's KV events to gateways.

Events contain prompts, and vLLM publishes them to any client. A server that memserve starts
therefore publishes at a Unix socket that only this user can open, and the relay sends the batches
unchanged to clients with the cluster's secret. The relay adds: a topic with the instance's epoch,
empty batches while vLLM is idle, an AllBlocksCleared after missed batches, a snapshot, and the
blocks of host memory once more when vLLM has cleared its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence

import msgspec
import zmq

from memserve.api.kv_events import (
    BEAT_SECONDS,
    MAX_BATCH_BYTES,
    MAX_BATCH_ITEMS,
    AllBlocksCleared,
    BlockStored,
    EventBatch,
    KVEventsInfo,
    KVSnapshot,
    MalformedEvents,
    ServerBlocks,
    decode_frames,
)
from memserve.errors import ConfigError, TransferError
from memserve.instance.event_outlet import EventOutlet
from memserve.instance.server_cache import ServerCache, stored_event
from memserve.transfer.secret import ClusterKeys
from memserve.types import Epoch, InstanceId

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2  # between checks of `_stopping`
RECEIVE_HIGH_WATER = 100_000  # batches
_EVENT_ITEMS = 32  # size of an event's other fields, in items of a batch


class EventRelay:
    """Relays the events of one vLLM server until `close`. For missed batches, also those from
    before its start, the relay publishes an AllBlocksCleared."""

    def __init__(
        self,
        source: str,
        instance: InstanceId,
        epoch: Epoch,
        block_tokens: int,
        host: str,
        keys: ClusterKeys | None,
    ) -> None:
        """`source`: the endpoint at which vLLM publishes. Other arguments: see `EventOutlet`.
        Raises ConfigError for an invalid `source` or `host`."""
        self._outlet = EventOutlet(instance, epoch, block_tokens, host, keys, server_snapshot=True)
        self._owner = instance, epoch
        self._cache = ServerCache()
        self._changing = threading.Lock()  # held while a batch is published and put into `_cache`
        self._building = threading.Lock()  # one snapshot at a time: snapshots may be large
        self._events = self._outlet.context.socket(zmq.SUB)
        self._events.rcvhwm = RECEIVE_HIGH_WATER
        self._events.maxmsgsize = MAX_BATCH_BYTES
        self._events.subscribe(b"")
        try:
            self._events.connect(source)
        except zmq.ZMQError as error:
            self._events.close(linger=0)
            self._outlet.close()
            raise ConfigError(f"KV events of vLLM at {source}: {error}") from error
        self._expected = 0  # vLLM's sequence number of the next batch
        self._encode = msgspec.msgpack.Encoder().encode
        self._stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self.thread.start()

    @property
    def info(self) -> KVEventsInfo:
        return self._outlet.info

    def snapshot(self) -> bytes:
        """Return an encoded `KVSnapshot`. Raises TransferError if the relay has ended."""
        if not self.thread.is_alive():
            raise TransferError("the relay of vLLM's KV events has ended")
        with self._building:
            with self._changing:
                sequence, cache = self._outlet.next - 1, self._cache.copy()
            return self._encode(
                KVSnapshot(
                    instance=self._owner[0],
                    epoch=self._owner[1],
                    sequence=sequence,
                    block_tokens=self.info.block_tokens,
                    blocks=[],
                    server_blocks=cache.stored(),
                )
            )

    def close(self) -> None:
        self._stopping.set()
        self.thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._events, zmq.POLLIN)
        self._outlet.register(poller)
        last = time.monotonic()
        try:
            while not self._stopping.is_set():
                ready = dict(poller.poll(int(1000 * LOOK_SECONDS)))
                self._outlet.answer(ready)
                before = self._outlet.next
                if self._events in ready:
                    self._take(self._events.recv_multipart())
                elif time.monotonic() >= last + BEAT_SECONDS:
                    with self._changing:
                        self._publish([])
                if self._outlet.next != before:
                    last = time.monotonic()
        finally:
            self._events.close(linger=0)
            self._outlet.close()

    def _take(self, frames: list[bytes]) -> None:
        try:
            batch = decode_frames(frames)
        except MalformedEvents as error:
            log.warning("vLLM published malformed KV events: %s", error)
            self._forget()  # the lost events may have removed any block
            self._expected += 1
            return
        if batch.sequence != self._expected:
            log.warning("missed KV events of vLLM: %d to %d", self._expected, batch.sequence - 1)
            self._forget()
        self._expected = batch.sequence + 1
        with self._changing:
            outlasted = self._cache.apply(batch.events.events)
            self._outlet.publish(frames[-1])
            if outlasted:
                for part in _parts(self._cache.stored(), self.info.block_tokens):
                    self._publish(part)

    def _forget(self) -> None:
        with self._changing:
            self._cache.clear()
            self._publish([AllBlocksCleared()])

    def _publish(self, events: Sequence[AllBlocksCleared | BlockStored]) -> None:
        self._outlet.publish(self._encode(EventBatch(time.time(), [*events], 0)))


def _parts(runs: Sequence[ServerBlocks], block_tokens: int) -> Iterator[list[BlockStored]]:
    """Yield the events that store `runs`, in batches of a size that subscribers accept."""
    part: list[BlockStored] = []
    items = 0
    for run in runs:
        part.append(stored_event(run, block_tokens))
        items += _EVENT_ITEMS + len(run.tokens) // 4 + len(run.hashes)
        if items >= MAX_BATCH_ITEMS:
            yield part
            part, items = [], 0
    if part:
        yield part
