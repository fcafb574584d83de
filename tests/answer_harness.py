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


def _deepseek_v3(calls: Sequence[Call]) -> str:
    said = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{_json(arguments)}\n```"
        "<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(said) + "<｜tool▁calls▁end｜>"


def _deepseek_v31(calls: Sequence[Call]) -> str:
    said = [
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{_json(arguments)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "".join(said) + "<｜tool▁calls▁end｜>"


def _kimi_k2(calls: Sequence[Call]) -> str:
    said = [
        f"<|tool_call_begin|>functions.{name}:{at}<|tool_call_argument_begin|>{_json(arguments)}"
        "<|tool_call_end|>"
        for at, (name, arguments) in enumerate(calls)
    ]
    return "<|tool_calls_section_begin|>" + "".join(said) + "<|tool_calls_section_end|>"


def _glm45(calls: Sequence[Call]) -> str:
    lines = []
    for name, arguments in calls:
        lines.append(f"<tool_call>{name}")
        for key, value in arguments.items():
            text = value if isinstance(value, str) and key == "city" else _json(value)
            lines += [f"<arg_key>{key}</arg_key>", f"<arg_value>{text}</arg_value>"]
        lines.append("</tool_call>")
    return "\n".join(lines)


def _granite(calls: Sequence[Call]) -> str:
    listed = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return f"<|tool_call|>{_json(listed)}"


def _openai(calls: Sequence[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{_json(arguments)}"
        "<|call|>"
        for name, arguments in calls
    )


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


WRITERS: dict[str, tuple[ToolFormat, Callable[[Sequence[Call]], str]]] = {
    "hermes": (ToolFormat.HERMES, _hermes),
    "llama3_json": (ToolFormat.LLAMA3_JSON, _llama),
    "mistral": (ToolFormat.MISTRAL, _mistral),
    "mistral 11": (ToolFormat.MISTRAL, _mistral_11),
    "qwen3_coder": (ToolFormat.QWEN3_CODER, _qwen3_coder),
    "pythonic": (ToolFormat.PYTHONIC, _pythonic),
    "deepseek_v3": (ToolFormat.DEEPSEEK_V3, _deepseek_v3),
    "deepseek_v31": (ToolFormat.DEEPSEEK_V31, _deepseek_v31),
    "glm45": (ToolFormat.GLM45, _glm45),
    "granite": (ToolFormat.GRANITE, _granite),
    "kimi_k2": (ToolFormat.KIMI_K2, _kimi_k2),
    "openai": (ToolFormat.OPENAI, _openai),
    "json_calls": (ToolFormat.JSON_CALLS, _json_calls),
}
# Formats whose calls may follow content.
AFTER_CONTENT = (
    *("hermes", "mistral", "mistral 11", "qwen3_coder", "deepseek_v3", "deepseek_v31", "glm45"),
    *("granite", "kimi_k2", "openai"),
)
# Whose calls come when they are whole.
WHOLE = ("pythonic", "glm45")
TOOL_FORMATS = [
    form for form in ToolFormat if form not in (ToolFormat.NONE, ToolFormat.RESPONSE_TEMPLATE)
]
# By markers around it; harmony is more than that.
REASONING_FORMATS = [
    form for form in ReasoningFormat if form not in (ReasoningFormat.NONE, ReasoningFormat.OPENAI)
]
