"""The KV events of a vLLM server, passed on to gateways.

vLLM publishes to whoever connects; here it does so at a Unix socket that only this user reaches,
and what comes is sent on, as it is, where only those who have the cluster's secret can listen:
events tell prompts. What vLLM lacks is added: the topic names one life of the instance, an idle
publisher says that it is idle, and what was missed is said to be so.
"""

from __future__ import annotations

import logging
import threading
import time

import msgspec
import zmq

from memserve.api.kv_events import (
    BEAT_SECONDS,
    MAX_BATCH_BYTES,
    AllBlocksCleared,
    EventBatch,
    KVEventsInfo,
    MalformedEvents,
    decode_frames,
)
from memserve.errors import ConfigError, TransferError
from memserve.instance.event_outlet import EventOutlet
from memserve.transfer.secret import ClusterKeys
from memserve.types import Epoch, InstanceId

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2  # between looks at whether it is to end
RECEIVE_HIGH_WATER = 100_000  # batches


class EventRelay:
    """The events of one vLLM server, passed on until `close`. Where some came before it was
    made, subscribers are told that all is cleared."""

    def __init__(
        self,
        source: str,
        instance: InstanceId,
        epoch: Epoch,
        block_tokens: int,
        host: str,
        keys: ClusterKeys | None,
    ) -> None:
        """`source`: the endpoint at which vLLM publishes. The rest as of `EventOutlet`. Raises
        ConfigError for what is no endpoint."""
        self._outlet = EventOutlet(instance, epoch, block_tokens, host, keys, snapshot=False)
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
        self._expected = 0  # vLLM's number of the next batch
        self._encode = msgspec.msgpack.Encoder().encode
        self._stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self.thread.start()

    @property
    def info(self) -> KVEventsInfo:
        return self._outlet.info

    def snapshot(self) -> bytes:
        raise TransferError("vLLM has no snapshot of its cache")

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
                    self._say([])
                if self._outlet.next != before:
                    last = time.monotonic()
        finally:
            self._events.close(linger=0)
            self._outlet.close()

    def _take(self, frames: list[bytes]) -> None:
        try:
            batch = decode_frames(frames)
        except MalformedEvents as error:
            log.warning("vLLM published what are no KV events: %s", error)
            self._say([AllBlocksCleared()])  # what it was, nobody knows
            self._expected += 1
            return
        if batch.sequence != self._expected:
            log.warning("missed KV events of vLLM: %d to %d", self._expected, batch.sequence - 1)
            self._say([AllBlocksCleared()])
        self._expected = batch.sequence + 1
        self._outlet.publish(frames[-1])

    def _say(self, events: list[AllBlocksCleared]) -> None:
        self._outlet.publish(self._encode(EventBatch(time.time(), [*events], 0)))
