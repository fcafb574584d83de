"""`memserve planner`: a cluster that changes its own shape."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from memserve.api.serving import run_until_signalled
from memserve.api.tls import command_tls
from memserve.cli_flags import takes_flags
from memserve.clock import MonotonicClock
from memserve.cluster.running import DEFAULT_URL, find_gateway
from memserve.config import LogConfig, PlannerConfig, check_planner
from memserve.flags import Given, flags_of, with_flags
from memserve.logs import log_to_stderr

_NEEDS_BACKEND = ("enabled", "min_members", "max_members")


@takes_flags(flags_of(PlannerConfig, _NEEDS_BACKEND), flags_of(LogConfig))
def planner(
    url: Annotated[
        list[str] | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="a gateway's; repeat it for all gateways of the cluster; default: this user's "
            f"cluster here, or {DEFAULT_URL}",
        ),
    ] = None,
    *,
    given: Given,
) -> None:
    """Change members' roles so that latencies stay inside their objectives, until SIGTERM.

    Run one for each cluster. Signs as `memserve cluster` does. `memserve cluster planner` shows
    what it decided.
    """
    from memserve.cluster.planning import PlannerLoop

    log = with_flags(LogConfig(), given)
    log_to_stderr(log.level, log.format)
    config = with_flags(PlannerConfig(), given, _NEEDS_BACKEND)
    config = msgspec.structs.replace(config, enabled=True)
    check_planner(config)
    found = find_gateway(url[0] if url else None)
    urls = url or [found[0]]
    authorities = command_tls()

    async def gateways() -> list[str]:
        return urls

    loop = PlannerLoop(gateways, config, MonotonicClock(), found[1], lambda: authorities)
    run_until_signalled(loop.run())
