"""`plan`: the planner of a cluster that lives on in a Ray cluster, while a command runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from memserve.api.tls import command_tls
from memserve.clock import MonotonicClock
from memserve.cluster.backend import Group, Place
from memserve.cluster.launches import tables
from memserve.cluster.planning import PlannerLoop
from memserve.config import BackendConfig, PlannerConfig, check_planner
from memserve.errors import ClusterError
from memserve.models.resolve import Progress
from memserve.ray import service
from memserve.ray.connection import disconnect


class ServiceGroups:
    """`Groups` of a namespace's cluster, as its actors know them at each call: other commands may
    have changed them since."""

    def __init__(self, config: BackendConfig, progress: Progress) -> None:
        self._config = config
        self._progress = progress
        self._group_of: dict[str, str] = {}  # of instances that have answered once

    async def gateways(self) -> list[str]:
        """Return the URLs at which gateways listen now. Raises ClusterError if none does."""
        found = await service.processes(self._config)
        urls = [
            report.url
            for order, report in found.values()
            if order is not None and order.is_gateway and report is not None and report.url
        ]
        if urls := urls or list(service.settings_of(found, self._config).cluster.join):
            return urls
        raise ClusterError("no gateway listens")

    async def groups(self) -> tuple[Group, ...]:
        """Return the instances that have not ended for good, also those for which Ray looks for a
        node. Raises ClusterError if no process answers."""
        found = await service.processes(self._config)
        settings = service.settings_of(found, self._config)
        members: dict[str, list[str]] = {name: [] for name in tables(settings)}
        for name, (order, report) in found.items():
            if order is not None:
                self._group_of[name] = order.group
            # Of one that has never answered only the role is known, by its name.
            group = self._group_of.get(name, name.rpartition("-")[0])
            if group in members and (report is None or report.ended is None):
                members[group].append(name)
        # Names of a group differ in their number, which grows.
        return tuple(
            Group(name, table.role, tuple(sorted(members[name], key=lambda one: (len(one), one))))
            for name, table in tables(settings).items()
        )

    async def places(self) -> Mapping[str, Place]:
        found = await service.processes(self._config)
        return {
            name: Place(report.node, report.pid)
            for name, (_, report) in found.items()
            if report is not None and report.pid is not None
        }

    async def scale(self, group: str, count: int) -> None:
        await service.scale(self._config, group, count, self._progress, wait=False)


async def plan(
    config: BackendConfig,
    adapt: Callable[[PlannerConfig], PlannerConfig],
    progress: Progress,
) -> None:
    """Run the planner of the cluster in a namespace, until cancelled.

    `adapt` returns the settings to use, from those that the cluster was deployed with. Raises
    ClusterError if no cluster runs, ConfigError for settings that contradict each other. A cluster
    that ends later is told, and waited for.
    """
    try:
        found = await service.processes(config)
        deployed = service.settings_of(found, config)
        secret = next(order.secret for order, _ in found.values() if order is not None)
        wanted = msgspec.structs.replace(adapt(deployed.planner), enabled=True)
        check_planner(wanted)
        groups = ServiceGroups(config, progress)
        loop = PlannerLoop(
            groups.gateways,
            wanted,
            MonotonicClock(),
            secret,
            lambda: command_tls(deployed.security.tls_ca),
            None if wanted.max_members is None else groups,
            progress,
        )
        await loop.run()
    finally:
        await disconnect()
