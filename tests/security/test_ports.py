"""Ports belong to who reserved them, through every life of the processes that listen on them, and
SIGHUP ends none of these."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from memserve.api.serving import Shutdown, bind
from memserve.cluster.child import Child
from memserve.cluster.cluster import Cluster
from memserve.cluster.local import LocalBackend
from memserve.cluster.port import ReservedPort, is_listened_on
from memserve.cluster.restarts import RestartLimits
from memserve.config import ClusterConfig, GatewayConfig, InstanceConfig, ModelConfig
from memserve.errors import ClusterError
from tests.fakes import save_tiny_tokenizer
from tests.security.test_control_plane import stranger
from tests.security.test_http_ipv6 import needs_ipv6

MODULE = "tests.e2e.fake_memserve"
NOBODY = 65534
LONGEST = 120.0  # seconds for processes to start on a busy machine
HOSTS = [
    "127.0.0.1",
    "0.0.0.0",
    pytest.param("::1", marks=needs_ipv6),
    pytest.param("::", marks=needs_ipv6),
]
OPTIONS = [
    [],
    [socket.SO_REUSEADDR],
    [socket.SO_REUSEPORT],
    [socket.SO_REUSEADDR, socket.SO_REUSEPORT],
]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def listen_as(uid: int, host: str, port: int, options: list[int]) -> int:
    """The error number with which a user cannot listen there; 0: it can."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setuid(uid)
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            for option in options:
                sock.setsockopt(socket.SOL_SOCKET, option, 1)
            sock.bind((host, port))
            sock.listen()
        except OSError as error:
            os._exit(error.errno or 255)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def reserve() -> Iterator[Callable[..., ReservedPort]]:
    ports: list[ReservedPort] = []

    def reserved(host: str, port: int = 0) -> ReservedPort:
        ports.append(ReservedPort(host, port))
        return ports[-1]

    yield reserved
    for port in ports:
        port.close()


def serve_once(sock: socket.socket) -> None:
    """One connection that the server closes first: it stays in TIME_WAIT."""
    with sock:
        host, port = sock.getsockname()[:2]
        with socket.create_connection((host, port)) as client:
            sock.accept()[0].close()
            assert client.recv(1) == b""


@needs_root
@pytest.mark.parametrize("host", HOSTS)
def test_no_other_user_listens_on_a_reserved_port(
    host: str, reserve: Callable[..., ReservedPort]
) -> None:
    port = reserve(host)
    for _ in range(2):  # lives
        for options in OPTIONS:
            assert listen_as(NOBODY, host, port.number, options) == errno.EADDRINUSE
        with bind(host, port.number, shared=True):
            for options in OPTIONS:
                assert listen_as(NOBODY, host, port.number, options) == errno.EADDRINUSE


@needs_root
def test_no_other_user_listens_at_a_wider_or_narrower_address(
    reserve: Callable[..., ReservedPort],
) -> None:
    for own, other in (("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1")):
        port = reserve(own)
        for options in OPTIONS:
            assert listen_as(NOBODY, other, port.number, options) == errno.EADDRINUSE


@needs_root
def test_who_has_bound_a_port_before_it_was_reserved_cannot_listen_on_it(
    reserve: Callable[..., ReservedPort],
) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        os.seteuid(NOBODY)  # this socket stays root's, the next ones are not
        try:
            reserve("127.0.0.1", port)
            bind("127.0.0.1", port, shared=True).close()
            with pytest.raises(OSError, match="already in use"):
                sock.listen()
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("host", HOSTS)
def test_two_of_one_user_do_not_get_one_port(
    host: str, reserve: Callable[..., ReservedPort]
) -> None:
    port = reserve(host).number
    with bind(host, port, shared=True), pytest.raises(ClusterError, match="already in use"):
        ReservedPort(host, port)
    with pytest.raises(ClusterError, match=f"{port}: Address already in use"):
        ReservedPort(host, port)
    with pytest.raises(OSError, match="already in use"):  # `memserve gateway` by itself
        bind(host, port)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_connections_of_a_former_life_are_no_obstacle(
    host: str, shared: bool, reserve: Callable[..., ReservedPort]
) -> None:
    with bind(host, 0, shared=shared) as sock:
        number = sock.getsockname()[1]
        serve_once(sock)
    port = reserve(host, number)
    for _ in range(2):
        serve_once(bind(host, number, shared=True))
    port.close()
    again = reserve(host, number)
    if os.geteuid() == 0:
        assert listen_as(NOBODY, host, again.number, [socket.SO_REUSEADDR]) == errno.EADDRINUSE


@pytest.mark.parametrize("host", HOSTS)
def test_a_listener_is_told_from_a_reservation(
    host: str, reserve: Callable[..., ReservedPort]
) -> None:
    port = reserve(host).number
    assert not is_listened_on(host, port)
    with bind(host, port, shared=True):
        assert is_listened_on(host, port)
    assert not is_listened_on(host, port)


async def test_a_child_that_has_not_loaded_survives_a_reload() -> None:
    # `this` knows no signals; it prints its lines and is done.
    child = await Child.spawn("zen", [], module="this")
    child.reload()
    assert await child.ended == 0


def cluster_of(directory: Path, workers: int) -> Cluster:
    save_tiny_tokenizer(directory)
    (directory / "config.json").write_text("{}")
    (directory / "keys").write_text("sk-of-the-first-day\n")
    config = ClusterConfig(
        model=ModelConfig(path=str(directory), served_name="m"),
        gateway=GatewayConfig(
            port=0, workers=workers, api_keys_file=str(directory / "keys"), drain_seconds=1.0
        ),
        instance=(InstanceConfig(),),
    )
    limits = RestartLimits(first_pause=0.01, longest_pause=0.05, max_crashes=3)
    backend = LocalBackend(config, lambda line: None, limits=limits, module=MODULE)
    return Cluster(config, backend, Shutdown(), lambda line: None)


async def ask(cluster: Cluster, key: str) -> int:
    """The status of an answer; 0 for none."""
    shown = {"Authorization": f"Bearer {key}"}
    try:
        answer = await asyncio.to_thread(stranger, cluster.url, "GET", "/v1/models", **shown)
    except OSError:
        return 0
    return answer.status


async def until_all_say(cluster: Cluster, key: str, status: int) -> None:
    """Many connections, so that each of the workers gets some."""
    answers = set[int]()
    while answers != {status}:
        answers = {await ask(cluster, key) for _ in range(20)}


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_gateway_reloads_its_keys_and_comes_back_at_its_port(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(root / "src"), str(root))))
    cluster = cluster_of(tmp_path, workers)
    try:
        async with asyncio.timeout(LONGEST):
            starting = asyncio.ensure_future(cluster.start())
            while "gateway" not in cluster.pids():
                await asyncio.wait((starting,), timeout=0)
            cluster.reload()  # it loads still
            await starting
            before = cluster.pids()
            supervising = asyncio.ensure_future(cluster.supervise())
            await until_all_say(cluster, "sk-of-the-first-day", 200)
            (tmp_path / "keys").write_text("sk-of-the-next-day\n")
            cluster.reload()
            await until_all_say(cluster, "sk-of-the-first-day", 401)
            await until_all_say(cluster, "sk-of-the-next-day", 200)
            assert cluster.pids() == before
            # Its workers, if it has some, live on for a while, and listen.
            os.kill(before["gateway"], signal.SIGKILL)
            port = urlsplit(cluster.url).port or 0
            while cluster.pids()["gateway"] == before["gateway"]:
                if os.geteuid() == 0:
                    assert listen_as(NOBODY, "127.0.0.1", port, [socket.SO_REUSEADDR])
                await asyncio.sleep(0.005)
            assert await cluster._gateways[0].address() == cluster.url
            await until_all_say(cluster, "sk-of-the-next-day", 200)
        supervising.cancel()
    finally:
        cluster._shutdown.forced.set()
        await cluster.stop()
