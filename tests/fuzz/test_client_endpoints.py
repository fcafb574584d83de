"""Bodies of `/v1/responses` and `/tokenize`, compressed ones, and instances' streams, all damaged:
an answer in the right form, or an ApiError that names what is wrong."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from memserve.api.api_keys import ApiKeys
from memserve.api.compression import PIECE_BYTES, Decompression
from memserve.api.errors import ApiError
from memserve.api.http_message import EVENTS_HEADERS, Request
from memserve.cluster.membership import Membership
from memserve.gateway.access import Access
from memserve.gateway.call_builder import CallBuilder
from memserve.gateway.forward_builder import ForwardBuilder
from memserve.gateway.response_store import ResponseStore, owner_of
from memserve.gateway.responses import Responses
from memserve.gateway.responses_reply import ResponsesReply
from memserve.gateway.responses_request import read_request
from memserve.gateway.tokenization import Tokenization
from memserve.secrets import cluster_secret
from tests.fakes import MODEL, tiny_tokenizer
from tests.fuzz.json_mutants import EXAMPLES, SEED, mutants
from tests.fuzz.test_requests import SERVED
from tests.gateway_harness import Client

PART = {"type": "input_text", "text": "hi"}
RESPONSES: list[dict[str, Any]] = [
    {
        "model": MODEL, "input": "hi", "instructions": "be", "max_output_tokens": 3, "user": "u",
        "temperature": 0.5, "store": True, "stream": True, "metadata": {"a": "b"}, "tools": [],
        "include": ["message.output_text.logprobs"], "top_logprobs": 2, "truncation": "disabled",
        "text": {"format": {"type": "text"}}, "reasoning": {"summary": "auto"},
        "tool_choice": "auto",
    },
    {
        "input": [
            {"role": "developer", "content": "be"},
            {"type": "message", "role": "user", "content": [PART, PART], "id": "m"},
            {"type": "reasoning", "id": "r", "summary": []},
            {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        ],
        "previous_response_id": "resp_1", "stop": ["x"], "service_tier": "auto",
    },
]  # fmt: skip
TOKENIZE: list[dict[str, Any]] = [
    {"prompt": "hi there", "return_token_strs": True, "add_special_tokens": False, "model": MODEL},
    {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False, "tools": []},
]
DETOKENIZE: list[dict[str, Any]] = [{"tokens": [5, 6, 7], "model": MODEL}]
CHUNKS: list[dict[str, Any]] = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "He"}}]},
    {"choices": [{"index": 0, "delta": {"reasoning": "Hm"}, "finish_reason": None}]},
    {
        "choices": [{
            "index": 0, "delta": {"content": "llo"},
            "logprobs": {"content": [
                {"token": "l", "logprob": -1.0, "bytes": [1], "top_logprobs": []}
            ]},
        }]
    },
    {"choices": [{"delta": {"tool_calls": [
        {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    ]}}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}},
]  # fmt: skip
POST = Request("POST", "/v1/responses", b"", [], b"", False, True, b"/v1/responses")


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CallBuilder]:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    builder = CallBuilder(tiny_tokenizer(directory), MODEL, threads=1)
    yield builder
    builder.close()


async def answered(work: Awaitable[Any], body: bytes) -> Any:
    """None for a refusal."""
    refusal: ApiError | None = None
    try:
        return await work
    except ApiError as error:
        refusal = error
    assert 400 <= refusal.status < 500, body[:300]
    assert len(refusal.body()) < 4096, body[:300]
    return None


@pytest.mark.timeout(0)
async def test_a_response_is_a_call_or_refused(builder: CallBuilder) -> None:
    access = Access(ApiKeys(), cluster_secret())
    store = ResponseStore(100_000)
    forwards = ForwardBuilder(builder, builder._tokenizer)
    responses = Responses(builder, forwards, Membership(), access, store)
    first = json.dumps({"input": "a", "max_output_tokens": 2}).encode()
    bodies = mutants([{**body, "previous_response_id": None} for body in RESPONSES])
    served = 0
    for body in (first, *bodies):
        client = Client(POST)
        exchange = responses.begin(POST, client.reply)
        call = await answered(exchange.build(body, SERVED), body)
        if call is None:
            continue
        served += 1
        assert (call.stream, call.include_usage, call.n) == (True, True, 1)
        exchange.reply.start(200, EVENTS_HEADERS)
        for chunk in (CHUNKS[0], CHUNKS[4], CHUNKS[5]):
            exchange.reply.write(b"data: %b\n\n" % json.dumps(chunk).encode())
        exchange.reply.end(b"data: [DONE]\n\n")
        assert client.complete
        text = client.body
        if text.startswith(b"event: "):
            text = text.rstrip().rpartition(b"\ndata: ")[2]
            whole = json.loads(text)["response"]
        else:
            whole = json.loads(text)
        assert (whole["status"], whole["output"][0]["content"][0]["text"]) == ("completed", "He")
        if whole["store"]:
            again = {"input": "b", "max_output_tokens": 1, "previous_response_id": whole["id"]}
            exchange = responses.begin(POST, Client(POST).reply)
            longer = await answered(exchange.build(json.dumps(again).encode(), SERVED), body)
            assert longer is None or len(longer.prompts[0]) > 2
    assert served > EXAMPLES / 20
    assert store.bytes <= 100_000
    assert store.get(owner_of(b"nobody"), "resp_1") is None


@pytest.mark.parametrize(
    ("valid", "detokenize"), [(TOKENIZE, False), (DETOKENIZE, True)], ids=["to", "from"]
)
@pytest.mark.timeout(0)
async def test_tokens_are_told_or_refused(
    builder: CallBuilder, valid: list[dict[str, Any]], detokenize: bool
) -> None:
    tokenization = Tokenization(builder, builder._tokenizer)
    served = 0
    for body in mutants(valid):
        ask = tokenization.detokenize if detokenize else tokenization.tokenize
        told = await answered(ask(body, SERVED), body)
        if told is not None:
            served += 1
            found = json.loads(told)
            assert isinstance(found["prompt"], str) if detokenize else found["count"] >= 0
    assert served > EXAMPLES / 20


def _raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"gzip": gzip.compress,
    b"deflate": _raw_deflate,
    b"zstd": zstandard.compress,
}


@pytest.mark.parametrize("coding", PACKERS)
def test_a_compressed_body_is_what_it_was_or_refused(coding: bytes) -> None:
    choice = random.Random(SEED)
    limit = 200_000
    whole = refused = 0
    for _ in range(EXAMPLES // 4):
        data = choice.randbytes(choice.randrange(50)) * choice.randrange(6000)
        packed = bytearray(PACKERS[coding](data))
        for _ in range(choice.choice((0, 0, 1, 3))):
            at = choice.randrange(len(packed) + 1)
            match choice.randrange(4):
                case 0:
                    del packed[at:]
                case 1:
                    packed[at:at] = choice.randbytes(choice.randrange(1, 9))
                case _:
                    packed[at : at + 1] = choice.randbytes(1)
        decompression = Decompression(coding, bytes(packed), limit)
        status = 200
        try:
            whole += len(decompression.rest()) <= limit
        except ApiError as error:
            status = error.status
            refused += 1
        assert status in (200, 400, 413)
        assert len(decompression._out) <= limit + PIECE_BYTES
    assert whole + refused == EXAMPLES // 4
    assert whole
    assert refused


@pytest.mark.timeout(0)
def test_whatever_an_instance_says_ends_a_response_well() -> None:
    choice = random.Random(SEED)
    asked = read_request(b'{"input":"hi"}')
    ends = {"response.completed": 0, "response.failed": 0, "response.incomplete": 0}
    bodies = mutants(CHUNKS, EXAMPLES * 3)
    for _ in range(EXAMPLES // 2):
        client = Client(POST)
        reply = ResponsesReply(client.reply, POST)
        reply.begin(asked.response("resp_1", "m", True), True, None)
        reply.start(200, EVENTS_HEADERS)
        said = [next(bodies) for _ in range(choice.randrange(4))]
        said += [json.dumps(chunk).encode() for chunk in CHUNKS[-3:]]
        stream = b"".join(b"data: %b\n\n" % body for body in said)
        at = choice.randrange(len(stream))
        for part in (stream[:at], stream[at:]):
            if not reply.ended:
                reply.write(part)
        if not reply.ended:
            reply.end(b"data: [DONE]\n\n")
        assert client.complete
        events = [json.loads(e.partition(b"\ndata: ")[2]) for e in client.body.split(b"\n\n")[:-1]]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        ends[events[-1]["type"]] += 1
        assert events[-1]["response"]["status"] == events[-1]["type"].removeprefix("response.")
    assert ends["response.completed"]
    assert ends["response.failed"]
