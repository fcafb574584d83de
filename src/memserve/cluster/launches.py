"""Command lines of a cluster's processes: `memserve` arguments from its configuration."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from memserve.api.api_keys import KEYS_VARIABLE, hashed
from memserve.cluster.backend import GATEWAYS, Launch
from memserve.config import ClusterConfig, InstanceConfig, available_cores
from memserve.flags import to_flags
from memserve.hosts import is_loopback
from memserve.secrets import SECRET_VARIABLE, Secret


def gateway_names(config: ClusterConfig) -> tuple[str, ...]:
    """Return the names of the cluster's gateways: `gateway`, `gateway-1`, ..."""
    return tuple(
        f"{GATEWAYS}-{index}" if index else GATEWAYS for index in range(config.cluster.gateways)
    )


def gateway_launch(config: ClusterConfig, secret: Secret, name: str = GATEWAYS) -> Launch:
    """Return the launch of one of the gateways."""
    return Launch(
        name=name,
        group=GATEWAYS,
        arguments=(
            "gateway",
            *to_flags(config.model),
            *to_flags(config.gateway),
            *to_flags(config.security),
            *to_flags(config.log),
            *to_flags(config.traces),
        ),
        secrets={**_secrets(secret), KEYS_VARIABLE: hashed(config.gateway.api_keys)},
    )


def instance_launches(config: ClusterConfig, secret: Secret) -> list[Launch]:
    """Return the launches of all instances, in the file's order, numbered from 0."""
    launches: list[Launch] = []
    for group, table in tables(config).items():
        for _ in range(table.count):
            launches.append(instance_launch(config, secret, group, len(launches)))
    return launches


def instance_launch(config: ClusterConfig, secret: Secret, group: str, number: int) -> Launch:
    """Return the launch of one instance of a group: `decode-3` for number 3 of role decode."""
    return named_launch(config, secret, group, f"{tables(config)[group].role}-{number}")


def named_launch(config: ClusterConfig, secret: Secret, group: str, name: str) -> Launch:
    """Return the launch of one instance of a group."""
    table = tables(config)[group]
    arguments = (
        "instance",
        "--id",
        name,
        *to_flags(config.model),
        *to_flags(config.cache),
        *to_flags(config.log),
        *to_flags(msgspec.structs.replace(table, count=1)),
        *to_flags(config.traces),
        # Loopback traffic needs no TLS.
        *([] if _stays_here(config, table) else to_flags(config.security)),
        "--drain-seconds",
        str(config.gateway.drain_seconds),
    )
    return Launch(name, group, arguments, table, _secrets(secret))


def tables(config: ClusterConfig) -> Mapping[str, InstanceConfig]:
    """Return the `[[instance]]` tables by group name: the role; the second of a role is
    `decode.2`."""
    named: dict[str, InstanceConfig] = {}
    for table in config.instance:
        same = sum(one.role is table.role for one in named.values())
        named[f"{table.role}.{same + 1}" if same else str(table.role)] = table
    return named


def with_threads(config: ClusterConfig) -> ClusterConfig:
    """Return the configuration in which instances without threads and cores of their own share
    this machine's cores: with more threads than cores, they slow each other down."""
    share = max(1, available_cores() // sum(table.count for table in config.instance))
    given = [
        msgspec.structs.replace(table, threads=share)
        if table.threads is None and table.cpus is None
        else table
        for table in config.instance
    ]
    return msgspec.structs.replace(config, instance=tuple(given))


def _stays_here(config: ClusterConfig, table: InstanceConfig) -> bool:
    return config.cluster.backend == "local" and is_loopback(table.host)


def _secrets(secret: Secret) -> dict[str, str]:
    return {SECRET_VARIABLE: str(secret)}
