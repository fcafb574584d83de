"""What clients may cost an HTTP server in connections, time and memory, and how often one was
refused for it.

How the numbers relate: a client's idle connection (IDLE_CONNECTION_SECONDS, 30) is closed by the
client before the server would (`idle_seconds`), so that no request meets a connection that is
just being closed. Who has begun to say something has less time, as it holds memory meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits of one server. Seconds and bytes; the times are looked at every `sweep_seconds`."""

    # Open at once. More than the streams that a gateway on one core can relay; a server takes
    # less where the process may not have so many descriptors (`http_server.FILES_SHARE`).
    connections: int = 8192
    # For a request's line and headers, from their first byte on, whatever trickles in.
    head_seconds: float = 10.0
    # For a body, from the end of its head on: so long, and longer by what has come at `body_rate`
    # bytes a second, about half a megabit. 16 MB have five minutes.
    body_seconds: float = 30.0
    body_rate: int = 64 * 1024
    # Of all connections together: what they hold of requests that have not begun to be handled.
    # Beyond it bodies above `small_body` are refused. At least two of the largest fit in.
    held_bytes: int = 256 * 1024 * 1024
    # Bodies that are always taken; as large as a head may be, which is always taken, too.
    small_body: int = 64 * 1024
    # Where a server is told whom to admit: of these it is not asked before their body is there. All
    # connections together hold a quarter of `held_bytes` with them.
    unasked_body: int = 8 * 1024
    # Without a request.
    idle_seconds: float = 75.0
    # What follows a refused request is thrown away for so long: a client that is still sending
    # would lose the refusal with its connection.
    linger_seconds: float = 30.0
    # Without reading anything of what waits for it: it keeps what answers it, or its connection.
    stalled_seconds: float = 300.0
    # How long a client of HTTP/1.0 that has finished sending is answered: whether it is still
    # there cannot be found out.
    half_closed_seconds: float = 5.0
    # For a TLS handshake.
    handshake_seconds: float = 10.0
    sweep_seconds: float = 1.0


@dataclass(slots=True)
class HttpCounters:
    """What has happened to a server's connections since it began; each only grows. Plain numbers
    that metrics read."""

    connections: int = 0  # accepted, the refused ones included
    evicted: int = 0  # idle ones, closed to make room for others
    refused_connections: int = 0  # one too many, and none was idle: 503
    malformed: int = 0  # requests that break HTTP or the limits on heads and single bodies: 4xx
    bodies_refused: int = 0  # bodies for which there was no memory: 503
    turned_away: int = 0  # before their bodies, by who may say whom to admit: 401, 403
    head_timeouts: int = 0  # 408
    body_timeouts: int = 0  # 408
    stalled: int = 0  # clients that did not read, hung up on
    half_closed: int = 0  # clients that had finished sending and waited for an answer
    departed: int = 0  # of these, the ones that had left
