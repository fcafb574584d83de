"""Strangers at the doors of a gateway and its instances: none of them gets anything."""

from __future__ import annotations

import http.client
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from memserve.api.signatures import Signer, body_digest
from memserve.config import GatewayConfig
from memserve.secrets import cluster_secret
from tests.e2e.conftest import StartCluster
from tests.fakes import MODEL, FakeCluster, FakeEngine, until
from tests.insider import Answer, ask, learned

ASKED = json.dumps({"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 2})


def stranger(url: str, method: str, path: str, body: str | None = None, **headers: str) -> Answer:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = Answer(response.status, response.headers, response.read())
    connection.close()
    return answer


@pytest.fixture(scope="module")
def cluster(start_module_cluster: StartCluster) -> FakeCluster:
    return start_module_cluster(FakeEngine())


class Rogue(http.server.BaseHTTPRequestHandler):
    """Says what a member says, without the secret."""

    info: dict[str, Any]
    heard: list[tuple[str, str]]

    def _answer(self) -> None:
        self.heard.append((self.command, self.path.partition("?")[0]))
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.dumps(self.info).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer  # noqa: N815 (http.server's names)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def rogue(info: dict[str, Any], port: int = 0) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A server of a stranger's, and what it was asked."""
    heard: list[tuple[str, str]] = []
    handler = type("Handler", (Rogue,), {"info": info, "heard": heard})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", heard
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def relaying(port: int, to: str, info: bytes) -> Iterator[list[str]]:
    """A stranger's server that has another member answer, and says who it would like to be. What
    it was asked for."""
    heard: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _relay(self) -> None:
            path = self.path.partition("?")[0]
            heard.append(path)
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            connection = http.client.HTTPConnection(urlsplit(to).netloc, timeout=30)
            connection.request(self.command, self.path, body or None, dict(self.headers))
            answer = connection.getresponse()
            said = answer.read()
            if answer.status == 200:
                said = info if path == "/info" else said.replace(b'"text":"', b'"text":"OWNED')
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in (
                    "content-length",
                    "transfer-encoding",
                    "connection",
                    "date",
                ):
                    self.send_header(name, value)
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)
            connection.close()

        do_GET = do_POST = _relay  # noqa: N815 (http.server's names)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


OPERATORS = [
    ("GET", "/cluster", None),
    ("GET", "/cluster/", None),
    ("GET", "/cluster/decisions?n=5", None),
    ("GET", "/cluster/feeds", None),
    ("GET", "/cluster/worker/metrics", None),
    ("GET", "/cluster/stats", None),
    ("GET", "/cluster/worker/stats", None),
    ("POST", "/cluster/members", '{"address": "http://127.0.0.1:1"}'),
    ("DELETE", "/cluster/members", '{"address": "http://127.0.0.1:1"}'),
    ("POST", "/cluster/instances/i0", '{"state": "draining"}'),
    ("POST", "/cluster/instances/i0", '{"role": "decode"}'),
    ("OPTIONS", "/cluster", None),
]
MEMBERS = [
    ("GET", "/info", None),
    ("GET", "/stats", None),
    ("GET", "/profile", None),
    ("GET", "/kv/snapshot", None),
    ("POST", "/role", '{"role": "decode"}'),
    ("POST", "/drain", None),
    ("POST", "/resume", None),
    ("POST", "/shutdown", "{}"),
    ("POST", "/v1/generate", "{}"),
    ("POST", "/v1/prefill", "{}"),
    ("POST", "/v1/kv/push", "{}"),
    ("POST", "/v1/kv/meet", "{}"),
    ("GET", "/%69nfo", None),
    ("GET", "/nothing", None),
]


@pytest.mark.parametrize(("method", "path", "body"), OPERATORS)
def test_a_gateway_tells_strangers_nothing_of_its_cluster(
    cluster: FakeCluster, method: str, path: str, body: str | None
) -> None:
    answer = stranger(cluster.url, method, path, body)
    assert answer.status == 401
    assert answer.json["error"]["type"] == "authentication_error"
    cluster.until_ready(1)


@pytest.mark.parametrize(("method", "path", "body"), MEMBERS)
def test_an_instance_answers_the_cluster_alone(
    cluster: FakeCluster, method: str, path: str, body: str | None
) -> None:
    assert stranger(cluster.urls[0], method, path, body).status == 401
    cluster.until_ready(1)


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer none",
        "Basic bWU6bWU=",
        "MemServe",
        "MemServe 0.0.0.0.0",
        f"MemServe {'0' * 16}.{'0' * 16}.1.1.{'0' * 64}",
        "Bearer é",
    ],
)
def test_no_other_authorization_is_taken(cluster: FakeCluster, authorization: str) -> None:
    given = authorization.encode("latin-1").decode("latin-1")
    for url, path in ((cluster.url, "/cluster"), (cluster.urls[0], "/info")):
        assert stranger(url, "GET", path, Authorization=given).status == 401


def test_an_operator_may_show_the_secret_itself_where_nobody_listens(cluster: FakeCluster) -> None:
    bearer = f"Bearer {cluster_secret().values[0]}"
    assert stranger(cluster.url, "GET", "/cluster", Authorization=bearer).status == 200
    # Members are asked by members, which sign.
    assert stranger(cluster.urls[0], "GET", "/info", Authorization=bearer).status == 401


def test_probes_and_scrapers_need_nothing(cluster: FakeCluster) -> None:
    for url in (cluster.url, cluster.urls[0]):
        health = stranger(url, "GET", "/health")
        assert health.status == 200
        assert health.json.keys() <= {"status", "ready"}
        assert stranger(url, "GET", "/metrics").status == 200


def test_metrics_may_be_put_behind_the_secret(start_cluster: StartCluster) -> None:
    cluster = start_cluster(FakeEngine(), gateway=GatewayConfig(port=0, metrics_secret=True))
    assert stranger(cluster.url, "GET", "/metrics").status == 401
    bearer = f"Bearer {cluster_secret().values[0]}"
    assert stranger(cluster.url, "GET", "/metrics", Authorization=bearer).status == 200
    assert stranger(cluster.url, "GET", "/health").status == 200


def test_a_stranger_s_server_becomes_no_member(cluster: FakeCluster) -> None:
    """Neither by asking to join, nor by answering where a member should be."""
    info = ask(cluster.urls[0], "/info").json
    with rogue({**info, "epoch": info["epoch"] + 1}) as (url, heard):
        joined = stranger(cluster.url, "POST", "/cluster/members", json.dumps({"address": url}))
        assert joined.status == 401
        assert heard == []  # it is not even asked: no request is made for strangers
        # Even where somebody with the secret has let it in by mistake.
        assert (
            ask(cluster.url, "/cluster/members", json.dumps({"address": url}), "POST").status == 200
        )
        until(lambda: len(heard) >= 3)
        members = {m["address"]: m for m in ask(cluster.url, "/cluster").json["instances"]}
        assert members[url]["state"] == "starting"
        assert members[cluster.urls[0]]["state"] == "ready"
        answer = stranger(cluster.url, "POST", "/v1/completions", ASKED)
        assert answer.status == 200
        assert {path for _, path in heard} == {"/info"}
        forgotten = ask(cluster.url, "/cluster/members", json.dumps({"address": url}), "DELETE")
        assert forgotten.status == 200


def test_who_takes_a_dead_member_s_port_is_not_believed(start_cluster: StartCluster) -> None:
    """Its answers are not, and what it is asked meanwhile is answered by nobody."""
    gone, there = FakeEngine(), FakeEngine()
    cluster = start_cluster(gone, there)
    info = ask(cluster.urls[0], "/info").json
    port = urlsplit(cluster.urls[0]).port
    assert port is not None
    cluster.wait(cluster.close_instance(0))
    with rogue(info, port) as (_, heard):
        for _ in range(6):
            answer = stranger(cluster.url, "POST", "/v1/completions", ASKED)
            assert answer.status == 200
            assert answer.json["choices"][0]["finish_reason"] == "length"
        until(lambda: ("GET", "/info") in heard)
        cluster.until_ready(1)


def test_who_passes_on_to_another_member_becomes_none(start_cluster: StartCluster) -> None:
    """It has every signature and proof that the other one makes, and changes what it likes."""
    gone, there = FakeEngine(), FakeEngine()
    cluster = start_cluster(gone, there)
    info = ask(cluster.urls[0], "/info").text
    port = urlsplit(cluster.urls[0]).port
    assert port is not None
    cluster.wait(cluster.close_instance(0))
    with relaying(port, cluster.urls[1], info) as heard:
        for _ in range(6):
            answer = stranger(cluster.url, "POST", "/v1/completions", ASKED)
            assert answer.status == 200
            assert b"OWNED" not in answer.text
        until(lambda: len([path for path in heard if path == "/info"]) >= 4)
        assert set(heard) == {"/info"}  # and no prompt
        members = {m["address"]: m["state"] for m in ask(cluster.url, "/cluster").json["instances"]}
        assert members[cluster.urls[0]] == "dead"
        assert members[cluster.urls[1]] == "ready"


def test_what_a_member_said_cannot_be_said_again(cluster: FakeCluster) -> None:
    """Recorded on its way to one server, it is nothing to that one or another."""
    signer, url = Signer(cluster_secret()), cluster.urls[0]
    unmet = signer.sign(url, b"POST", b"/resume", body_digest(b""))
    refused = stranger(url, "POST", "/resume", Authorization=unmet.authorization.decode())
    assert learned(signer, url, refused, unmet)
    signed = signer.sign(url, b"POST", b"/resume", body_digest(b""))
    recorded = {"Authorization": signed.authorization.decode()}
    assert stranger(cluster.urls[0], "POST", "/resume", **recorded).status == 200
    assert (
        stranger(cluster.urls[0], "POST", "/resume", **recorded).json["error"]["code"] == "replayed"
    )
    assert stranger(cluster.url, "POST", "/resume", **recorded).status == 404
    assert stranger(cluster.url, "GET", "/cluster", **recorded).status == 401


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_pages_of_other_sites_may_not_ask(cluster: FakeCluster, origin: str) -> None:
    answer = stranger(cluster.url, "POST", "/v1/completions", ASKED, Origin=origin)
    assert (answer.status, answer.json["error"]["code"]) == (403, "cross_origin")
    assert "access-control-allow-origin" not in answer.headers
    preflight = stranger(cluster.url, "OPTIONS", "/v1/completions", Origin=origin)
    assert preflight.status in (403, 405)
    assert "access-control-allow-origin" not in preflight.headers


def test_a_name_that_was_made_to_lead_here_is_no_page_of_ours(cluster: FakeCluster) -> None:
    port = urlsplit(cluster.url).port
    host = f"rebound.example:{port}"
    given = {"Origin": f"http://{host}", "Host": host}
    assert stranger(cluster.url, "POST", "/v1/completions", ASKED, **given).status == 403


def test_our_own_page_may_ask(cluster: FakeCluster) -> None:
    answer = stranger(cluster.url, "POST", "/v1/completions", ASKED, Origin=cluster.url)
    assert answer.status == 200


def test_pages_that_are_allowed_may_ask(start_cluster: StartCluster) -> None:
    origin = "https://chat.example"
    config = GatewayConfig(port=0, cors_origins=(origin,))
    cluster = start_cluster(FakeEngine(), gateway=config)
    asked = {"Origin": origin, "Access-Control-Request-Headers": "x-stainless-lang,x-session-id"}
    preflight = stranger(cluster.url, "OPTIONS", "/v1/chat/completions", **asked)
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-headers"] == "x-stainless-lang,x-session-id"
    assert preflight.headers["access-control-allow-origin"] == origin
    answer = stranger(cluster.url, "POST", "/v1/completions", ASKED, Origin=origin)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == origin
    other = stranger(cluster.url, "POST", "/v1/completions", ASKED, Origin="https://evil.example")
    assert other.status == 403


def test_a_stranger_s_body_is_not_read(start_cluster: StartCluster) -> None:
    cluster = start_cluster(FakeEngine(), gateway=GatewayConfig(port=0, api_keys=("sk-a",)))
    for url, path in ((cluster.url, "/v1/completions"), (cluster.urls[0], "/v1/generate")):
        host, port = urlsplit(url).hostname, urlsplit(url).port
        assert host is not None
        with socket.create_connection((host, port or 0), timeout=30) as connection:
            head = f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-length: 9000000\r\n\r\n"
            connection.sendall(head.encode())
            assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
