"""Whole events reach the client without their comments, and what it has of them is known."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.api.chunks import DONE
from memserve.api.generate import CallKind, GenerateCall
from memserve.clock import ManualClock
from memserve.gateway.stream import ClientStream
from memserve.tokens import from_ids
from tests.gateway_harness import Client, answer_to
from tests.packed import listed


def call_of(kind: CallKind = CallKind.COMPLETION, n: int = 1, usage: bool = False) -> GenerateCall:
    return GenerateCall(
        "c", kind, "m", 1, (from_ids((1, 2)),), n=n, stream=True, include_usage=usage
    )


def stream_of(call: GenerateCall) -> tuple[ClientStream, Client, ManualClock]:
    client, clock = Client(), ManualClock()
    return ClientStream(call, client.reply, (), clock), client, clock


def pieces(text: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if a < b]


calls = st.builds(
    call_of, st.sampled_from([CallKind.CHAT, CallKind.COMPLETION]), st.integers(1, 3), st.booleans()
)
cuts = st.lists(st.integers(0, 5000), max_size=12)


@given(calls, cuts)
def test_a_stream_in_pieces_is_the_stream_without_its_comments(
    call: GenerateCall, cuts: list[int]
) -> None:
    stream, client, _ = stream_of(call)
    events = answer_to(call)
    for piece in pieces(b"".join(events), cuts):
        stream.received(piece, False)
        assert client.body == b"" or client.body.endswith(b"\n\n")
    stream.received(b"", True)
    without = [b"\n".join(e.split(b"\n")[1:]) if e.startswith(b":") else e for e in events]
    assert client.body == b"".join(e for e in without if e != b"\n")
    assert client.complete
    assert stream.complete
    assert [len(ids) for ids in stream.tokens()] == [6] * call.n


@given(calls, cuts, st.lists(st.integers(0, 5000), min_size=1, max_size=3))
def test_streams_that_were_lost_anywhere_add_up_to_one(
    call: GenerateCall, cuts: list[int], losses: list[int]
) -> None:
    whole_stream, whole, _ = stream_of(call)
    whole_stream.received(b"".join(answer_to(call)), True)

    stream, client, _ = stream_of(call)
    asked = call
    for lost_at in losses:
        stream.begin_attempt()
        text = b"".join(answer_to(asked))
        for piece in pieces(text[: lost_at % (len(text) + 1)], cuts):
            stream.received(piece, False)
        if stream.finish():
            break
        assert stream.resumable
        tokens = stream.tokens()
        asked = GenerateCall(
            "c", call.kind, "m", 1, call.prompts, n=call.n, stream=True,
            include_usage=call.include_usage, resumed=tokens,
        )  # fmt: skip
    else:
        stream.begin_attempt()
        stream.received(b"".join(answer_to(asked)), True)
    assert client.complete
    for choice in range(call.n):
        assert client.text(choice) == whole.text(choice)
    roles = [e for e in client.events if b'"role"' in e]
    assert len(roles) == (call.n if call.kind is CallKind.CHAT else 0)
    assert client.events.count(b"[DONE]") == 1
    assert client.events[-2:] == whole.events[-2:]


def test_nothing_is_held_back_and_each_read_is_one_write() -> None:
    stream, client, _ = stream_of(call_of())
    events = answer_to(call_of(), hold_back=False)
    for number, event in enumerate(events[:-1], 1):
        stream.received(event, False)
        assert len(client.writes) == number
    stream.received(events[-1], True)
    assert len(client.writes) == len(events)


def test_a_stream_without_comments_is_relayed_as_it_is_and_ends_with_its_instance() -> None:
    stream, client, _ = stream_of(call_of())
    stream.received(b": ping\n\ndata: 1\n\ndat", False)
    assert client.body == b": ping\n\ndata: 1\n\n"
    assert not stream.resumable
    assert stream.tokens() == ()
    stream.received(b"a: 2\n\n", True)
    assert client.body == b": ping\n\ndata: 1\n\ndata: 2\n\n"
    assert client.complete


def test_another_server_s_comments_among_ours_go_through() -> None:
    stream, client, _ = stream_of(call_of())
    stream.received(b":0 7\ndata: a\n\n: ping\n\n", False)
    stream.received(b": ping\n\n", False)
    stream.received(b":0 8\n\n:0 9,10\ndata: b\n\n", False)
    assert client.body == b"data: a\n\n: ping\n\n: ping\n\ndata: b\n\n"
    assert listed(stream.tokens()) == [[7, 8, 9, 10]]


def test_an_instance_s_error_waits_for_somebody_who_goes_on() -> None:
    stream, client, _ = stream_of(call_of())
    error = b'data: {"error":{"message":"on fire"}}\n\n'
    stream.received(b":0 7\ndata: a\n\n" + error, True)
    assert client.body == b"data: a\n\n"
    assert not stream.complete
    stream.fail(b"data: other\n\n")
    assert client.body == b"data: a\n\n" + error
    assert client.complete


def test_text_that_looks_like_an_error_is_text() -> None:
    stream, client, _ = stream_of(call_of())
    text = json.dumps('data: {"error":').encode()
    stream.received(b':0 7\ndata: {"text":%b}\n\n' % text + DONE, True)
    assert client.events == [b'{"text":%b}' % text, b"[DONE]"]


@pytest.mark.parametrize(("usage", "end"), [(True, 2), (False, 1)])
def test_an_instance_that_is_lost_before_done_costs_only_what_is_missing(
    usage: bool, end: int
) -> None:
    call = call_of(usage=usage)
    events = answer_to(call)
    stream, client, _ = stream_of(call)
    stream.received(b"".join(events[:-1]), False)
    assert stream.finish() is usage  # usage was the last thing but [DONE]
    if not usage:
        stream.begin_attempt()
        stream.received(DONE, True)
    assert client.complete
    assert client.events[-1] == b"[DONE]"


def test_a_pause_is_what_the_client_saw() -> None:
    stream, client, clock = stream_of(call_of())
    clock.advance(1.0)
    stream.received(b":0 7\ndata: a\n\n", False)
    clock.advance(0.25)
    stream.received(b":0 8\n\n", False)  # nothing for the client
    clock.advance(0.25)
    stream.begin_attempt()
    clock.advance(2.0)
    stream.received(b":0 9\ndata: b\n\n", False)
    clock.advance(3.0)
    stream.received(b":0 9\ndata: c\n\n", False)
    assert stream.first_token == 1.0
    assert stream.pauses == [2.5]
    assert client.events == [b"a", b"b", b"c"]
