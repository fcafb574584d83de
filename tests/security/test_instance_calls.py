"""What reaches an instance over HTTP and is no call: a 400 in OpenAI's shape, and the next call
is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from memserve.api.generate import CallKind, GenerateCall, SamplingParams
from memserve.tokens import from_ids
from tests import insider
from tests.e2e.test_refusals import Answer, ask
from tests.fakes import FakeCluster, FakeEngine, tiny_tokenizer
from tests.packed import HEADERS, fields_of, ids, packed


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with FakeCluster(tokenizer, [FakeEngine()]) as cluster:
        yield cluster


def tell(cluster: FakeCluster, path: str, body: bytes) -> Answer:
    """What an instance answers to somebody of the cluster."""
    return Answer(insider.ask(cluster.urls[0], path, body, "POST", **HEADERS))


def call(**fields: Any) -> bytes:
    made = GenerateCall(
        "c", CallKind.COMPLETION, "m", 1, (from_ids((1, 2)),), SamplingParams(max_tokens=3)
    )
    return packed({**fields_of(made), **fields})


@pytest.mark.parametrize(
    "body",
    [
        call(n=2**63 - 1),
        call(n=-1),
        call(n=128, prompts=[ids(1)] * 1024),
        call(prompts=[]),
        call(prompts=[b""]),
        call(prompts=[ids(-1)]),
        call(prompts=[ids(1)[:3]]),
        call(prompts=[[1]]),
        call(prompts=[{}] * 300_000),
        call(prompts=[ids(1)] * 300_000),
        call(sampling={"stop_token_ids": [1] * 100_000}),
        call(sampling={"max_tokens": -1}),
        call(sampling={"max_tokens": 2**62}),
        call(prefill=[{"id": "p", "address": "http://127.0.0.1:1"}] * 100_000),
        call(resumed=[ids(1)]),
        call(resumed=[ids(-1)], stream=True),
        call(resumed=[b"abcde"], stream=True),
        call(id="i" * 1_000_000),
        call(stop=["a"] * 100_000),
        b'{"prompts":' + b"[" * 400_000,
        b'{"id":"\xff"}',
        b"\x00",
        b"",
    ],
    ids=lambda body: repr(body[:24]),
)
@pytest.mark.parametrize("path", ["/v1/generate", "/v1/prefill", "/v1/kv/push"])
def test_what_is_no_call_is_refused_and_the_instance_goes_on(
    cluster: FakeCluster, path: str, body: bytes
) -> None:
    answer = tell(cluster, path, body)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert len(answer.text) < 1000
    assert tell(cluster, "/v1/generate", call()).status == 200


@pytest.mark.parametrize("path", ["/role", "/shutdown"])
@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"[" * 4000, b'{"restart":2}', b'{"role":"x"}', b'{"role":"\\ud800"}']
)
def test_control_calls_are_refused_likewise(cluster: FakeCluster, path: str, body: bytes) -> None:
    answer = tell(cluster, path, body)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


def test_no_tenant_s_priority_reaches_an_instance(cluster: FakeCluster) -> None:
    for priority in (-(2**31), 5):
        body = json.dumps({"prompt": [1, 2], "max_tokens": 1, "priority": priority})
        assert ask(cluster.url, "/v1/completions", body).status == 200
    assert {request.priority for request in cluster.engines[0].submitted} == {0}
