"""ASGI applications that break off, and their errors: nobody waits for ever, all is JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Response
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from memserve.config import GatewayConfig
from memserve.gateway.asgi import asgi_handler
from memserve.models.tokenizer import Tokenizer
from tests import insider
from tests.fakes import FakeCluster, FakeEngine, save_tiny_tokenizer
from tests.http_harness import LOOPS, post, serving

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the")


@pytest.fixture(params=LOOPS, scope="module")
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


def start(status: int, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


BROKEN: dict[str, list[Message]] = {
    "says nothing": [],
    "only begins": [start(200)],
    "announces no number": [start(200, (b"content-length", b"many")), body(b"")],
    "has no beginning": [body(b"x")],
    "begins twice": [start(200), start(200), body(b"x")],
    "says more than it announced": [start(200, (b"content-length", b"1")), body(b"xy")],
    "says less than it announced": [start(200, (b"content-length", b"3")), body(b"xy")],
    "says what nobody knows": [start(200), {"type": "http.response.trailers"}],
    "has an unknown status": [start(799), body(b"x")],
}


@pytest.mark.parametrize("messages", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("fails", [True, False])
async def test_an_application_that_breaks_off_is_an_error_and_no_wait(
    messages: list[Message], reads: bool, fails: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if reads:
            await receive()
        for message in messages:
            await send(message)
        if fails:
            raise ValueError("on purpose")

    async with serving(asgi_handler(app)) as served:
        client = await served.connect()
        client.say(post(b"x" * 500) * 2)  # the connection is good for the next one
        for _ in range(2):
            assert await client.error() == (500, "internal_error")


@pytest.mark.parametrize(
    ("sent", "announced"), [(b"ab", 1), (b"ab", 3)], ids=["too much", "too little"]
)
async def test_an_application_that_breaks_off_within_its_answer_is_hung_up_on(
    sent: bytes, announced: int
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start(200, (b"content-length", b"%d" % announced)))
        await send(body(sent[:1], more=True))
        await send(body(sent[1:]))

    async with serving(asgi_handler(app)) as served:
        client = await served.connect()
        client.say(post(b""))
        await client.reader.readuntil(b"\r\n\r\n")
        assert await client.reader.read() == sent[:1]  # and then the end


def _app() -> FastAPI:
    app = FastAPI()

    @app.get("/ok")
    async def ok() -> Response:
        return Response(b"whole", media_type="text/plain")

    @app.get("/fails")
    async def fails() -> Response:
        raise ValueError("a secret of the server's")

    @app.get("/teapot")
    async def teapot() -> Response:
        return Response(b"short and " + b"stout " * 1000, 418, {"x-kept": "yes"})

    @app.get("/unavailable")
    async def unavailable() -> Response:
        return Response(b"a secret of the server's", 503, {"retry-after": "7"})

    @app.get("/json")
    async def own_json() -> Response:
        return Response(b'{"status":"no instance"}', 503, media_type="application/json")

    @app.exception_handler(HTTPException)
    async def plain(request: object, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return Response(error.detail, error.status_code, error.headers)

    return app


@pytest.mark.parametrize(
    ("path", "status", "says", "header"),
    [
        (b"/fails", 500, "Internal Server Error.", None),
        (b"/teapot", 418, "short and stout ", b"x-kept"),
        (b"/unavailable", 503, "Service Unavailable.", b"retry-after"),
        (b"/nothing", 404, "Not Found", None),
    ],
)
async def test_what_a_framework_says_of_errors_gets_the_shape_of_all(
    path: bytes, status: int, says: str, header: bytes | None
) -> None:
    async with serving(asgi_handler(_app())) as served:
        client = await served.connect()
        for _ in range(2):
            client.say(b"GET %b HTTP/1.1\r\nhost: h\r\n\r\n" % path)
            found, headers, data = await client.hear()
            error = json.loads(data)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (found, headers[b"content-type"]) == (status, b"application/json")
            assert error["message"].startswith(says)
            assert len(error["message"]) <= 256
            assert header is None or header in headers


async def test_json_of_an_applications_own_stays() -> None:
    async with serving(asgi_handler(_app())) as served:
        client = await served.connect()
        client.say(b"GET /json HTTP/1.1\r\nhost: h\r\n\r\n")
        assert (await client.hear())[2] == b'{"status":"no instance"}'


@pytest.mark.parametrize("path", [b"/ok", b"/fails", b"/teapot", b"/json", b"/nothing"])
async def test_head_is_get_without_the_body(path: bytes) -> None:
    async with serving(asgi_handler(_app())) as served:
        client = await served.connect()
        client.say(b"GET %b HTTP/1.1\r\nhost: h\r\n\r\n" % path)
        status, headers, data = await client.hear()
        client.say(b"HEAD %b HTTP/1.1\r\nhost: h\r\n\r\n" % path)
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert b"content-length: %d\r\n" % len(data) in head
        assert b"content-type: %b\r\n" % headers[b"content-type"] in head
        client.say(b"GET /ok HTTP/1.1\r\nhost: h\r\n\r\n")
        assert (await client.hear())[2] == b"whole"


# --- the two applications there are


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(directory)
    with FakeCluster(Tokenizer.load(directory), [FakeEngine()], GatewayConfig(port=0)) as made:
        yield made


def _ask(url: str, method: str, path: str, data: bytes | None = None) -> tuple[int, str, bytes]:
    # No Content-Type; `request` would add none to bytes.
    answer = insider.ask(url, path, data, method)
    return answer.status, answer.headers["content-type"] or "", answer.text


@pytest.mark.parametrize(
    "path",
    ["/", "/health", "/version", "/metrics", "/v1/models", "/openapi.json", "/cluster", "/docs"],
)
def test_a_gateway_answers_head(cluster: FakeCluster, path: str) -> None:
    status, media, _ = _ask(cluster.url, "GET", path)
    assert _ask(cluster.url, "HEAD", path) == (status, media, b"")
    assert status == 200


@pytest.mark.parametrize("path", ["/health", "/info", "/stats", "/metrics", "/profile"])
def test_an_instance_answers_head(cluster: FakeCluster, path: str) -> None:
    status, media, _ = _ask(cluster.urls[0], "GET", path)
    assert _ask(cluster.urls[0], "HEAD", path) == (status, media, b"")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/cluster/members"])
def test_head_does_nothing_where_there_is_no_get(cluster: FakeCluster, path: str) -> None:
    assert _ask(cluster.url, "HEAD", path)[0] == 405
    for own in ("/drain", "/shutdown", "/role", "/v1/generate"):
        assert _ask(cluster.urls[0], "HEAD", own)[0] == 405
    assert _ask(cluster.urls[0], "GET", "/health")[0] == 200


@pytest.mark.parametrize("instance", [False, True], ids=["gateway", "instance"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/%00",
        "/%ff%fe",
        "/v1/models/%00%ED%A0%80",
        "/cluster/instances/%ff",
        "/cluster/decisions?n=" + "9" * 400,
        "/cluster/decisions?n=%ff",
        "/cluster/decisions?n=-1&%00",
        "/v1/generate",
        "/role",
        "/cluster/members",
    ],
)
def test_errors_are_json_whatever_comes(
    cluster: FakeCluster, instance: bool, method: str, path: str
) -> None:
    url = cluster.urls[0] if instance else cluster.url
    for data in (None, b"{", b"\xff\xfe", b"[" * 5000, b'{"address":"\\ud800"}'):
        status, media, answer = _ask(url, method, path, data)
        if status >= 400:
            assert media == "application/json"
            assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
