"""A cluster that lives on in a Ray cluster: deployed, looked at, scaled, upgraded and deleted by
commands that come and go. What it is, its actors know (`Order`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec
import ray
import ray.exceptions
import ray.util

from memserve.api.serving import Shutdown
from memserve.api.tls import command_tls
from memserve.cluster.backend import Launch
from memserve.cluster.client import ClusterClient
from memserve.cluster.cluster import Cluster
from memserve.cluster.launches import gateway_launch, named_launch, tables
from memserve.config import BackendConfig, ClusterConfig
from memserve.errors import ClusterError, ConfigError
from memserve.models.resolve import Progress
from memserve.ray.backend import RayBackend
from memserve.ray.connection import connect, disconnect, process_names
from memserve.ray.order import (
    PREFIX,
    Order,
    Report,
    decode_order,
    decode_report,
    fitted,
    without_keys,
)
from memserve.secrets import SECRET_FILE_VARIABLE, SECRET_VARIABLE, cluster_secret

# An actor that runs answers at once. One that Ray is placing, or whose node is lost, does not.
ASK_SECONDS = 5.0
READY_SECONDS = 600.0  # enough to load a model


class Shown(msgspec.Struct, frozen=True):
    """One process of a deployed cluster, as `status` shows it."""

    name: str
    group: str = ""
    node: str = ""
    pid: int | None = None
    url: str = ""
    crashes: int = 0
    # A gateway's word for an instance; else `running`, `starting`, or why it has ended; `waiting`
    # for an actor without an answer: Ray looks for a node, or its node is lost.
    state: str = "waiting"


def check_detached() -> None:
    """Raise ConfigError unless a secret is configured: a cluster that outlives its command needs
    one that other commands know."""
    if cluster_secret().local:
        raise ConfigError(
            "a cluster that goes on by itself needs a secret that later commands know: set "
            f"{SECRET_VARIABLE} or {SECRET_FILE_VARIABLE}"
        )


async def deploy(
    config: ClusterConfig,
    progress: Progress,
    *,
    seconds: float = READY_SECONDS,
    module: str = "memserve",
) -> str:
    """Start a cluster that outlives this process, and wait until it is ready; return its URL.

    One of equal settings that runs already is left as it is, but for members that are missing.
    Raises ClusterError for one of other settings, and with the reason if it does not start: then
    what was started is ended.
    """
    check_detached()
    await connect(config.cluster)
    found = await _actors(config.cluster)
    wanted = without_keys(fitted(config))
    for order, _ in found.values():
        if order is not None and order.config != wanted:
            await disconnect()
            raise ClusterError(
                f"a cluster with other settings runs in namespace '{order.namespace}': "
                f"{difference(order.config, wanted)}. `memserve ray upgrade CONFIG` changes it, "
                "`memserve ray delete` ends it, another --ray-namespace has both"
            )
    if config.planner.enabled:
        progress("the planner runs for as long as `memserve ray planner` does")
    backend = RayBackend(config, progress, detached=True, module=module)
    cluster = Cluster(config, backend, Shutdown(), progress)
    started = False
    try:
        async with asyncio.timeout(seconds):
            await cluster.start()
        started = True
    except TimeoutError as error:
        raise ClusterError(f"the cluster is not ready after {seconds:g} s") from error
    finally:
        if started or found:
            await cluster.leave()
        else:
            await cluster.stop()
    return cluster.url


async def status(config: BackendConfig) -> list[Shown]:
    """Return what there is in the namespace, by name."""
    found = await processes(config)
    states = await _states([order for order, _ in found.values() if order], found)
    await disconnect()
    return [_shown(name, *found[name], states) for name in sorted(found)]


async def scale(
    config: BackendConfig, group: str, count: int, progress: Progress, *, wait: bool = True
) -> None:
    """Start or end instances until the group has `count`, and wait until new ones are ready (unless
    `wait` is off) and others have finished. Those that have ended for good do not count, and their
    actors go. Raises ClusterError."""
    cluster, _ = await _adopted(config, progress, without_ended=True)
    try:
        await cluster.scale(group, count)
        if wait:
            async with asyncio.timeout(READY_SECONDS):
                await cluster.or_failure(cluster.all_ready())
    finally:
        await cluster.leave()


async def upgrade(
    config: BackendConfig, wanted: ClusterConfig | None, gateways: bool, progress: Progress
) -> None:
    """Replace the instances one at a time, by new actors: each finishes what it runs, and its
    successor is ready before the next one ends. Then the gateways, likewise, if there are several
    or `gateways` is set.

    `wanted`: new settings; None: the same, for new software on the nodes. Raises ClusterError.
    """
    if wanted is not None:
        check_detached()
    cluster, found = await _adopted(config, progress, wanted)
    several = sum(order.is_gateway for order in found) > 1
    try:
        for order in sorted(found, key=lambda order: (order.is_gateway, order.name)):
            if order.is_gateway and not (several or gateways):
                progress(
                    f"{order.name} is the only one and stays as it is; --gateway replaces it, "
                    "which refuses clients for a moment"
                )
                continue
            launch = _launch(order) if wanted is None else _changed(order, wanted)
            await cluster.replace(launch, READY_SECONDS)
    finally:
        await cluster.leave()


async def delete(config: BackendConfig, progress: Progress) -> None:
    """End all processes: gateways finish running requests, then instances end. Raises
    ClusterError if there are none."""
    found = await processes(config)
    for name, (order, _) in found.items():
        if order is None:  # nothing of it runs, or it cannot be told
            progress(f"{name} does not answer and is ended without being asked")
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(PREFIX + name, config.ray_namespace), no_restart=True)
    if found and all(order is None for order, _ in found.values()):
        await disconnect()
        return
    cluster, _ = await _adopted(config, progress)
    await cluster.stop()


def difference(old: ClusterConfig, new: ClusterConfig) -> str:
    """Return the first setting that differs, with both values; "" if none does."""
    before, after = msgspec.to_builtins(old), msgspec.to_builtins(new)
    for section, values in after.items():
        if not isinstance(values, dict):
            if before[section] != values:
                return f"its [[{section}]] tables"
            continue
        for key, value in values.items():
            if before[section][key] != value:
                return f"{section}.{key} is {before[section][key]!r}, and {value!r} is wanted"
    return ""


# --- actors of the namespace --------------------------------------------------------------

Found = dict[str, tuple[Order | None, Report | None]]  # by name; None without an answer


async def processes(config: BackendConfig) -> Found:
    """Return what runs in the namespace. The connection to Ray is made, and stays."""
    await connect(config)
    return await _actors(config)


def settings_of(found: Found, config: BackendConfig) -> ClusterConfig:
    """Return the settings that the processes know. Raises ClusterError if none answers."""
    for order, _ in found.values():
        if order is not None:
            return order.config
    raise _no_cluster(config)


def _no_cluster(config: BackendConfig) -> ClusterError:
    return ClusterError(
        f"no cluster runs in namespace '{config.ray_namespace}' of this Ray cluster; "
        "`memserve ray deploy CONFIG` starts one"
    )


async def _actors(config: BackendConfig) -> Found:
    names = await process_names(config.ray_namespace)
    answers = await asyncio.gather(*(_ask(config, PREFIX + name) for name in names))
    return dict(zip(names, answers, strict=True))


async def _ask(config: BackendConfig, name: str) -> tuple[Order | None, Report | None]:
    try:
        actor: Any = await asyncio.to_thread(ray.get_actor, name, config.ray_namespace)
        async with asyncio.timeout(ASK_SECONDS):
            order = decode_order(await actor.order.remote())
            return order, decode_report(await actor.report.remote(0, 0.0))
    except (ValueError, ray.exceptions.RayError, TimeoutError):
        return None, None


async def _adopted(
    config: BackendConfig,
    progress: Progress,
    wanted: ClusterConfig | None = None,
    *,
    without_ended: bool = False,
) -> tuple[Cluster, list[Order]]:
    """Return the cluster of the namespace, with the settings that its actors know or those that
    are `wanted`, and the orders of those that answer. `without_ended`: of instances that have ended
    for good the actors end, too. Raises ClusterError if there are none."""
    found = [(order, report) for order, report in (await processes(config)).values() if order]
    if not found:
        await disconnect()
        raise _no_cluster(config)
    orders = [order for order, _ in found]
    settings = orders[0].config if wanted is None else wanted
    backend = RayBackend(settings, progress, detached=True, module=orders[0].module)
    cluster = Cluster(settings, backend, Shutdown(), progress, orders[0].secret)
    url = next((r.url for o, r in found if o.is_gateway and r and r.url), "")
    if without_ended:
        gone = [o for o, r in found if not o.is_gateway and r and r.ended is not None]
        for order in gone:
            progress(f"{order.name} has ended before, and its actor ends")
            one = backend.kept(_launch(order), lambda: False)
            await one.start()
            await one.stop(Shutdown(), 0.0)
        orders = [order for order in orders if order not in gone]
    await cluster.adopt([_launch(order) for order in orders], url or settings.cluster.join[0])
    return cluster, orders


def _launch(order: Order) -> Launch:
    """Return what an actor runs, to run it again."""
    settings = None if order.is_gateway else tables(order.config)[order.group]
    return Launch(order.name, order.group, order.arguments, settings, order.secrets)


def _changed(order: Order, wanted: ClusterConfig) -> Launch:
    """Return what an actor runs, with other settings. Raises ClusterError if these have no such
    group."""
    config = fitted(wanted)
    if order.is_gateway:
        return gateway_launch(config, order.secret, order.name)
    if order.group not in tables(config):
        raise ClusterError(
            f"{order.name} is of group {order.group}, which the new settings do not have: "
            f"{', '.join(tables(config))}; delete and deploy to change that"
        )
    return named_launch(config, order.secret, order.group, order.name)


async def _states(orders: Sequence[Order], found: Found) -> dict[str, str]:
    """Return the instances' states as the first gateway that answers has them."""
    for order in orders:
        _, report = found[order.name]
        if not order.is_gateway or report is None or not report.url:
            continue
        # The file may be on the nodes alone: then the states are what the actors know.
        with contextlib.suppress(ClusterError, ConfigError):
            tls = command_tls(order.config.security.tls_ca)
            async with ClusterClient(report.url, order.secret, tls) as client:
                return {one.id: str(one.state) for one in (await client.view()).instances}
    return {}


def _shown(name: str, order: Order | None, report: Report | None, states: dict[str, str]) -> Shown:
    if order is None or report is None:
        return Shown(name)
    state = "running" if report.alive and report.url else "starting"
    if report.ended is not None:
        state = report.ended or "ended, as it was asked to"
    elif report.alive:
        state = states.get(name, state)
    return Shown(name, order.group, report.node, report.pid, report.url, report.crashes, state)
