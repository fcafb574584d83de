"""The conversation in a request for a vLLM server, in the form that chat templates take.

It only serves the choice of an instance: the server renders the request itself. So this module
refuses nothing; it leaves out what it does not understand, which the server may refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from memserve.api.forward import ForwardPath
from memserve.api.limits import MAX_MESSAGE_VALUES
from memserve.gateway.body_scan import count_values

Message = dict[str, Any]
# Template variables that would replace the template, or change its output's form.
TEMPLATE_STEERING: Final = ("chat_template", "tokenize", "return_dict")
_TEXTS = ("text", "input_text", "output_text")


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: Sequence[Message]
    tools: Sequence[object] | None
    variables: Mapping[str, object]  # of the template
    add_generation_prompt: bool = True

    def text(self) -> str:
        """Return the messages' text, for a template that cannot be used."""
        return "\n".join(message["content"] for message in self.messages)


def conversation_of(path: ForwardPath, fields: Mapping[str, Any]) -> Conversation | None:
    """Return the conversation of a request. None: this path has none."""
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
    """Return whether a request has parts other than text."""
    given = fields.get("messages", fields.get("input"))
    messages = [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []
    contents = [each.get("content") for each in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(not isinstance(part, dict) or part.get("type") not in _TEXTS for part in parts)


def _messages(given: object) -> Iterator[Message]:
    decode = ArgumentsDecoder().decode
    for message in given if isinstance(given, list) else ():
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            continue
        role = "system" if message["role"] == "developer" else message["role"]
        rendered = {**message, "role": role, "content": _text(message.get("content"))}
        if isinstance(calls := message.get("tool_calls"), list):
            rendered["tool_calls"] = [
                _called(call, decode) for call in calls if isinstance(call, dict)
            ]
        yield rendered


def _items(given: object) -> Iterator[Message]:
    """Yield the messages in the `input` of `/v1/responses`."""
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    yield from _messages(given)


def _text(content: object) -> str:
    """Return a content's text: its text parts joined as lines, as in vLLM, without others."""
    if isinstance(content, str):
        return content
    parts = (
        [part for part in content if isinstance(part, dict)] if isinstance(content, list) else ()
    )
    texts = [part.get("text") for part in parts if part.get("type") in _TEXTS]
    return "\n".join(text for text in texts if isinstance(text, str))


def _called(call: Mapping[str, Any], decode: Callable[[str], object]) -> dict[str, Any]:
    """Return a tool call with decoded arguments, as templates want them."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(
        arguments := function.get("arguments"), str
    ):
        return dict(call)
    return {**call, "function": {**function, "arguments": decode(arguments)}}


class ArgumentsDecoder:
    """Decodes the arguments of the calls in one conversation. JSON in a string is not counted with
    the body's elements, so all arguments together have a limit here: MAX_MESSAGE_VALUES."""

    def __init__(self) -> None:
        self._left = MAX_MESSAGE_VALUES

    def decode(self, arguments: str) -> object:
        """Return a call's arguments as templates want them: decoded; as they are if they are not
        valid JSON, which a model may have written, or beyond the limit; {} for no text."""
        if not arguments.strip():
            return {}
        try:
            json = arguments.encode()
            values = count_values(json)
            if values is None or values > self._left:
                return arguments
            self._left -= values
            return msgspec.json.decode(json)
        except (msgspec.DecodeError, UnicodeEncodeError):
            return arguments


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tool of responses or messages in the form of chat completions."""
    if "function" in tool or "name" not in tool:
        return tool
    function = {
        "name": tool["name"],
        "description": tool.get("description"),
        "parameters": tool.get("parameters", tool.get("input_schema")),
    }
    return {"type": "function", "function": function}
