"""A `GlobalRouter` whose members are what tests say, and whose profiles come from one server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec
from aiohttp import web

from memserve.api.generate import CallKind, GenerateCall, SamplingParams
from memserve.api.peer_client import PeerClient
from memserve.api.status import (
    EngineTotals,
    InstanceInfo,
    InstanceState,
    InstanceStats,
    Latencies,
    Limits,
    LinkTotals,
    PoolTotals,
)
from memserve.clock import ManualClock
from memserve.cluster.member import Member
from memserve.cluster.membership import Membership
from memserve.gateway.global_router import GlobalRouter
from memserve.gateway.route import Route
from memserve.scheduler.architecture import GEMMA3_270M
from memserve.scheduler.contract import InstanceSpec
from memserve.scheduler.hardware import HARDWARE, derive
from memserve.scheduler.profiles import Hardware, Subject, encode_profile, make_profile
from memserve.tokens import from_ids
from memserve.types import Epoch, InstanceId, Role

LIMITS = Limits(
    vocab_size=320,
    max_model_len=4096,
    pool_tokens=8192,
    max_tokens=4096,
    block_tokens=32,
    dtype="float32",
    device="cpu",
    threads=1,
    max_running=7,
    mixed_batch_tokens=128,
)
_ids = itertools.count()


def call_of(
    *prompt: int,
    tokens: int = 16,
    stream: bool = True,
    session: str | None = None,
    priority: int = 0,
    cache_salt: str = "",
) -> GenerateCall:
    return GenerateCall(
        id=f"call-{next(_ids)}",
        kind=CallKind.COMPLETION,
        model="tiny",
        created=1,
        prompts=(from_ids(prompt or range(100)),),
        sampling=SamplingParams(max_tokens=tokens),
        stream=stream,
        session=session,
        priority=priority,
        cache_salt=cache_salt,
    )


def profile_of(hardware: str) -> bytes:
    """What an instance says of a device that `HARDWARE` lists."""
    subject = Subject(
        hardware=Hardware(device=hardware, threads=1, software="test"),
        architecture=GEMMA3_270M,
        dtype="float32",
        max_batch_tokens=2048,
    )
    return encode_profile(make_profile("full", subject, derive(HARDWARE[hardware], GEMMA3_270M)))


def totals(**figures: int | float) -> EngineTotals:
    return msgspec.structs.replace(EngineTotals(), **figures)


class Routed:
    """A router and its surroundings. Instances answer with `profiles[name]`, or with 503."""

    def __init__(self, router: GlobalRouter, membership: Membership, clock: ManualClock) -> None:
        self.router = router
        self.membership = membership
        self.clock = clock
        self.profiles: dict[str, bytes] = {}
        self.asked: list[str] = []  # for profiles
        self.url = ""

    def member(
        self,
        name: str,
        role: Role = Role.COLOCATED,
        *,
        epoch: int = 1,
        state: InstanceState = InstanceState.READY,
        limits: Limits | None = LIMITS,
        links: Mapping[str, LinkTotals] | None = None,
        **engine: int | float,
    ) -> Member:
        """A member answers a poll: it is new, or has news."""
        kv = 64 * "0"  # all hold the same
        info = InstanceInfo(
            InstanceId(name), Epoch(epoch), role, state, 1, "tiny", limits, pool=True, kv=kv
        )
        pool = PoolTotals(links=dict(links or {}))
        stats = InstanceStats(totals(**engine), pool, Latencies()) if engine or links else None
        found = self.membership.join(f"{self.url}/{name}")
        self.membership.answered(found, info, stats)
        return found

    def plan(self, call: GenerateCall) -> Route:
        return self.router.plan(call, self.membership.ready())

    def plan_and_end(self, call: GenerateCall) -> InstanceId:
        """Who answers a call that is over at once."""
        plan = self.plan(call)
        plan.first_token()
        plan.ended()
        return plan.member.id

    def spec(self, name: str) -> InstanceSpec:
        return self.router.scheduler.load.of(InstanceId(name)).spec

    @property
    def known(self) -> dict[str, Role]:
        """What the scheduler knows."""
        return {line.spec.id: line.spec.role for line in self.router.scheduler.load.by_slot}

    async def profiled(self, name: str) -> None:
        """Until an instance has been asked for its costs, and that is over."""
        tasks = self.router._known[InstanceId(name)].asking
        assert tasks is not None
        await asyncio.wait((tasks,))

    async def close(self) -> None:
        """Nothing may be left of what was planned."""
        load = self.router.scheduler.load
        assert load.reserved == 0
        assert all(line.idle for line in load.by_slot)


@asynccontextmanager
async def routed(policy: str = "prompt-tree") -> AsyncIterator[Routed]:
    membership, clock = Membership(), ManualClock(100.0)
    # Instances that are nothing but a script sign nothing.
    async with PeerClient(None) as session:
        router = GlobalRouter(membership, session, clock, policy, instance_wait=30.0)
        made = Routed(router, membership, clock)

        async def answer(request: web.Request) -> web.Response:
            name, what = request.match_info["name"], request.match_info["what"]
            if what != "profile":
                return web.Response(status=404)
            made.asked.append(name)
            profile = made.profiles.get(name)
            return web.Response(status=503) if profile is None else web.Response(body=profile)

        app = web.Application()
        app.router.add_get("/{name}/{what}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield made
            await made.close()
        finally:
            await router.close()
            await runner.cleanup()
