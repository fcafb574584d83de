"""Calls that are required, by the engine itself: grammar, reasoning and answer fit together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from memserve.api.generate import GenerateCall
from memserve.api.status import Limits
from memserve.config import ModelConfig, ToolCallParser
from memserve.gateway.call_builder import CallBuilder
from memserve.gateway.model_formats import formats_of
from memserve.models.tokenizer import Tokenizer
from memserve.tokens import from_ids
from memserve.types import Role
from tests.fakes import MODEL, save_tiny_tokenizer
from tests.handoff_harness import Node, node, pair
from tests.stream_harness import events_of, resumed, stream_of
from tests.tiny_models import VOCAB, save_tiny_model
from tests.unit.test_instance_tool_calls import body_of, called, message_of

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | length }}<tool_call>"
    "{% if enable_thinking %}<think>{% else %}</think>{% endif %}"
)
WEATHER = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
ADD = {"type": "object", "properties": {"carry": {"type": "boolean"}}, "required": ["carry"]}
ADD["additionalProperties"] = False
SCHEMAS = {"weather": WEATHER, "add": ADD}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}},
    "required": ["sure"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "add"}}
LIMITS = Limits(
    vocab_size=VOCAB,
    max_model_len=1024,
    pool_tokens=1024,
    max_tokens=1024,
    block_tokens=16,
    dtype="float32",
    device="cpu",
    threads=1,
    max_waiting=64,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(made, TEMPLATE)
    return made


@pytest.fixture(scope="module")
def builder(model: Path) -> Iterator[CallBuilder]:
    """Of a model without reasoning."""
    with builder_of(model, ModelConfig(reasoning_parser="none")) as builder:
        yield builder


@contextmanager
def builder_of(model: Path, config: ModelConfig) -> Iterator[CallBuilder]:
    tokenizer = Tokenizer.load(model)
    builder = CallBuilder(tokenizer, MODEL, 1, formats_of(config, tokenizer))
    yield builder
    builder.close()


async def call_of(builder: CallBuilder, **fields: Any) -> GenerateCall:
    messages = [{"role": "user", "content": "hi"}]
    asked = {"messages": messages, "tools": TOOLS, "max_tokens": 120, "temperature": 1.5}
    return await builder.chat(json.dumps({**asked, **fields}).encode(), LIMITS)


def check(message: dict[str, Any]) -> int:
    """Raise if a call is none of its function; return how many there are."""
    for name, arguments in called(message):
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    return len(message["tool_calls"])


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"tool_choice": NAMED},
    ],
)
async def test_a_required_call_is_one(
    model: Path, builder: CallBuilder, fields: dict[str, Any]
) -> None:
    complete = 0
    async with node(model, Role.COLOCATED) as alone:
        for seed in range(6):
            call = await call_of(builder, **fields, seed=seed)
            (choice,) = (await body_of(alone.instance, call))["choices"]
            if choice["finish_reason"] != "length":
                count = check(choice["message"])
                assert count == 1 or len(fields) == 1
                assert not choice["message"]["content"]
                complete += 1
    assert complete >= 1


async def test_an_answer_is_calls_or_obeys_its_format(model: Path, builder: CallBuilder) -> None:
    kinds = set()
    async with node(model, Role.COLOCATED) as alone:
        for seed in range(12):
            call = await call_of(builder, response_format=FORMAT, seed=seed)
            (choice,) = (await body_of(alone.instance, call))["choices"]
            message = choice["message"]
            if choice["finish_reason"] == "tool_calls":
                assert check(message)
                assert message["content"] is None
            elif choice["finish_reason"] == "stop":
                jsonschema.validate(json.loads(message["content"]), SCHEMA)
            kinds.add(choice["finish_reason"])
    assert kinds >= {"tool_calls", "stop"}


@pytest.mark.parametrize(
    ("thinks", "thought"), [(True, "So be it.</think>\n"), (False, "<think>So be it.</think>")]
)
async def test_behind_the_reasoning_comes_the_call(model: Path, thinks: bool, thought: str) -> None:
    tokens = from_ids(Tokenizer.load(model).encode(thought, add_special_tokens=False))
    ended = 0
    with builder_of(model, ModelConfig()) as builder:
        async with node(model, Role.COLOCATED) as alone:
            for seed in range(6):
                call = await call_of(
                    builder,
                    tool_choice=NAMED,
                    stream=True,
                    seed=seed,
                    chat_template_kwargs={"enable_thinking": thinks},
                )
                # A random model's thoughts have no end: as if another instance had made these.
                call = msgspec.structs.replace(call, resumed=(tokens,))
                message, reason = message_of(await stream_of(alone.instance, call))
                assert message["content"] is None
                if reason == "stop":
                    assert check(message) == 1
                    ended += 1
    assert ended >= 3


async def test_a_required_call_goes_on_elsewhere(model: Path, builder: CallBuilder) -> None:
    async with pair(model) as (p, d), node(model, Role.COLOCATED) as alone:
        for seed in range(3):
            fields = {"tool_choice": "required", "parallel_tool_calls": False}
            call = await call_of(builder, **fields, seed=seed, stream=True)
            events = events_of(await stream_of(alone.instance, call))
            whole = _told(events)
            for at in range(1, len(events), len(events) // 6):
                again = resumed(call, events[:at])
                other: Node = (alone, d, p)[at % 3]
                rest = events_of(await stream_of(other.instance, again))
                assert _told([*events[:at], *rest]) == whole


# A call's beginning in each format whose arguments are JSON.
BEGUN = {
    "hermes": "So: <tool_call>",
    "llama3_json": "{",
    "mistral": "So: [TOOL_CALLS]",
    "granite": "<|tool_call|>",
    "deepseek_v3": "So: <｜tool▁calls▁begin｜>",
    "deepseek_v31": "<｜tool▁calls▁begin｜>",
    "kimi_k2": "<|tool_calls_section_begin|>",
    "openai": "<|channel|>commentary ",
}


@pytest.mark.parametrize("parser", BEGUN)
async def test_a_strict_function_s_call_obeys_its_schema_once_it_has_begun(
    model: Path, parser: ToolCallParser
) -> None:
    begun = from_ids(Tokenizer.load(model).encode(BEGUN[parser], add_special_tokens=False))
    tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]  # type: ignore[dict-item]
    config = ModelConfig(tool_call_parser=parser, reasoning_parser="none")
    complete = 0
    with builder_of(model, config) as builder:
        async with node(model, Role.COLOCATED) as alone:
            for seed in range(4):
                fields = {"tools": tools, "parallel_tool_calls": False, "max_tokens": 250}
                call = await call_of(builder, **fields, stream=True, seed=seed)
                # A random model begins no call: as if another instance had written this.
                call = msgspec.structs.replace(call, resumed=(begun,))
                message, reason = message_of(await stream_of(alone.instance, call))
                if reason == "tool_calls":
                    assert check(message) == 1
                    complete += 1
    assert complete >= 1


async def test_harmony_s_required_call_is_one(model: Path) -> None:
    complete = 0
    with builder_of(model, ModelConfig(tool_call_parser="openai")) as builder:
        async with node(model, Role.COLOCATED) as alone:
            for seed in range(8):
                fields = {"tool_choice": "required", "max_tokens": 200, "seed": seed}
                call = await call_of(builder, **fields)
                (choice,) = (await body_of(alone.instance, call))["choices"]
                if choice["finish_reason"] == "tool_calls":
                    complete += check(choice["message"])
    assert complete >= 1


def _told(events: list[Any]) -> Any:
    data = b"".join(
        b":%d %s\ndata: %b\n\n" % (0, ",".join(map(str, event.token_ids)).encode(), event.data)
        for event in events
        if event.choice is not None and event.data
    )
    return message_of(data)
