"""Conversations on a cluster of three hosts, with a secret and TLS: the tokens are those of
Transformers' generate, and KV goes over a link only where it is missing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from memserve.api.tls import TLS_CA_VARIABLE
from memserve.secrets import SECRET_VARIABLE
from memserve.types import Role
from tests.fault.conftest import Expected
from tests.hosts.cluster import HostCluster, Operator, Tls
from tests.hosts.conversations import Turn
from tests.hosts.turns import TALK_A_SECOND, Turns
from tests.hosts_harness import Hosts

P = "p-a"
DECODES = {"d-b": "B", "d-c": "C"}


def issue(hosts: Hosts, directory: Path) -> Tls:
    """A certificate for each host's address."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    chains, keys = {}, {}
    for host in hosts:
        made = authority.issue_cert(host.address, host.hostname)
        chains[host.name] = directory / f"{host.name}.pem"
        keys[host.name] = directory / f"{host.name}.key"
        chains[host.name].write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
        made.private_key_pem.write_to_path(keys[host.name])
    return Tls(directory / "ca.pem", chains, keys)


@pytest.fixture(scope="module")
def operator(
    module_hosts: Hosts, model: Path, secret: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    a, b, c = module_hosts
    tls = issue(module_hosts, tmp_path_factory.mktemp("certificates"))
    cluster = HostCluster(module_hosts, model, secret, tls)
    gateway = cluster.gateway(a)
    cluster.instance(a, "p-a", Role.PREFILL, gateway)
    cluster.instance(b, "d-b", Role.DECODE, gateway)
    cluster.instance(c, "d-c", Role.DECODE, gateway)
    with a.entered():
        operator = Operator(cluster, gateway)
        operator.until_ready("p-a", "d-b", "d-c")
        yield operator


def test_tokens_are_generates_and_kv_moves_only_where_it_is_missing(
    operator: Operator, expected: Expected, conversations: list[list[Turn]]
) -> None:
    decodes = {name: operator.cluster.hosts[host] for name, host in DECODES.items()}
    checked = Turns(operator, expected, P, decodes)
    checked.talk(conversations, TALK_A_SECOND)


def test_between_hosts_kv_moves_by_nixl(operator: Operator) -> None:
    a, *_ = operator.cluster.hosts
    assert operator.cluster.tls is not None
    environment = {
        SECRET_VARIABLE: operator.cluster.secret,
        TLS_CA_VARIABLE: str(operator.cluster.tls.authority),
    }
    said = a.run(
        *(sys.executable, "-m", "memserve", "doctor", "--url", operator.url),
        environment=environment,
    )
    reached = [line for line in said.splitlines() if " reach " in line]
    # Each of three pools reaches the two others.
    assert re.findall(r"\((\w+), [\d.]+ s\)", "".join(reached)) == ["nixl"] * 6, said
