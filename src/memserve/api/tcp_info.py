"""The kernel's knowledge of a connection's other end (Linux, TCP_INFO).

A host that is lost, or the way to it, ends no connection: TCP sends again what is not acknowledged
for a quarter of an hour. Until then a server would compute for nobody. A client that is only slow
acknowledges what it gets, and the kernel's questions whether it has room for more.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import NamedTuple

_CLOSED = 7  # a state (net/tcp_states.h): after a reset
# struct tcp_info (linux/tcp.h): eight bytes, of which the first is the state; at 24 the segments
# that are not acknowledged, at 56 the milliseconds since the last acknowledgement.
_FIELDS = struct.Struct("=B23xI28xI")


class TcpInfo(NamedTuple):
    """A connection at one moment."""

    reset: bool  # by the other end
    unacknowledged: int  # segments that were sent
    quiet_seconds: float  # since the other end's last acknowledgement


def tcp_info(transport: asyncio.Transport) -> TcpInfo | None:
    """Return the connection's state; None if it is no TCP connection."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return None
    try:
        state, unacknowledged, quiet = _FIELDS.unpack(
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _FIELDS.size)
        )
    except (OSError, struct.error):
        return None  # a Unix socket's writes fail at once
    return TcpInfo(state == _CLOSED, unacknowledged, quiet / 1000)


class Silence:
    """Finds out that the other end has not acknowledged anything for a while although it should."""

    __slots__ = ("_next", "_since")

    def __init__(self) -> None:
        self._since = 0.0  # the first look since its last acknowledgement; 0: none is due
        self._next = 0.0  # when to look again

    def lasts(self, transport: asyncio.Transport, now: float, seconds: float) -> bool:
        """Return whether it is silent for `seconds`, give or take a quarter. Call it often: most
        calls look at nothing."""
        if now < self._next:
            return False
        self._next = now + seconds / 4
        info = tcp_info(transport)
        if info is None or not info.unacknowledged:
            self._since = 0.0
        elif not self._since or now - info.quiet_seconds > self._since:
            self._since = now
        return bool(self._since) and now >= self._since + seconds
