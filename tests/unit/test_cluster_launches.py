"""What a cluster's processes are started with."""

from __future__ import annotations

from memserve.cluster.backend import GATEWAYS
from memserve.cluster.launches import (
    gateway_launch,
    gateway_names,
    instance_launch,
    instance_launches,
    tables,
)
from memserve.config import BackendConfig, ClusterConfig, GatewayConfig, InstanceConfig
from memserve.secrets import Secret
from memserve.types import Role

SECRET = Secret(("not-to-be-shown",))
CONFIG = ClusterConfig(
    gateway=GatewayConfig(api_keys=("sk-of-a-client",)),
    instance=(
        InstanceConfig(role=Role.DECODE, count=2),
        InstanceConfig(role=Role.PREFILL),
        InstanceConfig(role=Role.DECODE, hbm_blocks=9),
    ),
)


def test_each_table_is_a_group_and_members_are_numbered_through() -> None:
    assert gateway_names(ClusterConfig(cluster=BackendConfig(gateways=2))) == (
        "gateway",
        "gateway-1",
    )
    assert list(tables(CONFIG)) == ["decode", "prefill", "decode.2"]
    assert [(one.name, one.group) for one in instance_launches(CONFIG, SECRET)] == [
        ("decode-0", "decode"),
        ("decode-1", "decode"),
        ("prefill-2", "prefill"),
        ("decode-3", "decode.2"),
    ]
    more = instance_launch(CONFIG, SECRET, "decode.2", 7)
    assert more.name == "decode-7"
    assert more.arguments[more.arguments.index("--hbm-blocks") + 1] == "9"


def test_secrets_are_in_no_argument_and_in_no_text_of_a_launch() -> None:
    gateway = gateway_launch(CONFIG, SECRET)
    assert (gateway.name, gateway.group) == ("gateway", GATEWAYS)
    for launch in (gateway, *instance_launches(CONFIG, SECRET)):
        for hidden in ("not-to-be-shown", "sk-of-a-client"):
            assert hidden not in repr(launch)
            assert hidden not in " ".join(launch.arguments)
        assert launch.secrets["MEMSERVE_SECRET"] == "not-to-be-shown"
        assert ("MEMSERVE_API_KEYS" in launch.secrets) is (launch.group == GATEWAYS)
