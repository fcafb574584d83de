"""Process of one instance: startup, serving, drain, exit code."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from functools import partial

import uvloop

from memserve.api.audience import Audience, check_url
from memserve.api.control import RESTART_EXIT_CODE
from memserve.api.guard import Guard
from memserve.api.peer_client import PeerClient
from memserve.api.serving import MAX_BODY_BYTES, Shutdown, announce, bind, serve_http, url_of
from memserve.api.signatures import Signer, Verifier
from memserve.api.status import MemberKind
from memserve.api.tls import client_tls, server_tls
from memserve.clock import MonotonicClock
from memserve.config import ClusterConfig, InstanceConfig
from memserve.errors import GivenUp, MemserveError
from memserve.instance.app import InstanceApp
from memserve.instance.instance import Instance
from memserve.instance.join import Registration
from memserve.instance.parts import Identity, Parts
from memserve.secrets import Secret, cluster_secret, require_secret
from memserve.tracing.settings import open_tracer
from memserve.tracing.span import Tracer
from memserve.types import InstanceId, new_epoch

log = logging.getLogger(__name__)

# These need no signature: probes and scrapers have no secret.
OPEN_PATHS = ("/health", "/live", "/ready", "/metrics")

Build = Callable[[ClusterConfig, InstanceConfig, Identity], Parts]

# Time for calls that still run after the drain to send their error to the client.
STOP_SECONDS = 5.0


def run_instance(
    config: ClusterConfig,
    settings: InstanceConfig,
    instance_id: InstanceId,
    *,
    join: Sequence[str] = (),
    ready_fd: int | None = None,
    build: Build | None = None,
) -> int:
    """Serve until asked to end (SIGTERM, SIGINT, `POST /shutdown`) or a vital part is lost.

    Returns the process's exit code: 0, RESTART_EXIT_CODE if a restart was asked for, 1 after a
    failure.

    The port is open before the model is loaded. Its address goes, as one line, to `ready_fd`
    (closed then) or to standard output. `join`: URLs of gateways to register with, at all
    addresses of a URL's name. `build` makes the instance's parts; the default depends on
    `settings.engine`.
    """
    secret = cluster_secret()
    require_secret(secret, settings.host)
    for url in (*join, *([settings.advertise] if settings.advertise else ())):
        check_url(url)
    security = config.security
    tls = server_tls(security.tls_cert, security.tls_key), client_tls(security.tls_ca)
    try:
        sock = bind(settings.host, settings.port)
    except OSError as error:
        log.error("%s:%d: %s", settings.host, settings.port, error.strerror)
        return 1
    identity = Identity(
        id=instance_id,
        epoch=new_epoch(),
        role=settings.role,
        model=config.model.served_name or config.model.path,
        kind=MemberKind.VLLM if settings.engine == "vllm" else MemberKind.MEMSERVE,
    )
    ending = threading.Event()
    chosen: Build = partial(_vllm, ending) if settings.engine == "vllm" else _built_in
    make = partial(build or chosen, config, settings, identity)
    announce(url_of(sock, tls=tls[0] is not None), ready_fd)
    with open_tracer(config.traces, "memserve-instance", instance_id) as tracer:
        return uvloop.run(
            _main(
                identity,
                make,
                sock,
                config.gateway.drain_seconds,
                join,
                secret,
                tls,
                settings.advertise,
                ending,
                tracer,
            )
        )


async def _main(
    identity: Identity,
    make: Callable[[], Parts],
    sock: socket.socket,
    drain_seconds: float,
    join: Sequence[str],
    secret: Secret,
    tls: tuple[ssl.SSLContext | None, ssl.SSLContext | None],
    advertised: str | None,
    ending: threading.Event,
    tracer: Tracer | None,
) -> int:
    """Serve one instance. Sets `ending` at the start of the drain, so that `make` stops waiting.
    Returns the exit code."""
    server, authorities = tls
    address = advertised or url_of(sock, tls=server is not None)
    peers = PeerClient(Signer(secret), authorities)
    instance = Instance(identity, MonotonicClock(), peers)
    registration = Registration(peers, join, address, identity.id, identity.epoch)
    handler = handler_of(instance, secret, sock, advertised, tracer)
    instance.lifecycle.on_news(registration.tell)
    shutdown = Shutdown()
    shutdown.on_signals()
    loading = asyncio.ensure_future(_load(instance, make))

    async def drain() -> None:
        log.info("%s drains", identity.id)
        ending.set()
        if not instance.lifecycle.ending.is_set():
            instance.lifecycle.end()
        await asyncio.wait((loading,))
        if not await shutdown.wait_for(instance.lifecycle.idle(), drain_seconds):
            log.warning("%s ends with calls still running", identity.id)
        await instance.stop()
        await shutdown.wait_for(instance.lifecycle.idle(), STOP_SECONDS)
        joining.cancel()
        await asyncio.wait((joining,))
        # After a failure the gateways keep the member, and their polls see that it is dead.
        if loading.exception() is None and not instance.died.is_set():
            await registration.leave()

    async with asyncio.TaskGroup() as background:
        joining = instance.vitals.task("registration", registration.run())
        useful = background.create_task(_end_when_useless(instance, loading, shutdown))
        await serve_http(
            handler, sock, shutdown, drain, MAX_BODY_BYTES, tls=server, admit=handler.admit
        )
        useful.cancel()
        joining.cancel()
    await instance.close()
    await peers.close()
    return _exit_code(instance, loading)


def handler_of(
    instance: Instance,
    secret: Secret,
    sock: socket.socket,
    advertised: str | None = None,
    tracer: Tracer | None = None,
) -> Guard:
    """Return the HTTP handler of an instance, which checks the signatures of all requests except
    those to OPEN_PATHS. `advertised`: a further URL that requests may be signed for. `tracer`:
    None unless calls are traced."""
    audience = Audience()
    audience.add_socket(sock)
    if advertised is not None:
        audience.add_url(advertised)
    app = InstanceApp(instance, tracer)
    return Guard(app.handle, Verifier(secret, audience), OPEN_PATHS)


async def _end_when_useless(
    instance: Instance, loading: asyncio.Future[None], shutdown: Shutdown
) -> None:
    """Request a shutdown when loading fails, a vital part is lost, or an end is requested. After a
    failure the supervisor starts another process."""
    asked = asyncio.ensure_future(instance.lifecycle.ending.wait())
    died = asyncio.ensure_future(instance.died.wait())
    try:
        await asyncio.wait((loading, asked, died), return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is None:
            await asyncio.wait((died, asked), return_when=asyncio.FIRST_COMPLETED)
    finally:
        asked.cancel()
        died.cancel()
    if not shutdown.requested.is_set():  # a second request would skip waiting for running calls
        shutdown.request()


def _exit_code(instance: Instance, loading: asyncio.Future[None]) -> int:
    failure = loading.exception()
    if isinstance(failure, GivenUp):
        log.info("%s: %s", instance.identity.id, failure)
        return 0
    if isinstance(failure, MemserveError):
        log.error("%s: %s", instance.identity.id, failure)
    elif failure is not None:
        raise failure
    elif instance.died.is_set():
        log.error("%s: %s", instance.identity.id, instance.vitals.reason or "the engine stopped")
    else:
        return RESTART_EXIT_CODE if instance.lifecycle.restart else 0
    return 1


async def _load(instance: Instance, build: Callable[[], Parts]) -> None:
    # In a thread, so that the event loop can answer requests meanwhile.
    parts = await asyncio.to_thread(build)
    await instance.start(parts)
    log.info("%s is ready", instance.identity.id)


def _built_in(config: ClusterConfig, settings: InstanceConfig, identity: Identity) -> Parts:
    # Imported here, in the loading thread: torch takes seconds, and only engines need it.
    from memserve.instance.build import build_parts

    return build_parts(config, settings, identity)


def _vllm(
    ending: threading.Event, config: ClusterConfig, settings: InstanceConfig, identity: Identity
) -> Parts:
    from memserve.instance.vllm_build import build_vllm

    return build_vllm(ending, config, settings, identity)
