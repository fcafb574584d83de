"""Sockets, sequence numbers and replay buffer of an instance's KV events.

Used on one thread, which polls the sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container

import zmq

from memserve.api.kv_events import (
    END_OF_REPLAY,
    MAX_REQUEST_BYTES,
    SEQUENCE_BYTES,
    KVEventsInfo,
    topic_of,
)
from memserve.errors import ConfigError
from memserve.hosts import bracketed, numeric_endpoint
from memserve.transfer.secret import ClusterKeys
from memserve.types import Epoch, InstanceId

# Limits of the replay buffer: a subscriber with a short gap replays it instead of a snapshot.
REPLAY_BATCHES = 10_000
REPLAY_BYTES = 32 * 1024 * 1024
SEND_HIGH_WATER = 10_000  # batches queued for one slow subscriber; further ones are dropped


class EventOutlet:
    """Numbers and publishes batches of events, and replays the last ones on request."""

    def __init__(
        self,
        instance: InstanceId,
        epoch: Epoch,
        block_tokens: int,
        host: str,
        keys: ClusterKeys | None = None,
        *,
        server_snapshot: bool = False,
        buffer_batches: int = REPLAY_BATCHES,
    ) -> None:
        """Bind two free ports of `host`. With `keys`, only clients with the cluster's secret can
        connect. `server_snapshot`: the events are a vLLM server's. Raises ConfigError for a host
        that cannot be bound."""
        self.next = 0  # the next batch's sequence number
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=buffer_batches)
        self._sent_bytes = 0
        self.context = zmq.Context[zmq.Socket[bytes]]()
        self._gate = None if keys is None else keys.open_gate(self.context)
        self._keys = keys
        self._publisher = self._socket(zmq.PUB)
        self._replay = self._socket(zmq.ROUTER)
        self.info = KVEventsInfo(
            endpoint=_bind(self._publisher, host),
            replay_endpoint=_bind(self._replay, host),
            topic=topic_of(instance, epoch),
            block_tokens=block_tokens,
            secured=keys is not None,
            snapshot=not server_snapshot,
            server_snapshot=server_snapshot,
        )
        self._topic = self.info.topic.encode()

    def publish(self, payload: bytes) -> None:
        """Number, send and keep an encoded batch."""
        sequence = self.next
        self.next += 1
        if len(self._sent) == self._sent.maxlen:
            self._sent_bytes -= len(self._sent[0][1])
        self._sent.append((sequence, payload))
        self._sent_bytes += len(payload)
        while self._sent_bytes > REPLAY_BYTES:
            self._sent_bytes -= len(self._sent.popleft()[1])
        number = sequence.to_bytes(SEQUENCE_BYTES, "big")
        self._publisher.send_multipart((self._topic, number, payload))

    def register(self, poller: zmq.Poller) -> None:
        """Add the sockets that receive requests to `poller`."""
        poller.register(self._replay, zmq.POLLIN)
        if self._gate is not None:
            poller.register(self._gate, zmq.POLLIN)

    def answer(self, ready: Container[object]) -> None:
        """Answer the requests on sockets in `ready`."""
        if self._gate is not None and self._gate in ready and self._keys is not None:
            self._keys.answer(self._gate)
        if self._replay in ready:
            self._answer_replay()

    def close(self) -> None:
        """Close sockets and `context`. Callers close their own sockets of `context` before."""
        for socket in (self._publisher, self._replay, self._gate):
            if socket is not None:
                socket.close(linger=0)
        self.context.term()

    def _answer_replay(self) -> None:
        frames = self._replay.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != SEQUENCE_BYTES:
            return
        client, first = frames[0], int.from_bytes(frames[2], "big")
        for sequence, payload in self._sent:
            if sequence >= first:
                number = sequence.to_bytes(SEQUENCE_BYTES, "big")
                self._replay.send_multipart((client, b"", self._topic, number, payload))
        self._replay.send_multipart((client, b"", b"", END_OF_REPLAY, b""))

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        socket.sndhwm = SEND_HIGH_WATER
        socket.maxmsgsize = MAX_REQUEST_BYTES  # only topics and sequence numbers come in
        if self._keys is not None:
            self._keys.secure_server(socket)
        return socket


def _bind(socket: zmq.Socket[bytes], host: str) -> str:
    address = numeric_endpoint(f"tcp://{bracketed(host)}:0")
    socket.ipv6 = "[" in address
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise ConfigError(f"KV events cannot be published at {address}: {error}") from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
