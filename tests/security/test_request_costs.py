"""What one request may cost the others: texts that are tokenised, bodies that nobody may send,
answers that are large."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec
import pytest

from memserve.api import limits
from memserve.api.errors import ApiError
from memserve.config import available_cores
from memserve.gateway.call_builder import INLINE_CHARACTERS
from memserve.models.tokenizer import Tokenizer
from tests.e2e.test_refusals import ask
from tests.fakes import FakeCluster, FakeEngine, tiny_tokenizer, until
from tests.http_harness import post
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
    assert (await office.ask(completion(prompt=[1, 2]))).prompts == ([1, 2],)
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
