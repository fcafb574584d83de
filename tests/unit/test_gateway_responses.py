"""`/v1/responses` as a translation: requests into chats, and chats' streams into Responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response as ClientsResponse
from openai.types.responses import ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter

from memserve.api.errors import ApiError
from memserve.api.http_message import EVENTS_HEADERS, Request
from memserve.api.openai import NotUnderstood
from memserve.gateway.response_store import ResponseStore, StoredResponse, owner_of
from memserve.gateway.responses_reply import ResponsesReply
from memserve.gateway.responses_request import (
    chat_body,
    decode_items,
    kept_items,
    of_this_request,
    read_input,
    read_request,
)
from tests.gateway_harness import Client

POST = Request("POST", "/v1/responses", b"", [], b"", False, True, b"/v1/responses")
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ITEM: TypeAdapter[Any] = TypeAdapter(ResponseItem)
HEADERS = (*EVENTS_HEADERS, (b"x-request-id", b"r1"))


def translated(*before: bytes, **fields: Any) -> dict[str, Any]:
    """The chat request of a Responses request."""
    asked = read_request(json.dumps({"input": "hi", **fields}).encode())
    items = (*decode_items(before), *read_input(asked))
    chat: dict[str, Any] = json.loads(chat_body(asked, items))
    return chat


def messages(*items: Any, **fields: Any) -> Any:
    return translated(input=items, **fields)["messages"]


CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a":1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "3"}
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


def test_a_text_is_a_user_s_message() -> None:
    chat = translated(instructions="be", max_output_tokens=5, temperature=0.5, seed=1, user="u")
    assert chat == {
        "messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "seed": 1,
        "user": "u",
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_items_become_messages() -> None:
    assert messages(
        {"role": "developer", "content": "be"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "3?"}]},
        {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"},
        {
            "type": "message", "id": "m", "status": "completed", "role": "assistant",
            "content": [{"type": "output_text", "text": "I ask.", "annotations": []}],
        },
        CALL,
        {**CALL, "call_id": "c2"},
        RESULT,
        {**RESULT, "call_id": "c2", "output": [{"type": "input_text", "text": "4"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ) == [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "3?"},
        {"role": "assistant", "content": "I ask.", "tool_calls": [CALLED, {**CALLED, "id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "tool", "tool_call_id": "c2", "content": "4"},
        {"role": "assistant", "content": "no"},
    ]  # fmt: skip


def test_a_call_without_a_message_before_it_has_one() -> None:
    assert messages({"role": "user", "content": "x"}, CALL)[1:] == [
        {"role": "assistant", "content": None, "tool_calls": [CALLED]}
    ]


def test_instructions_and_a_first_system_message_are_one() -> None:
    given = messages({"role": "system", "content": "b"}, instructions="a")
    assert given == [{"role": "system", "content": "a\n\nb"}]


def test_what_was_kept_continues_the_conversation() -> None:
    asked = read_request(json.dumps({"input": [CALL, RESULT]}).encode())
    before = kept_items(read_input(asked), "item_1")
    assert translated(*before)["messages"] == [
        {"role": "assistant", "content": None, "tool_calls": [CALLED]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "user", "content": "hi"},
    ]
    assert [json.loads(item)["id"] for item in before] == ["item_1_0", "item_1_1"]


def test_what_is_kept_are_items_that_the_client_knows() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"role": "system", "content": "b"},
        {"role": "assistant", "content": "c"},
        CALL,
        {**RESULT, "output": [{"type": "input_text", "text": "4"}]},
        {"type": "reasoning", "id": "r", "summary": []},
    ]
    asked = read_request(json.dumps({"input": items}).encode())
    kept = [json.loads(item) for item in kept_items(read_input(asked), "item_1")]
    assert [item["type"] for item in kept] == ["message"] * 3 + [CALL["type"], RESULT["type"]]
    for item in kept:
        ITEM.validate_python(item)
    assert kept[4]["output"] == "4"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_formats_tools_and_choices_are_a_chat_s() -> None:
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    tool = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}
    chat = translated(
        text={"format": form, "verbosity": "low"},
        tools=[{**tool, "description": "d"}],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        reasoning={"effort": "low", "summary": "auto"},
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        top_logprobs=3,
    )
    assert chat["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
    }
    function = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert (chat["parallel_tool_calls"], chat["reasoning_effort"]) == (False, "low")
    assert (chat["verbosity"], chat["logprobs"], chat["top_logprobs"]) == ("low", True, 3)
    assert translated(tool_choice="required")["tool_choice"] == "required"
    allowed = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "f"}],
    }
    assert translated(tool_choice=allowed)["tool_choice"] == {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "auto",
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"nonsense": 1}, "nonsense"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": [{"role": "user", "content": 7}]}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input"),
        ({"input": [{"type": "message", "content": "x"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "m"}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"reasoning": {"effort": "low", "summary": "detailed"}}, "reasoning"),
    ],
)
def test_a_refusal_names_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        translated(**fields)
    assert (refused.value.status, refused.value.detail.param) == (400, param)


def test_a_chat_s_refusal_has_this_request_s_names() -> None:
    error = of_this_request(NotUnderstood("'response_format' is no.", "response_format"))
    assert (error.detail.message, error.detail.param) == ("'text.format' is no.", "text.format")


# --- answers


def chunk(**delta: Any) -> bytes:
    finish, scores = delta.pop("finish", None), delta.pop("logprobs", None)
    choice = {"index": 0, "delta": delta, "logprobs": scores, "finish_reason": finish}
    return b"data: %b\n\n" % json.dumps({"id": "c", "choices": [choice], "usage": None}).encode()


USED = {
    "prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
}  # fmt: skip
END = [b"data: %b\n\n" % json.dumps({"choices": [], "usage": USED}).encode(), b"data: [DONE]\n\n"]


class Answered:
    """What a client gets of a chat's stream."""

    def __init__(self, parts: Sequence[bytes], stream: bool, **fields: Any) -> None:
        self.client = Client(POST)
        self.kept: list[tuple[bytes, Sequence[bytes]]] = []
        reply = ResponsesReply(self.client.reply, POST)
        asked = read_request(json.dumps({"input": "hi", **fields}).encode())
        response = asked.response("resp_1", "m", True)
        reply.begin(response, stream, lambda body, output: self.kept.append((body, output)))
        reply.start(200, HEADERS)
        for part in parts[:-1]:
            if not reply.ended:
                reply.write(part)
        if not reply.ended:
            reply.end(parts[-1])
        self.reply = reply
        assert self.client.complete
        assert self.client.headers[b"x-request-id"] == b"r1"

    @property
    def events(self) -> list[dict[str, Any]]:
        """Each is one that the openai package knows, with the right name and number."""
        found = []
        for number, text in enumerate(self.client.body.split(b"\n\n")[:-1]):
            name, data = text.split(b"\n")
            event = json.loads(data.removeprefix(b"data: "))
            assert name == b"event: " + event["type"].encode()
            assert event["sequence_number"] == number
            EVENT.validate_python(event)
            found.append(event)
        return found

    @property
    def response(self) -> dict[str, Any]:
        """The whole one."""
        whole: dict[str, Any] = json.loads(self.client.body)
        ClientsResponse.model_validate(whole)
        return whole


def types(events: Sequence[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


TEXT = [chunk(role="assistant", content="He"), chunk(content="llo"), chunk(finish="stop"), *END]


def test_a_text_s_events() -> None:
    answered = Answered(TEXT, stream=True, instructions="be")
    events = answered.events
    assert types(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["delta"] for event in events[4:6]] == ["He", "llo"]
    assert events[6]["text"] == "Hello"
    assert {event["item_id"] for event in events[3:8]} == {"msg_1_0"}
    whole = events[-1]["response"]
    assert events[0]["response"]["status"] == "in_progress"
    assert (whole["status"], whole["instructions"]) == ("completed", "be")
    assert whole["output"] == [events[-2]["item"]]
    assert whole["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    }
    assert [json.loads(body) for body, _ in answered.kept] == [whole]


def test_a_whole_answer_is_the_last_event_s() -> None:
    whole = Answered(TEXT, stream=False).response
    streamed = Answered(TEXT, stream=True).events[-1]["response"]
    for one in (whole, streamed):
        del one["created_at"], one["completed_at"]
    assert whole == streamed
    assert Answered(TEXT, stream=False).client.headers[b"content-type"] == b"application/json"


@given(cuts=st.lists(st.integers(0, len(b"".join(TEXT))), max_size=8).map(sorted))
def test_it_does_not_matter_how_bytes_come(cuts: list[int]) -> None:
    data = b"".join(TEXT)
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    pieces = Answered(parts, stream=True).events
    assert types(pieces) == types(Answered([data], stream=True).events)
    assert pieces[6]["text"] == "Hello"


def test_reasoning_text_and_calls_are_items() -> None:
    def call(index: int, name: str | None, arguments: str, id: str | None = None) -> bytes:
        function = {"arguments": arguments} | ({} if name is None else {"name": name})
        part = {"index": index, "function": function} | ({} if id is None else {"id": id})
        return chunk(tool_calls=[part])

    parts = [
        chunk(role="assistant", content=""),
        chunk(reasoning="Hm", content=None),
        chunk(reasoning_content="m."),
        chunk(content="I ask."),
        call(0, "f", "", "c1"),
        call(0, None, '{"a"'),
        call(0, None, ":1}"),
        call(1, "g", "{}", "c2"),
        chunk(finish="tool_calls"),
        *END,
    ]
    events = Answered(parts, stream=True).events
    assert types(events)[2:] == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]  # fmt: skip
    thought, said, first, second = events[-1]["response"]["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hmm."}]
    assert said["content"][0]["text"] == "I ask."
    assert (first["call_id"], first["name"], first["arguments"]) == ("c1", "f", '{"a":1}')
    assert (second["call_id"], second["name"], second["arguments"]) == ("c2", "g", "{}")
    assert [event["output_index"] for event in events if "item" in event] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]


def test_log_probabilities_come_with_the_text() -> None:
    top = {"token": "He", "logprob": -0.5, "bytes": [72, 101]}
    scores = {"content": [{**top, "top_logprobs": [top]}]}
    parts = [chunk(content="He", logprobs=scores), chunk(finish="stop"), *END]
    events = Answered(parts, stream=True).events
    told = [{"token": "He", "logprob": -0.5}]
    assert events[4]["logprobs"] == [{**told[0], "top_logprobs": told}]
    assert events[5]["logprobs"] == events[4]["logprobs"]
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == scores["content"]


def test_an_answer_that_is_cut_off_is_incomplete() -> None:
    events = Answered([chunk(content="He"), chunk(finish="length"), *END], stream=True).events
    assert types(events)[-1] == "incomplete"
    whole = events[-1]["response"]
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["output"][0]["status"] == "incomplete"
    assert whole["completed_at"] is None


def test_an_empty_answer_is_an_empty_message() -> None:
    whole = Answered([chunk(role="assistant", content="", finish="stop"), *END], stream=False)
    assert whole.response["output"][0]["content"][0]["text"] == ""


BROKEN = b'data: {"error":{"message":"lost","type":"server_error","code":"instance_lost"}}\n\n'


@pytest.mark.parametrize(
    "end", [BROKEN, b"", b"data: {}}\n\n", b'data: {"choices":7}\n\n', b'data: {"choi']
)
def test_a_stream_that_breaks_says_so(end: bytes) -> None:
    answered = Answered([chunk(content="He"), end], stream=True)
    failed = answered.events[-1]
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "server_error"
    assert failed["response"]["output"][0]["content"][0]["text"] == "He"
    assert not answered.kept


@pytest.mark.parametrize(("end", "status"), [(BROKEN, 503), (b"", 503), (b"data: {}}\n\n", 500)])
def test_a_whole_answer_that_breaks_is_an_error(end: bytes, status: int) -> None:
    answered = Answered([chunk(content="He"), end], stream=False)
    assert answered.client.status == status
    assert set(json.loads(answered.client.body)["error"]) == {"message", "type", "param", "code"}
    assert not answered.kept


def test_an_instance_that_talks_nonsense_is_not_listened_to() -> None:
    client = Client(POST)
    reply = ResponsesReply(client.reply, POST)
    reply.begin(read_request(b'{"input":"hi"}').response("resp_1", "m", True), True, None)
    left: list[bool] = []
    reply.on_gone = lambda: left.append(True)
    reply.start(200, HEADERS)
    reply.write(b"data: {]\n\n")
    assert left == [True]
    assert client.complete


def test_the_client_s_leaving_and_slowness_are_passed_on() -> None:
    client = Client(POST)
    reply = ResponsesReply(client.reply, POST)
    flows: list[bool] = []
    reply.on_flow = flows.append
    assert client.reply.on_flow is not None
    client.reply.on_flow(True)
    assert (flows, reply.writable) == ([True], False)
    left: list[bool] = []
    reply.on_gone = lambda: left.append(True)
    client.reply.hung_up()
    assert (left, reply.gone) == ([True], True)


# --- the store

RED, BLUE = owner_of(b"red"), owner_of(b"blue")


def stored(size: int = 0) -> StoredResponse:
    return StoredResponse(b"x" * size, (), ())


def test_nobody_finds_another_owner_s() -> None:
    store = ResponseStore(10**6)
    assert store.put(RED, "r", stored())
    assert store.get(RED, "r") is not None
    assert store.get(BLUE, "r") is None
    assert not store.delete(BLUE, "r")
    assert store.delete(RED, "r")
    assert (store.bytes, store.count, store.get(RED, "r")) == (0, 0, None)


def test_the_owner_with_the_most_loses_what_it_used_last() -> None:
    store = ResponseStore(3 * stored(1000).size)
    store.put(BLUE, "b", stored(1000))
    for name in ("r0", "r1"):
        store.put(RED, name, stored(1000))
    store.get(RED, "r0")
    store.put(RED, "r2", stored(1000))
    kept = [name for name in ("r0", "r1", "r2") if store.get(RED, name)]
    assert kept == ["r0", "r2"]
    assert store.get(BLUE, "b") is not None


def test_one_that_is_larger_than_the_store_is_not_kept() -> None:
    store = ResponseStore(2000)
    store.put(RED, "r", stored())
    assert not store.put(RED, "large", stored(2000))
    assert store.get(RED, "r") is not None
    assert not ResponseStore(0).put(RED, "r", stored())


@given(
    st.lists(
        st.tuples(st.sampled_from([RED, BLUE]), st.integers(0, 9), st.integers(0, 5000)),
        max_size=60,
    )
)
def test_it_never_holds_more_than_it_may(puts: list[tuple[Any, int, int]]) -> None:
    store = ResponseStore(20_000, max_count=5)
    held: dict[tuple[Any, str], StoredResponse] = {}
    for owner, number, size in puts:
        response = stored(size)
        assert store.put(owner, str(number), response)
        held[owner, str(number)] = response
        found = [one for key, one in held.items() if store.get(*key) is one]
        assert response in found
        assert store.count == len(found) <= 5
        assert store.bytes == sum(one.size for one in found) <= 20_000
