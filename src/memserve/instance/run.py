"""One instance as a process of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from functools import partial

import uvloop

from memserve.api.serving import Shutdown, announce, bind, serve, url_of
from memserve.clock import MonotonicClock
from memserve.config import ClusterConfig, InstanceConfig
from memserve.errors import MemserveError
from memserve.instance.instance import Identity, Instance, Parts
from memserve.instance.join import keep_joined
from memserve.instance.server import InstanceApp
from memserve.types import Epoch, InstanceId

log = logging.getLogger(__name__)

Build = Callable[[ClusterConfig, InstanceConfig, Identity], Parts]

# How long calls that were still running after the drain have to be told that they end.
STOP_SECONDS = 5.0


def run_instance(
    config: ClusterConfig,
    settings: InstanceConfig,
    instance_id: InstanceId,
    *,
    join: str | None = None,
    ready_fd: int | None = None,
    build: Build | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT, or until the engine is lost; the process's exit code.

    The port is open before the model is loaded. Its address goes, as one line, to `ready_fd`
    (closed then) or to standard output. `join` is the URL of a gateway to register with.
    `build` makes engine and pool; by default the built-in ones.
    """
    try:
        sock = bind(settings.host, settings.port)
    except OSError as error:
        log.error("%s:%d: %s", settings.host, settings.port, error.strerror)
        return 1
    identity = Identity(
        id=instance_id,
        epoch=Epoch(time.time_ns() // 1_000_000),  # a later life has a larger number
        role=settings.role,
        model=config.model.served_name or config.model.path,
    )
    make = partial(build or _built_in, config, settings, identity)
    announce(url_of(sock), ready_fd)
    return uvloop.run(_main(identity, make, sock, config.gateway.drain_seconds, join))


async def _main(
    identity: Identity,
    make: Callable[[], Parts],
    sock: socket.socket,
    drain_seconds: float,
    join: str | None,
) -> int:
    instance = Instance(identity, MonotonicClock())
    shutdown = Shutdown()
    shutdown.on_signals()
    loading = asyncio.ensure_future(_load(instance, make))

    async def drain() -> None:
        log.info("%s drains", identity.id)
        instance.drain()
        await asyncio.wait((loading,))
        if not await shutdown.wait_for(instance.idle(), drain_seconds):
            log.warning("%s ends with calls still running", identity.id)
        await instance.stop()
        await shutdown.wait_for(instance.idle(), STOP_SECONDS)

    async with asyncio.TaskGroup() as background:
        helpers = [background.create_task(_end_when_useless(instance, loading, shutdown))]
        if join is not None:
            helpers.append(background.create_task(keep_joined(join, url_of(sock))))
        await serve(InstanceApp(instance), sock, shutdown, drain)
        for helper in helpers:
            helper.cancel()
    await instance.close()
    return _exit_code(instance, loading)


async def _end_when_useless(
    instance: Instance, loading: asyncio.Future[None], shutdown: Shutdown
) -> None:
    """Without an engine there is nothing to serve: whoever started the process starts another."""
    await asyncio.wait((loading,))
    if loading.exception() is None:
        await instance.died.wait()
    shutdown.request()


def _exit_code(instance: Instance, loading: asyncio.Future[None]) -> int:
    failure = loading.exception()
    if isinstance(failure, MemserveError):
        log.error("%s: %s", instance.identity.id, failure)
    elif failure is not None:
        raise failure
    elif instance.died.is_set():
        log.error("%s: the engine stopped", instance.identity.id)
    else:
        return 0
    return 1


async def _load(instance: Instance, build: Callable[[], Parts]) -> None:
    # In a thread, so that the instance can say meanwhile that it is starting.
    parts = await asyncio.to_thread(build)
    await instance.start(parts)
    log.info("%s is ready", instance.identity.id)


def _built_in(config: ClusterConfig, settings: InstanceConfig, identity: Identity) -> Parts:
    # Imported here, in the loading thread: torch takes seconds, and only engines need it.
    from memserve.instance.build import build_parts

    return build_parts(config, settings, identity)
