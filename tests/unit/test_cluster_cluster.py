"""What a cluster knows of its instances: who is ready, who there is, and where its gateways are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

import msgspec
import pytest

from memserve.api.serving import Shutdown
from memserve.api.status import InstanceState
from memserve.cluster import cluster as module
from memserve.cluster import readiness
from memserve.cluster.backend import Launch, Place
from memserve.cluster.cluster import Cluster
from memserve.cluster.launches import gateway_launch, instance_launches
from memserve.cluster.member import ClusterView, MemberView
from memserve.config import BackendConfig, ClusterConfig, InstanceConfig
from memserve.errors import ClusterError
from memserve.secrets import Secret
from memserve.types import Epoch, InstanceId, Role
from tests.waiting import until

READY, STARTING = InstanceState.READY, InstanceState.STARTING
CONFIG = ClusterConfig(
    cluster=BackendConfig(gateways=2), instance=(InstanceConfig(role=Role.DECODE, count=2),)
)
SECRET = Secret(("of-the-test",))


class FakeKept:
    """A process that starts unless its machine is full, and listens where it is told to."""

    def __init__(self, name: str, backend: FakeBackend) -> None:
        self.name = name
        self.place: Place | None = None
        self.alive = True
        self.crashes = 0
        self._backend = backend

    async def start(self) -> None:
        if self.name in self._backend.refused:
            raise ClusterError(f"no machine has room for {self.name}")

    async def address(self) -> str:
        await until(lambda: self.name in self._backend.urls, f"the address of {self.name}")
        return self._backend.urls[self.name]

    async def failure(self) -> ClusterError:
        await asyncio.Event().wait()
        raise AssertionError

    async def keep(self) -> None:
        await asyncio.Event().wait()

    async def stop(self, shutdown: Shutdown, seconds: float) -> None:
        self._backend.ended.append(self.name)

    def show_output(self, show: Callable[[str], None]) -> None:
        pass

    def reload(self) -> None:
        pass


class FakeBackend:
    url = ""

    def __init__(self) -> None:
        self.urls = {"gateway": "http://one:1", "gateway-1": "http://two:2"}
        self.urls |= {f"decode-{n}": f"http://decode-{n}:1" for n in range(3)}
        self.refused: set[str] = set()
        self.ended: list[str] = []

    def fit(self, config: ClusterConfig) -> ClusterConfig:
        return config

    async def open(self) -> None:
        pass

    def kept(self, launch: Launch, needed: Callable[[], bool]) -> FakeKept:
        return FakeKept(launch.name, self)

    async def close(self) -> None:
        pass


class FakeGateway:
    """Shows the members of `views`, by its URL."""

    views: dict[str, list[MemberView]]

    def __init__(self, url: str, *more: object) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def view(self) -> ClusterView:
        return ClusterView(Epoch(1), tuple(self.views.get(self._url, ())))


def member(name: str, state: InstanceState = READY, pid: int = 1) -> MemberView:
    return MemberView(InstanceId(name), Role.DECODE, state, f"http://{name}:1", pid)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> type[FakeGateway]:
    monkeypatch.setattr(readiness, "ClusterClient", FakeGateway)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(module, "ADDRESS_SECONDS", 0.02)
    FakeGateway.views = {}
    return FakeGateway


@pytest.fixture
async def cluster(gateway: type[FakeGateway]) -> Cluster:
    one = Cluster(CONFIG, FakeBackend(), Shutdown(), lambda line: None, SECRET)
    launches = [
        *(gateway_launch(CONFIG, SECRET, name) for name in ("gateway", "gateway-1")),
        *instance_launches(CONFIG, SECRET),
    ]
    await one.adopt(launches, "http://one:1")
    return one


def backend_of(cluster: Cluster) -> FakeBackend:
    backend = cluster._backend
    assert isinstance(backend, FakeBackend)
    return backend


async def names(cluster: Cluster) -> list[str]:
    return [name for group in await cluster.groups() for name in group.members]


async def looks() -> None:
    """Enough turns of the loop for many looks at the gateway."""
    for _ in range(20):
        await asyncio.sleep(0.001)


async def test_another_cluster_s_ready_members_are_none_of_its_own(
    cluster: Cluster, gateway: type[FakeGateway]
) -> None:
    late = member("decode-1", STARTING)
    others = [member("prefill-7"), member("decode-9")]
    gateway.views["http://one:1"] = [member("decode-0"), late, *others]
    waiting = asyncio.ensure_future(cluster.all_ready())
    await looks()
    assert not waiting.done()
    gateway.views["http://one:1"] = [member("decode-0"), member("decode-1"), *others]
    await asyncio.wait_for(waiting, 10)


async def test_an_instance_that_was_scaled_away_does_not_count_for_one_that_starts(
    cluster: Cluster, gateway: type[FakeGateway]
) -> None:
    shown = gateway.views["http://one:1"] = [member("decode-0"), member("decode-1")]
    await cluster.all_ready()
    await cluster.scale("decode", 1)
    await cluster.scale("decode", 2)
    assert await names(cluster) == ["decode-0", "decode-2"]
    waiting = asyncio.ensure_future(cluster.all_ready())
    await looks()
    assert not waiting.done()
    shown.append(member("decode-2"))
    await asyncio.wait_for(waiting, 10)


async def test_an_upgrade_waits_for_the_successor_and_not_for_who_was_there_before(
    cluster: Cluster, gateway: type[FakeGateway]
) -> None:
    """Its name is in the gateway's list before and after, beside other clusters' members."""
    shown = gateway.views["http://one:1"] = [
        member("decode-0"),
        member("decode-1", pid=1),
        member("decode-8"),
    ]
    launch = instance_launches(CONFIG, SECRET)[1]
    replacing = asyncio.ensure_future(cluster.replace(launch, 30))
    backend = backend_of(cluster)
    await until(lambda: backend.ended == ["decode-1"], "the end of the former")
    await looks()
    assert not replacing.done()
    shown[1] = member("decode-1", STARTING, pid=2)
    await looks()
    assert not replacing.done()
    shown[1] = member("decode-1", pid=2)
    await asyncio.wait_for(replacing, 10)


async def test_a_gateway_is_replaced_once_its_successor_knows_the_instances(
    cluster: Cluster, gateway: type[FakeGateway]
) -> None:
    known = [member("decode-0"), member("decode-1")]
    gateway.views["http://one:1"] = known
    await cluster.all_ready()
    backend_of(cluster).urls["gateway"] = "http://elsewhere:9"
    launch = gateway_launch(CONFIG, SECRET, "gateway")
    replacing = asyncio.ensure_future(cluster.replace(launch, 30))
    await until(lambda: cluster.url == "http://elsewhere:9", "the successor's address")
    await looks()
    assert not replacing.done()
    gateway.views["http://elsewhere:9"] = known
    await asyncio.wait_for(replacing, 10)


async def test_an_instance_that_cannot_be_started_is_none(
    cluster: Cluster, gateway: type[FakeGateway]
) -> None:
    gateway.views["http://one:1"] = [member("decode-0"), member("decode-1"), member("decode-2")]
    backend_of(cluster).refused = {"decode-3"}
    with pytest.raises(ClusterError, match="no machine has room for decode-3"):
        await cluster.scale("decode", 4)
    assert await names(cluster) == ["decode-0", "decode-1", "decode-2"]
    await asyncio.wait_for(cluster.all_ready(), 10)
    await cluster.scale("decode", 2)
    assert backend_of(cluster).ended == ["decode-2"]


async def test_the_planner_asks_gateways_where_they_are_now(cluster: Cluster) -> None:
    backend = backend_of(cluster)
    assert await cluster._listening() == ["http://one:1", "http://two:2"]
    backend.urls["gateway"] = "http://elsewhere:9"
    assert await cluster._listening() == ["http://elsewhere:9", "http://two:2"]
    del backend.urls["gateway"]  # it is being started
    assert await cluster._listening() == ["http://two:2"]
    del backend.urls["gateway-1"]
    with pytest.raises(ClusterError, match="gateway does not listen yet; the gateway-1 does not"):
        await cluster._listening()


async def test_a_cluster_that_joins_others_gateways_plans_through_these(
    gateway: type[FakeGateway],
) -> None:
    joining = BackendConfig(gateways=0, join=("http://theirs:8000",))
    config = msgspec.structs.replace(CONFIG, cluster=joining)
    one = Cluster(config, FakeBackend(), Shutdown(), lambda line: None, SECRET)
    assert await one._listening() == ["http://theirs:8000"]
