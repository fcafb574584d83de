"""A port that stays reserved while the processes that listen on it are restarted."""

from __future__ import annotations

import socket

from memserve.errors import ClusterError
from memserve.hosts import SocketAddress, bracketed, open_socket

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
# A connection within this machine takes no time, unless the listener's backlog is full.
_CONNECT_SECONDS = 1.0


class ReservedPort:
    """A port that is bound and not listened on: only processes of this user that share it
    (`api.serving.bind`) can listen on it. Connections are refused while none does."""

    def __init__(self, host: str, port: int, *, tls: bool = False) -> None:
        """Reserve a port; 0: any. `tls`: `url` is https. Raises ClusterError if another process
        listens on the port or has reserved it, or `host` is not an address of this machine."""
        try:
            lock, address = open_socket(host, port)
        except OSError as error:
            raise ClusterError(f"{host}: {error.strerror or error}") from error
        try:
            with lock:
                self._sock = _reserved(lock, address)
        except OSError as error:
            raise ClusterError(f"{host}:{port}: {error.strerror}") from error
        self.number: int = self._sock.getsockname()[1]
        own = bracketed(_WILDCARDS.get(host, host))
        # For processes on this machine.
        self.url = f"{'https' if tls else 'http'}://{own}:{self.number}"

    def close(self) -> None:
        self._sock.close()


def is_listened_on(host: str, port: int) -> bool:
    """Return whether a process listens on a port of this machine; a reservation does not count.
    Raises ClusterError if the connection fails in another way, as for an unknown host."""
    try:
        sock, address = open_socket(_WILDCARDS.get(host, host), port)
        with sock:
            sock.settimeout(_CONNECT_SECONDS)
            sock.connect(address)
    except ConnectionRefusedError:
        return False
    except TimeoutError:  # its backlog is full
        return True
    except OSError as error:
        raise ClusterError(f"{host}:{port}: {error.strerror or error}") from error
    return True


def _reserved(lock: socket.socket, address: SocketAddress) -> socket.socket:
    """Return a socket that reserves the port. `lock`, not yet bound, listens meanwhile."""
    # Without SO_REUSEPORT only one socket can listen, and none beside a reservation: of two
    # processes that reserve the port at once, one fails here. SO_REUSEADDR, here and below, allows
    # connections of an earlier process in TIME_WAIT.
    lock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    lock.bind(address)
    lock.listen(0)
    lock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock = socket.socket(lock.family, lock.type, lock.proto)
    try:
        if lock.family == socket.AF_INET6:
            only_6 = lock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_6)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(lock.getsockname())
        # Two sockets with SO_REUSEADDR can share a port across users. Without it on this one the
        # kernel requires SO_REUSEPORT on both, and the same user.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError:
        sock.close()
        raise
    return sock
