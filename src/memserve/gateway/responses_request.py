"""Translation of a Responses request into a chat request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from msgspec import UNSET

from memserve.api.errors import ApiError, ErrorDetail, invalid
from memserve.api.json_body import decode_json
from memserve.api.limits import MAX_ITEMS
from memserve.api.neutral import unsupported
from memserve.api.openai import NotUnderstood
from memserve.api.responses import (
    IGNORED,
    NEUTRAL,
    OWN,
    SHARED_WITH_CHAT,
    WITH_LOGPROBS,
    Content,
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    MessageItem,
    OutputText,
    Response,
    ResponsesRequest,
    TextPart,
)
from memserve.gateway.body_scan import check_body, count_elements

_encode = msgspec.json.Encoder().encode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_request = msgspec.json.Decoder(ResponsesRequest)
_Items = tuple[InputItem, ...]
_input: msgspec.json.Decoder[str | _Items] = msgspec.json.Decoder(str | _Items)
_items = msgspec.json.Decoder(_Items)

# Chat fields whose names differ from those of the request that they come from.
_NAMES: Final = {
    "echo": "input",
    "logprobs": "include",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}
_TEXT_TYPES = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})
_TOOL_FIELDS = frozenset({"name", "description", "parameters", "strict"})
_FORMAT_FIELDS = frozenset({"name", "description", "schema", "strict"})


@dataclass(frozen=True, slots=True)
class Asked:
    """A decoded request. `members`: all of its fields, as JSON."""

    request: ResponsesRequest
    members: dict[str, msgspec.Raw]

    @property
    def wants_logprobs(self) -> bool:
        return WITH_LOGPROBS in (self.request.include or ())

    def response(self, response_id: str, model: str, store: bool) -> Response:
        """Return the answer as it is before anything is generated."""
        request, given = self.request, self.members
        return Response(
            id=response_id,
            created_at=int(time.time()),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=_given(given, "metadata", {}),
            model=model,
            parallel_tool_calls=_given(given, "parallel_tool_calls", True),
            previous_response_id=request.previous_response_id,
            prompt_cache_key=_given(given, "prompt_cache_key", None),
            reasoning=_given(given, "reasoning", None),
            safety_identifier=_given(given, "safety_identifier", None),
            store=store,
            temperature=_given(given, "temperature", 1.0),
            text=_given(given, "text", {"format": {"type": "text"}}),
            tool_choice=_given(given, "tool_choice", "auto"),
            tools=_given(given, "tools", ()),
            top_logprobs=request.top_logprobs or 0,
            top_p=_given(given, "top_p", 1.0),
            user=_given(given, "user", None),
        )


def read_request(body: bytes) -> Asked:
    """Decode a request, but not its input. Raises ApiError (400) that names the field at fault."""
    check_body(body)
    members = decode_json(_members.decode, body)
    for name, value in members.items():
        if name in OWN or name in IGNORED or name in SHARED_WITH_CHAT:
            continue
        if name not in NEUTRAL or not _is_neutral(name, value):
            raise unsupported(name[:64])
    return Asked(decode_json(_request.decode, body), members)


def read_input(asked: Asked) -> tuple[InputItem, ...]:
    """Return the items of a request's input. Raises ApiError (400)."""
    raw = asked.request.input
    if (count := count_elements(memoryview(raw))) > MAX_ITEMS:
        raise invalid(f"'input' has {count} items, and at most {MAX_ITEMS} may be.", "input")
    given = decode_json(_input.decode, raw, "input")
    if isinstance(given, str):
        given = (InputItem(role="user", content=given),)
    if not given:
        raise invalid("'input' is empty; at least one item is needed.", "input")
    return given


def kept_items(items: Sequence[InputItem], stem: str) -> tuple[bytes, ...]:
    """Return items as JSON, in the form in which they are kept and sent; those without an id get
    one that begins with `stem`. Reasoning is left out."""
    kept: list[bytes] = []
    for number, item in enumerate(items):
        item_id = item.id or f"{stem}_{number}"
        match item.type:
            case "message":
                text = _text(item.content)
                part = OutputText(text) if item.role == "assistant" else TextPart(text)
                kept.append(_encode(MessageItem(item_id, item.role or "user", (part,))))
            case "function_call":
                call = item.call_id or "", item.name or "", item.arguments or ""
                kept.append(_encode(FunctionCallItem(item_id, *call)))
            case "function_call_output":
                output = FunctionOutputItem(item_id, item.call_id or "", _text(item.output))
                kept.append(_encode(output))
    return tuple(kept)


def decode_items(items: Sequence[bytes]) -> tuple[InputItem, ...]:
    """Return kept items."""
    return _items.decode(b"[" + b",".join(items) + b"]")


def chat_body(asked: Asked, items: Sequence[InputItem]) -> bytes:
    """Return the body of the chat request that asks the same, streamed and with usage. `items`:
    the whole conversation. Raises ApiError (400)."""
    request, members = asked.request, asked.members
    chat: dict[str, object] = {name: members[name] for name in SHARED_WITH_CHAT if name in members}
    chat["messages"] = _messages(request.instructions, items)
    chat["stream"] = True
    chat["stream_options"] = {"include_usage": True}
    if request.max_output_tokens is not None:
        chat["max_completion_tokens"] = request.max_output_tokens
    if asked.wants_logprobs:
        chat["logprobs"] = True
        chat["top_logprobs"] = request.top_logprobs or 0
    if request.reasoning is not None and request.reasoning.effort is not None:
        chat["reasoning_effort"] = request.reasoning.effort
    if request.text is not None:
        if request.text.verbosity is not UNSET:
            chat["verbosity"] = request.text.verbosity
        if request.text.format is not UNSET:
            chat["response_format"] = _response_format(request.text.format)
    if request.tools:
        chat["tools"] = [_tool(tool) for tool in request.tools]
    if request.tool_choice is not None:
        chat["tool_choice"] = _tool_choice(request.tool_choice)
    return _encode(chat)


def of_this_request(error: ApiError) -> ApiError:
    """Return the error of a chat request, with the names of this one's fields."""
    error.detail = renamed(error.detail)
    return error


def renamed(detail: ErrorDetail) -> ErrorDetail:
    """Return what is wrong with a chat request, with the names of this one's fields."""
    name = _NAMES.get(detail.param or "")
    if name is None:
        return detail
    message = detail.message.replace(f"'{detail.param}'", f"'{name}'")
    return msgspec.structs.replace(detail, param=name, message=message)


def _messages(instructions: str | None, items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """Return a conversation as a chat has it: calls belong to the assistant's message before them,
    and instructions to a system message behind them (many templates take one only)."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        last = messages[-1] if messages else {}
        match item.type:
            case "message":
                role = "system" if item.role == "developer" else item.role
                if role is None:
                    raise invalid("A message in 'input' has no 'role'.", "input")
                text = _text(item.content)
                if role == "system" == last.get("role"):
                    last["content"] = f"{last['content']}\n\n{text}"
                else:
                    messages.append({"role": role, "content": text})
            case "function_call":
                if item.call_id is None or item.name is None or item.arguments is None:
                    raise invalid(
                        "A function_call in 'input' has call_id, name and arguments.", "input"
                    )
                if last.get("role") != "assistant":
                    last = {"role": "assistant", "content": None}
                    messages.append(last)
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                last.setdefault("tool_calls", []).append(call)
            case "function_call_output":
                if item.call_id is None or item.output is None:
                    raise invalid(
                        "A function_call_output in 'input' has call_id and output.", "input"
                    )
                text = _text(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
            case "reasoning":
                pass  # templates leave out what an earlier turn has thought
            case _:
                raise NotUnderstood(
                    f"Items of type '{item.type[:64]}' are not supported in 'input'.", "input"
                )
    return messages


def _text(content: Content | None) -> str:
    """Return the text of a content. Raises NotUnderstood for a part of another kind."""
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for part in content:
        text = part.refusal if part.type == "refusal" else part.text
        if text is None or (part.type != "refusal" and part.type not in _TEXT_TYPES):
            raise NotUnderstood(
                f"'input' has content of type '{part.type[:64]}'; only text is supported.", "input"
            )
        texts.append(text)
    return "\n".join(texts)


def _response_format(raw: msgspec.Raw) -> object:
    given = decode_json(msgspec.json.decode, raw, "text.format")
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return given
    named = {name: value for name, value in given.items() if name in _FORMAT_FIELDS}
    rest = given.keys() - _FORMAT_FIELDS - {"type"}
    return {"type": "json_schema", "json_schema": named, **{name: given[name] for name in rest}}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise NotUnderstood("Of 'tools' only functions are supported.", "tools")
    return {
        "type": "function",
        "function": {name: value for name, value in tool.items() if name in _TOOL_FIELDS},
    }


def _tool_choice(choice: str | dict[str, Any]) -> object:
    if isinstance(choice, str):
        return choice
    match choice.get("type"):
        case "function":
            return {"type": "function", "function": {"name": choice.get("name")}}
        case "allowed_tools":
            tools = choice.get("tools")
            allowed = {
                "mode": choice.get("mode"),
                "tools": [
                    {"type": "function", "function": {"name": tool.get("name")}}
                    for tool in (tools if isinstance(tools, list) else ())
                    if isinstance(tool, dict)
                ],
            }
            return {"type": "allowed_tools", "allowed_tools": allowed}
    raise NotUnderstood("'tool_choice' names a tool that is no function.", "tool_choice")


def _given(members: dict[str, msgspec.Raw], name: str, default: object) -> object:
    """Return a field's JSON in one line, without white space, which may be most of the body."""
    raw = members.get(name)
    if raw is None or bytes(raw) == b"null":
        return default
    return msgspec.Raw(msgspec.json.format(bytes(raw), indent=-1))


def _is_neutral(field: str, json: msgspec.Raw) -> bool:
    if memoryview(json).nbytes > 64:
        return False
    value = msgspec.json.decode(json)
    return value in (None, [], {}) or value in NEUTRAL[field]
