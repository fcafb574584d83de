"""The planner at work on a cluster: its changes lose no request and no cache, and are told."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from memserve.api.peer_client import PeerError
from memserve.clock import MonotonicClock
from memserve.cluster.backend import Group, Groups, Place
from memserve.cluster.client import ClusterClient
from memserve.cluster.planning import PlannerLoop
from memserve.config import PlannerConfig
from memserve.errors import ClusterError
from memserve.planner.contract import (
    Action,
    Decision,
    Demand,
    LoadReport,
    Prediction,
    RoleChange,
    Split,
)
from memserve.planner.planner import Planner, merged
from memserve.scheduler.contract import Costs
from memserve.types import InstanceId, Role
from tests.e2e.test_routing import Front, front, tokens_of
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import node, prompt_of
from tests.insider import peers
from tests.tiny_models import Reference, save_tiny_model
from tests.waiting import PATIENCE, until

P, D, C = Role.PREFILL, Role.DECODE, Role.COLOCATED


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


class Scripted(Planner):
    """A planner that decides what it is told, about members that it is shown."""

    def __init__(self) -> None:
        super().__init__(PlannerConfig())
        self.wanted: dict[str, Role] = {}
        self.scaled: tuple[Action, Role, int] | None = None
        self.reports: list[LoadReport] = []
        self.starting = 0

    def look(
        self, now: float, reports: Sequence[LoadReport], costs: Costs, starting: int = 0
    ) -> Decision:
        self.reports = list(reports)
        self.starting = starting
        roles = {one.id: one.role for one in merged(reports)}
        changes = tuple(
            RoleChange(InstanceId(name), roles.get(InstanceId(name), C), role)
            for name, role in self.wanted.items()
        )
        action, role, count = self.scaled or (Action.ROLES, None, 0)
        return Decision(
            at=now,
            action=action if changes or self.scaled else Action.NOTHING,
            reason="as told",
            role=role,
            count=count,
            demand=Demand(),
            present=Prediction(split=Split.of(list(roles.values())), headroom=1.5, served=0.9),
            changes=changes,
        )


class Planned:
    """A planner's loop in front of a gateway, look by look."""

    def __init__(
        self,
        gateway: Front,
        config: PlannerConfig | None = None,
        groups: Groups | None = None,
        first: Sequence[str] = (),
    ) -> None:
        """`first`: URLs of gateways that are asked before this one."""
        self.planner = Scripted()
        self.told: list[str] = []
        self._urls = [*first, gateway.url]

        async def urls() -> list[str]:
            return self._urls

        self._loop = PlannerLoop(
            urls,
            config or PlannerConfig(),
            MonotonicClock(),
            groups=groups,
            tell=self.told.append,
            planner=self.planner,
        )

    async def change(self, **roles: Role) -> Decision:
        """One look that gives these members these roles, seen by the gateway."""
        self.planner.wanted = dict(roles)
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(ClusterClient(url)) for url in self._urls]
            decision = await self._loop.look(clients)
        assert decision is not None
        return decision


def roles_of(gateway: Front) -> dict[str, Role]:
    return {one.id: one.role for one in gateway.membership.members}


async def test_no_answer_is_lost_or_wrong_while_roles_change(
    model: Path, reference: Reference
) -> None:
    answered = 0

    async def client(gateway: Front, number: int, stop: asyncio.Event) -> None:
        nonlocal answered
        for turn in range(1000):
            prompt = prompt_of(60 + 7 * number, seed=1000 * number + turn)
            async with gateway.streaming(prompt, 24) as answer:
                assert await answer.all() == reference.generate(prompt, 24)
            answered += 1
            if stop.is_set():
                return

    async with (
        node(model, P, name="a") as a,
        node(model, P, name="b") as b,
        node(model, D, name="c") as c,
        front(model, a, b, c) as gateway,
    ):
        planned = Planned(gateway)
        stop = asyncio.Event()
        clients = [asyncio.create_task(client(gateway, n, stop)) for n in range(3)]
        for wanted in (
            {"b": D},
            {"a": D, "c": P},  # for a moment nobody prefills
            {"a": C, "b": C, "c": C},
            {"a": P, "b": D, "c": D},
        ):
            seen = answered
            decision = await planned.change(**wanted)
            assert not decision.failed
            assert wanted.items() <= roles_of(gateway).items()
            await until(lambda seen=seen: answered >= seen + 3, "answers after the change")
        stop.set()
        await asyncio.gather(*clients)
        for one in (a, b, c):
            await one.settled()


async def test_what_members_had_cached_is_of_use_in_their_other_roles(
    model: Path, reference: Reference
) -> None:
    long = prompt_of(400, seed=1)
    async with (
        node(model, P, name="a") as a,
        node(model, P, name="b") as b,
        node(model, D, name="c") as c,
        front(model, a, b, c) as gateway,
    ):
        first = await gateway.ask(long, 8)
        assert tokens_of(first) == reference.generate(long, 8)
        await gateway.until_equal(a, b, c)
        # The prompt's holders are the ones that do not compute prompts any more, or begin to.
        roles = {"a": P, "b": P, "c": D}
        held = {one.peer.id: one.has(long) for one in (a, b, c)}
        assert max(held.values()) >= 384
        other = {P: D, D: P}
        await Planned(gateway).change(
            **{name: other[roles[name]] if held[InstanceId(name)] else P for name in roles}
        )
        again = await gateway.ask(long, 8)
        assert tokens_of(again) == reference.generate(long, 8)
        usage = again["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= 384


async def test_a_decision_is_shown_counted_and_explained(model: Path) -> None:
    async with (
        node(model, P, name="a") as a,
        node(model, D, name="b") as b,
        front(model, a, b) as gateway,
    ):
        assert await gateway.get("/cluster/planner") == []
        planned = Planned(gateway)
        await planned.change()
        await planned.change(a=C)
        (load,) = planned.planner.reports
        assert {one.id: one.role for one in load.members} == {"a": P, "b": D}
        newest, first = await gateway.get("/cluster/planner")
        assert (first["action"], newest["action"]) == ("nothing", "roles")
        assert newest["changes"] == [{"member": "a", "before": "prefill", "after": "colocated"}]
        assert "planner: a: prefill -> colocated" in planned.told
        async with gateway.http.get(f"{gateway.url}/metrics") as answer:
            page = await answer.text()
        assert 'memserve_planner_decisions_total{action="roles"} 1.0' in page
        assert 'memserve_planner_role_changes_total{role="colocated"} 1.0' in page
        assert "memserve_planner_headroom_ratio 1.5" in page


async def test_a_dry_run_changes_no_role(model: Path) -> None:
    async with (
        node(model, P, name="a") as a,
        node(model, D, name="b") as b,
        front(model, a, b) as gateway,
    ):
        decision = await Planned(gateway, PlannerConfig(dry_run=True)).change(a=D)
        assert decision.dry_run
        assert roles_of(gateway) == {"a": P, "b": D}
        (shown,) = await gateway.get("/cluster/planner")
        assert shown["dry_run"] is True


async def test_a_change_that_fails_is_told_and_planning_goes_on(model: Path) -> None:
    async with (
        node(model, P, name="a") as a,
        node(model, D, name="b") as b,
        front(model, a, b) as gateway,
    ):
        planned = Planned(gateway)
        decision = await planned.change(b=C, gone=D, a=D)
        assert "gone" in decision.failed
        assert "2 of 3 roles were not changed" in decision.failed
        (shown,) = await gateway.get("/cluster/planner")
        assert shown["failed"] == decision.failed
        assert roles_of(gateway) == {"a": P, "b": C}
        # What was done before is told and counted as done.
        assert shown["changes"] == [{"member": "b", "before": "decode", "after": "colocated"}]
        assert [line for line in planned.told if "->" in line] == [
            "planner: b: decode -> colocated"
        ]
        async with gateway.http.get(f"{gateway.url}/metrics") as answer:
            page = await answer.text()
        assert "memserve_planner_failures_total 1.0" in page
        assert 'memserve_planner_role_changes_total{role="colocated"} 1.0' in page
        assert not (await planned.change(a=C)).failed
        assert roles_of(gateway)["a"] is C


async def test_roles_change_while_the_first_gateway_is_down(model: Path) -> None:
    async with (
        node(model, P, name="a") as a,
        node(model, D, name="b") as b,
        front(model, a, b) as gateway,
    ):
        planned = Planned(gateway, first=["http://127.0.0.1:9"])
        decision = await planned.change(a=C, b=C)
        assert not decision.failed
        assert roles_of(gateway) == {"a": C, "b": C}


class Scaled:
    """A backend's groups: two of decode members, one of prefill members."""

    def __init__(self) -> None:
        self.sizes = {"decode": 3, "decode.2": 1, "prefill": 2}
        self.full = False

    async def groups(self) -> tuple[Group, ...]:
        return tuple(
            Group(name, Role(name.partition(".")[0]), tuple(f"{name}-{n}" for n in range(size)))
            for name, size in self.sizes.items()
        )

    async def places(self) -> dict[str, Place]:
        return {}

    async def scale(self, group: str, count: int) -> None:
        if self.full:
            raise ClusterError("no machine has room for another instance")
        self.sizes[group] = count


async def test_members_are_asked_of_the_group_of_their_role(model: Path) -> None:
    async with node(model, P, name="a") as a, front(model, a) as gateway:
        groups = Scaled()
        planned = Planned(gateway, groups=groups)
        planned.planner.scaled = (Action.ADD, D, 2)
        assert not (await planned.change()).failed
        assert groups.sizes == {"decode": 5, "decode.2": 1, "prefill": 2}
        planned.planner.scaled = (Action.REMOVE, P, 1)
        assert not (await planned.change()).failed
        assert groups.sizes == {"decode": 5, "decode.2": 1, "prefill": 1}
        planned.planner.scaled = (Action.ADD, C, 1)  # no such group: the largest, and a role later
        assert not (await planned.change()).failed
        assert groups.sizes == {"decode": 6, "decode.2": 1, "prefill": 1}
        groups.full = True
        assert "no machine has room" in (await planned.change()).failed


async def test_members_that_gateways_do_not_show_are_starting_and_count(model: Path) -> None:
    async with node(model, P, name="a") as a, front(model, a) as gateway:
        groups = Scaled()
        planned = Planned(gateway, PlannerConfig(max_members=7), groups)
        planned.planner.scaled = (Action.ADD, D, 2)
        decision = await planned.change()
        assert planned.planner.starting == 6
        assert (decision.count, decision.failed) == (1, "")
        failed = (await planned.change()).failed
        assert planned.planner.starting == 7
        assert "max_members = 7: the backend has 7 members" in failed
        assert groups.sizes == {"decode": 4, "decode.2": 1, "prefill": 2}


async def test_load_and_decisions_are_the_operator_s(model: Path) -> None:
    async with node(model, P, name="a") as a, front(model, a) as gateway:
        for path in ("/cluster/planner", "/cluster/load"):
            async with gateway.http.get(gateway.url + path) as answer:
                assert answer.status == 401
        async with gateway.http.post(f"{gateway.url}/cluster/planner", data=b"{}") as answer:
            assert answer.status == 401
        async with peers() as client:
            for body in (b"{}", b"[]", b'{"at": "x"}', b"\xff" * 100):
                with pytest.raises(PeerError) as refused:
                    await client.call("POST", f"{gateway.url}/cluster/planner", json.loads, body)
                assert refused.value.detail is not None


async def test_without_a_gateway_there_is_no_look() -> None:
    async def urls() -> list[str]:
        return ["http://127.0.0.1:9"]

    loop = PlannerLoop(urls, PlannerConfig(), MonotonicClock())
    async with ClusterClient("http://127.0.0.1:9") as client:
        with pytest.raises(ClusterError):
            await loop.look([client])


async def test_the_command_looks_until_it_is_asked_to_end(model: Path) -> None:
    async with (
        node(model, P, name="a") as a,
        node(model, D, name="b") as b,
        front(model, a, b) as gateway,
    ):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "memserve", "planner", "--url", gateway.url),
            *("--planner-interval", "0.5", "--planner-dry-run"),
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            shown: list[Decision] = []

            async def looked() -> bool:
                async with ClusterClient(gateway.url) as client:
                    shown[:] = await client.plans(5)
                return len(shown) >= 2

            async with asyncio.timeout(PATIENCE):
                while True:
                    if await looked():
                        break
                    await asyncio.sleep(0.1)
            assert shown[0].at > shown[1].at
            assert shown[0].reason == "no requests"
            assert all(one.dry_run for one in shown)
            assert str(shown[0].present.split) == "1P1D"
            process.terminate()
            _, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
            assert process.returncode == 0, errors
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
