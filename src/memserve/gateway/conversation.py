"""The conversation in a request for a vLLM server, as chat templates know it.

It is used to choose an instance by, and nothing else: the server renders the request itself. So
nothing is refused here; what is not understood is left out, and is the server's to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from memserve.api.forward import ForwardPath

Message = dict[str, Any]
_TEXTS = ("text", "input_text", "output_text")


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: Sequence[Message]
    tools: Sequence[object] | None
    variables: Mapping[str, object]  # of the template
    add_generation_prompt: bool = True

    def text(self) -> str:
        """What is said in it, for models whose template cannot be used."""
        return "\n".join(message["content"] for message in self.messages)


def conversation_of(path: ForwardPath, fields: Mapping[str, Any]) -> Conversation | None:
    """None: there is none in it."""
    if path is ForwardPath.RESPONSES:
        messages = [*_system(fields.get("instructions")), *_items(fields.get("input"))]
    elif path in (ForwardPath.MESSAGES, ForwardPath.CHAT):
        messages = [*_system(fields.get("system")), *_messages(fields.get("messages"))]
    else:
        return None
    variables = fields.get("chat_template_kwargs")
    known = {} if not isinstance(variables, dict) else dict(variables)
    for name in ("documents", "reasoning_effort"):
        if fields.get(name) is not None:
            known[name] = fields[name]
    tools = fields.get("tools")
    return Conversation(
        messages,
        [_tool(tool) for tool in tools if isinstance(tool, dict)]
        if isinstance(tools, list) and tools
        else None,
        known,
        fields.get("add_generation_prompt") is not False,
    )


def _system(content: object) -> Iterator[Message]:
    if content:
        yield {"role": "system", "content": _text(content)}


def has_media(fields: Mapping[str, Any]) -> bool:
    """Whether a request has parts that are no texts."""
    given = fields.get("messages", fields.get("input"))
    messages = [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []
    contents = [each.get("content") for each in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(not isinstance(part, dict) or part.get("type") not in _TEXTS for part in parts)


def _messages(given: object) -> Iterator[Message]:
    for message in given if isinstance(given, list) else ():
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            continue
        role = "system" if message["role"] == "developer" else message["role"]
        rendered = {**message, "role": role, "content": _text(message.get("content"))}
        if isinstance(calls := message.get("tool_calls"), list):
            rendered["tool_calls"] = [_called(call) for call in calls if isinstance(call, dict)]
        yield rendered


def _items(given: object) -> Iterator[Message]:
    """Of the input of a response."""
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    yield from _messages(given)


def _text(content: object) -> str:
    """Of several parts the lines, as in vLLM; what is no text is left out."""
    if isinstance(content, str):
        return content
    parts = (
        [part for part in content if isinstance(part, dict)] if isinstance(content, list) else ()
    )
    texts = [part.get("text") for part in parts if part.get("type") in _TEXTS]
    return "\n".join(text for text in texts if isinstance(text, str))


def _called(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a tool, with its arguments as templates want them."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(
        arguments := function.get("arguments"), str
    ):
        return dict(call)
    try:
        decoded = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return dict(call)
    return {**call, "function": {**function, "arguments": decoded}}


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """In the form of chat completions; those of responses and messages have their own."""
    if "function" in tool or "name" not in tool:
        return tool
    function = {
        "name": tool["name"],
        "description": tool.get("description"),
        "parameters": tool.get("parameters", tool.get("input_schema")),
    }
    return {"type": "function", "function": function}
