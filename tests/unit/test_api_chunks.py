"""The bytes of answers, against the openai package's own types."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from memserve.api import chunks
from memserve.api.chunks import Piece, StreamFormat, TokenScore
from memserve.api.generate import CallKind, FinishReason, GenerateCall, SamplingParams
from memserve.tokens import from_ids

AWKWARD = 'a "quoted"\\\n\u2028 line \x00 é 👍'
SCORE = TokenScore("é", -0.25, (("é", -0.25), ("e", float("-inf"))))
USED = chunks.usage(prompt_tokens=5, completion_tokens=2, cached_tokens=4)


def call(kind: CallKind, **fields: Any) -> GenerateCall:
    return GenerateCall(
        id="x-1", kind=kind, model='m"1', created=7, prompts=(from_ids((1, 2)),), n=2, **fields
    )


def event(data: bytes) -> Any:
    assert data.endswith(b"\n\n")
    *comment, line = data.removesuffix(b"\n\n").split(b"\n")
    assert len(comment) <= 1  # and one line of data, or clients would see two events
    assert all(line.startswith(b":") for line in comment)
    assert line.startswith(b"data: ")
    return json.loads(line[len(b"data: ") :])


@pytest.mark.parametrize("asked", [{}, {"return_token_ids": True}])
def test_chat_chunks_are_openai_s(asked: dict[str, Any]) -> None:
    form = StreamFormat(call(CallKind.CHAT, **asked))
    role = ChatCompletionChunk.model_validate(event(form.event(Piece(1, "x", (4,)), role=True)))
    assert (role.choices[0].delta.role, role.choices[0].delta.content) == ("assistant", "x")
    text = event(form.event(Piece(1, AWKWARD, (3,))))
    chunk = ChatCompletionChunk.model_validate(text)
    assert (chunk.id, chunk.created, chunk.model) == ("x-1", 7, 'm"1')
    assert (chunk.choices[0].index, chunk.choices[0].delta.content) == (1, AWKWARD)
    assert chunk.choices[0].finish_reason is None
    assert text["choices"][0].get("token_ids") == ([3] if asked else None)


def test_the_last_chunk_of_a_choice_says_why_it_ended() -> None:
    form = StreamFormat(call(CallKind.CHAT))
    with_text = event(form.event(Piece(0, "x", (), finish_reason=FinishReason.LENGTH)))
    assert with_text["choices"][0]["delta"] == {"content": "x"}
    assert with_text["choices"][0]["finish_reason"] == "length"
    stop = Piece(0, "", (), finish_reason=FinishReason.STOP, stop_reason="END")
    without = event(form.event(stop))["choices"][0]
    assert (without["delta"], without["stop_reason"]) == ({}, "END")


def test_usage_is_null_until_the_last_chunk_where_it_was_asked_for() -> None:
    form = StreamFormat(call(CallKind.COMPLETION, include_usage=True))
    assert event(form.event(Piece(0, "x", (3,))))["usage"] is None
    last = event(form.usage(USED))
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert last["usage"]["total_tokens"] == 7
    assert "usage" not in event(StreamFormat(call(CallKind.COMPLETION)).event(Piece(0, "x", (3,))))


@pytest.mark.parametrize("kind", CallKind)
def test_a_body_is_openai_s(kind: CallKind) -> None:
    asked = call(kind, sampling=SamplingParams(logprobs=1), return_token_ids=True)
    pieces = [Piece(i, AWKWARD, (3,), (SCORE,), finish_reason=FinishReason.STOP) for i in range(2)]
    data = json.loads(chunks.body(asked, pieces, USED))
    shape = ChatCompletion if kind is CallKind.CHAT else Completion
    assert [choice.index for choice in shape.model_validate(data).choices] == [0, 1]
    assert data["choices"][1]["token_ids"] == [3]
    assert data["choices"][1]["stop_reason"] is None


def test_logprobs_of_chat() -> None:
    form = StreamFormat(call(CallKind.CHAT, sampling=SamplingParams(logprobs=2)))
    entry = event(form.event(Piece(0, "é", (3,), (SCORE,))))["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["logprob"]) == ("é", -0.25)
    assert entry["bytes"] == list("é".encode())
    assert entry["top_logprobs"][1]["logprob"] == chunks.LOWEST_LOGPROB  # JSON has no infinity


def test_logprobs_of_completions_know_where_each_token_starts() -> None:
    form = StreamFormat(call(CallKind.COMPLETION, sampling=SamplingParams(logprobs=1)))
    piece = Piece(0, "éé", (3, 3), (SCORE, SCORE), text_offset=10)
    logprobs = event(form.event(piece))["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [10, 11]
    assert logprobs["tokens"] == ["é", "é"]
    assert logprobs["top_logprobs"][0] == {"é": -0.25, "e": chunks.LOWEST_LOGPROB}
