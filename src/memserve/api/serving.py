"""An HTTP server that goes away politely: refuse what is new, finish what runs, exit.

Order of the limits: a client's idle connection (IDLE_CONNECTION_SECONDS) is closed by the
client before the server would (SERVER_KEEP_ALIVE_SECONDS), so that no request meets a
connection that is just being closed. After draining, connections have CLOSE_SECONDS to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

BACKLOG = 2048
IDLE_CONNECTION_SECONDS = 30.0
SERVER_KEEP_ALIVE_SECONDS = 75
CLOSE_SECONDS = 2


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


def bind(host: str, port: int) -> socket.socket:
    """A listening socket: from here on clients can connect, and wait. Port 0: any.

    Raises OSError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Accepted connections inherit it. Without it every stream's first event waits for the
        # client's delayed acknowledgement of the headers, 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket) -> str:
    """The http:// address of a listening socket; for a wildcard, this host's name."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.getfqdn()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announce(address: str, ready_fd: int | None) -> None:
    """Tell whoever started this process where it listens: one line, to a descriptor or stdout."""
    if ready_fd is None:
        print(address, flush=True)
        return
    with os.fdopen(ready_fd, "w") as ready:
        ready.write(f"{address}\n")


async def serve(
    app: ASGIApp,
    sock: socket.socket,
    shutdown: Shutdown,
    drain: Callable[[], Awaitable[None]],
) -> None:
    """Serve until a shutdown is requested, then wait for `drain`, then close.

    While draining, connections are still accepted: the application refuses the requests.
    """
    server = _Server(
        uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=SERVER_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            backlog=BACKLOG,
        )
    )
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    requested = asyncio.ensure_future(shutdown.requested.wait())
    await asyncio.wait((serving, requested), return_when=asyncio.FIRST_COMPLETED)
    requested.cancel()
    if not serving.done():
        await drain()
        server.should_exit = True
    await serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Signals are `Shutdown`'s: uvicorn would close the socket before the drain, and end
        # the process by the signal instead of with exit code 0.
        yield
