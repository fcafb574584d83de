"""Hosts that are lost without a word: first the link, then all processes. Streams go on with the
right tokens, nothing stays held, and a host is used again when it is back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memserve.types import Role
from tests.fault.conftest import Expected
from tests.handoff_harness import prompt_of
from tests.hosts.cluster import HostCluster, Operator
from tests.hosts.streams import (
    FEW,
    LONG_PROMPTS,
    PROMPTS,
    TOKENS,
    finished,
    hands_over,
    in_hand_over,
    streaming,
)
from tests.hosts_harness import Hosts

P, ON_B, ON_C = "p-a", "d-b", "d-c"


@pytest.fixture(scope="module")
def cluster(module_hosts: Hosts, model: Path, secret: str) -> Iterator[HostCluster]:
    """Members know two gateways, of which the second is not there yet."""
    a, b, c = module_hosts
    cluster = HostCluster(module_hosts, model, secret)
    gateways = cluster.gateway(a), cluster.url(b)
    cluster.instance(a, P, Role.PREFILL, *gateways)
    cluster.instance(b, ON_B, Role.DECODE, *gateways)
    cluster.instance(c, ON_C, Role.DECODE, *gateways)
    yield cluster
    for process in cluster.processes.values():
        assert "Traceback" not in process.text(), process.text()[-5000:]


@pytest.fixture(scope="module")
def answers(expected: Expected) -> list[list[int]]:
    return [expected(prompt, TOKENS) for prompt in PROMPTS]


def note(case: str, pause: float, whole: float, back: float) -> None:
    """A row of the table in docs/many-hosts.md; `pytest -s` shows it."""
    print(f"\n| {case} | {pause:.1f} | {whole:.1f} | {back:.1f} |")


def test_a_host_is_lost_and_comes_back(
    cluster: HostCluster, expected: Expected, answers: list[list[int]]
) -> None:
    a, b, c = cluster.hosts
    wanted = answers + [expected(prompt, FEW) for prompt in LONG_PROMPTS]
    with a.entered():
        operator = Operator(cluster, cluster.url(a))
        operator.until_ready(P, ON_B, ON_C)
        hands_over(operator, ON_C, expected)
        clients = streaming(operator, ON_C)
        clients += in_hand_over(operator, P, ON_C, c)
        fault = time.monotonic()
        c.cut()
        c.kill()
        pause = finished(operator, clients, wanted, fault)
        operator.until(lambda: operator.quiet(P, ON_B), "the end of what it held")
        whole = time.monotonic() - fault
        operator.until_ready(P, ON_B)
        c.boot()
        back = time.monotonic()
        cluster.instance(c, ON_C, Role.DECODE, cluster.url(a), cluster.url(b))
        operator.until_ready(P, ON_B, ON_C)
        hands_over(operator, ON_C, expected)
        operator.until(lambda: operator.quiet(P, ON_B, ON_C), "quiet")
        note(
            "a decode host, in a hand-over too: link down, processes killed",
            pause,
            whole,
            time.monotonic() - back,
        )


def test_a_link_is_lost_for_longer_than_a_lease(
    cluster: HostCluster, expected: Expected, answers: list[list[int]]
) -> None:
    """The instance lives on, and finds that its requests are others'."""
    a, _, c = cluster.hosts
    with a.entered():
        operator = Operator(cluster, cluster.url(a))
        operator.until_ready(P, ON_B, ON_C)
        clients = streaming(operator, ON_C)
        fault = time.monotonic()
        c.cut()
        pause = finished(operator, clients, answers, fault)
        operator.until_ready(P, ON_B)
        operator.until(lambda: operator.quiet(P, ON_B), "the end of what it held")
        whole = time.monotonic() - fault
        c.mend()
        back = time.monotonic()
        operator.until_ready(P, ON_B, ON_C)
        hands_over(operator, ON_C, expected)
        operator.until(lambda: operator.quiet(P, ON_B, ON_C), "quiet")
        note("a decode host's link, mended later", pause, whole, time.monotonic() - back)


def test_the_host_of_gateway_and_prefill_is_lost(cluster: HostCluster, expected: Expected) -> None:
    """A gateway on another host finds the members that know it; they serve without P."""
    a, b, _ = cluster.hosts
    with b.entered():
        first = Operator(cluster, cluster.url(a))
        first.until_ready(P, ON_B, ON_C)
        clients = streaming(first, ON_B)
        fault = time.monotonic()
        a.cut()
        a.kill()
        second = Operator(cluster, cluster.gateway(b))
        second.until_ready(ON_B, ON_C)
        prompt = prompt_of(200, seed=50)
        answer = second.complete(prompt, 8)
        pause = time.monotonic() - fault
        assert answer["choices"][0]["token_ids"] == expected(prompt, 8)
        second.until(lambda: second.quiet(ON_B, ON_C), "the end of what it held")
        whole = time.monotonic() - fault
        for client in clients:
            client.leave()
        a.boot()
        back = time.monotonic()
        cluster.instance(a, P, Role.PREFILL, cluster.url(a), cluster.url(b))
        second.until_ready(P, ON_B, ON_C)
        for name in (ON_B, ON_C):
            hands_over(second, name, expected)
        second.until(lambda: second.quiet(P, ON_B, ON_C), "quiet")
        case = "the gateway's and the prefill's host, a gateway started elsewhere"
        note(case, pause, whole, time.monotonic() - back)
