"""The local backend: a cluster's processes on this machine."""

from __future__ import annotations

from collections.abc import Callable

from memserve.clock import Clock, MonotonicClock
from memserve.cluster.backend import GATEWAYS, Launch
from memserve.cluster.launches import with_threads
from memserve.cluster.port import ReservedPort
from memserve.cluster.restarts import RestartLimits, Restarts
from memserve.cluster.supervised import Supervised
from memserve.config import ClusterConfig
from memserve.errors import ConfigError
from memserve.models.resolve import Progress
from memserve.pool.segment import sweep


class LocalBackend:
    """A `Backend` whose processes are this one's children, and end with it."""

    def __init__(
        self,
        config: ClusterConfig,
        progress: Progress,
        *,
        limits: RestartLimits | None = None,
        clock: Clock | None = None,
        module: str = "memserve",
    ) -> None:
        """`limits`: of restarts. `module`: run by Python for each process."""
        self._gateway = config.gateway
        self._tls = config.security.tls_cert is not None
        self._progress = progress
        self._limits = limits or RestartLimits()
        self._clock = clock or MonotonicClock()
        self._module = module
        self._port: ReservedPort | None = None

    @property
    def url(self) -> str:
        return "" if self._port is None else self._port.url

    def fit(self, config: ClusterConfig) -> ClusterConfig:
        if config.cluster.gateways != 1:
            raise ConfigError(
                f"cluster.gateways = {config.cluster.gateways}: on one machine there is one "
                "gateway; gateway.workers makes it use more cores"
            )
        if config.cluster.join:
            raise ConfigError("cluster.join: only with backend = 'ray'")
        return with_threads(config)

    async def open(self) -> None:
        """Reserve the gateway's port, so that it gets it back after a crash."""
        self._port = ReservedPort(self._gateway.host, self._gateway.port, tls=self._tls)

    def kept(self, launch: Launch, needed: Callable[[], bool]) -> Supervised:
        assert self._port is not None  # `open` has returned
        if launch.group == GATEWAYS:
            where = ("--port", str(self._port.number))
        else:
            where = ("--join", self._port.url)
        return Supervised(
            launch.name,
            [*launch.arguments, *where],
            Restarts(self._limits, self._clock),
            self._progress,
            self._module,
            needed,
            launch.secrets,
        )

    async def close(self) -> None:
        """Free the port, and the shared memory of processes that were killed."""
        if self._port is not None:
            self._port.close()
        sweep()
