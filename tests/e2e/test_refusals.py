"""Whatever comes in, a clean error goes out in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from memserve.api.serving import bind
from memserve.config import GatewayConfig
from tests import insider
from tests.e2e.conftest import StartCluster
from tests.fakes import MODEL, FakeCluster, FakeEngine
from tests.packed import HEADERS

LIMIT = 1 << 20


@pytest.fixture(scope="module")
def cluster(start_module_cluster: StartCluster) -> FakeCluster:
    return start_module_cluster(FakeEngine(), gateway=GatewayConfig(port=0, max_body_bytes=LIMIT))


class Answer:
    def __init__(self, answer: insider.Answer) -> None:
        self.status = answer.status
        self.headers = answer.headers
        self.text = answer.text

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


def ask(url: str, path: str, body: Any = None, method: str = "POST", **headers: str) -> Answer:
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request(method, path, body=body, headers=headers)
    response = connection.getresponse()
    answer = Answer(insider.Answer(response.status, response.headers, response.read()))
    connection.close()
    return answer


def still_works(cluster: FakeCluster) -> bool:
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1})
    return ask(cluster.url, "/v1/completions", body).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/v1/completions", 405, "POST"),
        ("PUT", "/v1/chat/completions", 405, "POST"),
        ("DELETE", "/v1/models", 405, "GET"),
        ("GET", "/v1/nothing", 404, None),
        ("POST", "/v2/chat/completions", 404, None),
    ],
)
def test_wrong_methods_and_paths(
    cluster: FakeCluster, method: str, path: str, status: int, allowed: str | None
) -> None:
    answer = ask(cluster.url, path, method=method)
    assert (answer.status, answer.headers["Allow"]) == (status, allowed)
    assert path in answer.error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b'{"prompt": "\xff"}', b"[1]", b'{"prompt": 1}', b"null"]
)
def test_malformed_bodies(cluster: FakeCluster, body: bytes) -> None:
    answer = ask(cluster.url, "/v1/completions", body)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert still_works(cluster)


def test_an_announced_body_of_100_mb(cluster: FakeCluster) -> None:
    answer = ask(cluster.url, "/v1/completions", b"x" * 100_000_000)
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert str(LIMIT) in answer.error["message"]
    assert still_works(cluster)


def test_an_endless_body_without_announcement(cluster: FakeCluster) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 65536

    answer = ask(cluster.url, "/v1/completions", parts())
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert still_works(cluster)


@pytest.mark.parametrize("address", ["ftp://x", "http://[::1", "http://h:99999", "http://h:0", ""])
def test_nobody_joins_with_an_address_that_is_none(cluster: FakeCluster, address: str) -> None:
    body = json.dumps({"address": address})
    answer = Answer(insider.ask(cluster.url, "/cluster/members", body, "POST"))
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("body", [b"", b"{}", b"x" * 5000])
def test_nobody_joins_without_an_address(cluster: FakeCluster, body: bytes) -> None:
    answer = Answer(insider.ask(cluster.url, "/cluster/members", body, "POST"))
    assert answer.status in (400, 413)
    assert answer.error["type"] == "invalid_request_error"


def test_a_request_id_comes_back(cluster: FakeCluster) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1})
    given = ask(cluster.url, "/v1/completions", body, **{"X-Request-Id": "mine"})
    assert given.headers["X-Request-Id"] == "mine"
    own = ask(cluster.url, "/v1/completions", body)
    assert own.headers["X-Request-Id"] == json.loads(own.text)["id"]
    refused = ask(cluster.url, "/v1/completions", "{", **{"X-Request-Id": "mine"})
    assert refused.headers["X-Request-Id"] == "mine"


@pytest.mark.parametrize("path", ["/v1/generate", "/drain", "/info", "/nothing"])
def test_an_instance_refuses_cleanly_too(cluster: FakeCluster, path: str) -> None:
    answer = Answer(insider.ask(cluster.urls[0], path, method="PATCH"))
    assert answer.status == (404 if path == "/nothing" else 405)
    assert answer.error["message"]


def test_an_instance_takes_nothing_but_calls(cluster: FakeCluster) -> None:
    url, body = cluster.urls[0], b'{"prompt": "a"}'
    for path in ("/v1/generate", "/v1/prefill", "/v1/kv/push", "/v1/kv/meet"):
        answer = Answer(
            insider.ask(url, path, body, "POST", **{"content-type": "application/json"})
        )
        assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
        assert "'application/msgpack'" in answer.error["message"]
        answer = Answer(insider.ask(url, path, body, "POST", **HEADERS))
        assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


def test_the_published_schema_has_the_endpoints_that_generate(cluster: FakeCluster) -> None:
    schema = json.loads(ask(cluster.url, "/openapi.json", method="GET").text)
    assert {"/v1/chat/completions", "/v1/completions", "/cluster"} <= set(schema["paths"])
    assert "cache_salt" in schema["components"]["schemas"]["ChatRequest"]["properties"]


def test_metrics_tell_of_requests_and_of_every_instance(cluster: FakeCluster) -> None:
    assert still_works(cluster)
    text = ask(cluster.url, "/metrics", method="GET").text.decode()
    assert 'memserve_requests_total{endpoint="/v1/completions",status="200"}' in text
    assert 'memserve_instance_blocks{instance_id="i0",medium="hbm",state="free"}' in text
    assert 'memserve_instance_prompt_tokens_total{instance_id="i0",source="cached"}' in text
    own = ask(cluster.urls[0], "/metrics", method="GET").text.decode()
    assert 'memserve_instance_inter_token_seconds_count{instance_id="i0"}' in own


def test_health_and_version(cluster: FakeCluster) -> None:
    assert ask(cluster.url, "/health", method="GET").status == 200
    assert json.loads(ask(cluster.url, "/version", method="GET").text)["version"]


def test_connections_do_not_wait_for_acknowledgements() -> None:
    with bind("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
