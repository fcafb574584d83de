"""Messages with tool calls and reasoning in OpenAI's shape, whole and as deltas of a stream."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from memserve.api.answer.delta import CallDelta, Delta, tool_call_id
from memserve.api.answer.format import ToolFormat
from memserve.api.generate import GenerateCall


class CalledFunction(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    function: CalledFunction
    type: str = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """An answer. Its reasoning has vLLM's name and DeepSeek's."""

    role: str
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class FunctionPart(msgspec.Struct, frozen=True):
    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCallPart(msgspec.Struct, frozen=True):
    """A part of a tool call in a stream: the first one has id, type and name."""

    index: int
    function: FunctionPart
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True):
    """A part of an answer in a stream."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallPart] | UnsetType = UNSET


def message_of(call: GenerateCall, choice: int, delta: Delta) -> ChatMessage:
    """Return the message of one choice, whose whole answer is `delta`."""
    calls = [
        ToolCall(
            _id(call, choice, part),
            CalledFunction(part.name or "", part.arguments),
        )
        for part in delta.calls
    ]
    reasoning = delta.reasoning or UNSET
    content = delta.content or (None if calls or delta.reasoning else "")
    return ChatMessage("assistant", content, None, calls or UNSET, reasoning, reasoning)


def delta_of(call: GenerateCall, choice: int, delta: Delta, first: bool) -> ChatDelta:
    """Return the next delta of one choice's stream. `first`: with the role."""
    calls = [
        ToolCallPart(part.index, FunctionPart(arguments=part.arguments))
        if part.name is None
        else ToolCallPart(
            part.index, FunctionPart(part.name, part.arguments), _id(call, choice, part), "function"
        )
        for part in delta.calls
    ]
    reasoning = delta.reasoning or UNSET
    content: str | UnsetType | None = delta.content or UNSET
    if first and content is UNSET:
        content = None if calls else ""
    return ChatDelta("assistant" if first else UNSET, content, reasoning, reasoning, calls or UNSET)


def _id(call: GenerateCall, choice: int, part: CallDelta) -> str:
    tools = ToolFormat.NONE if call.answer is None else call.answer.tools
    return tool_call_id(call.id, choice, part.index, tools)
