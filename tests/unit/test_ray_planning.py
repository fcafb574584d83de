"""What a planner sees and asks of a cluster that lives on in a Ray cluster; Ray is not there."""

from __future__ import annotations

import asyncio

import pytest

from tests.ray_orders import order_of

pytest.importorskip("ray", reason="Ray is not installed: pip install 'memserve[ray]'")

from memserve.cluster.backend import GATEWAYS
from memserve.config import BackendConfig, ClusterConfig, InstanceConfig, PlannerConfig
from memserve.errors import ClusterError, ConfigError
from memserve.ray import planning, service
from memserve.ray.order import Order, Report
from memserve.ray.planning import ServiceGroups, plan
from memserve.secrets import SECRET_VARIABLE
from memserve.types import Role

PLACE = BackendConfig(backend="ray")
CONFIG = ClusterConfig(
    cluster=BackendConfig(backend="ray", join=("http://10.0.0.9:8000",)),
    planner=PlannerConfig(max_members=4, min_members=2),
    instance=(
        InstanceConfig(role=Role.PREFILL),
        InstanceConfig(role=Role.DECODE),
        InstanceConfig(role=Role.DECODE, threads=2),
    ),
)


def order(name: str, group: str) -> Order:
    return order_of(CONFIG, name, group, {SECRET_VARIABLE: "a-secret-of-these-tests"})


def report(url: str = "http://10.0.0.2:1", ended: str | None = None) -> Report:
    return Report("life", "10.0.0.2", 7, url, 0, ended is None, ended, 0, ())


class Actors:
    """What `service.processes` finds."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found: service.Found = {
            "gateway": (order("gateway", GATEWAYS), report("http://10.0.0.1:8000")),
            "prefill-0": (order("prefill-0", "prefill"), report()),
            "decode-10": (order("decode-10", "decode"), report()),
            "decode-2": (order("decode-2", "decode"), report()),
            "decode-3": (order("decode-3", "decode.2"), report()),
        }
        self.scaled: list[tuple[str, int, bool]] = []

        async def processes(config: BackendConfig) -> service.Found:
            return self.found

        async def scale(
            config: BackendConfig, group: str, count: int, progress: object, *, wait: bool = True
        ) -> None:
            self.scaled.append((group, count, wait))

        async def disconnect() -> None:
            pass

        patch.setattr(service, "processes", processes)
        patch.setattr(service, "scale", scale)
        patch.setattr(planning, "disconnect", disconnect)


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> Actors:
    return Actors(monkeypatch)


def members(groups: ServiceGroups) -> dict[str, tuple[str, ...]]:
    return {one.name: one.members for one in asyncio.run(groups.groups())}


def test_groups_are_what_actors_run_in_the_order_of_their_start(actors: Actors) -> None:
    groups = ServiceGroups(PLACE, print)
    assert members(groups) == {
        "prefill": ("prefill-0",),
        "decode": ("decode-2", "decode-10"),
        "decode.2": ("decode-3",),
    }
    assert [one.role for one in asyncio.run(groups.groups())] == [
        Role.PREFILL,
        Role.DECODE,
        Role.DECODE,
    ]
    places = asyncio.run(groups.places())
    assert places["decode-3"].node == "10.0.0.2"


def test_one_that_has_ended_is_no_member_and_one_without_a_node_is(actors: Actors) -> None:
    groups = ServiceGroups(PLACE, print)
    members(groups)
    actors.found["decode-2"] = (order("decode-2", "decode"), report(ended="it was given up"))
    actors.found["decode-10"] = (order("decode-10", "decode"), report(ended=""))
    actors.found["decode-3"] = (None, None)  # its node is lost
    actors.found["prefill-4"] = (None, None)  # Ray looks for a node
    assert members(groups) == {
        "prefill": ("prefill-0", "prefill-4"),
        "decode": (),
        "decode.2": ("decode-3",),
    }


def test_what_other_commands_change_is_seen_at_the_next_call(actors: Actors) -> None:
    groups = ServiceGroups(PLACE, print)
    members(groups)
    del actors.found["decode-3"]
    actors.found["prefill-11"] = (order("prefill-11", "prefill"), report())
    assert members(groups)["prefill"] == ("prefill-0", "prefill-11")
    assert members(groups)["decode.2"] == ()


def test_scaling_does_not_wait_for_new_members(actors: Actors) -> None:
    asyncio.run(ServiceGroups(PLACE, print).scale("decode", 3))
    assert actors.scaled == [("decode", 3, False)]


def test_gateways_are_those_that_listen_or_run_elsewhere(actors: Actors) -> None:
    groups = ServiceGroups(PLACE, print)
    assert asyncio.run(groups.gateways()) == ["http://10.0.0.1:8000"]
    actors.found["gateway"] = (order("gateway", GATEWAYS), report(""))
    assert asyncio.run(groups.gateways()) == ["http://10.0.0.9:8000"]


def test_without_a_cluster_the_planner_says_so(actors: Actors) -> None:
    actors.found = {"decode-3": (None, None)}
    for work in (
        ServiceGroups(PLACE, print).groups(),
        ServiceGroups(PLACE, print).gateways(),
        plan(PLACE, lambda deployed: deployed, print),
    ):
        with pytest.raises(ClusterError, match="no cluster runs in namespace 'memserve'"):
            asyncio.run(work)


def test_settings_are_those_of_the_cluster_and_flags_on_top(actors: Actors) -> None:
    seen = []

    def adapt(deployed: PlannerConfig) -> PlannerConfig:
        seen.append(deployed)
        return PlannerConfig(min_members=5, max_members=4)

    with pytest.raises(ConfigError, match=r"min_members = 5 is above planner\.max_members = 4"):
        asyncio.run(plan(PLACE, adapt, print))
    assert seen == [CONFIG.planner]
