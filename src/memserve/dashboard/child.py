"""`DashboardChild`: the dashboard as a process beside a cluster, which can do without it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from importlib.util import find_spec

from memserve.api.tls import TLS_CA_VARIABLE
from memserve.clock import Clock, MonotonicClock
from memserve.cluster.port import ReservedPort
from memserve.cluster.restarts import RestartLimits, Restarts
from memserve.cluster.supervised import Supervised
from memserve.config import ClusterConfig
from memserve.dashboard.guard import TOKEN_VARIABLE, dashboard_token, link_of
from memserve.errors import ClusterError, ConfigError
from memserve.flags import to_flags
from memserve.models.resolve import Progress
from memserve.secrets import SECRET_VARIABLE, Secret

HOST = "127.0.0.1"  # beyond it, `memserve dashboard` is started with a token and TLS of its own
_LOOK_SECONDS = 0.2  # between looks for a child that has begun anew


def is_installed() -> bool:
    """Return whether the dashboard's libraries (the extra `ui`) are installed."""
    return find_spec("nicegui") is not None


class DashboardChild:
    """Supervises `memserve dashboard`. Whatever goes wrong with it is told and harms nothing."""

    def __init__(
        self,
        config: ClusterConfig,
        progress: Progress,
        show: Callable[[str], None],
        *,
        limits: RestartLimits | None = None,
        clock: Clock | None = None,
        module: str = "memserve",
    ) -> None:
        """`show` gets the lines that it prints. `module`: run by Python for it."""
        self._config = config
        self._progress = progress
        self._show = show
        self._restarts = Restarts(limits or RestartLimits(), clock or MonotonicClock())
        self._module = module

    async def run(self, url: str, secret: Secret, tell: Callable[[str], None]) -> None:
        """Run it for the gateway at `url`, again after each crash, until it is given up or this is
        cancelled. `tell` gets a line with the link, once. Raises nothing of its own."""
        try:
            token, made = dashboard_token(None, HOST)
            if made and self._config.log.format == "json":  # what is told goes into the log
                raise ConfigError(
                    f"set {TOKEN_VARIABLE}: a token that is made here would be logged"
                )
            port = self._reserve()
        except (ClusterError, ConfigError) as error:
            self._progress(f"no dashboard: {error}")
            return
        child = self._supervised(url, port.number, secret, token)
        telling = asyncio.ensure_future(self._tell(child, token if made else None, tell))
        try:
            await child.start()
            child.show_output(self._show)
            await child.keep()
        except (ClusterError, OSError) as error:  # OSError: no process can be made
            self._progress(f"no dashboard any more: {error}")
        finally:
            telling.cancel()
            if child.started:
                # At once, since the cluster is to end, and a dashboard has nothing to lose.
                child.child.kill()
                await asyncio.wait((child.child.ended,))
            port.close()

    def _reserve(self) -> ReservedPort:
        wanted = self._config.dashboard.port
        try:
            return ReservedPort(HOST, wanted)
        except ClusterError as error:
            self._progress(f"the dashboard takes another port than {wanted}: {error}")
            return ReservedPort(HOST, 0)

    def _supervised(self, url: str, port: int, secret: Secret, token: str) -> Supervised:
        arguments = ["dashboard", "--url", url, "--host", HOST, "--port", str(port)]
        if (planner := self._config.planner).enabled:  # what it plans for is what is drawn in
            arguments += ["--ttft", str(planner.ttft), "--tpot", str(planner.tpot)]
        environment = {SECRET_VARIABLE: str(secret), TOKEN_VARIABLE: token}
        if (authorities := self._config.security.tls_ca) is not None:
            environment[TLS_CA_VARIABLE] = os.environ.get(TLS_CA_VARIABLE) or authorities
        return Supervised(
            "dashboard",
            [*arguments, *to_flags(self._config.log)],
            self._restarts,
            self._progress,
            self._module,
            environment=environment,
        )

    async def _tell(
        self, child: Supervised, token: str | None, tell: Callable[[str], None]
    ) -> None:
        while True:
            if child.alive:
                try:
                    tell(f"The dashboard is at {link_of(await child.child.address(), token)}")
                except ClusterError:
                    pass  # `keep` says so, and starts another
                else:
                    return
            await asyncio.sleep(_LOOK_SECONDS)
