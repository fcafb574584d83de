"""Orders to an actor and its answers, as msgspec's bytes; and its needs of a node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from memserve.cluster.backend import GATEWAYS, Launch
from memserve.config import ClusterConfig, InstanceConfig
from memserve.errors import ConfigError
from memserve.secrets import SECRET_VARIABLE, Secret, cluster_secret

# Of actors' names: others may use the namespace, too.
PREFIX = "memserve."
# A gateway computes little but keeps a core busy under load.
GATEWAY_CPUS = 1.0
# Ray's names of resources.
_CPU, _GPU = "CPU", "GPU"


class Order(msgspec.Struct, frozen=True):
    """One process for an actor to run. Its text (`repr`) has no secrets."""

    name: str
    group: str
    arguments: tuple[str, ...]  # without host, port and gateways
    secrets: dict[str, str]  # environment variables of the process
    namespace: str  # of the cluster's actors
    gateways: tuple[str, ...]  # names of their actors
    join: tuple[str, ...]  # URLs of gateways that are no actors
    host: str  # to listen on; "": the node's address
    port: int  # a gateway's
    tls: bool  # a gateway's
    module: str  # run by Python
    config: ClusterConfig  # the whole cluster's, without API keys, for who changes it later

    def __repr__(self) -> str:
        return f"Order({self.name})"

    @property
    def actor(self) -> str:
        """The actor's name."""
        return PREFIX + self.name

    @property
    def secret(self) -> Secret:
        """The cluster's secret."""
        return cluster_secret(self.secrets[SECRET_VARIABLE])

    @property
    def is_gateway(self) -> bool:
        return self.group == GATEWAYS


class Report(msgspec.Struct, frozen=True):
    """An actor's process, and what it has said since the last report.

    `lines`: (whether the process printed it, text); the supervisor's words are the others.
    `ended`: None while it is kept running; "" after an end in order, else why it is given up.
    """

    life: str  # differs for each life of the actor
    node: str
    pid: int | None
    url: str  # "" until it listens
    crashes: int  # in this life
    alive: bool
    ended: str | None
    seen: int  # number of the last line, for the next call
    lines: tuple[tuple[bool, str], ...]


def needs(launch: Launch) -> dict[str, float]:
    """Return what Ray reserves for a process, by resource. An instance without `resources.CPU`
    takes its `cpus`, its `threads`, or one."""
    table = launch.settings
    if table is None:
        return {_CPU: GATEWAY_CPUS}
    return {_CPU: float(cpus_of(table)), **table.resources}


def cpus_of(table: InstanceConfig) -> float:
    """Return the CPUs that an instance takes from its node."""
    if _CPU in table.resources:
        return table.resources[_CPU]
    return float(len(table.cpus)) if table.cpus else float(table.threads or 1)


def fitted(config: ClusterConfig) -> ClusterConfig:
    """Return the configuration for nodes that are not this one: an instance without `threads`
    computes with the CPUs that it takes.

    Raises ConfigError for addresses of instances, which are their nodes', and for a cluster
    without any gateway.
    """
    if not config.cluster.gateways and not config.cluster.join:
        raise ConfigError(
            "cluster.gateways = 0: instances need a gateway; name those that run elsewhere in "
            "cluster.join, as ['http://10.0.0.5:8000']"
        )
    usual = InstanceConfig()
    tables = []
    for table in config.instance:
        for name in ("host", "port", "advertise", "vllm_url"):
            value = msgspec.structs.asdict(table)[name]
            if value != msgspec.structs.asdict(usual)[name]:
                raise ConfigError(
                    f"instance.{name} = {value!r}: with Ray an instance runs where there is room, "
                    "and listens at its node's address; leave it out"
                )
        threads = table.threads
        if threads is None and table.cpus is None:
            threads = max(1, int(cpus_of(table)))
        tables.append(msgspec.structs.replace(table, threads=threads))
    return msgspec.structs.replace(config, instance=tuple(tables))


def without_keys(config: ClusterConfig) -> ClusterConfig:
    """Return the configuration without clients' API keys, which are secrets of a launch."""
    gateway = msgspec.structs.replace(config.gateway, api_keys=())
    return msgspec.structs.replace(config, gateway=gateway)


def missing(needed: Mapping[str, float], nodes: Iterable[Mapping[str, float]]) -> str:
    """Return why no node could ever run something, in words; "" if one could.

    `nodes`: the total resources of each.
    """
    nodes = list(nodes)
    if any(all(node.get(name, 0) >= n for name, n in needed.items()) for node in nodes):
        return ""
    wanted = amounts(needed)
    largest = amounts({name: max((n.get(name, 0) for n in nodes), default=0) for name in needed})
    return (
        f"it needs {wanted} on one node; the most that any of the {len(nodes)} nodes has is "
        f"{largest}"
    )


def amounts(resources: Mapping[str, float]) -> str:
    """Return resources in words: `8 CPU, 1 GPU`."""
    return ", ".join(f"{n:g} {name}" for name, n in resources.items() if n or name == _CPU)


encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
