"""A cluster that Ray runs on three hosts: a head and two workers, one on each. Tokens are those of
Transformers' generate, KV goes over a link only where it is missing, and a host may be lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.conftest import Expected
from tests.hosts.cluster import Operator
from tests.hosts.conversations import Turn
from tests.hosts.ray_cluster import RayCluster, started_ray
from tests.hosts.streams import PROMPTS, TOKENS, finished, hands_over, streaming
from tests.hosts.turns import TALK_A_SECOND, Turns
from tests.hosts_harness import Hosts
from tests.steady_load import Load

pytest.importorskip("ray", reason="Ray is not installed: pip install 'memserve[ray]'")
pytestmark = pytest.mark.timeout(600)

P, DECODES = "prefill-0", ("decode-1", "decode-2")
# What a node of Ray says to its head, at most, in bytes.
RAY_A_SECOND = 25_000
AGAIN_SECONDS = 240.0  # until Ray has noticed, and a member is at work again: 30 s if all is quiet


@pytest.fixture(scope="module")
def operator(module_hosts: Hosts, model: Path, secret: str) -> Iterator[Operator]:
    with started_ray(module_hosts, model, secret) as cluster:
        url = cluster.deploy()
        with cluster.head.entered():
            operator = Operator(cluster, url)
            operator.until_ready(P, *DECODES)
            yield operator


def ray_of(operator: Operator) -> RayCluster:
    assert isinstance(operator.cluster, RayCluster)
    return operator.cluster


def test_tokens_are_generates_and_kv_moves_only_where_it_is_missing(
    operator: Operator, expected: Expected, conversations: list[list[Turn]]
) -> None:
    nodes = ray_of(operator).nodes()
    by_address = {host.address: host for host in operator.cluster.hosts}
    decodes = {name: by_address[nodes[name]] for name in DECODES}
    a, b, c = operator.cluster.hosts
    assert by_address[nodes[P]] is by_address[nodes["gateway"]] is a
    assert {host.name for host in decodes.values()} == {b.name, c.name}
    checked = Turns(operator, expected, P, decodes)
    checked.talk(conversations, TALK_A_SECOND + RAY_A_SECOND)


def test_an_upgrade_replaces_every_member_under_load_and_loses_no_request(
    operator: Operator,
) -> None:
    cluster = ray_of(operator)
    before = {member.id: member.life for member in operator.view().instances}
    with Load(operator.url, clients=2) as load:
        cluster.ray("upgrade", "--ray-address", cluster.address)
        load.more(2)
    assert load.failures == []
    after = {member.id: member.life for member in operator.view().instances}
    assert set(after) == set(before) == {P, *DECODES}
    assert not set(after.items()) & set(before.items())


def test_a_host_is_lost_and_its_member_comes_up_on_another_until_it_is_back(
    operator: Operator, expected: Expected
) -> None:
    cluster = ray_of(operator)
    answers = [expected(prompt, TOKENS) for prompt in PROMPTS]
    nodes = cluster.nodes()
    lost = DECODES[1]
    (host,) = (each for each in cluster.hosts if each.address == nodes[lost])
    (other,) = (each for each in cluster.hosts if each not in (host, cluster.head))
    hands_over(operator, lost, expected)
    clients = streaming(operator, lost)
    fault = time.monotonic()
    host.cut()
    host.kill()
    pause = finished(operator, clients, answers, fault)
    operator.until(
        lambda: other.address in addresses(operator).get(lost, ""), "the member", AGAIN_SECONDS
    )
    again = time.monotonic() - fault
    hands_over(operator, lost, expected)
    operator.until(lambda: operator.quiet(P, *DECODES), "the end of what it held")
    whole = time.monotonic() - fault
    host.boot()
    cluster.node(host)
    back = time.monotonic()
    cluster.ray("scale", "--ray-address", cluster.address, "decode", "3")
    (new,) = set(addresses(operator)) - {P, *DECODES}
    assert host.address in addresses(operator)[new]
    hands_over(operator, new, expected)
    note = (pause, again, whole, time.monotonic() - back)
    print("\n| Ray: a decode host: link down, processes killed |", *(f"{n:.1f} |" for n in note))


def addresses(operator: Operator) -> dict[str, str]:
    """URLs of the members that are ready."""
    ready = operator.ready()
    return {m.id: m.address for m in operator.view().instances if m.id in ready}
