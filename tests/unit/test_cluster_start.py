"""A cluster's start: whom it trusts, what it says while it waits, and who ends it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
import ray.util
import trustme

from memserve.api.audience import Audience
from memserve.api.guard import Guard
from memserve.api.http_message import Reply, Request
from memserve.api.http_server import HttpServer
from memserve.api.serving import Shutdown, bind
from memserve.api.signatures import Verifier
from memserve.api.status import InstanceState
from memserve.api.tls import TLS_CA_VARIABLE, server_tls
from memserve.cluster import cluster as module
from memserve.cluster import readiness
from memserve.cluster.backend import Launch, Place
from memserve.cluster.cluster import Cluster
from memserve.cluster.launches import gateway_names, instance_launches
from memserve.cluster.member import ClusterView, MemberView
from memserve.cluster.run import run_cluster
from memserve.config import (
    BackendConfig,
    ClusterConfig,
    InstanceConfig,
    PlannerConfig,
    SecurityConfig,
)
from memserve.errors import ClusterError
from memserve.ray.member import Member
from memserve.ray.order import Order, encode
from memserve.secrets import DIRECTORY_VARIABLE, SECRET_VARIABLE, Secret
from memserve.types import Epoch, InstanceId, Role
from tests.ray_orders import launched
from tests.waiting import PATIENCE, until

SECRET = Secret(("the cluster's",))
# A name of this machine's that is not its loopback: there certificates count.
NAME = "gateway.example"


class Gateway:
    """Tells of members, and of no load: a planner can look at it and decide nothing."""

    def __init__(self, **states: InstanceState) -> None:
        self.states = states
        self.asked: list[str] = []

    async def handle(self, request: Request, reply: Reply) -> None:
        self.asked.append(f"{request.method} {request.path}")
        members = tuple(
            MemberView(InstanceId(name), Role.COLOCATED, state, "http://10.0.0.1:1")
            for name, state in self.states.items()
        )
        if request.path == "/cluster/members":
            reply.send(200, msgspec.json.encode(members[0]))
        elif request.path == "/cluster":
            reply.send(200, msgspec.json.encode(ClusterView(Epoch(1), members)))
        else:
            reply.send(200, b"[]")


@asynccontextmanager
async def listening(gateway: Gateway, chain: Path | None = None) -> AsyncIterator[str]:
    sock = bind("127.0.0.1", 0)
    audience = Audience(any_name=True)
    audience.add_socket(sock)
    server = HttpServer(Guard(gateway.handle, Verifier(SECRET, audience)), 4096)
    await server.start(sock, 16, server_tls(str(chain), str(chain)) if chain else None)
    host = f"https://{NAME}" if chain else "http://127.0.0.1"
    try:
        yield f"{host}:{sock.getsockname()[1]}"
    finally:
        await server.close(1.0)


class Process:
    """A `Kept` that runs until `end` is set, with `error` if it is given up then."""

    place: Place | None = None
    alive = True
    crashes = 0

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url
        self.silent = list[ClusterError]()  # what the next calls of `address` come to
        self.asked = 0
        self.end = asyncio.Event()
        self.error = ClusterError(f"{name} has crashed too often")

    async def start(self) -> None:
        pass

    async def address(self) -> str:
        self.asked += 1
        if self.asked > 1 and self.silent:
            raise self.silent.pop(0)
        return self.url

    async def failure(self) -> ClusterError:
        await self.end.wait()
        return self.error

    async def keep(self) -> None:
        raise await self.failure()

    async def stop(self, shutdown: Shutdown, seconds: float) -> None:
        pass

    def show_output(self, show: Callable[[str], None]) -> None:
        pass

    def reload(self) -> None:
        pass


class Processes:
    """A `Backend` whose processes are `Process`es."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.made: dict[str, Process] = {}

    def fit(self, config: ClusterConfig) -> ClusterConfig:
        return config

    async def open(self) -> None:
        pass

    def kept(self, launch: Launch, needed: Callable[[], bool]) -> Process:
        one = self.made[launch.name] = Process(launch.name, self.url)
        return one

    async def close(self) -> None:
        pass


@pytest.fixture
def authorities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A private authority's certificate, and the chain and key of NAME, which leads here as
    another machine's name would."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert(NAME).private_key_and_cert_chain_pem.write_to_path(tmp_path / "chain.pem")
    real = socket.getaddrinfo

    def getaddrinfo(host: object, *arguments: object, **more: object) -> object:
        found = "127.0.0.1" if host in (NAME, NAME.encode()) else host
        return real(found, *arguments, **more)  # type: ignore[call-overload, unused-ignore]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return tmp_path / "ca.pem", tmp_path / "chain.pem"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.005)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "run"))
    monkeypatch.setenv(SECRET_VARIABLE, str(SECRET))
    monkeypatch.delenv(TLS_CA_VARIABLE, raising=False)


def config_of(ca: Path | None = None, count: int = 1, **more: PlannerConfig) -> ClusterConfig:
    security = SecurityConfig(tls_ca=None if ca is None else str(ca))
    tables = (InstanceConfig(role=Role.COLOCATED, count=count),)
    return ClusterConfig(security=security, instance=tables, **more)


@asynccontextmanager
async def starting(config: ClusterConfig, url: str) -> AsyncIterator[tuple[Cluster, list[str]]]:
    said: list[str] = []
    cluster = Cluster(config, Processes(url), Shutdown(), said.append)
    try:
        yield cluster, said
    finally:
        await cluster.stop()


async def test_a_gateway_elsewhere_is_verified_by_the_cluster_s_authorities(
    authorities: tuple[Path, Path],
) -> None:
    ca, chain = authorities
    async with (
        listening(Gateway(**{"colocated-0": InstanceState.READY}), chain) as url,
        starting(config_of(ca), url) as (cluster, said),
    ):
        await asyncio.wait_for(cluster.start(), PATIENCE)
    assert "colocated-0 is ready" in said


async def test_a_command_elsewhere_may_have_the_authorities_in_a_file_of_its_own(
    authorities: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As commands that are only clients: the configured path is the nodes'."""
    ca, chain = authorities
    monkeypatch.setenv(TLS_CA_VARIABLE, str(ca))
    async with (
        listening(Gateway(**{"colocated-0": InstanceState.READY}), chain) as url,
        starting(config_of(Path("/nodes/ca.pem")), url) as (cluster, _),
    ):
        await asyncio.wait_for(cluster.start(), PATIENCE)


async def test_a_gateway_that_cannot_be_asked_is_told_of(
    authorities: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "PATIENT_LOOKS", 2)
    async with (
        listening(Gateway(), authorities[1]) as url,
        starting(config_of(), url) as (cluster, said),
    ):
        work = asyncio.ensure_future(cluster.start())
        await until(lambda: any("still waiting" in line for line in said), "a line")
        work.cancel()
    (line,) = [line for line in said if "still waiting" in line][:1]
    assert url in line
    assert "certificate verify failed" in line.lower()


async def test_members_that_are_late_are_told_of_less_and_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readiness, "PATIENT_LOOKS", 3)
    gateway = Gateway(**{"colocated-0": InstanceState.STARTING})
    async with (
        listening(gateway) as url,
        starting(config_of(count=2), url) as (cluster, said),
    ):
        work = asyncio.ensure_future(cluster.start())
        lines = lambda: [line for line in said if "still waiting" in line]  # noqa: E731
        await until(lambda: len(lines()) == 3, "three lines")
        assert len(gateway.asked) >= 12  # 3, 6 and 12
        assert set(lines()) == {
            "still waiting: colocated-0 is starting, colocated-1 has not registered"
        }
        gateway.states = {
            "colocated-0": InstanceState.READY,
            "colocated-1": InstanceState.DRAINING,
        }
        await until(lambda: len(lines()) == 4, "one about the other")
        assert lines()[-1] == "still waiting: colocated-1 is draining"
        gateway.states["colocated-1"] = InstanceState.READY
        await asyncio.wait_for(work, PATIENCE)


# --- the planner beside it --------------------------------------------------------------------

PLANNED = PlannerConfig(enabled=True, interval=0.5)


@asynccontextmanager
async def running(
    beside: Callable[[Cluster], Awaitable[None]],
) -> AsyncIterator[tuple[Processes, list[str], asyncio.Task[None]]]:
    """`run_cluster` with a planner whose gateway ends before the planner has its address."""
    said: list[str] = []
    gateway = Gateway(**{"colocated-0": InstanceState.READY})
    async with listening(gateway) as url:
        backend = Processes(url)
        made = backend.kept

        def kept(launch: Launch, needed: Callable[[], bool]) -> Process:
            one = made(launch, needed)
            one.silent = [ClusterError("the gateway ended with code 1")] * 2
            return one

        backend.kept = kept  # type: ignore[method-assign]
        config = config_of(planner=PLANNED)
        work = asyncio.ensure_future(
            run_cluster(config, backend, said.append, lambda cluster: None, beside)
        )
        try:
            yield backend, said, work
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError, ClusterError, RuntimeError):
                await work


async def for_ever(cluster: Cluster) -> None:
    await asyncio.Event().wait()


async def test_a_planner_that_cannot_start_says_so_and_starts_later() -> None:
    async with running(for_ever) as (backend, said, work):
        await until(lambda: any("waits for a member's cost" in line for line in said), "a look")
        told = [line for line in said if "the planner cannot look" in line]
        assert told == ["the planner cannot look at the cluster: the gateway ended with code 1"]
        assert not work.done()
        backend.made["gateway"].end.set()
        with pytest.raises(ClusterError, match="gateway has crashed too often"):
            await asyncio.wait_for(work, PATIENCE)


async def test_who_fails_after_the_planner_ends_the_cluster() -> None:
    planner_failed = asyncio.Event()

    async def fails(cluster: Cluster) -> None:
        await planner_failed.wait()
        raise RuntimeError("a fault beside the cluster")

    async with running(fails) as (_, said, work):
        await until(
            lambda: any("the planner cannot look" in line for line in said), "the first failure"
        )
        planner_failed.set()
        with pytest.raises(RuntimeError, match="beside the cluster"):
            await asyncio.wait_for(work, PATIENCE)


# --- Ray's actors -----------------------------------------------------------------------------


def order_of(config: ClusterConfig, *join: str) -> Order:
    (launch,) = instance_launches(config, SECRET)
    return launched(config, launch, gateways=gateway_names(config), join=join)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors that have no node, and start nothing."""

    async def nothing(member: Member) -> None:
        pass

    monkeypatch.setattr(Member, "_run", nothing)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")


@pytest.mark.usefixtures("idle")
async def test_an_actor_meets_a_gateway_by_the_cluster_s_authorities(
    authorities: tuple[Path, Path],
) -> None:
    ca, chain = authorities
    gateway = Gateway(**{"colocated-0": InstanceState.STARTING})
    async with listening(gateway, chain) as url:
        member = Member(encode(order_of(config_of(ca))))
        member._url = "http://10.0.0.7:1"
        await member.meet("gateway", url)
    assert "POST /cluster/members" in gateway.asked


@pytest.mark.usefixtures("idle")
async def test_an_actor_s_process_joins_each_gateway_once() -> None:
    a, b = "http://10.0.0.1:8000", "http://10.0.0.2:8000"
    named = BackendConfig(backend="ray", join=(a, b))
    config = msgspec.structs.replace(config_of(), cluster=named)
    member = Member(encode(order_of(config, a, b)))
    await member.meet("gateway", a)
    await member.meet("gateway-1", a)
    assert member._where() == ["--host", "10.0.0.7", "--join", a, "--join", b]
