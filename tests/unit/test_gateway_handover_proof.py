"""Each prefill and decode instance hands a small prompt over before anybody relies on it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
from aiohttp import web

from memserve.api.errors import unavailable
from memserve.api.generate import GenerateCall
from memserve.api.limits import MAX_INT32
from memserve.api.peer_client import PeerClient
from memserve.api.request_stats import RequestStats
from memserve.api.serving import Shutdown, url_of
from memserve.api.status import (
    InstanceInfo,
    InstanceState,
    InstanceStats,
    Latencies,
    Limits,
    MemberKind,
    PoolTotals,
)
from memserve.clock import ManualClock
from memserve.cluster.member import Member
from memserve.cluster.membership import Membership
from memserve.config import ClusterConfig, GatewayConfig, ModelConfig
from memserve.gateway import handover_proof
from memserve.gateway.handover_proof import (
    BUSY_PAUSE,
    FIRST_PAUSE,
    MAX_PAUSE,
    MAX_PUT_OFF,
    NO_ANSWER,
    NOTHING_MOVED,
    HandoverProof,
    MemberEpoch,
    Pair,
    pairs_of,
)
from memserve.gateway.run import Gateway
from memserve.models.tokenizer import Tokenizer
from memserve.types import Epoch, InstanceId, Role
from memserve.vital import Vitals
from tests.fakes import gateway_socket, save_tiny_tokenizer
from tests.handoff_harness import node, pair
from tests.insider import peers
from tests.metric_page import reported
from tests.router_harness import LIMITS, totals
from tests.tiny_models import save_tiny_model
from tests.waiting import until

KV = "0" * 64
OTHER_KV = "1" * 64
P, D = Role.PREFILL, Role.DECODE
FIGURES = RequestStats(0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)


class World:
    """Members that are nothing but a script, and their proofs."""

    def __init__(self, proof: HandoverProof, membership: Membership, clock: ManualClock) -> None:
        self.proof = proof
        self.membership = membership
        self.clock = clock
        self.url = ""
        self.calls: list[tuple[str, GenerateCall]] = []  # with who was asked
        self.moved: dict[str, int] = {}  # bytes, by who decodes; else it answers with 503
        self.obstacle = ""  # between pools

    def member(
        self,
        name: str,
        role: Role,
        *,
        epoch: int = 1,
        kv: str | None = KV,
        kind: MemberKind = MemberKind.MEMSERVE,
        state: InstanceState = InstanceState.READY,
        waiting: int = 0,
        limits: Limits = LIMITS,
    ) -> Member:
        """A member answers a poll."""
        info = InstanceInfo(
            InstanceId(name), Epoch(epoch), role, state, 1, "m", limits, kind=kind, kv=kv
        )
        stats = InstanceStats(totals(waiting=waiting), PoolTotals(), Latencies())
        found = self.membership.join(f"{self.url}/{name}")
        self.membership.answered(found, info, stats)
        return found

    async def look(self, seconds: float = 0.0) -> int:
        """Prove what is due `seconds` later; how many calls were made."""
        self.clock.advance(seconds)
        before = len(self.calls)
        self.proof.follow()
        while (pair := self.proof._next()) is not None:
            await self.proof.prove(pair)
        return len(self.calls) - before

    async def generate(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.calls.append((name, msgspec.msgpack.decode(await request.read(), type=GenerateCall)))
        if name not in self.moved:
            return web.Response(status=503, body=unavailable("It rests.", "resting").body())
        figures = msgspec.structs.replace(FIGURES, bytes_received=self.moved[name])
        return web.Response(body=msgspec.json.encode({"usage": {"memserve": figures}}))

    async def meet(self, request: web.Request) -> web.Response:
        if self.obstacle:
            return web.Response(status=503, body=unavailable(self.obstacle, "not_met").body())
        return web.Response(body=msgspec.msgpack.encode({"transport": "shm", "seconds": 0.0}))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    membership, clock = Membership(), ManualClock(100.0)
    # Instances that are nothing but a script sign nothing.
    async with PeerClient(None) as client:
        proof = HandoverProof(membership, client, clock, "m", Vitals())
        made = World(proof, membership, clock)
        app = web.Application()
        app.router.add_post("/{name}/v1/generate", made.generate)
        app.router.add_post("/{name}/v1/kv/meet", made.meet)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield made
        finally:
            await runner.cleanup()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def gauge(proof: HandoverProof) -> float:
    return reported(proof)["memserve_scheduler_degraded_pairs",]


async def test_a_pair_that_works_is_proved_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.moved["d"] = 1000
    world.member("p", P)
    assert await world.look() == 0
    world.member("d", D)
    assert await world.look() == 1
    assert await world.look(10 * MAX_PAUSE) == 0
    assert world.proof.proven() == [
        Pair(MemberEpoch(InstanceId("p"), Epoch(1)), MemberEpoch(InstanceId("d"), Epoch(1)))
    ]
    assert world.proof.degraded() == ()
    assert gauge(world.proof) == 0
    assert not warnings(caplog)


async def test_its_prompt_is_short_ordinary_and_nobody_else_s(world: World) -> None:
    world.moved = {"d": 1, "v": 1}
    world.member("p", P)
    world.member("d", D)
    world.member("q", P, kv=OTHER_KV, kind=MemberKind.VLLM)
    world.member("v", D, kv=OTHER_KV, kind=MemberKind.VLLM)
    await world.look()
    (asked, call), (other, second) = world.calls
    assert (asked, other) == ("d", "v")
    assert [(peer.id, peer.address) for peer in call.prefill] == [("p", f"{world.url}/p")]
    (prompt,) = call.prompts
    assert len(prompt) == 3 * LIMITS.block_tokens
    assert all(LIMITS.vocab_size // 4 <= token < LIMITS.vocab_size // 2 for token in prompt)
    assert call.id != second.id
    assert call.cache_salt
    assert call.cache_salt != second.cache_salt
    assert not np.array_equal(prompt, second.prompts[0])
    sampling = call.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.ignore_eos) == (2, 0.0, True)
    # Behind all clients, where requests are ordered.
    assert (call.priority, second.priority) == (MAX_INT32, 0)


async def test_a_pair_that_moves_nothing_is_told_of_and_tried_until_it_works(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.moved["d"] = 0
    world.obstacle = "No way to d: its pool at tcp://10.0.0.1:5: silence"
    world.member("p", P)
    world.member("d", D)
    assert await world.look() == 1
    (found,) = world.proof.degraded()
    assert (found.prefill, found.decode, found.why) == ("p", "d", NOTHING_MOVED)
    assert "tcp://10.0.0.1:5" in found.detail
    assert gauge(world.proof) == 1
    pause, tries = FIRST_PAUSE, 0
    while pause < MAX_PAUSE:
        assert await world.look(pause * 0.9) == 0
        assert await world.look(pause * 0.1 + 0.01) == 1
        pause, tries = 2 * pause, tries + 1
    assert tries > 3
    assert await world.look(MAX_PAUSE + 0.01) == 1
    assert len(world.proof.degraded()) == 1
    (said,) = warnings(caplog)  # once
    assert "p and d are degraded" in said
    assert world.obstacle in said
    world.moved["d"] = 1000
    assert await world.look(MAX_PAUSE + 0.01) == 1
    assert world.proof.degraded() == ()
    assert gauge(world.proof) == 0
    assert await world.look(10 * MAX_PAUSE) == 0


async def test_a_decode_instance_that_does_not_answer_is_degraded_too(world: World) -> None:
    world.member("p", P)
    world.member("d", D)
    await world.look()
    (found,) = world.proof.degraded()
    assert (found.why, found.detail) == (NO_ANSWER, "503 It rests.")


async def test_a_new_life_is_proved_anew(world: World) -> None:
    world.moved["d"] = 0
    world.member("p", P)
    world.member("d", D)
    await world.look()
    assert world.proof.degraded()
    world.moved["d"] = 1000
    world.member("d", D, epoch=2)
    assert await world.look() == 1  # at once, whatever the former life's pause
    assert world.proof.degraded() == ()
    world.member("p", P, epoch=3)
    assert await world.look() == 1
    assert len(world.proof.proven()) == 1  # who has gone is forgotten


async def test_a_missed_heartbeat_is_no_new_life(world: World) -> None:
    world.moved["d"] = 1000
    p = world.member("p", P)
    world.member("d", D)
    await world.look()
    world.membership.missed(p)
    assert await world.look() == 0
    assert len(world.proof.proven()) == 1


async def test_who_goes_during_a_proof_leaves_nothing_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.member("p", P)
    d = world.member("d", D)
    world.proof.follow()
    (found,) = world.proof._pairs
    ask = PeerClient.call

    async def call(*args: Any, **options: Any) -> Any:
        world.membership.leave(d.address)
        return await ask(*args, **options)

    monkeypatch.setattr(PeerClient, "call", call)
    await world.proof.prove(found)
    assert world.proof.degraded() == ()
    assert world.proof.failed == 0


async def test_clients_that_wait_go_first_but_not_for_ever(world: World) -> None:
    world.moved["d"] = 1000
    world.member("p", P, waiting=3)
    world.member("d", D)
    for _ in range(MAX_PUT_OFF):
        assert await world.look() == 0
        assert await world.look(BUSY_PAUSE / 2) == 0
        world.clock.advance(BUSY_PAUSE / 2 + 0.01)
    assert await world.look() == 1
    assert len(world.proof.proven()) == 1


async def test_what_has_no_room_for_a_prompt_hands_nothing_over(world: World) -> None:
    small = msgspec.structs.replace(LIMITS, max_tokens=2 * LIMITS.block_tokens)
    world.member("p", P, limits=small)
    world.member("d", D)
    assert await world.look() == 0
    assert world.proof.degraded() == ()


def members_of(*wanted: tuple[str, Role, str | None]) -> Sequence[Member]:
    membership = Membership()
    for name, role, kv in wanted:
        info = InstanceInfo(
            InstanceId(name), Epoch(1), role, InstanceState.READY, 1, "m", LIMITS, kv=kv
        )
        membership.answered(membership.join(f"http://{name}"), info, None)
    return membership.members


def shown(pairs: Sequence[Pair]) -> list[str]:
    return sorted(f"{pair.prefill.id}-{pair.decode.id}" for pair in pairs)


def test_everybody_is_in_a_pair_and_pairs_grow_linearly() -> None:
    for prefill, decode in ((1, 1), (3, 5), (40, 7), (100, 100)):
        members = members_of(
            *((f"p{i}", P, KV) for i in range(prefill)),
            *((f"d{i}", D, KV) for i in range(decode)),
        )
        pairs = pairs_of(members)
        assert {pair.prefill.id for pair in pairs} == {f"p{i}" for i in range(prefill)}
        assert {pair.decode.id for pair in pairs} == {f"d{i}" for i in range(decode)}
        assert len(pairs) <= max(prefill, decode)


def test_only_those_that_hold_the_same_kv_are_paired() -> None:
    members = members_of(
        ("p0", P, KV),
        ("d0", D, KV),
        ("p1", P, OTHER_KV),
        ("d1", D, OTHER_KV),
        ("p2", P, None),
        ("d2", D, None),
        ("c", Role.COLOCATED, KV),
    )
    assert shown(pairs_of(members)) == ["p0-d0", "p1-d1"]


def test_who_comes_and_goes_leaves_other_pairs_as_they_are() -> None:
    some = [("p1", P, KV), ("d1", D, KV), ("p2", P, KV)]
    pairs = pairs_of(members_of(*some))
    assert shown(pairs) == ["p1-d1", "p2-d1"]
    more = pairs_of(members_of(("p0", P, KV), ("d0", D, KV), *some), pairs)
    assert set(pairs) < set(more)
    assert shown(more) == ["p0-d0", "p1-d1", "p2-d1"]
    assert shown(pairs_of(members_of(*some[:2]), more)) == ["p1-d1"]
    # A role that changes ends a pair.
    assert pairs_of(members_of(("p1", D, KV), ("d1", D, KV)), more) == []


def test_no_more_pairs_are_kept_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover_proof, "MAX_PAIRS", 5)
    members = members_of(*((f"{r}{i}", r, KV) for i in range(20) for r in (P, D)))
    assert len(pairs_of(members)) == 5


# --- a gateway, and instances with an engine ----------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


class Front:
    """A gateway that proves."""

    def __init__(self, gateway: Gateway, url: str, http: aiohttp.ClientSession) -> None:
        self.proof = gateway._proof
        self.url = url
        self._http = http

    async def get(self, path: str) -> tuple[int, str]:
        async with self._http.get(self.url + path) as answer:
            return answer.status, await answer.text()

    async def cluster(self) -> Any:
        async with peers() as client:
            return await client.call("GET", f"{self.url}/cluster", json.loads)


@asynccontextmanager
async def front(model: Path, *urls: str) -> AsyncIterator[Front]:
    config = ClusterConfig(
        model=ModelConfig(served_name="tiny"), gateway=GatewayConfig(port=0, api_keys=("key",))
    )
    sock, shutdown = gateway_socket(), Shutdown()
    async with Gateway(config, Tokenizer.load(model)) as gateway, aiohttp.ClientSession() as http:
        for url in urls:
            gateway.membership.join(url)
        serving = asyncio.create_task(gateway.serve(sock, shutdown))
        try:
            yield Front(gateway, url_of(sock), http)
        finally:
            shutdown.request()
            await serving


@pytest.mark.parametrize("caching", ["off", "p", "full"])
async def test_real_instances_are_proved_and_no_client_s_metric_counts_it(
    model: Path, caching: Any
) -> None:
    async with pair(model, caching) as (p, d), front(model, p.url, d.url) as gateway:
        await until(lambda: len(gateway.proof.proven()) == 1, "the proof")
        assert (d.totals.asked, d.totals.failed, d.totals.blocks_received) == (1, 0, 3)
        assert json.loads((await gateway.get("/health"))[1]) == {"status": "ready", "ready": 2}
        assert "degraded" not in await gateway.cluster()
        _, text = await gateway.get("/metrics")
        lines = text.splitlines()
        assert "memserve_scheduler_degraded_pairs 0.0" in lines
        assert 'memserve_scheduler_handover_proofs_total{what="worked"} 1.0' in lines
        assert "memserve_prompt_tokens_total 0.0" in lines
        assert "memserve_scheduler_prompt_tokens_total 0.0" in lines
        assert "memserve_request_seconds_count 0.0" in lines
        assert not [line for line in lines if line.startswith("memserve_requests_total{")]
        assert not [line for line in lines if line.startswith("memserve_scheduler_plans_total{")]
        _, own = await gateway.get("/metrics?instances=false")
        assert "memserve_instance_info" in text
        assert "memserve_instance_info" not in own
        assert "memserve_scheduler_degraded_pairs 0.0" in own.splitlines()
        await p.settled()
        await d.settled()


async def test_health_and_the_cluster_tell_of_a_pair_that_cannot_meet(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(model, Role.PREFILL, name="p") as p, node(model, Role.DECODE, name="d") as d:
        # Where D says that its pool is, nobody listens.
        wrong = msgspec.structs.replace(d.link.address, address="tcp://127.0.0.1:9")
        monkeypatch.setattr(d.link, "address", wrong)
        async with front(model, p.url, d.url) as gateway:
            await until(lambda: bool(gateway.proof.degraded()), "the proof")
            status, text = await gateway.get("/health")
            told = {"prefill": "p", "decode": "d", "why": NOTHING_MOVED}
            assert status == 200
            assert json.loads(text) == {"status": "ready", "ready": 2, "degraded": [told]}
            (found,) = (await gateway.cluster())["degraded"]
            assert "tcp://127.0.0.1:9" in found["detail"]
            _, text = await gateway.get("/metrics")
            assert "memserve_scheduler_degraded_pairs 1.0" in text.splitlines()
