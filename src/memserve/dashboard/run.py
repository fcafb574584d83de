"""The dashboard's process: its watcher, its pages, its server."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from nicegui import ui

from memserve.api.serving import announce, bind, url_of
from memserve.api.tls import server_tls
from memserve.dashboard.actions_page import add_actions_page
from memserve.dashboard.charts import NO_OBJECTIVES, Objectives
from memserve.dashboard.frame import ASSETS, Frame
from memserve.dashboard.guard import Guard, dashboard_token, link_of
from memserve.dashboard.pages import add_pages
from memserve.errors import ConfigError
from memserve.watch.watcher import Watcher

_STATIC = Path(__file__).parent / "assets"
DRAIN_SECONDS = 3  # for open pages to be told of the end


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of `memserve dashboard`. `tls`: trusted authorities for https:// gateways.
    `supervised`: by a parent that has reserved the port and waits to be told the address."""

    urls: Sequence[str]
    host: str
    port: int
    token_file: Path | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    read_only: bool = False
    tls: ssl.SSLContext | None = None
    supervised: bool = False
    texts: bool = False  # what cached prefixes say may be shown
    objectives: Objectives = NO_OBJECTIVES


def run_dashboard(settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve until the process is asked to end. `ready` is told the link, with the token if that was
    made here: a chosen one is in no output. Raises ConfigError."""
    token, made = dashboard_token(settings.token_file, settings.host)
    secure = server_tls(settings.tls_cert, settings.tls_key) is not None
    try:
        sock = bind(settings.host, settings.port, shared=settings.supervised)
    except OSError as error:
        raise ConfigError(f"{settings.host}:{settings.port}: {error}") from error
    watcher = Watcher(settings.urls, settings.tls)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount(ASSETS, StaticFiles(directory=_STATIC))
    frame = Frame(watcher)
    add_pages(frame, settings.objectives, texts=settings.texts)
    add_actions_page(frame, settings.tls, settings.read_only)
    ui.run_with(app, title="memserve", dark=None, show_welcome_message=False)
    guarded = Guard(app, token, sock.getsockname()[1], secure)
    config = uvicorn.Config(
        guarded,
        log_level="warning",
        ssl_certfile=settings.tls_cert if secure else None,
        ssl_keyfile=settings.tls_key if secure else None,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        server_header=False,
        proxy_headers=False,
    )

    async def serve() -> None:
        async with watcher:
            watching = asyncio.create_task(watcher.run(lambda: None))
            address = url_of(sock, tls=secure)

            def serving() -> None:
                if settings.supervised:
                    announce(address, None)
                else:
                    ready(link_of(address, token if made else None))

            try:
                await _Server(config, serving).serve(sockets=[sock])
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching

    asyncio.run(serve())


class _Server(uvicorn.Server):
    """A server that a first SIGTERM or SIGINT ends in order, with exit code 0, and a second one at
    once (uvicorn's own raises the signal anew afterwards). `ready` is called when it serves."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield
