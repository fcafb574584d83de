"""What a vLLM server is asked, and what is read of its answers, however they are cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.api.generate import FinishReason, SamplingParams
from memserve.api.namespaces import salted
from memserve.engine.request import EngineRequest, TokenOutput
from memserve.errors import RequestError
from memserve.tokens import from_ids
from memserve.types import RequestId
from memserve.vllm.answers import AnswerReader, MalformedAnswer, completion_body
from memserve.vllm.metrics import UnknownMetrics, read_load, read_memory

# As vLLM 0.32 sends it, shortened.
STREAM = (
    b'data: {"id":"cmpl-1","choices":[{"index":0,"text":"a","logprobs":null,"finish_reason":null,'
    b'"stop_reason":null,"prompt_token_ids":[5,6,7],"token_ids":[11]}],"usage":null}\n\n'
    b": keep-alive\n\n"
    b'data: {"id":"cmpl-1","choices":[{"index":0,"text":"","logprobs":null,"finish_reason":null,'
    b'"stop_reason":null,"token_ids":[12,13]}],"usage":null}\n\n'
    b'data: {"id":"cmpl-1","choices":[{"index":0,"text":"b","logprobs":null,"finish_reason":"stop",'
    b'"stop_reason":null,"token_ids":[2]}],"usage":null}\n\n'
    b'data: {"id":"cmpl-1","choices":[],"usage":{"prompt_tokens":3,"total_tokens":7,'
    b'"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":2}}}\n\n'
    b"data: [DONE]\n\n"
)


def request(**fields: Any) -> EngineRequest:
    prompt = np.array([5, 6, 7], dtype=np.int32)
    given: dict[str, Any] = {"sampling": SamplingParams(max_tokens=8, temperature=0.0)}
    return EngineRequest(RequestId("r"), prompt, **(given | fields))


def read(reader: AnswerReader, parts: list[bytes]) -> list[TokenOutput]:
    return [output for part in parts for output in reader.feed(part)]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_an_answer_is_the_same_however_it_is_cut(cuts: list[int]) -> None:
    at = [0, *sorted(cuts), len(STREAM)]
    reader = AnswerReader(request())
    outputs = read(reader, [STREAM[a:b] for a, b in pairwise(at)])
    assert [output.token_ids for output in outputs] == [(11,), (12, 13), (2,)]
    assert [output.finish_reason for output in outputs] == [None, None, FinishReason.STOP]
    assert outputs[-1].stop_token == 2
    assert [output.usage.cached_tokens for output in outputs] == [None, None, 2]
    assert reader.ended


def test_nothing_comes_after_the_end() -> None:
    reader = AnswerReader(request())
    read(reader, [STREAM])
    assert reader.feed(STREAM) == []


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"data: [DONE]\n\n", "without a reason"),
        (b"data: {\n\n", "truncated|malformed"),
        (b'data: {"choices": 3}\n\n', "Expected `array`"),
        (b'data: {"choices":[{"token_ids":[1.5]}]}\n\n', "Expected `int`"),
        (b"data: \xff\n\n", "malformed"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "recursion|Expected"),
    ],
)
def test_what_is_no_answer(data: bytes, error: str) -> None:
    with pytest.raises(MalformedAnswer, match=error):
        AnswerReader(request()).feed(data)


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ({"error": {"message": "out of everything", "code": 500}}, "out of everything"),
        ({"choices": [{"finish_reason": "abort", "token_ids": []}]}, "vLLM ended it: abort"),
    ],
)
def test_a_server_that_gives_up_says_why(event: dict[str, Any], error: str) -> None:
    reader = AnswerReader(request())
    (output,) = reader.feed(b"data: %b\n\n" % json.dumps(event).encode())
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, error)
    assert reader.ended


def test_scores_are_those_that_were_asked_for_most_probable_first() -> None:
    reader = AnswerReader(request(sampling=SamplingParams(max_tokens=2, logprobs=2)))
    top = {"token_id:9": -3.0, "token_id:4": -0.1, "token_id:5": -2.0}
    logprobs = {"tokens": ["token_id:9"], "token_logprobs": [-3.0], "top_logprobs": [top]}
    choice = {"token_ids": [9], "logprobs": logprobs}
    (output,) = reader.feed(b"data: %b\n\n" % json.dumps({"choices": [choice]}).encode())
    (scores,) = output.logprobs
    assert (scores.chosen, scores.rank, scores.top) == (-3.0, 3, ((4, -0.1), (5, -2.0)))
    choice["logprobs"] = logprobs | {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    with pytest.raises(MalformedAnswer, match="1 tokens with 0 scores"):
        reader.feed(b"data: %b\n\n" % json.dumps({"choices": [choice]}).encode())


def test_a_request_says_what_the_sequence_is() -> None:
    sampling = SamplingParams(
        max_tokens=8,
        min_tokens=5,
        temperature=0.5,
        seed=3,
        logit_bias={7: -1.0},
        logprobs=2,
        allowed_token_ids=(4, 7),
    )
    asked = request(sampling=sampling, namespace=salted("tenant"), priority=4)
    body = json.loads(completion_body(asked, "m"))
    assert body["prompt"] == [5, 6, 7]
    assert (body["model"], body["max_tokens"], body["min_tokens"]) == ("m", 8, 5)
    assert (body["cache_salt"], body["priority"], body["seed"]) == ("tenant", 4, 3)
    assert body["logit_bias"] == {"7": -1.0}
    assert body["allowed_token_ids"] == [4, 7]
    assert body["return_token_ids"] is True
    assert body["return_tokens_as_token_ids"] is True


def test_what_was_generated_elsewhere_is_gone_on_from() -> None:
    sampling = SamplingParams(max_tokens=8, min_tokens=3, temperature=0.0, repetition_penalty=1.5)
    body = json.loads(completion_body(request(sampling=sampling, output=from_ids((8, 9))), "m"))
    assert body["prompt"] == [5, 6, 7, 8, 9]
    assert (body["max_tokens"], body["min_tokens"]) == (6, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.0, "presence_penalty": 0.5},
        {"temperature": 0.0, "frequency_penalty": 0.5},
    ],
)
def test_what_cannot_be_gone_on_with_exactly_is_refused(fields: dict[str, Any]) -> None:
    sampling = SamplingParams(max_tokens=8, **fields)
    completion_body(request(sampling=sampling), "m")  # from its beginning it can
    with pytest.raises(RequestError, match="cannot go on"):
        completion_body(request(sampling=sampling, output=from_ids((8,))), "m")


METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a}b"} 2.0
vllm:num_requests_running{engine="1",model_name="a"} 1.0
vllm:num_requests_waiting{engine="0"} 4.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:iteration_tokens_total_count{engine="0"} 17.0
vllm:cache_config_info{block_size="32",cache_dtype="auto",num_gpu_blocks="100"} 1.0
"""


def test_load_and_memory_are_read_off_the_metrics() -> None:
    load = read_load(METRICS.replace("a}b", "a"))
    assert (load.running, load.waiting, load.steps, load.kv_used) == (3, 4, 17, 0.5)
    assert load.prompt_tokens is None  # it does not say
    more = "vllm:prompt_tokens_total 7.0\nvllm:generation_tokens_total 9.0\n"
    told = read_load(METRICS.replace("a}b", "a") + more)
    assert (told.prompt_tokens, told.generated_tokens, told.engines) == (7, 9, 2)
    memory = read_memory(METRICS)
    assert (memory.block_tokens, memory.blocks) == (32, 100)


@pytest.mark.parametrize("text", ["", "vllm:num_requests_running 1\n", METRICS.replace("32", "x")])
def test_other_metrics_are_said_to_be_unknown(text: str) -> None:
    with pytest.raises(UnknownMetrics, match="vllm:"):
        read_memory(text)
