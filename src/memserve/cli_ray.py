"""`memserve ray`: a cluster that lives on in a Ray cluster."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from memserve.api.serving import run_until_signalled
from memserve.cli_cluster import console
from memserve.cli_flags import takes_flags
from memserve.config import (
    BackendConfig,
    ClusterConfig,
    LogConfig,
    PlannerConfig,
    check_config,
    load_config,
)
from memserve.errors import ConfigError
from memserve.flags import Given, flags_of, with_flags
from memserve.logs import log_to_stderr
from memserve.terminal import progress_lines

app = typer.Typer(
    no_args_is_help=True,
    help="A cluster that lives on in a Ray cluster, without a command that watches it. "
    "This machine must be a node of the Ray cluster.",
)

# The rest of a cluster's place is in its file, and known to what runs.
_OTHERS = tuple(
    name for name in BackendConfig.__struct_fields__ if name not in ("ray_address", "ray_namespace")
)
_where = takes_flags(flags_of(BackendConfig, _OTHERS))


def require_ray() -> None:
    """Raise ConfigError if Ray is not installed."""
    if find_spec("ray") is None:
        raise ConfigError("backend = 'ray' needs Ray: pip install 'memserve[ray]'")


@app.command()
@_where
def deploy(
    config: Annotated[Path, typer.Argument(help="TOML; flags go before it")],
    seconds: Annotated[float, typer.Option(help="to be ready in")] = 600.0,
    *,
    given: Given,
) -> None:
    """Start the cluster of a file and leave it running. Prints its URL when it is ready.

    Where it runs already, members that are missing are started; with other settings it is refused.
    """
    require_ray()
    from memserve.ray import service

    wanted = _read(config, given)
    print(asyncio.run(service.deploy(wanted, progress_lines(), seconds=seconds)))


@app.command()
@_where
def status(
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False, *, given: Given
) -> None:
    """Show each process: its node, address and state."""
    require_ray()
    from memserve.ray import service

    found = asyncio.run(service.status(with_flags(BackendConfig(), given, _OTHERS)))
    if json:
        print(msgspec.json.encode(found).decode())
        return
    table = Table()
    columns = service.Shown.__struct_fields__
    for name in columns:
        table.add_column(name)
    for one in found:
        values = msgspec.structs.asdict(one)
        table.add_row(*("" if values[n] is None else str(values[n]) for n in columns))
    console().print(table)


@app.command()
@_where
def scale(
    group: Annotated[str, typer.Argument(help="of instances: decode; decode.2, the second table")],
    count: Annotated[int, typer.Argument(min=0, help="instances that it is to have")],
    *,
    given: Given,
) -> None:
    """Start instances of a group, or end its newest, once they have finished what they run."""
    require_ray()
    from memserve.ray import service

    place = with_flags(BackendConfig(), given, _OTHERS)
    asyncio.run(service.scale(place, group, count, progress_lines()))


@app.command()
@_where
def upgrade(
    config: Annotated[
        Path | None, typer.Argument(help="TOML; default: settings as they are")
    ] = None,
    gateway: Annotated[bool, typer.Option("--gateway", help="the only gateway, too")] = False,
    *,
    given: Given,
) -> None:
    """Replace all members, one by one, as requests go on: after new software, or new settings."""
    require_ray()
    from memserve.ray import service

    wanted = None if config is None else _read(config, given)
    place = with_flags(BackendConfig(), given, _OTHERS) if wanted is None else wanted.cluster
    asyncio.run(service.upgrade(place, wanted, gateway, progress_lines()))


@app.command()
@takes_flags(
    flags_of(BackendConfig, _OTHERS), flags_of(PlannerConfig, ("enabled",)), flags_of(LogConfig)
)
def planner(*, given: Given) -> None:
    """Change roles, and with max_members the number of members, until SIGTERM.

    Settings are those of the file that was deployed, and flags on top. Run one for each cluster.
    """
    require_ray()
    from memserve.ray.planning import plan

    log = with_flags(LogConfig(), given)
    log_to_stderr(log.level, log.format)
    place = with_flags(BackendConfig(), given, _OTHERS)

    def adapt(deployed: PlannerConfig) -> PlannerConfig:
        return with_flags(deployed, given, ("enabled",))

    run_until_signalled(plan(place, adapt, progress_lines()))


@app.command()
@_where
def delete(*, given: Given) -> None:
    """End the cluster, once it has finished what it runs."""
    require_ray()
    from memserve.ray import service

    place = with_flags(BackendConfig(), given, _OTHERS)
    asyncio.run(service.delete(place, progress_lines()))


def _read(path: Path, given: Given) -> ClusterConfig:
    file = load_config(path)
    cluster = with_flags(msgspec.structs.replace(file.cluster, backend="ray"), given, _OTHERS)
    wanted = msgspec.structs.replace(file, cluster=cluster)
    check_config(wanted)
    return wanted
