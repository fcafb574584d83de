"""Tools and reasoning as users of the openai package know them, through a gateway and instances."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessage, ChatCompletionMessageParam

from memserve.api.openai import MAX_TOOLS
from memserve.models.tokenizer import Tokenizer
from tests.e2e.conftest import Served, StartCluster
from tests.e2e.test_failover import running
from tests.fakes import MODEL, FakeCluster, FakeEngine, metric
from tests.scripted_model import EOS, FOUND, NUMBER, PLAIN, TEXT, TOKENS, scripted_engine

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the weather?"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ADD: Any = {"type": "function", "function": {"name": "add"}}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TOOLS = [WEATHER, ADD]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
ARGUMENTS = {"city": TEXT, "days": NUMBER}


@pytest.fixture
def cluster(start_cluster: StartCluster, tokenizer: Tokenizer) -> FakeCluster:
    return start_cluster(scripted_engine(tokenizer))


@pytest.fixture
def client(cluster: FakeCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(client: openai.OpenAI, stream: bool, **fields: Any) -> tuple[ChatCompletionMessage, str]:
    """The answer's message and finish reason; a stream's as the package adds it up."""
    fields = {"model": MODEL, "messages": HI, "max_tokens": 1000, **fields}
    if stream:
        with client.chat.completions.stream(**fields) as events:
            for _ in events:
                pass
            (choice,) = events.get_final_completion().choices
    else:
        (choice,) = client.chat.completions.create(**fields).choices
    return choice.message, choice.finish_reason


def called(message: ChatCompletionMessage) -> list[tuple[str, Any]]:
    return [
        (call.function.name, json.loads(call.function.arguments))
        for call in message.tool_calls or ()
        if call.type == "function"
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_with_a_tool(client: openai.OpenAI, stream: bool) -> None:
    message, reason = asked(client, stream, tools=TOOLS)
    assert (message.content, reason) == ("I look.", "tool_calls")
    assert called(message) == [("weather", ARGUMENTS)]
    assert message.tool_calls
    answer: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    back: Any = message.model_dump(exclude_none=True)
    message, reason = asked(client, stream, messages=[*HI, back, answer], tools=TOOLS)
    assert (message.content, reason, message.tool_calls) == (f"{FOUND}rain", "stop", None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "calls", "reason"),
    [
        ("auto", [("weather", ARGUMENTS)], "tool_calls"),
        ("required", [("weather", ARGUMENTS)], "tool_calls"),
        (NAMED, [("weather", ARGUMENTS)], "stop"),
        ("none", [], "stop"),
    ],
)
def test_the_choice_of_tools(
    client: openai.OpenAI, stream: bool, choice: Any, calls: list[Any], reason: str
) -> None:
    message, told = asked(client, stream, tools=TOOLS, tool_choice=choice)
    assert (called(message), told) == (calls, reason)
    if choice == "none":
        assert message.content == PLAIN


def test_events_of_the_package_s_helper(client: openai.OpenAI) -> None:
    class Weather(pydantic.BaseModel):
        city: str
        days: int

    tool = openai.pydantic_function_tool(Weather)
    with client.chat.completions.stream(model=MODEL, messages=HI, tools=[tool]) as stream:
        events = list(stream)
        (choice,) = stream.get_final_completion().choices
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(deltas) > 5
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert done.parsed_arguments == Weather(city=TEXT, days=NUMBER)
    assert choice.message.tool_calls
    assert choice.message.tool_calls[0].function.parsed_arguments == done.parsed_arguments


def test_raw_chunks_have_openai_s_shape(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, stream=True)
    )
    parts = [call for chunk in chunks for call in (chunk.choices[0].delta.tool_calls or ())]
    first, *rest = parts
    assert first.id
    assert first.id.startswith("call_")
    assert first.type == "function"
    assert first.function
    assert first.function.name == "weather"
    assert {part.id for part in rest} == {None}
    assert {part.index for part in parts} == {0}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_what_is_refused(client: openai.OpenAI) -> None:
    for fields, param in [
        ({"tools": [ADD] * (MAX_TOOLS + 1)}, "tools"),
        ({"tools": TOOLS, "functions": [{"name": "f"}]}, "functions"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
    ]:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=MODEL, messages=HI, **fields)  # type: ignore[call-overload]
        assert refused.value.param == param


SAID = (
    "<think>\nHm.\n</think>\n\nTwo calls.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Malmö", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"numbers": [1, 2, 3]}}\n</tool_call>'
)


def test_reasoning_and_calls(start_cluster: StartCluster, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(SAID, add_special_tokens=False), EOS]
    engine = FakeEngine(answer=ids, max_model_len=TOKENS, pool_tokens=TOKENS)
    cluster = start_cluster(engine, reasoning_parser="qwen3")
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        for stream in (False, True):
            message, reason = asked(client, stream, tools=TOOLS)
            extra: Any = message.model_extra
            assert (extra["reasoning_content"], extra["reasoning"]) == ("Hm.", "Hm.")
            assert (message.content, reason) == ("Two calls.", "tool_calls")
            assert called(message) == [
                ("weather", {"city": "Malmö", "days": 2}),
                ("add", {"numbers": [1, 2, 3]}),
            ]
            body = {"include_reasoning": False}
            message, _ = asked(client, stream, tools=TOOLS, extra_body=body)
            assert "reasoning" not in (message.model_extra or {})
            message, _ = asked(client, stream, tools=TOOLS, parallel_tool_calls=False)
            assert called(message) == [("weather", {"city": "Malmö", "days": 2})]


def test_an_instance_killed_in_mid_call_is_not_noticed(
    start_cluster: StartCluster, tokenizer: Tokenizer, spawn: Callable[..., Served]
) -> None:
    ids = [*tokenizer.encode(SAID, add_special_tokens=False), EOS]
    cluster = start_cluster(reasoning_parser="qwen3")
    settings = {
        "answer": ids,
        "step_seconds": 0.004,
        "max_model_len": TOKENS,
        "pool_tokens": TOKENS,
    }
    served = [spawn("instance", [cluster.url], name, **settings) for name in ("a", "b")]
    cluster.until_ready(2)
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        fields: Any = {"model": MODEL, "messages": HI, "tools": TOOLS, "stream": True}
        fields["max_tokens"] = 1000
        undisturbed = [_shown(chunk) for chunk in client.chat.completions.create(**fields)]
        heard = []
        for chunk in client.chat.completions.create(**fields):
            heard.append(_shown(chunk))
            arguments = [part for _, calls in heard for part in calls if part[0] == 1]
            if len(arguments) == 3:
                running(served).process.send_signal(signal.SIGKILL)
    assert heard == undisturbed
    assert metric(cluster.url, "memserve_failovers_total") == 1
    assert metric(cluster.url, "memserve_streams_broken_total") == 0


def _shown(chunk: Any) -> tuple[Any, list[tuple[Any, ...]]]:
    """A chunk without ids, which are of one request."""
    (choice,) = chunk.choices
    delta = choice.delta
    calls = [
        (call.index, call.type, call.id is None, call.function.name, call.function.arguments)
        for call in delta.tool_calls or ()
    ]
    text = (delta.role, delta.content, (delta.model_extra or {}).get("reasoning"))
    return (text, choice.finish_reason), calls
