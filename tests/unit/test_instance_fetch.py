"""A longer prefix from a third instance: it saves computing, and costs nothing but time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memserve.api import msgpack
from memserve.api.generate import GenerateCall, PrefillPeer
from memserve.api.handoff import PUSH_PATH, PushCall
from memserve.api.peer_client import PeerClient
from memserve.api.status import PeerMoves
from memserve.instance import fetch
from memserve.instance.app import instance_page
from memserve.tokens import from_ids
from memserve.transfer import kv_link
from memserve.types import SHARED, InstanceId, Namespace, Role
from tests.fakes import save_tiny_tokenizer
from tests.faulty_transport import Drop, Fail
from tests.handoff_harness import (
    Completion,
    Node,
    call_of,
    completed,
    node,
    pair,
    prompt_of,
    until,
)
from tests.insider import peers
from tests.metric_page import figures
from tests.packed import ids, packed
from tests.tiny_models import Reference, save_tiny_model
from tests.unit.test_instance_handoff_faults import faulty

PROMPT = prompt_of(70, seed=1)  # four whole blocks and six tokens
WHOLE = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """The first tokens of the answer to PROMPT."""
    return Reference(model).generate(PROMPT, 12)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_link, "LINGER_SECONDS", 0.3)
    # What should succeed has time for it, on any machine.
    monkeypatch.setattr(fetch, "MIN_FETCH_SECONDS", 5.0)


async def fetching(one: Node, peer: Node | PrefillPeer, **options: Any) -> Completion:
    """Have `one` answer PROMPT, with what `peer` has of it."""
    call = fetch_call(peer, **options)
    with one.instance.run(call) as run:
        completion = await completed(run)
    await one.settled()
    return completion


def fetch_call(peer: Node | PrefillPeer, **options: Any) -> GenerateCall:
    call = call_of(PROMPT, **{"tokens": 12, **options})
    return msgspec.structs.replace(call, fetch=peer.peer if isinstance(peer, Node) else peer)


async def test_only_what_nobody_has_is_computed(model: Path, expected: list[int]) -> None:
    async with node(model, Role.COLOCATED) as one, node(model, Role.COLOCATED) as third:
        await third.complete(*PROMPT)
        before = one.engine.stats().computed_prompt_tokens
        answer = await fetching(one, third)
        assert answer.tokens == [expected]
        assert one.engine.stats().computed_prompt_tokens - before == len(PROMPT) - WHOLE
        assert answer.cached == WHOLE
        totals = one.fetches
        assert (totals.asked, totals.failed, totals.blocks_received) == (1, 0, 4)
        assert totals.seconds > 0
        assert one.moves == {third.peer.id: PeerMoves(received=4 * totals.block_bytes)}
        assert third.moves == {}
        assert (third.fetches.pushes, third.fetches.blocks_pushed) == (1, 4)
        extra = answer.body["usage"]["memserve"]
        assert extra["blocks_fetched"] == 4
        assert 0 < extra["fetch_seconds"] <= totals.seconds
        # A second time everything is here, and nobody is asked.
        assert (await fetching(one, third)).tokens == [expected]
        assert one.fetches.asked == 1


async def test_only_what_is_missing_here_is_sent(model: Path, expected: list[int]) -> None:
    async with node(model, Role.COLOCATED) as one, node(model, Role.COLOCATED) as third:
        await third.complete(*PROMPT)
        await one.complete(*PROMPT[:40])
        assert (await fetching(one, third)).tokens == [expected]
        assert one.fetches.blocks_received == 2


async def test_a_prefill_instance_fetches_before_it_computes(
    model: Path, expected: list[int]
) -> None:
    async with pair(model) as (p, d), node(model, Role.COLOCATED) as third:
        await third.complete(*PROMPT)
        before = p.engine.stats().computed_prompt_tokens
        answer = await fetching(d, third, prefill=[p])
        assert answer.tokens == [expected]
        assert p.engine.stats().computed_prompt_tokens - before == len(PROMPT) - WHOLE
        assert (p.fetches.asked, p.fetches.blocks_received, d.fetches.asked) == (1, 4, 0)
        assert answer.body["usage"]["memserve"]["blocks_fetched"] == 4
        assert d.totals.blocks_received == 4
        await until(lambda: d.totals.returns == 1, "the return")


async def test_a_prefill_instance_may_fetch_what_its_decode_instance_has(
    model: Path, expected: list[int]
) -> None:
    async with pair(model) as (p, d):
        await d.complete(*PROMPT)
        before = p.engine.stats().computed_prompt_tokens
        assert (await fetching(d, d, prefill=[p])).tokens == [expected]
        assert p.engine.stats().computed_prompt_tokens - before == len(PROMPT) - WHOLE
        assert (d.totals.blocks_received, d.totals.blocks_already_present) == (0, 4)
        await until(lambda: d.totals.returns == 1, "the return")


async def test_a_decode_instance_that_is_left_alone_fetches_itself(
    model: Path, expected: list[int]
) -> None:
    gone = PrefillPeer(InstanceId("gone"), "http://127.0.0.1:9", "tcp://127.0.0.1:9")
    async with node(model, Role.DECODE, "p") as d, node(model, Role.COLOCATED) as third:
        await third.complete(*PROMPT)
        before = d.engine.stats().computed_prompt_tokens
        assert (await fetching(d, third, prefill=[gone], n=2)).tokens == [expected] * 2
        # Nothing is kept here with this step of caching, so both samples compute what is left.
        computed = d.engine.stats().computed_prompt_tokens - before
        assert computed == 2 * len(PROMPT) - 2 * WHOLE
        await until(lambda: not d.cached, "nothing left of it")


async def test_a_stream_that_goes_on_fetches_what_it_had_generated(
    model: Path, expected: list[int]
) -> None:
    async with node(model, Role.COLOCATED) as one, node(model, Role.COLOCATED) as third:
        answer = await third.complete(*PROMPT, tokens=40)
        call = msgspec.structs.replace(
            fetch_call(third, tokens=40), stream=True, resumed=(from_ids(answer.tokens[0][:30]),)
        )
        before = one.engine.stats().computed_prompt_tokens
        with one.instance.run(call) as run:
            while not run.generation.finished:
                await run.step()
            assert list(run.produced.values()) == [answer.tokens[0][30:]]
        await one.settled()
        assert one.fetches.blocks_received == 6  # 99 tokens that need KV
        assert one.engine.stats().computed_prompt_tokens == before


async def test_nobody_is_asked_without_caching_or_by_itself(
    model: Path, expected: list[int]
) -> None:
    async with node(model, Role.COLOCATED, "off") as off, node(model, Role.COLOCATED) as third:
        await third.complete(*PROMPT)
        assert (await fetching(off, third)).tokens == [expected]
        assert off.fetches.asked == 0
        await until(lambda: not off.cached, "nothing left of it")
        assert (await fetching(third, third)).tokens == [expected]
        short = msgspec.structs.replace(fetch_call(third), prompts=(from_ids((5, 6)),))
        with off.instance.run(short) as run:
            await completed(run)
        assert (off.fetches.asked, third.fetches.asked) == (0, 0)


async def test_salts_are_kept_apart(model: Path) -> None:
    async with node(model, Role.COLOCATED) as one, node(model, Role.COLOCATED) as third:
        await third.complete(*PROMPT)
        assert (await fetching(one, third, cache_salt="tenant")).cached == 0
        await third.complete(*PROMPT, cache_salt="tenant")
        assert one.fetches.blocks_received == 0
        other = await fetching(one, third, cache_salt="other")
        assert other.cached == 0


# --- what goes wrong ----------------------------------------------------------------------------


@asynccontextmanager
async def server(answer: bytes | None, asked: asyncio.Event) -> AsyncIterator[PrefillPeer]:
    """Answers anything with `answer`; with None it says nothing."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        if answer is None:
            await reader.read()
        else:
            writer.write(answer)
        writer.close()

    made = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = made.sockets[0].getsockname()[1]
    try:
        yield PrefillPeer(InstanceId("impostor"), f"http://127.0.0.1:{port}")
    finally:
        made.close()


ANSWERS = {
    "gone": b"",
    "busy": b"HTTP/1.1 503 No\r\ncontent-length: 2\r\n\r\n{}",
    "nonsense": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    "no text": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n\xff{}",
    "silent": None,
}


@pytest.mark.parametrize("what", ANSWERS)
async def test_a_third_instance_that_does_not_do_it_costs_nothing_but_time(
    model: Path, expected: list[int], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MIN_FETCH_SECONDS", 0.2)
    monkeypatch.setattr(fetch, "MAX_FETCH_SECONDS", 0.2)
    asked = asyncio.Event()
    async with node(model, Role.COLOCATED) as one, server(ANSWERS[what], asked) as impostor:
        assert (await fetching(one, impostor)).tokens == [expected]
        assert asked.is_set()
        assert (one.fetches.asked, one.fetches.failed) == (1, 1)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "nowhere", "http://", "ftp://x:1"])
async def test_a_third_instance_that_is_not_there(
    model: Path, expected: list[int], address: str
) -> None:
    async with node(model, Role.COLOCATED) as one:
        peer = PrefillPeer(InstanceId("nobody"), address)
        assert (await fetching(one, peer)).tokens == [expected]
        assert (one.fetches.asked, one.fetches.failed) == (1, 1)


async def test_nothing_is_cached_there(model: Path, expected: list[int]) -> None:
    async with node(model, Role.COLOCATED) as one, node(model, Role.COLOCATED) as third:
        assert (await fetching(one, third)).tokens == [expected]
        assert (one.fetches.asked, one.fetches.failed, one.fetches.blocks_received) == (1, 0, 0)


async def test_a_push_that_stalls_is_given_up(
    model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MIN_FETCH_SECONDS", 0.2)
    monkeypatch.setattr(fetch, "MAX_FETCH_SECONDS", 0.2)
    async with (
        node(model, Role.COLOCATED) as one,
        node(model, Role.COLOCATED, transports=faulty(Drop())) as third,
    ):
        await third.complete(*PROMPT)
        assert (await fetching(one, third)).tokens == [expected]
        assert (one.fetches.asked, one.fetches.failed) == (1, 1)
        await third.settled()


async def test_a_push_that_breaks_is_the_only_one_that_fails(
    model: Path, expected: list[int]
) -> None:
    async with (
        node(model, Role.COLOCATED) as one,
        node(model, Role.COLOCATED, transports=faulty(Fail(0.5))) as third,
    ):
        await third.complete(*PROMPT)
        assert (await fetching(one, third)).tokens == [expected]
        assert (one.fetches.asked, one.fetches.failed) == (1, 1)
        assert (third.fetches.pushes, third.fetches.pushes_failed) == (0, 1)
        other = prompt_of(40, 3)
        await third.complete(*other)
        call = msgspec.structs.replace(call_of(other), fetch=third.peer)
        with one.instance.run(call) as run:
            assert (await completed(run)).cached == 32


async def test_a_third_instance_that_ends_in_mid_push_is_noticed_at_once(
    model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MIN_FETCH_SECONDS", 600.0)
    monkeypatch.setattr(fetch, "MAX_FETCH_SECONDS", 600.0)
    async with (
        node(model, Role.COLOCATED) as one,
        node(model, Role.COLOCATED, transports=faulty(Drop())) as third,
    ):
        await third.complete(*PROMPT)
        with one.instance.run(fetch_call(third)) as run:
            await until(lambda: third.pool.peer_stats().outgoing == 1, "the transfer")
            third.shutdown.request()
            third.shutdown.request()
            assert (await completed(run)).tokens == [expected]
        assert (one.fetches.asked, one.fetches.failed) == (1, 1)
        await third.settled()


async def test_a_client_that_leaves_stops_the_fetch(model: Path, expected: list[int]) -> None:
    async with (
        node(model, Role.COLOCATED) as one,
        node(model, Role.COLOCATED, transports=faulty(Drop())) as third,
    ):
        await third.complete(*PROMPT)
        with one.instance.run(fetch_call(third)):
            await until(lambda: third.pool.peer_stats().outgoing == 1, "the transfer")
        await one.settled()
        await third.settled()
        assert one.engine.stats().generated_tokens == 1  # the self-test's
        assert (await one.complete(*PROMPT, tokens=12)).tokens == [expected]


async def test_a_full_pool_refuses_and_the_prompt_is_computed(
    model: Path, expected: list[int]
) -> None:
    async with (
        node(model, Role.COLOCATED, hbm_blocks=8, dram_blocks=0) as one,
        node(model, Role.COLOCATED) as third,
    ):
        await third.complete(*PROMPT)
        held = one.pool.alloc_mem(6)
        with one.instance.run(fetch_call(third)) as run:
            await until(lambda: one.fetches.failed == 1, "the refusal")
            one.pool.free_mem(held)
            assert (await completed(run)).tokens == [expected]


# --- the endpoint ------------------------------------------------------------------------------


@pytest.fixture
async def http() -> AsyncIterator[PeerClient]:
    async with peers() as client:
        yield client


PUSH = {
    "tokens": ids(1),
    "namespace": "",
    "target": {"id": "x", "address": "tcp://127.0.0.1:9"},
    "target_namespace": "",
}
BAD = {
    "no call": packed({}),
    "no msgpack": b"\xc1",
    "JSON": b'{"tokens":[1],"namespace":""}',
    "a token that is none": packed({**PUSH, "tokens": ids(-1)}),
    "a part of a token": packed({**PUSH, "tokens": ids(1)[:3]}),
    "numbers": packed({**PUSH, "tokens": [1]}),
    "an address that is none": packed({**PUSH, "target": {"id": "x", "address": "nowhere"}}),
    "an unknown field": packed({**PUSH, "x": 1}),
}


@pytest.mark.parametrize("what", BAD)
async def test_bad_calls_are_refused_in_openai_s_shape(
    model: Path, http: PeerClient, what: str
) -> None:
    async with node(model, Role.COLOCATED) as one:
        url = one.url + PUSH_PATH
        answer = await http.ask("POST", url, BAD[what], media=msgpack.MEDIA)
        assert answer.status == 400
        assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
        assert (await http.ask("GET", one.url + PUSH_PATH)).status == 405


async def test_an_instance_that_drains_still_gives(model: Path, http: PeerClient) -> None:
    async with node(model, Role.COLOCATED) as one, node(model, Role.COLOCATED) as third:
        await third.complete(*PROMPT)
        third.instance.lifecycle.drain()
        call = PushCall(from_ids(PROMPT), SHARED, one.link.address, SHARED)
        url = third.url + PUSH_PATH
        answer = await http.ask("POST", url, msgpack.encode(call), media=msgpack.MEDIA)
        assert msgspec.msgpack.decode(answer.body) == {
            "blocks_sent": 4,
            "blocks_already_present": 0,
        }
        assert one.has(PROMPT) == WHOLE
        to_itself = PushCall(from_ids(PROMPT), SHARED, third.link.address, Namespace("x"))
        body = msgpack.encode(to_itself)
        assert (await http.ask("POST", url, body, media=msgpack.MEDIA)).status == 400


async def test_metrics_tell_of_fetches(model: Path) -> None:
    async with node(model, Role.COLOCATED) as one, node(model, Role.COLOCATED) as third:
        await third.complete(*PROMPT)
        await fetching(one, third)
        samples = figures(instance_page(one.instance))
        name, i = "memserve_instance_", one.instance.identity.id
        assert samples[(name + "fetches_total", i, "done")] == 1
        assert samples[(name + "handoff_bytes_total", i, "fetched")] == 4 * one.link.block_bytes
        assert samples[(name + "fetch_seconds_count", i)] == 1
        for part in ("queue", "prefill", "decode"):
            assert samples[(f"{name}{part}_seconds_count", i)] == 1
