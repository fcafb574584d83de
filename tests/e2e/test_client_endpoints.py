"""What clients of vLLM's server use beside generation: tokens, health, load, compressed bodies."""

from __future__ import annotations

import gzip
import http.client
import json
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
import zstandard

from memserve.models.tokenizer import Tokenizer
from tests.e2e.conftest import StartCluster
from tests.fakes import MODEL, FakeCluster, FakeEngine, until


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(cluster: FakeCluster, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    connection = http.client.HTTPConnection(urlsplit(cluster.url).netloc, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body or None, named)
    answer = connection.getresponse()
    found = Answer(answer.status, dict(answer.getheaders()), answer.read())
    connection.close()
    return found


def post(cluster: FakeCluster, path: str, **fields: Any) -> Answer:
    return ask(cluster, "POST", path, json.dumps(fields).encode())


@pytest.fixture(scope="module")
def cluster(start_module_cluster: StartCluster) -> FakeCluster:
    return start_module_cluster(FakeEngine())


TEXT = "the quick naïve 你好"


def test_tokens_of_a_prompt_and_back(cluster: FakeCluster, tokenizer: Tokenizer) -> None:
    found = post(cluster, "/tokenize", model=MODEL, prompt=TEXT, return_token_strs=True).json
    ids = tokenizer.encode(TEXT)
    assert found["tokens"] == ids
    assert found["count"] == len(ids)
    assert found["max_model_len"] == 256
    assert found["token_strs"][0] == "<bos>"
    assert len(found["token_strs"]) == len(ids)
    bare = post(cluster, "/tokenize", prompt=TEXT, add_special_tokens=False).json
    assert (bare["tokens"], bare["token_strs"]) == (ids[1:], None)
    back = post(cluster, "/detokenize", model=MODEL, tokens=ids)
    assert back.json == {"prompt": f"<bos>{TEXT}"}
    assert post(cluster, "/detokenize", tokens=[]).json == {"prompt": ""}


def test_tokens_of_a_chat_are_those_of_its_prompt(cluster: FakeCluster) -> None:
    messages = [{"role": "user", "content": "hi"}]
    found = post(cluster, "/tokenize", messages=messages).json
    asked = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
    answer = post(cluster, "/v1/chat/completions", **asked)
    assert found["tokens"] == answer.json["prompt_token_ids"]
    fewer = post(cluster, "/tokenize", messages=messages, add_generation_prompt=False).json
    assert fewer["count"] < found["count"]


def test_a_text_that_is_too_long_for_an_answer_is_counted(cluster: FakeCluster) -> None:
    found = post(cluster, "/tokenize", prompt="the quick " * 200).json
    assert found["count"] > found["max_model_len"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ["a", "b"]}, "prompt"),
        ("/tokenize", {"prompt": [1, 2]}, "prompt"),
        ("/tokenize", {"prompt": "a", "nonsense": 1}, "nonsense"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/tokenize", {"prompt": "a" * 1_000_000}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "n": 2}, "n"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1, "x"]}, "tokens"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [1] * 2000}, "tokens"),
    ],
)
def test_a_refusal_names_the_field(
    cluster: FakeCluster, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = post(cluster, path, **fields)
    assert answer.status in (400, 404)
    assert answer.json["error"]["param"] == param


def test_health_and_version(cluster: FakeCluster) -> None:
    for method in ("GET", "POST"):
        answer = ask(cluster, method, "/ping")
        assert (answer.status, answer.body) == (200, b"")
    assert ask(cluster, "GET", "/version").json["version"]
    assert ask(cluster, "GET", "/load").json == {"server_load": 0}


def test_the_load_is_what_runs(start_cluster: StartCluster) -> None:
    engine = FakeEngine()
    cluster = start_cluster(engine)
    engine.gate.clear()
    connection = http.client.HTTPConnection(urlsplit(cluster.url).netloc)
    body = json.dumps({"prompt": "a", "max_tokens": 2})
    connection.request("POST", "/v1/completions", body)
    until(lambda: ask(cluster, "GET", "/load").json == {"server_load": 1})
    engine.gate.set()
    assert connection.getresponse().status == 200
    connection.close()
    until(lambda: ask(cluster, "GET", "/load").json == {"server_load": 0})


def test_ping_fails_where_health_does(start_cluster: StartCluster) -> None:
    cluster = start_cluster()
    assert ask(cluster, "GET", "/ping").status == ask(cluster, "GET", "/health").status == 503


@pytest.mark.parametrize(
    "path",
    ["/health", "/version", "/ping", "/load", "/metrics", "/v1/models", f"/v1/models/{MODEL}"],
)
def test_head_is_get_without_the_body(cluster: FakeCluster, path: str) -> None:
    whole, head = ask(cluster, "GET", path), ask(cluster, "HEAD", path)
    assert (head.status, head.body) == (whole.status, b"")
    assert head.headers["content-type" if whole.body else "content-length"]
    if path != "/metrics":  # which change
        assert head.headers["content-length"] == whole.headers["content-length"]
        assert int(head.headers["content-length"]) == len(whole.body)


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


CODINGS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("GZIP", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("zstd", zstandard.compress),
    ("identity", bytes),
]


@pytest.mark.parametrize(("coding", "compress"), CODINGS)
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 2}),
        ("/tokenize", {"prompt": "x" * 100}),
    ],
)
def test_bodies_may_be_compressed(
    cluster: FakeCluster,
    coding: str,
    compress: Callable[[bytes], bytes],
    path: str,
    fields: dict[str, Any],
) -> None:
    body = compress(json.dumps(fields).encode())
    answer = ask(cluster, "POST", path, body, content_encoding=coding)
    assert answer.status == 200, answer.body


def test_usage_may_come_with_every_chunk(cluster: FakeCluster) -> None:
    asked = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    text = post(cluster, "/v1/chat/completions", **asked).body
    *chunks, last, done = [event.removeprefix(b"data: ") for event in text.split(b"\n\n")[:-1]]
    assert done == b"[DONE]"
    usages = [json.loads(chunk)["usage"] for chunk in chunks]
    assert [used["completion_tokens"] for used in usages] == [1, 2, 3]
    final = json.loads(last)["usage"]
    assert {used["prompt_tokens"] for used in usages} == {final["prompt_tokens"]}
    assert final["completion_tokens"] == 3
    assert final["total_tokens"] == usages[-1]["total_tokens"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a b c", "max_tokens": 4}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": [{"type": "text", "text": "a b c"}]}],
                "max_completion_tokens": 4,
            },
        ),
    ],
)
def test_what_guidellm_sends_by_default(
    cluster: FakeCluster, path: str, fields: dict[str, Any]
) -> None:
    """guidellm 0.8.1; of each request it counts the chunks with text, and reads the last usage."""
    more = {
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "stop": None,
        "ignore_eos": True,
    }
    answer = post(cluster, path, **fields, **more)
    assert answer.status == 200, answer.body
    events = [event.removeprefix(b"data: ") for event in answer.body.split(b"\n\n")[:-1]]
    usages = [used for event in events[:-1] if (used := json.loads(event)["usage"])]
    assert usages[-1]["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_log_probabilities_may_be_named_by_their_ids(
    cluster: FakeCluster, stream: bool
) -> None:
    asked = {"max_tokens": 2, "return_tokens_as_token_ids": True, "stream": stream}
    message = {"role": "user", "content": "x"}
    chats = post(
        cluster, "/v1/chat/completions", messages=[message], logprobs=True, top_logprobs=2, **asked
    )
    texts = post(cluster, "/v1/completions", prompt="a", logprobs=1, **asked)
    for answer in (chats, texts):
        assert answer.status == 200, answer.body
        first, second = (b'"token_id:2"', b'"token_id:3"')  # what the engine says
        assert first in answer.body
        assert second in answer.body
    if not stream:
        scores = texts.json["choices"][0]["logprobs"]
        assert scores["tokens"] == ["token_id:2", "token_id:3"]
        assert scores["top_logprobs"][0]["token_id:2"] == -0.5
        score = chats.json["choices"][0]["logprobs"]["content"][0]
        assert bytes(score["bytes"]) == b"token_id:2"
    refused = post(cluster, "/v1/completions", prompt="a", prompt_logprobs=1, **asked)
    assert refused.status == 400
