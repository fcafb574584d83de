"""The load generator against a small fake server: causal order, honest times, bounded failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from memserve.bench.loadgen import (
    LoadResult,
    LoadSettings,
    arrival_times,
    generate_load,
    warm_up,
)
from memserve.bench.openai_client import OpenAIClient
from memserve.clock import MonotonicClock
from memserve.workloads.session import Session, Turn

FAST = LoadSettings(rate=1000.0, seed=0)


class FakeServer:
    """Answers each chat request with as many one-token chunks as were asked for."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.fail_prompts: dict[str, str] = {}  # prompt -> how
        self.silent_tokens = 0  # leading chunks whose token has no text

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        how = self.fail_prompts.get(body["messages"][-1]["content"])
        if how == "refuse":
            return web.json_response({"error": {"message": "too busy"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self.send(response, choices=[{"delta": {"role": "assistant", "content": ""}}])
        for index in range(body["max_tokens"]):
            await asyncio.sleep(0)
            text = "" if index < self.silent_tokens else f"t{index} "
            choice = {"delta": {"content": text}, "token_ids": [index]}
            await self.send(response, choices=[choice])
        if how == "break off":
            return response
        if how == "error":
            await self.send(response, error={"message": "engine died"})
        usage = {
            "prompt_tokens": 10 * len(body["messages"]),
            "completion_tokens": body["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": 5},
        }
        await self.send(response, choices=[], usage=usage)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def send(self, response: web.StreamResponse, **chunk: object) -> None:
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    @asynccontextmanager
    async def client(self) -> AsyncIterator[OpenAIClient]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat)
        async with (
            TestServer(app) as server,
            OpenAIClient(str(server.make_url("/")), "m", MonotonicClock()) as client,
        ):
            yield client

    async def run(self, sessions: list[Session], settings: LoadSettings = FAST) -> LoadResult:
        async with self.client() as client:
            return await generate_load(client, sessions, settings, MonotonicClock())


def session(name: str, turns: int = 3) -> Session:
    return Session(name, tuple(Turn(f"{name}{i}", f"data answer {i}", 2 + i) for i in range(turns)))


async def test_each_turn_contains_the_answers_that_the_server_gave_before() -> None:
    server = FakeServer()
    await server.run([session("a")])
    assert [message["content"] for message in server.bodies[2]["messages"]] == [
        "a0",
        "t0 t1 ",
        "a1",
        "t0 t1 t2 ",
        "a2",
    ]


async def test_history_can_be_the_datas_answers() -> None:
    server = FakeServer()
    await server.run([session("a", 2)], LoadSettings(1000.0, 0, replay_answers=True))
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "data answer 0"}


async def test_a_turn_is_sent_only_after_the_answer_before_it_has_ended() -> None:
    result = await FakeServer().run([session(name) for name in "abcdef"])
    by_session: dict[str, list[tuple[float, float]]] = {}
    for record in result.records:
        by_session.setdefault(record.session, []).append((record.sent, record.end))
    assert len(by_session) == 6
    for spans in by_session.values():
        assert all(end <= sent for (_, end), (sent, _) in pairwise(spans))


async def test_output_lengths_are_exactly_the_workloads() -> None:
    """A model that ends early would make a server look fast."""
    server = FakeServer()
    await server.run([session("a", 2)])
    assert [(b["max_tokens"], b["ignore_eos"]) for b in server.bodies] == [(2, True), (3, True)]


async def test_records_hold_what_the_server_counted_and_when_it_came() -> None:
    (record,) = (await FakeServer().run([session("a", 1)])).records
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (10, 5, 2)
    assert record.first_token == record.chunk_times[0]
    assert len(record.chunk_times) == 2
    assert record.scheduled <= record.sent <= record.first_token
    assert list(record.chunk_times) == sorted(record.chunk_times)
    assert record.chunk_times[-1] <= record.end


async def test_a_token_without_text_is_a_first_token_and_the_role_chunk_is_none() -> None:
    server = FakeServer()
    server.silent_tokens = 1
    (record,) = (await server.run([session("a", 1)])).records
    assert len(record.chunk_times) == 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("refuse", "HTTP 429: too busy"),
        ("error", "engine died"),
        ("break off", "ended without"),
    ],
)
async def test_a_failure_is_recorded_and_ends_only_its_own_session(how: str, message: str) -> None:
    server = FakeServer()
    server.fail_prompts["a1"] = how
    result = await server.run([session("a"), session("b")])
    errors = {(r.session, r.turn): r.error for r in result.records}
    assert set(errors) == {("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2)}
    assert message in (errors.pop(("a", 1)) or "")
    assert not any(errors.values())
    assert result.unsent == 1


async def test_a_server_that_is_not_there_is_an_error_of_each_session() -> None:
    async with OpenAIClient("http://127.0.0.1:1", "m", MonotonicClock()) as client:
        assert "Connect" in (await warm_up(client, 1) or "")
        result = await generate_load(client, [session("a")], FAST, MonotonicClock())
    assert [record.first_token for record in result.records] == [None]
    assert result.unsent == 2


async def test_warm_up_requests_differ_so_that_none_is_answered_from_the_cache() -> None:
    server = FakeServer()
    async with server.client() as client:
        assert await warm_up(client, 3) is None
    assert len({body["messages"][0]["content"] for body in server.bodies}) == 3


def test_arrivals_are_poisson_with_the_rate_and_repeat_with_the_seed() -> None:
    times = arrival_times(20_000, rate=4.0, seed=3)
    assert times == arrival_times(20_000, rate=4.0, seed=3)
    assert times != arrival_times(20_000, rate=4.0, seed=4)
    gaps = [b - a for a, b in pairwise((0.0, *times))]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.05)
    assert variance == pytest.approx(mean**2, rel=0.1)  # as an exponential's


async def test_a_closed_loop_keeps_so_many_sessions_going_and_no_more() -> None:
    closed = LoadSettings(rate=0.001, seed=0, concurrency=2)
    result = await FakeServer().run([session(name) for name in "abcde"], closed)
    assert [r.session for r in result.records] == [n for n in "abcde" for _ in range(3)]
    spans = [(r.sent, r.end) for r in result.records]
    at_once = [sum(sent <= start < end for sent, end in spans) for start, _ in spans]
    assert max(at_once) == 2
    assert result.unsent == 0


async def test_a_closed_loops_sessions_are_scheduled_when_there_is_room() -> None:
    closed = LoadSettings(rate=0.001, seed=0, concurrency=1)
    first, second = (await FakeServer().run([session("a", 1), session("b", 1)], closed)).records
    assert first.end <= second.scheduled <= second.sent


async def test_a_salt_is_sent_with_every_request_only_if_there_is_one() -> None:
    server = FakeServer()
    await server.run([session("a", 1)])
    async with server.client() as client:
        salted = OpenAIClient(client.url, "m", MonotonicClock(), cache_salt="x")
        async with salted:
            await generate_load(salted, [session("a", 2)], FAST, MonotonicClock())
    assert [body.get("cache_salt") for body in server.bodies] == [None, "x", "x"]
