"""An HTTP server that goes away politely: refuse what is new, finish what runs, exit.

After draining, connections have CLOSE_SECONDS to end.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine

from starlette.types import ASGIApp

from memserve.api.asgi import asgi_handler
from memserve.api.http_connection import Admit
from memserve.api.http_limits import HttpCounters, HttpLimits
from memserve.api.http_server import FILES_SHARE, Handler, HttpServer
from memserve.hosts import advertised, bracketed, open_socket

BACKLOG = 2048
IDLE_CONNECTION_SECONDS = 30.0  # of a client's connection; see http_limits
CLOSE_SECONDS = 2.0
# An application refuses bodies itself; those of instances are token ids, about 7 bytes each.
MAX_BODY_BYTES = 128 * 1024 * 1024


class Shutdown:
    """Asked for by a first signal, forced by a second."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()

    def request(self) -> None:
        if self.requested.is_set():
            self.forced.set()
        self.requested.set()

    def on_signals(self) -> None:
        """SIGTERM and SIGINT from now on. Only in a process's main thread."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request)

    async def wait_for(self, done: Awaitable[object], seconds: float) -> bool:
        """Wait until `done`, a second signal, or the limit. Whether it was `done`."""
        work = asyncio.ensure_future(done)
        forced = asyncio.ensure_future(self.forced.wait())
        finished, _ = await asyncio.wait(
            (work, forced), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        work.cancel()
        forced.cancel()
        return work in finished

    async def run_until_requested(self, work: Coroutine[object, object, None]) -> None:
        """Run `work` until it ends or the shutdown is requested: it is cancelled then, and has
        ended when this returns. Raises what it raised before that."""
        working = asyncio.ensure_future(work)
        requested = asyncio.ensure_future(self.requested.wait())
        try:
            await asyncio.wait((working, requested), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            working.cancel()
            requested.cancel()
            await asyncio.wait((working,))


def hold_reloads() -> None:
    """SIGHUP waits from now on, until `on_reload`: in this thread, and in the threads and
    processes that it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def release_reloads() -> None:
    """SIGHUP is taken again, in this thread: one that has waited, at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def on_reload(reload: Callable[[], None]) -> None:
    """Call it on SIGHUP from now on, and for one that has waited. Only in a process's main
    thread."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    release_reloads()


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket: from here on clients can connect, and wait. Port 0: any. `shared`:
    other processes of this user's listen on the port too, and each connection comes to one of
    them; or one has reserved it (`cluster.port`).

    `host` is an address of IPv4 or IPv6, a name that has one, or a wildcard (`0.0.0.0`, or `::`
    for both). Raises OSError.
    """
    sock, address = open_socket(host, port)
    try:
        # Accepted connections inherit it. Without it every stream's first event waits for the
        # client's delayed acknowledgement of the headers, 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket, *, tls: bool = False) -> str:
    """The http:// or https:// address of a listening socket; for a wildcard, this host's name."""
    host, port = sock.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{bracketed(advertised(host))}:{port}"


def announce(address: str, ready_fd: int | None) -> None:
    """Tell whoever started this process where it listens: one line, to a descriptor or stdout."""
    if ready_fd is None:
        print(address, flush=True)
        return
    with os.fdopen(ready_fd, "w") as ready:
        ready.write(f"{address}\n")


def allow_files(number: int) -> None:
    """Let this process open so many files, as far as the system does: many shells give 1024,
    which is for programs that use select(2), as nothing here does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def serve(
    app: ASGIApp,
    sock: socket.socket,
    shutdown: Shutdown,
    drain: Callable[[], Awaitable[None]],
    max_body_bytes: int = MAX_BODY_BYTES,
    *,
    tls: ssl.SSLContext | None = None,
) -> None:
    """`serve_http` for an ASGI application, which is given bodies whole."""
    await serve_http(asgi_handler(app), sock, shutdown, drain, max_body_bytes, tls=tls)


async def serve_http(
    handler: Handler,
    sock: socket.socket,
    shutdown: Shutdown,
    drain: Callable[[], Awaitable[None]],
    max_body_bytes: int,
    *,
    tls: ssl.SSLContext | None = None,
    limits: HttpLimits | None = None,
    counters: HttpCounters | None = None,
    admit: Admit | None = None,
) -> None:
    """Serve until a shutdown is requested, then wait for `drain`, then close. With `tls`, by
    TLS alone. `counters` are those to count in, for whoever shows them; `admit` says who may not
    send a body (see `HttpServer`).

    While draining, connections are still accepted: the handler refuses the requests.
    """
    limits = limits or HttpLimits()
    allow_files(int(limits.connections / FILES_SHARE))
    server = HttpServer(handler, max_body_bytes, limits, counters, admit)
    await server.start(sock, BACKLOG, tls)
    try:
        await shutdown.requested.wait()
        await drain()
    finally:
        await server.close(CLOSE_SECONDS)
