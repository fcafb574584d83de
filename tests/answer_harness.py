"""Answers through the parsers, whole and in pieces, and models' ways to write calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from memserve.api.answer.delta import Delta, joined
from memserve.api.answer.format import AnswerFormat, Function, ReasoningFormat, ToolFormat
from memserve.api.answer.parser import AnswerParser

Call = tuple[str, Mapping[str, object]]

FUNCTIONS = (Function("weather", ("city",)), Function("add"), Function("mcp.list-all/x"))


def format_of(tools: ToolFormat = ToolFormat.NONE, **fields: object) -> AnswerFormat:
    functions = () if tools is ToolFormat.NONE else FUNCTIONS
    return AnswerFormat(tools=tools, functions=functions, **fields)  # type: ignore[arg-type]


def parsed(form: AnswerFormat, pieces: Iterable[str]) -> Delta:
    """All deltas of a stream, joined."""
    return joined(deltas(form, pieces))


def deltas(form: AnswerFormat, pieces: Iterable[str]) -> list[Delta]:
    parser = AnswerParser(form)
    found = []
    for piece in pieces:
        parser.push(piece)
        found.append(parser.take())
    parser.finish()
    return [*found, parser.take()]


def cut(text: str, places: Iterable[int]) -> list[str]:
    """The text in pieces that end at these places."""
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[begin:end] for begin, end in pairwise(ends)]


def calls_of(delta: Delta) -> list[Call]:
    return [(call.name or "", json.loads(call.arguments)) for call in delta.calls]


def _hermes(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        for name, arguments in calls
    )


def _llama(calls: Sequence[Call]) -> str:
    return "; ".join(
        json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)
        for name, arguments in calls
    )


def _mistral(calls: Sequence[Call]) -> str:
    return "[TOOL_CALLS] " + json.dumps(
        [{"name": name, "arguments": arguments} for name, arguments in calls]
    )


def _mistral_11(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


def _qwen3_coder(calls: Sequence[Call]) -> str:
    lines = []
    for name, arguments in calls:
        lines += ["<tool_call>", f"<function={name}>"]
        for key, value in arguments.items():
            text = value if isinstance(value, str) and key == "city" else json.dumps(value)
            lines += [f"<parameter={key}>", str(text), "</parameter>"]
        lines += ["</function>", "</tool_call>"]
    return "\n".join(lines)


def _pythonic(calls: Sequence[Call]) -> str:
    said = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    ]
    return f"[{', '.join(said)}]"


def _json_calls(calls: Sequence[Call]) -> str:
    return json.dumps([{"name": name, "parameters": arguments} for name, arguments in calls])


WRITERS: dict[str, tuple[ToolFormat, Callable[[Sequence[Call]], str]]] = {
    "hermes": (ToolFormat.HERMES, _hermes),
    "llama3_json": (ToolFormat.LLAMA3_JSON, _llama),
    "mistral": (ToolFormat.MISTRAL, _mistral),
    "mistral 11": (ToolFormat.MISTRAL, _mistral_11),
    "qwen3_coder": (ToolFormat.QWEN3_CODER, _qwen3_coder),
    "pythonic": (ToolFormat.PYTHONIC, _pythonic),
    "json_calls": (ToolFormat.JSON_CALLS, _json_calls),
}
# Formats whose calls may follow content.
AFTER_CONTENT = ("hermes", "mistral", "mistral 11", "qwen3_coder")
TOOL_FORMATS = [form for form in ToolFormat if form is not ToolFormat.NONE]
REASONING_FORMATS = [form for form in ReasoningFormat if form is not ReasoningFormat.NONE]
