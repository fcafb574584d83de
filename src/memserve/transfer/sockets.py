"""`PoolSockets`: the sockets of one pool. They carry frames and do not decode them.

A pool has one ROUTER that peers connect to, one DEALER for each peer that it connects to, and a
Unix socket for the pools of its host. All belong to the thread that polls. Other threads may call
`wake` and, one at a time, `send`, which sends through the Unix socket at once and queues other
messages for the polling thread: ZeroMQ sockets may not be used while that thread waits for them.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from memserve.errors import ConfigError, TransferError
from memserve.hosts import is_loopback, numeric_endpoint, split_endpoint
from memserve.secrets import SECRET_VARIABLE
from memserve.transfer.secret import ClusterKeys
from memserve.transfer.unix_socket import UnixAddress, UnixSocket
from memserve.transfer.wire import HEADER_BYTES, MAX_MESSAGE_BYTES

# Milliseconds for the last messages to leave when a pool closes. Less than a LEASE, after which a
# peer that misses them notices the silence.
LINGER_MS = 200

# Messages taken from one socket before other sockets and timers get their turn.
RECEIVE_BATCH = 64

# Messages in one ZeroMQ queue: enough for a peer's messages between two polls. QUEUE_MESSAGES *
# MAX_MESSAGE_BYTES bounds the memory for a reader that has stopped.
QUEUE_MESSAGES = 256

# Frames of a message after the route: a header and a body. Longer messages are read frame by frame
# and dropped.
FRAMES = 2

# Milliseconds until a connection is closed whose handshake has not ended, or whose other host does
# not answer pings. Longer than a LEASE, so that a slow peer keeps its connection; the pool's own
# heartbeats find lost peers earlier.
HANDSHAKE_MS = 10_000
PING_MS = 10_000
PING_TIMEOUT_MS = 30_000

_ADDRESS = re.compile(
    r"tcp://(\*|[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.%A-Za-z0-9_-]{2,64}\]):(\d{1,5}|\*)"
)

Socket = zmq.Socket[bytes]


_WATCHED_EVENTS = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


@dataclass(slots=True, eq=False)
class Dealer:
    """A connection that this pool opened."""

    address: str
    socket: Socket
    monitor: Socket
    broken: int = 0  # number of times that the other side has ended the connection
    foreign: bool = False  # one side has a secret and the other has none


@dataclass(frozen=True, slots=True)
class Arrival:
    """The frames of one message, and the connection for the answer."""

    frames: list[bytes]
    path: Way


# A connection of this pool, the ROUTER's name for a peer's connection, or a Unix socket.
Way = Dealer | bytes | UnixAddress


class PoolSockets:
    """The sockets of one pool; the module's docstring has the rules for threads."""

    def __init__(self, keys: ClusterKeys | None, unix: bool = True) -> None:
        """`unix`: whether pools of this host may use Unix sockets."""
        self._keys = keys
        self._context: zmq.Context[Socket] = zmq.Context()
        self._poller = zmq.Poller()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._waking = threading.Lock()  # held while `_wake` is written to, or closed
        self._closed = False
        self._poller.register(self._wake, zmq.POLLIN)
        self._dealers: dict[Socket, Dealer] = {}
        self._monitors: dict[Socket, Dealer] = {}
        self._router: Socket | None = None
        self._unix = UnixSocket() if unix else None
        if self._unix is not None:
            self._poller.register(self._unix.fileno(), zmq.POLLIN)
        self._gate: Socket | None = None
        self._poller_thread = threading.get_ident()
        self._to_send: deque[tuple[Way, bytes, bytes]] = deque()  # for the polling thread
        self.strangers = 0  # clients without the secret
        self.unsent = 0  # messages without a connection, or without room in its queue

    def adopt(self) -> None:
        """Make the calling thread the polling thread."""
        self._poller_thread = threading.get_ident()

    @property
    def unix_address(self) -> str:
        """Path of the Unix socket, for peers of this host; empty if there is none."""
        return "" if self._unix is None else self._unix.address

    def listen(self, address: str) -> str:
        """Bind; return the address with the port. Raises TransferError; ConfigError for an address
        that other hosts can reach, without a secret."""
        require_address(address)
        if self._router is not None:
            raise TransferError("this pool is served already")
        address = numeric_endpoint(address)
        if (self._keys is None or self._keys.local) and not is_local(address):
            raise ConfigError(
                f"{address} can be reached from other hosts: set {SECRET_VARIABLE} (the same "
                "for the whole cluster), or serve on 127.0.0.1"
            )
        router = self._socket(zmq.ROUTER)
        router.router_mandatory = True  # raises if a peer is not connected
        router.ipv6 = "[" in address  # otherwise LAST_ENDPOINT of an IPv4 address is an IPv6 one
        if self._keys is not None:
            if self._gate is None:
                self._gate = self._keys.open_gate(self._context)
                self._poller.register(self._gate, zmq.POLLIN)
            self._keys.secure_server(router)
        try:
            router.bind(address)
        except zmq.ZMQError as error:
            router.close(0)
            raise TransferError(f"cannot listen on {address}: {error}") from error
        self._router = router
        self._poller.register(router, zmq.POLLIN)
        return router.getsockopt_string(zmq.LAST_ENDPOINT)

    def dial(self, address: str) -> Dealer:
        """Start a connection; ZeroMQ reconnects when it breaks. Raises TransferError."""
        require_address(address)
        socket = self._socket(zmq.DEALER)
        socket.immediate = True  # do not queue for a peer that is not there
        socket.ipv6 = True
        if self._keys is not None:
            self._keys.secure_client(socket)
        monitor = socket.get_monitor_socket(_WATCHED_EVENTS)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.disable_monitor()
            monitor.close(0)
            socket.close(0)
            raise TransferError(f"cannot connect to {address}: {error}") from error
        dealer = self._dealers[socket] = self._monitors[monitor] = Dealer(address, socket, monitor)
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)
        return dealer

    def hang_up(self, dealer: Dealer) -> None:
        self._poller.unregister(dealer.socket)
        self._poller.unregister(dealer.monitor)
        del self._dealers[dealer.socket], self._monitors[dealer.monitor]
        dealer.socket.disable_monitor()
        dealer.monitor.close(0)
        dealer.socket.close(LINGER_MS)

    def send(self, path: Way, header: bytes, body: bytes) -> bool:
        """Queue a message. Returns False if there is no connection, or no room in its queue; True
        does not prove arrival."""
        if isinstance(path, UnixAddress):
            return self._unix is not None and self._unix.send(path, [header, body])
        if threading.get_ident() != self._poller_thread:
            self._to_send.append((path, header, body))
            self.wake()
            return True
        try:
            if isinstance(path, Dealer) and path.socket in self._dealers:
                path.socket.send_multipart([header, body], zmq.NOBLOCK)
                return True
            if self._router is not None and isinstance(path, bytes):
                self._router.send_multipart([path, header, body], zmq.NOBLOCK)
                return True
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
        self.unsent += 1
        return False

    def wake(self) -> None:
        """End a `poll`; from any thread."""
        with self._waking:
            if not self._closed:  # after `close`, the descriptor may belong to another file
                os.eventfd_write(self._wake, 1)

    def poll(self, timeout: float) -> list[Arrival]:
        """Wait up to `timeout` seconds; return the messages that have arrived."""
        arrivals: list[Arrival] = []
        for source, _ in self._poller.poll(int(timeout * 1000)):
            if source == self._wake:
                os.eventfd_read(self._wake)
            elif self._unix is not None and source == self._unix.fileno():
                arrivals += self._receive_datagrams(self._unix)
            elif source is self._gate and self._keys is not None:
                self.strangers += not self._keys.answer(self._gate)
            elif source in self._monitors:
                dealer = self._monitors[source]
                if recv_monitor_message(source)["event"] == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                    dealer.foreign = True  # ZeroMQ does not reconnect
                else:
                    dealer.broken += 1
            elif source is self._router:
                arrivals += self._receive(self._router, None)
            elif source in self._dealers:
                arrivals += self._receive(source, self._dealers[source])
        while self._to_send:  # after the read of `_wake`, so that later messages wake again
            self.send(*self._to_send.popleft())
        return arrivals

    def close(self) -> None:
        for dealer in list(self._dealers.values()):
            self.hang_up(dealer)
        if self._router is not None:
            self._router.close(LINGER_MS)
        if self._gate is not None:
            self._gate.close(0)
        self._context.term()
        if self._unix is not None:
            self._unix.close()
        with self._waking:
            self._closed = True
            os.close(self._wake)

    def _receive_datagrams(self, unix: UnixSocket) -> Iterator[Arrival]:
        for _ in range(RECEIVE_BATCH):
            received = unix.receive()
            if received is None:
                return
            data, sender = received
            yield Arrival([data[:HEADER_BYTES], data[HEADER_BYTES:]], sender)

    def _receive(self, socket: Socket, dealer: Dealer | None) -> Iterator[Arrival]:
        for _ in range(RECEIVE_BATCH):
            try:
                frames = _receive_frames(socket, FRAMES + (dealer is None))
            except zmq.Again:
                return
            if dealer is None:
                yield Arrival(frames[1:], frames[0])
            else:
                yield Arrival(frames, dealer)

    def _socket(self, kind: int) -> Socket:
        socket = self._context.socket(kind)
        socket.maxmsgsize = MAX_MESSAGE_BYTES
        socket.linger = LINGER_MS
        socket.rcvhwm = socket.sndhwm = QUEUE_MESSAGES
        socket.handshake_ivl = HANDSHAKE_MS
        socket.heartbeat_ivl = PING_MS
        socket.heartbeat_timeout = PING_TIMEOUT_MS
        return socket


def _receive_frames(socket: Socket, wanted: int) -> list[bytes]:
    """Return a message's frames, at most one more than `wanted`. Raises zmq.Again."""
    frames = [socket.recv(zmq.NOBLOCK)]
    while socket.rcvmore:
        frame = socket.recv(zmq.NOBLOCK)
        if len(frames) <= wanted:  # one frame too many marks the message as malformed
            frames.append(frame)
    return frames


def require_address(address: str) -> None:
    """Raise TransferError for anything but tcp://host:port. ZeroMQ's other schemes lead into this
    process (`inproc`: the ZAP handler) or to its files (`ipc`)."""
    match = _ADDRESS.fullmatch(address)
    if match is None or (match[2] != "*" and int(match[2]) > 65535):
        raise TransferError(f"{address[:300]!r} is not tcp://host:port")


def is_local(address: str) -> bool:
    """Return whether only this host can reach an address."""
    return is_loopback(split_endpoint(address)[0])
