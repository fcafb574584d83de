"""Grammars of answers that have more than one part: reasoning, and calls beside a constrained
answer. They are structural tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from memserve.api.answer.format import ReasoningFormat, ToolFormat
from memserve.api.answer.reasoning import MARKERS
from memserve.api.errors import invalid
from memserve.api.grammar import Grammar, GrammarKind
from memserve.api.limits import MAX_GRAMMAR_CHARACTERS
from memserve.api.openai_tools import Tool
from memserve.gateway.calls_schema import ANY_ARGUMENTS, calls_schema

Format = dict[str, Any]

_NAMES: Final = re.compile("NAME_IN_JSON|NAME")
_BLANK: Final[Format] = {"type": "regex", "pattern": r"\s{0,4}"}


@dataclass(frozen=True, slots=True)
class Written:
    """How a format writes calls whose arguments are JSON. `begin` (with the name, in JSON or as it
    is) and `end`: around the arguments. `opening` and `closing`: around all calls. `trigger`: what
    the first call begins with, wherever it stands; None: calls are the whole answer."""

    begin: str
    end: str
    separator: str
    trigger: str | None
    opening: str = ""
    closing: str = ""
    numbered: str = ""  # what follows the number behind `begin`; none where calls have no number

    def tag(self, tool: Tool) -> Format:
        """Return the format of a call of one function."""
        name = tool.function.name
        in_json = msgspec.json.encode(name).decode()
        content = _schema(tool.function.parameters or ANY_ARGUMENTS)
        if self.numbered:
            inner = {"type": "tag", "begin": self.numbered, "content": content, "end": self.end}
            number = {"type": "regex", "pattern": "[0-9]{1,3}"}
            content = {"type": "sequence", "elements": [number, inner]}
        names = {"NAME_IN_JSON": in_json, "NAME": name}
        begin = _NAMES.sub(lambda found: names[found[0]], self.begin)
        end = "" if self.numbered else self.end
        return {"type": "tag", "begin": begin, "content": content, "end": end}

    def calls(self, tools: Sequence[Tool], single: bool) -> Format:
        """Return the format of one or more calls."""
        calls: Format = {
            "type": "tags_with_separator",
            "tags": [self.tag(tool) for tool in tools],
            "separator": self.separator,
            "at_least_one": True,
            "stop_after_first": single,
        }
        if not self.opening:
            return calls
        return {"type": "tag", "begin": self.opening, "content": calls, "end": self.closing}


_WRITTEN: Final = {
    ToolFormat.HERMES: Written(
        '<tool_call>\n{"name": NAME_IN_JSON, "arguments": ',
        "}\n</tool_call>",
        "\n",
        "<tool_call>",
    ),
    ToolFormat.LLAMA3_JSON: Written('{"name": NAME_IN_JSON, "parameters": ', "}", "; ", None),
    ToolFormat.MISTRAL: Written(
        '{"name": NAME_IN_JSON, "arguments": ', "}", ", ", "[TOOL_CALLS]", "[TOOL_CALLS] [", "]"
    ),
    ToolFormat.GRANITE: Written(
        '{"name": NAME_IN_JSON, "arguments": ', "}", ", ", "<|tool_call|>", "<|tool_call|>[", "]"
    ),
    ToolFormat.DEEPSEEK_V3: Written(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
        "\n```<｜tool▁call▁end｜>",
        "\n",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    ToolFormat.DEEPSEEK_V31: Written(
        "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    ToolFormat.KIMI_K2: Written(
        "<|tool_call_begin|>functions.NAME:",
        "<|tool_call_end|>",
        "",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_argument_begin|>",
    ),
}
# Text that Llama's format takes for content.
_NO_CALL: Final[Format] = {"type": "regex", "pattern": r"\s*([^\s{][\x{0}-\x{10ffff}]*)?"}


def behind_reasoning(grammar: Grammar, reasoning: ReasoningFormat, begun: bool) -> Grammar:
    """Return the grammar of an answer that obeys `grammar` behind its reasoning, if it has any.
    `begun`: it is in the reasoning from the start."""
    answer = format_of(grammar)
    if answer is None:
        return grammar
    begin, end = MARKERS[reasoning]
    reasoned = {
        "type": "sequence",
        "elements": [
            {
                "type": "tag",
                "begin": "" if begun else begin,
                "content": {"type": "any_text"},
                "end": end,
            },
            _BLANK,
            answer,
        ],
    }
    return tags(reasoned if begun else {"type": "or", "elements": [answer, reasoned]}, grammar)


def or_calls(
    grammar: Grammar, form: ToolFormat, tools: Sequence[Tool], single: bool
) -> tuple[Grammar, ToolFormat]:
    """Return the grammar of an answer that either obeys `grammar` or calls some of `tools`, and
    the format of its calls: the model's own, if that is JSON. `single`: of one call."""
    answer = format_of(grammar)
    if answer is None:
        raise invalid(f"'{grammar.kind}' and tools that may be called do not go together.", "tools")
    written = _WRITTEN.get(form)
    if written is not None:
        calls = written.calls(tools, single)
    else:
        form = ToolFormat.JSON_CALLS
        calls = _schema(calls_schema(tools, single))
    return tags({"type": "or", "elements": [answer, calls]}, grammar), form


def strict_calls(form: ToolFormat, tools: Sequence[Tool], single: bool) -> Grammar | None:
    """Return the grammar of an answer in which calls, wherever they stand, obey the schemas of
    those functions that are strict; None for a format whose arguments are not JSON."""
    tools = strict_alone(tools)
    empty = Grammar(GrammarKind.STRUCTURAL_TAG, "", param="tools")
    written = _WRITTEN.get(form)
    if written is None:
        return None
    if written.trigger is None:
        whole = {"type": "or", "elements": [written.calls(tools, single), _NO_CALL]}
        return tags(whole, empty)
    calls = written.calls(tools, single)
    triggered = {
        "type": "triggered_tags",
        "triggers": [written.trigger],
        "tags": [calls] if written.opening else calls["tags"],
        "stop_after_first": single,
    }
    return tags(triggered, empty)


def strict_alone(tools: Sequence[Tool]) -> list[Tool]:
    """Return the tools; those that are not strict take any arguments."""
    return [
        tool
        if tool.function.strict
        else Tool(msgspec.structs.replace(tool.function, parameters=None))
        for tool in tools
    ]


def schema_grammar(schema: object) -> Grammar:
    """Return the grammar of a JSON schema that comes from a request's tools."""
    source = msgspec.json.encode(schema).decode()
    return _bounded(Grammar(GrammarKind.JSON_SCHEMA, source, param="tools"), "tools")


def _schema(schema: object) -> Format:
    return {"type": "json_schema", "json_schema": schema}


def format_of(grammar: Grammar) -> Format | None:
    """Return a grammar as a part of a structural tag; None if it cannot be one."""
    if grammar.kind is GrammarKind.JSON_OBJECT:
        return _schema({"type": "object"})
    if grammar.kind is GrammarKind.REGEX:
        return {"type": "regex", "pattern": grammar.source}
    if grammar.kind is GrammarKind.EBNF:
        return {"type": "grammar", "grammar": grammar.source}
    try:
        source = msgspec.json.decode(grammar.source)
    except (msgspec.DecodeError, RecursionError):  # the instance says what is wrong with it
        return None
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        return _schema(source)
    if grammar.kind is GrammarKind.CHOICE and isinstance(source, list):
        texts = [{"type": "const_string", "value": text} for text in source]
        return {"type": "or", "elements": texts}
    if grammar.kind is GrammarKind.STRUCTURAL_TAG and isinstance(source, dict):
        inner = source.get("format")
        return inner if isinstance(inner, dict) else None
    return None


def tags(form: Format, like: Grammar) -> Grammar:
    """Return a format as a grammar with the settings of `like`."""
    source = msgspec.json.encode({"type": "structural_tag", "format": form}).decode()
    changed = msgspec.structs.replace(like, kind=GrammarKind.STRUCTURAL_TAG, source=source)
    return _bounded(changed, "tools")


def _bounded(grammar: Grammar, param: str) -> Grammar:
    if len(grammar.source) > MAX_GRAMMAR_CHARACTERS:
        raise invalid(
            f"The answer's grammar has {len(grammar.source)} characters with what '{param}' adds, "
            f"and at most {MAX_GRAMMAR_CHARACTERS} may be.",
            param,
        )
    return grammar
