"""The Ray backend: a cluster's processes belong to actors on the nodes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable

from memserve.cluster.backend import Launch
from memserve.cluster.launches import gateway_names
from memserve.config import ClusterConfig, GatewayConfig
from memserve.models.resolve import Progress
from memserve.ray.connection import connect, disconnect
from memserve.ray.kept import RayKept
from memserve.ray.order import Order, fitted, without_keys


class RayBackend:
    """A `Backend` whose processes belong to actors in the namespace `cluster.ray_namespace`.

    `detached`: the actors outlive this process; else they end with it, even if it is killed.
    """

    def __init__(
        self,
        config: ClusterConfig,
        progress: Progress,
        *,
        detached: bool = False,
        module: str = "memserve",
    ) -> None:
        """`module`: run by Python for each process."""
        self._config = config
        self._progress = progress
        self._detached = detached
        self._module = module
        self._kept: list[RayKept] = []

    @property
    def url(self) -> str:
        return next((one.url for one in self._kept if one.is_gateway and one.url), "")

    def fit(self, config: ClusterConfig) -> ClusterConfig:
        return fitted(config)

    async def open(self) -> None:
        await connect(self._config.cluster)

    def kept(self, launch: Launch, needed: Callable[[], bool]) -> RayKept:
        # Whether others need it, its actor knows by itself: this process may not be there.
        one = RayKept(launch, self.order(launch), self._progress, self._detached)
        self._kept.append(one)
        return one

    def order(self, launch: Launch) -> Order:
        """Return what the actor of a process is to run."""
        gateway, cluster = self._config.gateway, self._config.cluster
        return Order(
            name=launch.name,
            group=launch.group,
            arguments=launch.arguments,
            secrets=dict(launch.secrets),
            namespace=cluster.ray_namespace,
            gateways=gateway_names(self._config),
            join=cluster.join,
            # The default is loopback, which other nodes do not reach.
            host="" if gateway.host == GatewayConfig().host else gateway.host,
            port=gateway.port,
            tls=self._config.security.tls_cert is not None,
            module=self._module,
            config=without_keys(fitted(self._config)),
        )

    async def close(self) -> None:
        for one in self._kept:
            one.forget()
        await disconnect()
