"""What clients may send, and that a refusal names the field at fault."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memserve.api.errors import ApiError
from memserve.api.generate import SamplingParams
from memserve.api.openai import (
    ChatRequest,
    CompletionRequest,
    chat_logprobs,
    parse_chat,
    parse_completion,
    sampling_params,
)
from memserve.gateway.body_scan import check_body
from memserve.gateway.prompts import read_prompts

TOOLS = [{"type": "function", "function": {"name": "weather", "strict": True}}]


def chat(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "hi"}]
    return parse_chat(json.dumps({"messages": messages, **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    request = parse_completion(json.dumps({"prompt": "hi", **fields}).encode())
    read_prompts(request.prompt)
    return request


def test_what_is_not_given_takes_the_neutral_values_of_sampling() -> None:
    assert sampling_params(completion(), 16, None) == SamplingParams()


def test_every_sampling_field_reaches_the_engine() -> None:
    given = {
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {"7": -100},
        "seed": 9,
        "stop_token_ids": [5],
        "ignore_eos": True,
    }
    expected = SamplingParams(
        max_tokens=4,
        **{**given, "logit_bias": {7: -100.0}, "stop_token_ids": (5,)},  # type: ignore[arg-type]
        logprobs=1,
    )
    assert sampling_params(completion(**given), 4, 1) == expected


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": [], "tool_choice": "auto", "functions": None, "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"], "audio": None},
        {"store": False, "metadata": {"a": "b"}, "user": "me", "service_tier": "auto"},
        {"n": 2, "best_of": 2},
        {"length_penalty": 1.0, "use_beam_search": False, "echo": False, "bad_words": []},
        {"temperature": None, "max_tokens": None, "stop": None, "stream_options": None},
    ],
)
def test_neutral_values_of_what_is_not_supported_are_accepted(neutral: dict[str, Any]) -> None:
    chat(**neutral)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"best_of": 2}, "best_of"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"echo": True}, "echo"),
        ({"temprature": 0.5}, "temprature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include": 1}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": ["x"]}, "chat_template_kwargs"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages"),
    ],
)
def test_a_refusal_names_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**fields)
    assert refused.value.status == 400
    assert refused.value.detail.param == param
    assert param in refused.value.detail.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt"),
    ],
)
def test_completions_refuse_by_name_too(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        completion(**fields)
    assert (refused.value.status, refused.value.detail.param) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "tools": ' + b"[" * 100_000,
    ],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    def read() -> None:
        check_body(body)
        read_prompts(parse_completion(body).prompt)

    with pytest.raises(ApiError) as refused:
        read()
    assert refused.value.status == 400


def test_tools_are_of_chats() -> None:
    with pytest.raises(ApiError) as refused:
        completion(tools=TOOLS)
    assert refused.value.detail.param == "tools"
    completion(tools=[], tool_choice="auto", reasoning_effort=None)


def test_images_are_refused_with_a_reason() -> None:
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    with pytest.raises(ApiError, match="only text content"):
        chat(messages=[{"role": "user", "content": [image]}])


def test_an_answer_can_be_sent_back_as_a_message() -> None:
    # As the openai package's `message.model_dump()` has it.
    answer = {
        "role": "assistant",
        "content": "hello",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[answer, {"role": "user", "content": parts}])
    assert [message.text for message in request.messages] == ["hello", "a\nb"]


def test_logprobs_without_alternatives_are_of_the_chosen_token_alone() -> None:
    assert chat_logprobs(chat(logprobs=True)) == 0
    assert chat_logprobs(chat(logprobs=True, top_logprobs=3)) == 3
    assert chat_logprobs(chat()) is None
