"""Orders as Ray's actors get them."""

from __future__ import annotations

from typing import Any

from memserve.cluster.launches import Launch
from memserve.config import ClusterConfig
from memserve.ray.order import Order


def order_of(
    config: ClusterConfig, name: str, group: str, secrets: dict[str, str], **fields: Any
) -> Order:
    """Return an order without arguments, in a cluster of one gateway; `fields`: instead of that."""
    given: dict[str, Any] = {
        "arguments": (),
        "namespace": "memserve",
        "gateways": ("gateway",),
        "join": (),
        "host": "",
        "port": 0,
        "tls": False,
        "module": "memserve",
    }
    return Order(name=name, group=group, secrets=secrets, config=config, **{**given, **fields})


def launched(config: ClusterConfig, launch: Launch, **fields: Any) -> Order:
    """Return the order of a launch."""
    secrets = dict(launch.secrets)
    return order_of(
        config, launch.name, launch.group, secrets, arguments=launch.arguments, **fields
    )
