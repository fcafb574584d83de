"""A port that stays ours while the process that listens on it comes and goes."""

from __future__ import annotations

import socket

from memserve.errors import ClusterError
from memserve.hosts import bracketed, open_socket

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ReservedPort:
    """Bound, but not listened on: nobody else gets it, and a child can listen on it, since both
    sides allow the address to be used again. Connections are refused while no child does."""

    def __init__(self, host: str, port: int, *, tls: bool = False) -> None:
        """Port 0: any. `tls`: the child will speak it. Raises ClusterError where another process
        listens on it, and for a host that is not this machine's."""
        try:
            self._sock, address = open_socket(host, port)
        except OSError as error:
            raise ClusterError(f"{host}: {error.strerror or error}") from error
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._sock.bind(address)
        except OSError as error:
            self._sock.close()
            raise ClusterError(f"{host}:{port}: {error.strerror}") from error
        self.number: int = self._sock.getsockname()[1]
        own = bracketed(_WILDCARDS.get(host, host))
        # As processes on this machine reach it.
        self.url = f"{'https' if tls else 'http'}://{own}:{self.number}"

    def close(self) -> None:
        self._sock.close()
