"""What one request may cost the others: texts that are tokenised, bodies that nobody may send,
answers that are large."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import msgspec
import pytest

from memserve.api import limits
from memserve.api.errors import ApiError
from memserve.api.generate import CallKind, GenerateCall
from memserve.clock import MonotonicClock
from memserve.cluster.member import Member
from memserve.config import available_cores
from memserve.gateway import relay
from memserve.gateway.call_builder import INLINE_CHARACTERS
from memserve.gateway.relay import Attempt
from memserve.gateway.route import Route
from memserve.gateway.upstream import Upstream
from memserve.instance.generation import Generation
from memserve.models.tokenizer import Tokenizer
from memserve.tokens import from_ids
from tests.e2e.test_refusals import ask
from tests.fakes import FakeCluster, FakeEngine, tiny_tokenizer, until
from tests.gateway_harness import Client, impostor, ready_members
from tests.http_harness import post
from tests.packed import listed
from tests.security.test_request_limits import (
    SERVED,
    TEMPLATE,
    Counting,
    Office,
    chat,
    completion,
    message,
)

SMALL = msgspec.structs.replace(SERVED, max_tokens=1024)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEMPLATE)


@pytest.fixture
def office(own: Tokenizer) -> Iterator[Office]:
    office = Office(own)
    yield office
    office.tokenizer.gate.set()
    office.builder.close()


# --- texts


@pytest.mark.parametrize("size", [0, limits.LARGE_BODY_BYTES])
async def test_a_text_that_no_tokens_could_make_short_enough_is_not_tokenised(
    office: Office, own: Tokenizer, size: int
) -> None:
    longest = own.longest_token()
    assert longest is not None
    text = "a" * max(size, SMALL.max_tokens * longest + 1)
    for asked, param in [
        (completion(prompt=text), "prompt"),
        (completion(prompt=["hi", text]), "prompt"),
        (chat([message(content=text[:-1]), message(content="a")]), "messages"),
    ]:
        refusal = await office.refused(asked, SMALL)
        assert (refusal.status, refusal.detail.param) == (400, param)
        assert refusal.detail.code == "context_length_exceeded"


async def test_texts_have_only_so_much_room_to_wait_for_their_turn(office: Office) -> None:
    text = "a" * (limits.LARGE_BODY_BYTES // 2)
    most = limits.MAX_TOKENISED_CHARACTERS // len(text)
    office.tokenizer.gate.clear()
    asks = [completion(prompt=text), chat([message(content=text)])]
    waiting = [asyncio.ensure_future(office.ask(asks[i % 2])) for i in range(most)]
    await asyncio.sleep(0)
    for asked in asks:
        with pytest.raises(ApiError) as full:
            await office.ask(asked)
        assert (full.value.status, full.value.detail.code) == (429, "queue_full")
        assert full.value.retry_after
    assert listed((await office.ask(completion(prompt=[1, 2]))).prompts) == [[1, 2]]
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    office.tokenizer.gate.set()
    assert (await office.ask(asks[0])).prompts  # there is room again


@pytest.mark.parametrize("size", [INLINE_CHARACTERS + 1, limits.LARGE_BODY_BYTES])
async def test_what_was_given_up_is_not_tokenised(office: Office, size: int) -> None:
    asked = completion(prompt="a" * size)
    office.tokenizer.gate.clear()
    waiting = [asyncio.ensure_future(office.ask(asked)) for _ in range(20)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    office.tokenizer.gate.set()
    await office.ask(asked)
    assert office.tokenizer.encoded <= limits.LARGE_BODIES_AT_ONCE + 1


def test_a_text_whose_client_has_left_is_not_tokenised(
    own: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = Counting(own)
    with FakeCluster(own, [FakeEngine(max_model_len=4096)]) as cluster:
        monkeypatch.setattr(own, "encode", gated.encode)
        metrics = cluster.gateway._app._metrics
        text = "the quick brown fox " * (INLINE_CHARACTERS // 20 + 1)
        body = json.dumps(completion(prompt=text)).encode()
        gated.gate.clear()
        count = available_cores() + 5
        address = urlsplit(cluster.url)
        leaving = []
        for _ in range(count):
            client = socket.create_connection((address.hostname, address.port))
            client.sendall(post(body, b"/v1/completions"))
            leaving.append(client)
        until(lambda: cluster.call(lambda: metrics.running) == count)
        for client in leaving:
            client.close()
        until(lambda: cluster.call(lambda: metrics.running) == 0)
        assert cluster.call(lambda: metrics.client_hang_ups) == count
        gated.gate.set()
        assert ask(cluster.url, "/v1/completions", body).status == 200
        assert gated.encoded <= available_cores() + 1


# --- answers


def test_an_answer_that_comes_in_many_parts_is_put_together_once() -> None:
    attempt = Attempt(Route(Member("http://one", 0.0)), Client().reply, None)
    attempt.head(200, None, None)
    part = b"x" * 65536
    count = limits.MAX_ANSWER_BYTES // len(part)
    tracemalloc.start()
    for number in range(count):
        attempt.received(part, number == count - 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000  # nothing was copied on the way
    assert len(attempt.body) == limits.MAX_ANSWER_BYTES
    assert not attempt.too_large


async def test_an_answer_that_is_too_large_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "MAX_ANSWER_BYTES", 100_000)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    upstream = Upstream(None)
    calls: list[GenerateCall] = []
    call = GenerateCall("c", CallKind.COMPLETION, "m", 1, (from_ids((1,)),))
    for size in (100_000, 100_001):
        parts = [head % (size + 5), b"x" * 50_000, b"x" * (size - 50_000)]
        async with impostor(parts, calls) as one, impostor(parts, calls) as another:
            members = ready_members(one, another)

            def plan(call: GenerateCall, members: Sequence[Member]) -> Route:
                return Route(members[0])

            under_test = relay.Relay(upstream, members, plan, MonotonicClock(), 0.0)
            calls.clear()
            with pytest.raises(ApiError) as refusal:
                await under_test.run(call, Client().reply, (), relay.Answer())
            too_large = size > relay.MAX_ANSWER_BYTES
            code = "answer_too_large" if too_large else "instance_lost"  # five bytes are missing
            assert refusal.value.detail.code == code
            assert len(calls) == (1 if too_large else 2)
            assert len(members.ready()) == 2 or not too_large  # and no instance is suspected
    upstream.close()


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_large_answers_are_encoded_beside_an_instance_s_loop(
    own: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    threads = []

    def body(generation: Generation) -> bytes:
        threads.append(threading.get_ident())
        return encode(generation)

    encode = Generation.body
    monkeypatch.setattr(Generation, "body", body)
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    asked = chat() if kind == "chat" else completion()
    scores = {"logprobs": True, "top_logprobs": 20} if kind == "chat" else {"logprobs": 20}
    with FakeCluster(own, [FakeEngine()]) as cluster:
        loop = cluster.call(threading.get_ident)
        for fields in ({}, scores, {"n": 32}, {"max_tokens": 200}):
            assert ask(cluster.url, path, json.dumps({**asked, **fields})).status == 200
        assert set(threads) == {loop}
        large = {**asked, **scores, "n": 32, "max_tokens": 64}
        answer = ask(cluster.url, path, json.dumps(large))
        assert answer.status == 200
        assert len(json.loads(answer.text)["choices"]) == 32
        assert threads[-1] != loop
