"""The spans of a request through a gateway, as a receiver of OTLP gets them."""

from __future__ import annotations

import http.client
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from memserve.config import TracesConfig
from memserve.models.tokenizer import Tokenizer
from memserve.tracing import otlp
from memserve.tracing.settings import open_tracer
from memserve.vllm.place import ServerPlace
from tests.fake_vllm import Server
from tests.fakes import MODEL, FakeCluster, FakeEngine
from tests.otlp_receiver import Receiver, receiver

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROMPT = "a prompt that nobody should read"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "EXPORT_SECONDS", 0.01)


@contextmanager
def traced(
    tokenizer: Tokenizer,
    engines: Sequence[FakeEngine],
    servers: Mapping[int, ServerPlace] | None = None,
    **settings: Any,
) -> Iterator[tuple[FakeCluster, Receiver]]:
    """A cluster whose spans go to a receiver; all have come at the end."""
    with ExitStack() as stack:
        got = stack.enter_context(receiver())
        config = TracesConfig(endpoint=got.url, **settings)
        tracer = stack.enter_context(open_tracer(config, "memserve", "test", {}))
        cluster = FakeCluster(tokenizer, engines, servers=servers, tracer=tracer)
        yield stack.enter_context(cluster), got


def post(
    cluster: FakeCluster, path: str = "/v1/completions", body: Any = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(cluster.url).netloc, timeout=30)
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, **(body or {})}
    asked = {name: value for name, value in asked.items() if value is not None}
    connection.request("POST", path, json.dumps(asked), headers)
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


def test_a_request_is_a_tree_of_spans_below_its_client_s(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with traced(tokenizer, [FakeEngine(cached_tokens=4)], sample=0.0) as (cluster, got):
        status, _ = post(
            cluster,
            body={"stream": True, "temperature": 0.5, "stop": ["a secret"], "user": "alice"},
            traceparent=f"00-{TRACE}-{SPAN}-01",
            tracestate="vendor=1",
        )
        assert status == 200
        assert post(cluster)[0] == 200  # not sampled
        root_name = f"text_completion {MODEL}"
        got.wait_for(root_name)
        root = got.named(root_name)
        assert (root.trace, root.parent, root.kind, root.state) == (TRACE, SPAN, 2, "vendor=1")
        assert got.tree(root) == {
            root_name: [
                "tokenise",
                "admission",
                "decide",
                {"attempt": [{"generate": ["queue", "compute", "decode"]}]},
            ]
        }
        attempt, generate = got.named("attempt"), got.named("generate")
        assert {span.trace for span in got.spans} == {TRACE}
        assert root.start <= attempt.start <= generate.start
        assert generate.end <= attempt.end <= root.end
        assert root.events == generate.events == ["first_token"]
        tokens = len(tokenizer.encode(PROMPT, add_special_tokens=True))
        said = root.attributes
        assert said["gen_ai.operation.name"] == "text_completion"
        assert said["gen_ai.request.model"] == MODEL
        assert (said["gen_ai.request.max_tokens"], said["gen_ai.request.temperature"]) == (4, 0.5)
        assert (said["http.response.status_code"], said["url.path"]) == (200, "/v1/completions")
        assert said["gen_ai.usage.input_tokens"] == tokens
        assert said["gen_ai.usage.output_tokens"] == 4
        assert said["gen_ai.response.finish_reasons"] == ["length"]
        decide = got.named("decide").attributes
        assert (decide["memserve.instance"], decide["memserve.policy"]) == ("i0", "prompt-tree")
        assert decide["memserve.predicted.first_token"] >= 0
        assert attempt.kind == 3
        assert attempt.attributes["server.port"] == urlsplit(cluster.urls[0]).port
        assert attempt.attributes["http.response.status_code"] == 200
        assert generate.kind == 2
        assert generate.attributes["gen_ai.usage.output_tokens"] == 4
        assert generate.attributes["gen_ai.response.id"] == said["gen_ai.response.id"]
        assert generate.attributes["memserve.cached_tokens.prefill"] == 4
        everything = repr(got.spans)
        for private in (PROMPT, "secret", "alice"):
            assert private not in everything
    # The second one is logged at the latest when the gateway has drained.
    traced_line, other = [r for r in caplog.records if r.name == "memserve.gateway.app"]
    assert f" trace={TRACE} " in traced_line.getMessage()
    assert "trace=" not in other.getMessage()
    fields = [r.msg.fields() for r in (traced_line, other)]  # type: ignore[attr-defined]
    assert [line.get("trace") for line in fields] == [TRACE, None]


def test_a_failover_is_a_second_attempt_that_knows_the_first(tokenizer: Tokenizer) -> None:
    engines = [FakeEngine(step_seconds=0.02), FakeEngine(step_seconds=0.02)]
    with traced(tokenizer, engines) as (cluster, got):
        connection = http.client.HTTPConnection(urlsplit(cluster.url).netloc, timeout=30)
        asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 30, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(asked))
        response = connection.getresponse()
        response.readline()  # the first event
        next(engine for engine in engines if engine.submitted[1:]).crash()
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        root_name = f"text_completion {MODEL}"
        got.wait_for(root_name)
        root = got.named(root_name)
        parts = got.children(root)
        names = ["tokenise", "admission", "decide", "attempt", "decide", "attempt"]
        assert [span.name for span in parts] == names
        lost, second = parts[3], parts[5]
        assert not root.failed
        assert root.attributes["gen_ai.usage.output_tokens"] == 30
        assert root.attributes["gen_ai.response.finish_reasons"] == ["length"]
        assert lost.failed
        assert lost.attributes["error.type"] == "instance_lost"
        assert second.links == [lost.id]
        assert second.attributes["memserve.failover_from"] == lost.attributes["memserve.instance"]
        assert second.attributes["memserve.instance"] != lost.attributes["memserve.instance"]
        assert second.attributes["memserve.attempt"] == 2
        (broken,), (whole,) = got.children(lost), got.children(second)
        assert broken.failed
        assert not whole.failed
        resumed = second.attributes["memserve.resumed_tokens"]
        assert resumed == broken.attributes["gen_ai.usage.output_tokens"] > 0
        assert whole.attributes["memserve.resumed_tokens"] == resumed
        assert whole.attributes["gen_ai.usage.output_tokens"] == 30


@pytest.mark.parametrize("parent", ["", "nonsense", f"00-{TRACE}-{'0' * 16}-01", "ü" * 5])
def test_a_malformed_traceparent_begins_another_trace(tokenizer: Tokenizer, parent: str) -> None:
    with traced(tokenizer, [FakeEngine()]) as (cluster, got):
        assert post(cluster, traceparent=parent)[0] == 200
        got.wait_for(f"text_completion {MODEL}")
        root = got.named(f"text_completion {MODEL}")
        assert root.parent == ""
        assert root.trace != TRACE


def test_requests_that_fail_have_spans_that_say_so(tokenizer: Tokenizer) -> None:
    engine = FakeEngine()
    with traced(tokenizer, [engine]) as (cluster, got):
        assert post(cluster, body={"max_tokens": -1})[0] == 400
        got.wait_for("POST /v1/completions")
        refused = got.named("POST /v1/completions")
        assert refused.attributes["http.response.status_code"] == 400
        assert not refused.failed  # the client's fault
        assert got.children(refused) == []
        engine.fails = "no"
        assert post(cluster)[0] == 500
        got.wait_for(f"text_completion {MODEL}")
        root = got.named(f"text_completion {MODEL}")
        assert root.failed
        assert root.attributes["error.type"] == "500"
        assert got.named("generate").attributes["error.type"] == "engine_error"


def test_a_client_that_leaves_ends_its_spans(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(step_seconds=0.02)
    with traced(tokenizer, [engine]) as (cluster, got):
        connection = http.client.HTTPConnection(urlsplit(cluster.url).netloc, timeout=30)
        asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 200, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(asked))
        connection.getresponse().readline()
        connection.sock.close() if connection.sock is not None else None
        connection.close()
        got.wait_for(f"text_completion {MODEL}", "generate", "decode")
        assert got.named("generate").attributes["error.type"] == "cancelled"
        assert got.named("attempt").attributes["memserve.lost"] == "given up"
        assert got.named(f"text_completion {MODEL}").attributes["http.response.status_code"] == 499


def test_a_vllm_server_gets_the_context(tokenizer: Tokenizer, tmp_path: Path) -> None:
    server = Server(tmp_path / "s")
    chat = {"prompt": None, "messages": [{"role": "user", "content": PROMPT}], "tools": []}
    chat["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    try:
        places = {0: ServerPlace(path=server.path)}
        with traced(tokenizer, [FakeEngine()], places, client_rate=0.0) as (cluster, got):
            assert post(cluster, "/v1/chat/completions", chat)[0] == 200
            got.wait_for(f"chat {MODEL}")
            vllm = got.named("vllm")
            assert [span.name for span in got.children(got.named("generate"))] == ["vllm"]
            assert server.fake.parents[-1] == f"00-{vllm.trace}-{vllm.id}-01"
            assert vllm.attributes["http.response.status_code"] == 200
            # What is not sampled must not become a trace of the server's own.
            unsampled = f"00-{TRACE}-{SPAN}-00"
            assert post(cluster, "/v1/chat/completions", chat, traceparent=unsampled)[0] == 200
            parent = server.fake.parents[-1]
            assert parent is not None
            assert parent.startswith(f"00-{TRACE}-")
            assert parent.endswith("-00")
            assert SPAN not in parent
    finally:
        server.end()


def test_a_receiver_that_is_not_there_changes_nothing(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    config = TracesConfig(endpoint="http://127.0.0.1:9")
    with (
        open_tracer(config, "memserve", "test", {}) as tracer,
        FakeCluster(tokenizer, [FakeEngine()], tracer=tracer) as cluster,
    ):
        for _ in range(3):
            assert post(cluster)[0] == 200
    assert caplog.text.count("traces cannot be exported") == 1
    assert "Traceback" not in caplog.text


def test_where_traces_are_off_nothing_is_sent_or_passed_on(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    server = Server(tmp_path / "s")
    places = {0: ServerPlace(path=server.path)}
    chat = {"prompt": None, "messages": [{"role": "user", "content": PROMPT}]}
    chat["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    try:
        with receiver() as got, FakeCluster(tokenizer, [FakeEngine()], servers=places) as cluster:
            parent = f"00-{TRACE}-{SPAN}-01"
            assert post(cluster, "/v1/chat/completions", chat, traceparent=parent)[0] == 200
            assert server.fake.parents[-1] is None
        assert got.requests == 0
    finally:
        server.end()
