"""Stored responses belong to who made them; bodies do not grow beyond the limit; pages of other
sites stay out of what they may not ask."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import io
import json
import random
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import zstandard

from memserve.api.compression import PIECE_BYTES, Decompression
from memserve.api.errors import ApiError
from memserve.api.http_message import Request
from memserve.api.limits import MAX_MESSAGE_VALUES
from memserve.config import GatewayConfig
from memserve.gateway.body_threads import BodyThreads
from memserve.gateway.conversation import ArgumentsDecoder
from memserve.gateway.response_store import StoredResponse, owner_of
from memserve.models.tokenizer import Tokenizer
from tests.fakes import FakeCluster, FakeEngine, tiny_tokenizer

SITE = "https://chat.example"
LIMIT = 300_000
KEYS = ("sk-a name=a tenant=red", "sk-b name=b tenant=red", "sk-c name=c tenant=blue")
A, B, C = ({"authorization": f"Bearer sk-{name}"} for name in "abc")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def running(tokenizer: Tokenizer, **gateway: Any) -> Iterator[FakeCluster]:
    settings = GatewayConfig(port=0, max_body_bytes=LIMIT, **gateway)
    with FakeCluster(tokenizer, [FakeEngine()], settings) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def keyed(tokenizer: Tokenizer) -> Iterator[FakeCluster]:
    yield from running(tokenizer, api_keys=KEYS, cors_origins=(SITE,))


@pytest.fixture(scope="module")
def open_to_all(tokenizer: Tokenizer) -> Iterator[FakeCluster]:
    yield from running(tokenizer)


Told = tuple[int, dict[str, str], bytes]


def ask(
    cluster: FakeCluster, method: str, path: str, headers: dict[str, str], body: bytes = b""
) -> Told:
    connection = http.client.HTTPConnection(urlsplit(cluster.url).netloc, timeout=30)
    connection.request(method, path, body or None, headers)
    answer = connection.getresponse()
    told = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return told


def made(cluster: FakeCluster, headers: dict[str, str], **fields: Any) -> Told:
    asked = {"input": "hi", "max_output_tokens": 2, **fields}
    return ask(cluster, "POST", "/v1/responses", headers, json.dumps(asked).encode())


def id_of(told: Told) -> str:
    assert told[0] == 200, told
    found: str = json.loads(told[2])["id"]
    return found


def test_only_its_tenant_gets_at_a_response(keyed: FakeCluster) -> None:
    name = id_of(made(keyed, A))
    path = f"/v1/responses/{name}"
    for headers, status in ((A, 200), (B, 200), (C, 404), ({}, 401)):
        for place in (path, f"{path}/input_items"):
            for method in ("GET", "HEAD"):
                assert ask(keyed, method, place, headers)[0] == status
        goes_on = made(keyed, headers, previous_response_id=name)
        assert goes_on[0] == {200: 200, 404: 400, 401: 401}[status]
    for headers, status in ((C, 404), ({}, 401), (B, 200), (A, 404)):
        assert ask(keyed, "DELETE", path, headers)[0] == status


def test_what_another_tenant_has_and_what_nobody_has_look_alike(keyed: FakeCluster) -> None:
    name = id_of(made(keyed, A))
    theirs = ask(keyed, "GET", f"/v1/responses/{name}", C)
    assert ask(keyed, "DELETE", f"/v1/responses/{name}", A)[0] == 200
    assert ask(keyed, "GET", f"/v1/responses/{name}", C)[2] == theirs[2]


def test_without_keys_what_is_shown_tells_clients_apart(open_to_all: FakeCluster) -> None:
    path = f"/v1/responses/{id_of(made(open_to_all, A))}"
    assert ask(open_to_all, "GET", path, A)[0] == 200
    assert ask(open_to_all, "GET", path, C)[0] == ask(open_to_all, "GET", path, {})[0] == 404


def test_clients_cannot_ask_as_siblings_do(keyed: FakeCluster) -> None:
    owner = owner_of(b"tenant:red")
    name = id_of(made(keyed, A))
    for method in ("GET", "DELETE"):
        told = ask(keyed, method, f"/cluster/worker/responses/{owner}/{name}", A)
        assert told[0] in (401, 404)
    assert ask(keyed, "GET", f"/v1/responses/{name}", A)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses/",
        "/v1/responses/resp_x/more",
        "/v1/responses/resp_x/input_items/1",
        "/v1/responses/..%2fmodels",
        "/v1/responses/" + "x" * 2000,
    ],
)
def test_other_paths_lead_nowhere(keyed: FakeCluster, path: str) -> None:
    assert ask(keyed, "GET", path, A)[0] == 404


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=x", "after=x"])
def test_pages_are_bounded(keyed: FakeCluster, query: str) -> None:
    path = f"/v1/responses/{id_of(made(keyed, A))}/input_items?{query}"
    status, _, body = ask(keyed, "GET", path, A)
    assert (status, json.loads(body)["error"]["param"]) == (400, query.partition("=")[0])


def test_no_more_is_gone_on_from_than_a_body_may_have(open_to_all: FakeCluster) -> None:
    name = id_of(made(open_to_all, {}))
    store = open_to_all.gateway._app._responses.store
    item = json.dumps({"type": "reasoning", "id": "r", "encrypted_content": "x" * 2**20}).encode()
    large = StoredResponse(b"{}", (item,) * 16, ())
    open_to_all.call(lambda: store.put(owner_of(b"shown:"), name, large))
    status, _, body = made(open_to_all, {}, previous_response_id=name)
    assert (status, json.loads(body)["error"]["param"]) == (400, "previous_response_id")


# --- compressed bodies


def bomb(coding: str, size: int) -> bytes:
    """`size` bytes of white space, compressed."""
    data = b" " * size
    if coding == "gzip":
        return gzip.compress(data)
    frames = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(frames, closefd=False) as writer:
        writer.write(data)
    return frames.getvalue()


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/tokenize"])
def test_a_small_body_that_becomes_a_large_one_is_refused(
    keyed: FakeCluster, coding: str, path: str
) -> None:
    body = bomb(coding, 64 * 1024 * 1024)
    assert len(body) < LIMIT
    status, _, told = ask(keyed, "POST", path, A | {"content-encoding": coding}, body)
    assert (status, json.loads(told)["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("coding", [b"gzip", b"zstd"])
def test_no_more_than_the_limit_is_ever_made_of_it(coding: bytes) -> None:
    packed = bomb(coding.decode(), 64 * 1024 * 1024)
    decompression = Decompression(coding, packed, LIMIT)
    with pytest.raises(ApiError) as refused:
        decompression.rest()
    assert refused.value.status == 413
    assert len(decompression._out) <= LIMIT + PIECE_BYTES


def test_the_limit_is_what_the_body_becomes(keyed: FakeCluster) -> None:
    fields = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    for size, status in ((LIMIT, 200), (LIMIT + 1, 413)):
        body = gzip.compress(fields.ljust(size))
        headers = A | {"content-encoding": "gzip"}
        assert ask(keyed, "POST", "/v1/completions", headers, body)[0] == status


def test_nothing_is_decompressed_for_who_may_not_ask(keyed: FakeCluster) -> None:
    headers = {"content-encoding": "gzip"}
    assert ask(keyed, "POST", "/v1/completions", headers, b"not gzip")[0] == 401


@pytest.mark.parametrize("coding", ["br", "compress", "gzip, gzip", "x" * 300, "gzip;q=1"])
def test_other_codings_are_refused(keyed: FakeCluster, coding: str) -> None:
    headers = A | {"content-encoding": coding}
    status, _, told = ask(keyed, "POST", "/v1/completions", headers, b"{}")
    error = json.loads(told)["error"]
    assert (status, error["code"]) == (415, "unsupported_content_encoding")
    assert set(error) == {"message", "type", "param", "code"}


GOOD = gzip.compress(b'{"prompt": "a", "max_tokens": 2}', mtime=0)  # in the names of tests


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", GOOD[:-5]),
        ("gzip", GOOD + b"x"),
        ("gzip", GOOD + GOOD),
        ("gzip", GOOD[:-8] + bytes(8)),
        ("gzip", b"{}"),
        ("deflate", b"{}"),
        ("zstd", b"{}"),
        ("zstd", zstandard.compress(b"{}") + b"x"),
        ("zstd", zstandard.compress(b'{"prompt": "a"}')[:-3]),
    ],
)
def test_damaged_bodies_are_refused(keyed: FakeCluster, coding: str, body: bytes) -> None:
    headers = A | {"content-encoding": coding}
    status, _, told = ask(keyed, "POST", "/v1/completions", headers, body)
    assert (status, json.loads(told)["error"]["type"]) == (400, "invalid_request_error")


def test_a_frame_that_wants_much_memory_is_refused() -> None:
    settings = zstandard.ZstdCompressionParameters(window_log=27)
    frame = zstandard.ZstdCompressor(compression_params=settings).compressobj().compress(b"")
    frame += zstandard.ZstdCompressor(compression_params=settings).compress(b" " * 2**24)
    with pytest.raises(ApiError):
        Decompression(b"zstd", frame, 2**30).rest()


# --- pages of other sites


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize", "/ping"])
def test_a_preflight_of_an_allowed_site_is_answered(keyed: FakeCluster, path: str) -> None:
    headers = {"origin": SITE, "access-control-request-method": "POST"}
    status, told, _ = ask(keyed, "OPTIONS", path, headers)
    assert status == 200
    assert told["access-control-allow-origin"] == SITE
    assert told["access-control-allow-methods"] == "GET, HEAD, POST, DELETE"
    assert "authorization" in told["access-control-allow-headers"]
    wanted = headers | {"access-control-request-headers": "x-stainless-os, authorization"}
    told = ask(keyed, "OPTIONS", path, wanted)[1]
    assert told["access-control-allow-headers"] == "x-stainless-os, authorization"


def test_a_preflight_of_another_site_is_not(keyed: FakeCluster) -> None:
    for path in ("/v1/chat/completions", "/v1/responses", "/tokenize", "/ping"):
        status, told, _ = ask(keyed, "OPTIONS", path, {"origin": "https://other.example"})
        assert status in (403, 405)
        assert not any(name.startswith("access-control") for name in told)


@pytest.mark.parametrize("stream", [False, True])
def test_answers_to_an_allowed_site_may_be_read_there(keyed: FakeCluster, stream: bool) -> None:
    headers = A | {"origin": SITE}
    for told in (
        made(keyed, headers, stream=stream),
        made(keyed, headers, nonsense=1),
        ask(keyed, "POST", "/tokenize", headers, b'{"prompt":"a"}'),
        ask(keyed, "GET", "/version", headers),
        ask(keyed, "GET", "/ping", headers),
        ask(keyed, "GET", "/v1/responses/resp_x", headers),
        ask(keyed, "POST", "/v1/embeddings", headers, b"{}"),
    ):
        assert told[1]["access-control-allow-origin"] == SITE
        assert told[1]["vary"] == "origin"
    other = A | {"origin": "https://other.example"}
    for told in (made(keyed, other), ask(keyed, "POST", "/tokenize", other, b'{"prompt":"a"}')):
        assert told[0] == 403
        assert "access-control-allow-origin" not in told[1]


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/rerank", "/v1/score", "/pooling", "/classify"]
)
def test_what_no_member_can_do_is_said_to_clients_alone(keyed: FakeCluster, path: str) -> None:
    status, _, told = ask(keyed, "POST", path, A, b'{"input":"a"}')
    assert status == 404
    assert "No member of this cluster" in json.loads(told)["error"]["message"]
    assert ask(keyed, "POST", path, {}, b"{}")[0] == 401


def test_ids_do_not_tell_each_other(keyed: FakeCluster) -> None:
    names = [id_of(made(keyed, A)).removeprefix("resp_") for _ in range(3)]
    assert {len(name) for name in names} == {48}
    assert len({name[:8] for name in names}) == 3


def test_an_event_is_one_line_whatever_the_request_looks_like(open_to_all: FakeCluster) -> None:
    asked = {"input": "hi", "stream": True, "max_output_tokens": 2, "metadata": {"a": "b\nc"}}
    body = json.dumps(asked, indent=2).encode().replace(b'"b', b' \n\n "b')
    status, _, told = ask(open_to_all, "POST", "/v1/responses", {}, body)
    assert status == 200
    for event in told.split(b"\n\n"):
        lines = event.split(b"\n")
        assert all(line.startswith((b"event: ", b"data: ")) for line in lines if line), event
        if lines[-1].startswith(b"data: "):
            response = json.loads(lines[-1][6:]).get("response")
            assert response is None or response["metadata"] == {"a": "b\nc"}


def test_white_space_is_not_kept(open_to_all: FakeCluster) -> None:
    body = b'{"input":"hi","max_output_tokens":2,"metadata":{%b}}' % (b" " * 100_000)
    status, _, told = ask(open_to_all, "POST", "/v1/responses", {}, body)
    assert (status, json.loads(told)["metadata"]) == (200, {})
    assert len(told) < 10_000


@pytest.mark.parametrize("limit", ["0000000999", "1" * 5000, "050", "%C2%B2"])
def test_a_page_has_a_number_for_its_limit(keyed: FakeCluster, limit: str) -> None:
    name = id_of(made(keyed, A))
    path = f"/v1/responses/{name}/input_items?limit={limit}"
    status = ask(keyed, "GET", path, A)[0]
    assert status == (200 if limit == "050" else 400)


def test_a_long_query_is_refused_unread(keyed: FakeCluster) -> None:
    name = id_of(made(keyed, A))
    assert ask(keyed, "GET", f"/v1/responses/{name}?{'a=b&' * 1000}", A)[0] == 400


def deep(levels: int) -> str:
    """A schema that nests, in JSON."""
    return '{"properties":{"a":' * levels + "{}" + "}}" * levels


@pytest.mark.parametrize("levels", [10, 400, 490, 495, 498, 500, 600])
def test_nesting_is_no_error_of_the_server(open_to_all: FakeCluster, levels: int) -> None:
    parameters = deep(levels)
    tool = f'{{"type":"function","name":"f","parameters":{parameters}}}'
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": parameters}}]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": calls}]
    messages.append({"role": "tool", "tool_call_id": "c", "content": "x"})
    schema = f'{{"type":"json_schema","json_schema":{{"name":"s","schema":{parameters}}}}}'
    for path, body in (
        ("/v1/responses", f'{{"input":"hi","max_output_tokens":1,"tools":[{tool}]}}'),
        ("/v1/chat/completions", json.dumps({"messages": messages, "max_tokens": 1})),
        (
            "/v1/chat/completions",
            f'{{"messages":[{{"role":"user","content":"hi"}}],"max_tokens":1,"response_format":{schema}}}',
        ),
    ):
        status, _, told = ask(open_to_all, "POST", path, {}, body.encode())
        assert status in (200, 400), told


def test_arguments_in_a_conversation_are_counted_together() -> None:
    decode = ArgumentsDecoder().decode
    assert decode('{"a": [1, 2]}') == {"a": [1, 2]}
    assert (decode(""), decode(" ")) == ({}, {})
    assert decode("no JSON") == "no JSON"
    assert decode("[" * 40 + "]" * 40) == "[" * 40 + "]" * 40  # deeper than a body may be
    text = f"[{','.join(['[]'] * (MAX_MESSAGE_VALUES // 4))}]"  # an array, and a comma for each
    assert decode(text) == [[]] * (MAX_MESSAGE_VALUES // 4)
    assert decode(text) == text
    assert decode('{"a": 1}') == {"a": 1}


def test_a_compressed_body_that_is_not_short_leaves_the_event_loop_alone() -> None:
    """It may become nothing after a long time."""
    threads = BodyThreads(1)
    ran: list[str] = []

    async def read(body: bytes) -> bytes:
        headers = [(b"content-encoding", b"gzip")]
        request = Request("POST", "/", b"", headers, body, False, True, b"/")
        with pytest.MonkeyPatch.context() as patch:
            whole = Decompression.rest
            patch.setattr(
                Decompression,
                "rest",
                lambda self: ran.append(threading.current_thread().name) or whole(self),
            )
            return await threads.whole(request, LIMIT)

    noise = random.Random(1).randbytes(20_000)
    for data in (b"short", noise):
        assert asyncio.run(read(gzip.compress(data, mtime=0))) == data
    threads.close()
    assert ran[0] == "MainThread"
    assert ran[1].startswith("large-body")


@pytest.mark.parametrize("text", ["中" * 300, "é" * 400])
def test_a_text_may_become_as_many_tokens_as_it_has_bytes(
    open_to_all: FakeCluster, text: str
) -> None:
    """So bytes are what /tokenize bounds: 4 contexts of 256 tokens, 4 bytes for each."""
    status, _, told = ask(
        open_to_all, "POST", "/tokenize", {}, json.dumps({"prompt": text}).encode()
    )
    assert status == 200
    assert json.loads(told)["count"] > len(text)
    long = json.dumps({"prompt": 20 * text}).encode()
    status, _, told = ask(open_to_all, "POST", "/tokenize", {}, long)
    assert (status, json.loads(told)["error"]["param"]) == (400, "prompt")
