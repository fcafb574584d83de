"""What a Ray cluster is asked for, and what goes to actors."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from memserve.cluster.launches import gateway_launch, instance_launches
from memserve.config import (
    BackendConfig,
    ClusterConfig,
    GatewayConfig,
    InstanceConfig,
    ModelConfig,
    SecurityConfig,
    parse_config,
)
from memserve.errors import ConfigError
from memserve.ray.order import (
    decode_order,
    encode,
    fitted,
    missing,
    needs,
    without_keys,
)
from memserve.secrets import Secret
from memserve.types import Role
from tests.ray_orders import launched

SECRET = Secret(("not-to-be-shown",))
RAY = BackendConfig(backend="ray")


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        (InstanceConfig(), {"CPU": 1.0}),
        (InstanceConfig(threads=4), {"CPU": 4.0}),
        (InstanceConfig(cpus=(0, 1)), {"CPU": 2.0}),
        (InstanceConfig(threads=4, resources={"CPU": 0.5, "GPU": 2}), {"CPU": 0.5, "GPU": 2}),
        (InstanceConfig(resources={"GPU": 1, "rack-7": 1}), {"CPU": 1.0, "GPU": 1, "rack-7": 1}),
    ],
)
def test_what_an_instance_takes_from_its_node(
    table: InstanceConfig, wanted: dict[str, float]
) -> None:
    (launch,) = instance_launches(ClusterConfig(cluster=RAY, instance=(table,)), SECRET)
    assert needs(launch) == wanted
    assert needs(gateway_launch(ClusterConfig(), SECRET)) == {"CPU": 1.0}


def test_resources_are_read_from_the_file() -> None:
    config = parse_config("[cluster]\nbackend = 'ray'\n[[instance]]\nresources = { GPU = 2 }")
    assert config.cluster.backend == "ray"
    assert config.instance[0].resources == {"GPU": 2.0}
    with pytest.raises(ConfigError, match="resources"):
        parse_config("[[instance]]\nresources = { GPU = -1 }")


def test_instances_compute_with_the_cpus_that_they_take() -> None:
    tables = (
        InstanceConfig(),
        InstanceConfig(resources={"CPU": 6}),
        InstanceConfig(resources={"CPU": 0.5}),
        InstanceConfig(threads=3),
        InstanceConfig(cpus=(0, 1)),
    )
    config = fitted(ClusterConfig(cluster=RAY, instance=tables))
    assert [table.threads for table in config.instance] == [1, 6, 1, 3, None]
    assert fitted(config) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"host": "0.0.0.0"}, "instance.host = '0.0.0.0'.*its node's address"),
        ({"port": 9000}, "instance.port = 9000"),
        ({"advertise": "http://h:1"}, "instance.advertise"),
        ({"engine": "vllm", "vllm_url": "http://h:1"}, "instance.vllm_url"),
    ],
)
def test_addresses_are_not_the_file_s_to_choose(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fitted(ClusterConfig(cluster=RAY, instance=(InstanceConfig(**changes),)))


def test_gateways_may_be_elsewhere_but_not_nowhere() -> None:
    elsewhere = msgspec.structs.replace(RAY, gateways=0, join=("http://10.0.0.5:8000",))
    assert fitted(ClusterConfig(cluster=elsewhere)).cluster == elsewhere
    with pytest.raises(ConfigError, match=r"cluster\.join"):
        fitted(ClusterConfig(cluster=msgspec.structs.replace(RAY, gateways=0)))


def test_what_no_node_has_is_said_with_what_they_have() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 64.0, "worker": 1.0}]
    assert missing({"CPU": 4.0, "GPU": 1.0}, nodes) == ""
    assert missing({"CPU": 0.0, "worker": 1.0}, nodes) == ""
    said = missing({"CPU": 8.0, "GPU": 2.0}, nodes)
    assert "needs 8 CPU, 2 GPU on one node" in said
    assert "any of the 2 nodes has is 64 CPU, 1 GPU" in said
    # Each is somewhere, but not both on one node.
    assert missing({"CPU": 8.0, "GPU": 1.0}, nodes) != ""
    assert "any of the 0 nodes" in missing({"CPU": 1.0}, [])


def test_an_order_survives_its_way_and_does_not_show_its_secrets() -> None:
    config = ClusterConfig(
        cluster=RAY,
        model=ModelConfig(path="m"),
        gateway=GatewayConfig(api_keys=("sk-of-a-client",)),
        instance=(InstanceConfig(role=Role.DECODE, resources={"GPU": 1}),),
    )
    (launch,) = instance_launches(config, SECRET)
    order = launched(without_keys(config), launch)
    data = encode(order)
    back = decode_order(data)
    assert back == order
    assert (back.name, back.actor, back.is_gateway) == ("decode-0", "memserve.decode-0", False)
    assert back.config == without_keys(config)
    assert b"sk-of-a-client" not in data
    for shown in (repr(order), str(order), f"{order}"):
        assert "not-to-be-shown" not in shown


def test_members_of_other_hosts_serve_tls_if_the_cluster_does() -> None:
    security = SecurityConfig(tls_cert="c.pem", tls_key="k.pem", tls_ca="ca.pem")
    for backend, wanted in (("local", False), ("ray", True)):
        place = BackendConfig(backend=backend)  # type: ignore[arg-type]
        config = ClusterConfig(cluster=place, security=security)
        (launch,) = instance_launches(config, SECRET)
        assert ("--tls-cert" in launch.arguments) is wanted
