"""Running a cluster until a signal comes, as `memserve up` does."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

from memserve.api.serving import Shutdown, on_reload
from memserve.cluster.backend import Backend
from memserve.cluster.cluster import Cluster
from memserve.config import ClusterConfig
from memserve.models.resolve import Progress
from memserve.vital import Vitals


async def run_cluster(
    config: ClusterConfig,
    backend: Backend,
    progress: Progress,
    ready: Callable[[Cluster], None],
    beside: Callable[[Cluster], Awaitable[None]] | None = None,
    *,
    detached: bool = False,
) -> None:
    """Run a cluster until SIGINT or SIGTERM; a second signal ends the wait for requests. With
    `detached`, leave it running then, once it serves.

    `ready` is called when every instance has been ready or has crashed, and `beside` is awaited
    from then on; it is cancelled before the cluster stops. Raises ClusterError if a
    process ends before an instance is ready, or as `Cluster.supervise`.
    """
    shutdown = Shutdown()
    shutdown.on_signals()
    cluster = Cluster(config, backend, shutdown, progress)
    if not sys.stdin.isatty():  # a terminal that closes sends SIGHUP, too, to end the process
        on_reload(cluster.reload)

    async def tell() -> None:
        late = await cluster.settled()
        ready(cluster)
        if late:
            progress(f"not ready, and started again until they are: {', '.join(late)}")
        if beside is not None:
            await beside(cluster)

    async def serve() -> None:
        await cluster.begin()
        telling = asyncio.ensure_future(tell())
        supervising = asyncio.ensure_future(cluster.supervise())
        tasks = [telling, supervising]
        if config.planner.enabled:
            # The cluster goes on without it: none of `needed`.
            tasks.append(Vitals().errand("the planner", cluster.plan()))
        try:
            needed = (telling, supervising)
            await asyncio.wait(needed, return_when=asyncio.FIRST_EXCEPTION)
            if telling.done():
                telling.result()
            await supervising
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    try:
        await shutdown.run_until_requested(serve())
        if not detached:
            progress("stopping; Ctrl-C again to stop without waiting for requests")
    finally:
        if detached and cluster.serving:
            await cluster.leave()
        else:
            await cluster.stop()
