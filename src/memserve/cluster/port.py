"""A port that stays ours while the process that listens on it comes and goes."""

from __future__ import annotations

import socket

from memserve.errors import ClusterError

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


class ReservedPort:
    """Bound, but not listened on: nobody else gets it, and a child can listen on it, since both
    sides allow the address to be used again. Connections are refused while no child does."""

    def __init__(self, host: str, port: int) -> None:
        """Port 0: any. Raises ClusterError where another process listens on it."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._sock.bind((host, port))
        except OSError as error:
            self._sock.close()
            raise ClusterError(f"{host}:{port}: {error.strerror}") from error
        self.number: int = self._sock.getsockname()[1]
        own = _WILDCARDS.get(host, f"[{host}]" if ":" in host else host)
        self.url = f"http://{own}:{self.number}"  # as processes on this machine reach it

    def close(self) -> None:
        self._sock.close()
