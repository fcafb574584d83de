"""Listening at IPv6's addresses, at names that have no other, and at wildcards."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from memserve.api.serving import bind, url_of
from memserve.cluster.port import ReservedPort
from memserve.errors import ClusterError, ConfigError, TransferError
from memserve.hosts import (
    bracketed,
    is_loopback,
    numeric_endpoint,
    reachable_endpoint,
    resolve,
    split_endpoint,
)
from memserve.instance.kv_events import KVEventPublisher
from memserve.pool.pool import BlockPool
from memserve.transfer.sockets import PoolSockets, is_local
from tests.http_harness import post, serving
from tests.pool_harness import LAYOUT

ONLY_6 = "six.test"
BOTH = "both.test"


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(
    not _has_ipv6(),
    reason="::1 cannot be bound: enable IPv6 (sysctl net.ipv6.conf.lo.disable_ipv6=0)",
)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """`six.test` has an AAAA record alone, `both.test` has it first."""
    real = socket.getaddrinfo
    six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))
    four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    known = {ONLY_6: [six], BOTH: [six, four]}

    def getaddrinfo(host: str, port: int, *rest: Any, **options: Any) -> Any:
        if host not in known:
            return real(host, port, *rest, **options)
        return [(*entry, (at[0], port, *at[2:])) for *entry, at in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "::", ONLY_6, BOTH, "127.0.0.1", "0.0.0.0"])
async def test_servers_listen_where_they_are_told(host: str, names: None) -> None:
    async with serving(host=host) as served:
        at = {"::": "::1", "0.0.0.0": "127.0.0.1"}.get(served.host, served.host)
        served.host = at
        client = await served.connect()
        client.say(post(b"x"))
        assert (await client.hear())[2] == b"POST /p x"
        if host == "::":  # which is for everybody
            served.host = "127.0.0.1"
            client = await served.connect()
            client.say(post(b"x"))
            assert (await client.hear())[2] == b"POST /p x"


@needs_ipv6
def test_addresses_of_servers_have_brackets(names: None) -> None:
    for host, url in (("::1", "http://[::1]:"), (ONLY_6, "http://[::1]:"), (BOTH, "http://127.")):
        with bind(host, 0) as sock:
            assert url_of(sock).startswith(url)
    with bind("::", 0) as sock:
        assert url_of(sock).startswith(f"http://{bracketed(socket.getfqdn())}:")


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("::1", "http://[::1]:{}"),
        ("::", "http://[::1]:{}"),
        (ONLY_6, "http://six.test:{}"),
        (BOTH, "http://both.test:{}"),
    ],
)
def test_ports_are_reserved_for_a_child_to_listen_on(host: str, url: str, names: None) -> None:
    port = ReservedPort(host, 0)
    try:
        assert port.url == url.format(port.number)
        assert ReservedPort(host, 0, tls=True).url.startswith("https://")
        with bind(host, port.number, shared=True), pytest.raises(ClusterError):
            ReservedPort(host, port.number)
    finally:
        port.close()


def test_names_without_an_address_are_an_error_of_their_own() -> None:
    for host in ("nowhere.invalid", "a..b", "x" * 300):
        with pytest.raises(socket.gaierror):
            bind(host, 0)
        with pytest.raises(ClusterError):
            ReservedPort(host, 0)


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", ONLY_6, BOTH, "127.0.0.1", "localhost"])
def test_pools_and_events_listen_where_instances_do(host: str, names: None) -> None:
    at = "[::1]" if host in ("::1", ONLY_6) else "127.0.0.1"
    links, other = PoolSockets(None), PoolSockets(None)
    try:
        address = links.listen(f"tcp://{bracketed(host)}:0")
        assert address.startswith(f"tcp://{at}:")
        dealer = other.dial(address)
        while not (arrived := links.poll(0.05)):
            other.send(dealer, b"h" * 16, b"hello")
            other.poll(0.0)
        assert arrived[0].frames[-1] == b"hello"
    finally:
        other.close()
        links.close()
    with BlockPool(LAYOUT, 4) as pool:
        events = KVEventPublisher(pool, host)
        try:
            for endpoint in (events.info.endpoint, events.info.replay_endpoint):
                assert endpoint.startswith(f"tcp://{at}:")
        finally:
            events.close()


def test_what_nothing_can_listen_at_is_an_error_of_the_configuration() -> None:
    links = PoolSockets(None)
    try:
        for address in ("tcp://[::1", "tcp://127.0.0.1:x", "tcp://127.0.0.1"):
            with pytest.raises((TransferError, ConfigError)):
                links.listen(address)
    finally:
        links.close()
    with BlockPool(LAYOUT, 4) as pool, pytest.raises(ConfigError):
        KVEventPublisher(pool, "nowhere.invalid")


@pytest.mark.parametrize(
    "address",
    [
        "tcp://[::]:0",
        "tcp://0.0.0.0:0",
        "tcp://*:0",
        "tcp://127.evil.test:0",
        "tcp://localhost.evil.test:0",
        "tcp://[::2]:0",
        "tcp://[::ffff:10.0.0.1]:0",
        "tcp://10.0.0.1:0",
    ],
)
def test_what_others_may_reach_is_not_local(address: str) -> None:
    assert not is_local(address)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://[::1]:0",
        "tcp://127.0.0.1:0",
        "tcp://127.8.9.1:5",
        "tcp://localhost:0",
        "tcp://[::ffff:127.0.0.1]:0",
    ],
)
def test_what_this_machine_alone_reaches_is_local(address: str) -> None:
    assert is_local(address)


def test_endpoints_are_taken_apart_and_put_together() -> None:
    assert split_endpoint("tcp://[::1]:5") == ("::1", "5")
    assert split_endpoint("tcp://h:5") == ("h", "5")
    assert numeric_endpoint("tcp://lo:5") == "tcp://lo:5"  # an interface
    assert numeric_endpoint("ipc:///tmp/x") == "ipc:///tmp/x"
    assert numeric_endpoint("tcp://127.0.0.1:5") == "tcp://127.0.0.1:5"
    name = bracketed(socket.getfqdn())
    assert reachable_endpoint("tcp://[::]:5") == f"tcp://{name}:5"
    assert reachable_endpoint("tcp://0.0.0.0:5") == f"tcp://{name}:5"
    assert reachable_endpoint("tcp://[::1]:5") == "tcp://[::1]:5"
    assert bracketed("[::1]") == bracketed("::1") == "[::1]"
    assert is_loopback("127.0.0.1")
    assert not is_loopback("h")


def test_a_host_of_neither_kind_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: [])
    with pytest.raises(OSError, match="no address"):
        resolve("h", 0)
