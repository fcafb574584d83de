"""The bytes of answers, against the openai package's own types."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from memserve.api import chunks
from memserve.api.chunks import Piece, StreamFormat
from memserve.api.generate import CallKind, FinishReason, GenerateCall, SamplingParams
from memserve.api.logprobs import LOWEST_LOGPROB, ScoredToken, TokenScore
from memserve.tokens import from_ids

AWKWARD = 'a "quoted"\\\n\u2028 line \x00 é 👍'


def token(id: int, text: str, logprob: float, part: bytes | None = None) -> ScoredToken:
    return ScoredToken(id, text, text.encode() if part is None else part, logprob)


ACUTE = token(3, "é", -0.25)
SCORE = TokenScore(ACUTE, (ACUTE, token(4, "e", float("-inf"))), 10, 1)
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
    role = ChatCompletionChunk.model_validate(event(form.event(Piece(1, "x", (4,)), first=True)))
    assert (role.choices[0].delta.role, role.choices[0].delta.content) == ("assistant", "x")
    text = event(form.event(Piece(1, AWKWARD, (3,))))
    chunk = ChatCompletionChunk.model_validate(text)
    assert (chunk.id, chunk.created, chunk.model) == ("x-1", 7, 'm"1')
    assert (chunk.choices[0].index, chunk.choices[0].delta.content) == (1, AWKWARD)
    assert chunk.choices[0].finish_reason is None
    assert text["choices"][0].get("token_ids") == ([3] if asked else None)


def test_the_first_chunk_of_a_choice_has_the_prompt_s_token_ids_where_asked_for() -> None:
    for kind in CallKind:
        form = StreamFormat(call(kind, return_token_ids=True))
        for choice in range(2):
            first = event(form.event(Piece(choice, "", (4,)), first=True))
            place = first if kind is CallKind.CHAT else first["choices"][0]
            assert place["prompt_token_ids"] == [1, 2]
        assert b"prompt_token_ids" not in form.event(Piece(0, "x", (4,)))
        assert b"prompt_token_ids" not in StreamFormat(call(kind)).event(Piece(0, "x", (4,)), True)


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
def test_the_usage_so_far_counts_what_an_earlier_instance_gave(kind: CallKind) -> None:
    asked = call(
        kind,
        include_usage=True,
        continuous_usage=True,
        return_token_ids=True,
        stream=True,
        resumed=(from_ids((7, 8)), from_ids(())),
    )
    form = StreamFormat(asked)
    pieces = [Piece(0, "x", (3, 4)), Piece(1, "", (5,)), Piece(0, "y", (6,))]
    told = [event(form.event(piece, first=piece.choice == 1)) for piece in pieces]
    assert [chunk["usage"]["completion_tokens"] for chunk in told] == [4, 1, 5]
    assert told[0]["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    place = told[1] if kind is CallKind.CHAT else told[1]["choices"][0]
    assert place["prompt_token_ids"] == [1, 2]
    assert "usage" not in event(StreamFormat(call(kind)).event(Piece(0, "x", (3,))))


@pytest.mark.parametrize("kind", CallKind)
def test_a_body_is_openai_s(kind: CallKind) -> None:
    asked = call(kind, sampling=SamplingParams(logprobs=1), return_token_ids=True)
    pieces = [Piece(i, AWKWARD, (3,), (SCORE,), finish_reason=FinishReason.STOP) for i in range(2)]
    data = json.loads(chunks.body(asked, pieces, USED))
    shape = ChatCompletion if kind is CallKind.CHAT else Completion
    assert [choice.index for choice in shape.model_validate(data).choices] == [0, 1]
    assert data["choices"][1]["token_ids"] == [3]
    place = data if kind is CallKind.CHAT else data["choices"][1]
    assert place["prompt_token_ids"] == [1, 2]
    assert data["choices"][1]["stop_reason"] is None


def test_logprobs_of_chat() -> None:
    form = StreamFormat(call(CallKind.CHAT, sampling=SamplingParams(logprobs=2)))
    entry = event(form.event(Piece(0, "é", (3,), (SCORE,))))["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["logprob"]) == ("é", -0.25)
    assert entry["bytes"] == list("é".encode())
    assert entry["top_logprobs"][1]["logprob"] == LOWEST_LOGPROB  # JSON has no infinity


def test_bytes_of_parts_of_a_character_make_the_character() -> None:
    parts = [token(at, "\ufffd", -1.0, bytes([byte])) for at, byte in enumerate("👍".encode())]
    scores = tuple(TokenScore(part, (part,), 0, 1) for part in parts)
    chat = StreamFormat(call(CallKind.CHAT, sampling=SamplingParams(logprobs=1)))
    entries = event(chat.event(Piece(0, "👍", (0, 1, 2, 3), scores)))["choices"][0]["logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries["content"]).decode() == "👍"
    form = StreamFormat(call(CallKind.COMPLETION, sampling=SamplingParams(logprobs=1)))
    logprobs = event(form.event(Piece(0, "👍", (0, 1, 2, 3), scores)))["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == "bytes:\\xf0"


def test_tokens_of_one_text_all_have_their_log_probability() -> None:
    same = [token(7, "a", -11.5), token(8, "a", -0.25), token(9, "a", -3.0)]
    form = StreamFormat(call(CallKind.COMPLETION, sampling=SamplingParams(logprobs=3)))
    score = TokenScore(same[1], tuple(same), 0, 1)
    logprobs = event(form.event(Piece(0, "a", (8,), (score,))))["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"a": -0.25, "token_id:7": -11.5, "token_id:9": -3.0}]


def test_logprobs_of_completions_know_where_each_token_starts() -> None:
    form = StreamFormat(call(CallKind.COMPLETION, sampling=SamplingParams(logprobs=1)))
    piece = Piece(0, "éé", (3, 3), (SCORE, TokenScore(ACUTE, SCORE.top, 11, 2)))
    logprobs = event(form.event(piece))["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [10, 11]
    assert logprobs["tokens"] == ["é", "é"]
    assert logprobs["top_logprobs"][0] == {"é": -0.25, "e": LOWEST_LOGPROB}
