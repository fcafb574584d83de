"""Running an HTTP server with a graceful shutdown, by signals; sockets and ready lines.

On a shutdown, the server refuses further requests and finishes running ones. Connections then
have CLOSE_SECONDS to end.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine

from memserve.api.http_connection import Admit
from memserve.api.http_limits import HttpCounters, HttpLimits
from memserve.api.http_server import FILES_SHARE, Handler, HttpServer
from memserve.hosts import advertised, bracketed, open_socket

BACKLOG = 2048
IDLE_CONNECTION_SECONDS = 30.0  # for which our clients keep an idle connection; see http_limits
CLOSE_SECONDS = 2.0
# The server's limit; applications have lower ones. Instances' bodies are mostly token ids.
MAX_BODY_BYTES = 128 * 1024 * 1024


class Shutdown:
    """State of a process's shutdown: requested by a first signal, forced by a second."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()

    def request(self) -> None:
        if self.requested.is_set():
            self.forced.set()
        self.requested.set()

    def on_signals(self) -> None:
        """Call `request` on SIGTERM and SIGINT. Only in a process's main thread."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request)

    async def wait_for(self, done: Awaitable[object], seconds: float) -> bool:
        """Wait until `done` ends, a second signal comes, or `seconds` are over. Return whether
        `done` has ended."""
        work = asyncio.ensure_future(done)
        forced = asyncio.ensure_future(self.forced.wait())
        finished, _ = await asyncio.wait(
            (work, forced), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        work.cancel()
        forced.cancel()
        return work in finished

    async def run_until_requested(self, work: Coroutine[object, object, None]) -> None:
        """Run `work` until it ends or the shutdown is requested, which cancels `work` and waits
        for its end. Raises an exception that `work` raised before."""
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


def run_until_signalled(work: Coroutine[object, object, None]) -> None:
    """Run `work` on an event loop of its own until it ends, or SIGTERM or SIGINT cancels it. Raises
    an exception that `work` raised."""

    async def run() -> None:
        shutdown = Shutdown()
        shutdown.on_signals()
        await shutdown.run_until_requested(work)

    asyncio.run(run())


def hold_reloads() -> None:
    """Block SIGHUP until `on_reload`, in this thread and in threads and processes that it
    starts: a signal meanwhile stays pending."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def release_reloads() -> None:
    """Unblock SIGHUP in this thread; a pending one is delivered at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def on_reload(reload: Callable[[], None]) -> None:
    """Call `reload` on each SIGHUP from now on, a pending one included. Only in a process's main
    thread."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    release_reloads()


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Return a listening socket: from now on clients can connect, and wait. Port 0: any free one.
    `shared`: other processes of this user listen on the port, and each connection goes to one of
    them; or another process has reserved it (`cluster.port`).

    `host`: an IPv4 or IPv6 address, a host name, or a wildcard (`0.0.0.0`, or `::` for both).
    Raises OSError.
    """
    sock, address = open_socket(host, port)
    try:
        # Accepted connections inherit TCP_NODELAY. Without it, every stream's first event waits
        # for the client's delayed acknowledgement of the headers, 40 ms.
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
    """Return the URL of a listening socket; for a wildcard address, with this host's name."""
    host, port = sock.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{bracketed(advertised(host))}:{port}"


def announce(address: str, ready_fd: int | None) -> None:
    """Write the address as one line to `ready_fd`, closed then, or to stdout, for the parent."""
    if ready_fd is None:
        print(address, flush=True)
        return
    with os.fdopen(ready_fd, "w") as ready:
        ready.write(f"{address}\n")


def allow_files(number: int) -> None:
    """Raise this process's limit on open files to `number`, or to the hard limit. Many shells
    set 1024, for programs that use select(2); memserve does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
    """Serve until a shutdown is requested, then wait for `drain`, then close. With `tls`, serve
    TLS only. `counters`, `admit`: see `HttpServer`.

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
