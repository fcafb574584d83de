"""Limits of an HTTP server on clients' connections, time and memory, and counters of refusals.

How the numbers relate: our clients close an idle connection after IDLE_CONNECTION_SECONDS (30),
before the server does (`idle_seconds`), so that no request meets a connection that is just being
closed. An unfinished request has less time, since it holds memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits of one server, in seconds and bytes. Times are checked every `sweep_seconds`."""

    # Open connections. More than the streams that a gateway on one core can relay; a server takes
    # fewer if the process has too few file descriptors (`http_server.FILES_SHARE`).
    connections: int = 8192
    # For a request's line and headers, from their first byte to their end.
    head_seconds: float = 10.0
    # For a body, from the end of its head on: `body_seconds` plus the time of the received bytes
    # at `body_rate`, bytes a second (half a megabit). 16 MB have five minutes.
    body_seconds: float = 30.0
    body_rate: int = 64 * 1024
    # Bytes of requests whose handler has not begun, of all connections together. Above it, bodies
    # larger than `small_body` are refused. `HttpServer` raises it to two of the largest bodies.
    held_bytes: int = 256 * 1024 * 1024
    # Bodies that are always accepted; the size of the largest head, which is accepted, too.
    small_body: int = 64 * 1024
    # Largest body that is read without asking `admit` first. On all connections together such
    # bodies hold a quarter of `held_bytes`.
    unasked_body: int = 8 * 1024
    # For a connection without a request.
    idle_seconds: float = 75.0
    # For which bytes after a refused request are read and dropped: closing the connection while
    # the client still sends would lose the refusal.
    linger_seconds: float = 30.0
    # For a client that reads none of the bytes that wait for it: it holds an answer's memory.
    stalled_seconds: float = 300.0
    # For a client that acknowledges nothing of what was sent to it: its host is lost, or the way
    # to it. More than a few of TCP's retransmissions on a bad way, which double from 0.2 s on.
    silent_seconds: float = 30.0
    # For the answer to an HTTP/1.0 client that has finished sending: the server cannot find out
    # whether it is still there.
    half_closed_seconds: float = 5.0
    # For a TLS handshake.
    handshake_seconds: float = 10.0
    sweep_seconds: float = 1.0


@dataclass(slots=True)
class HttpCounters:
    """Counts of a server's connection events since its start, read by metrics."""

    connections: int = 0  # accepted, the refused ones included
    evicted: int = 0  # idle connections, closed to make room for others
    refused_connections: int = 0  # over the limit while none was idle: 503
    malformed: int = 0  # requests that break HTTP or the limits on heads and single bodies: 4xx
    bodies_refused: int = 0  # bodies for which there was no memory: 503
    turned_away: int = 0  # refused by `admit`, before their bodies: 401, 403
    head_timeouts: int = 0  # 408
    body_timeouts: int = 0  # 408
    stalled: int = 0  # clients that did not read, hung up on
    silent: int = 0  # clients that acknowledged nothing, given up
    half_closed: int = 0  # clients that had finished sending before their answer began
    departed: int = 0  # of `half_closed`: clients that had left
