"""Grammars of answers that have more than one part: reasoning, and calls beside a constrained
answer. They are structural tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from memserve.api.answer.format import ReasoningFormat, ToolFormat
from memserve.api.answer.reasoning import MARKERS
from memserve.api.errors import invalid
from memserve.api.grammar import Grammar, GrammarKind
from memserve.api.limits import MAX_GRAMMAR_CHARACTERS
from memserve.api.openai_tools import Tool
from memserve.gateway.calls_schema import ANY_ARGUMENTS, calls_schema

_Format = dict[str, Any]

_BLANK: Final[_Format] = {"type": "regex", "pattern": r"\s{0,4}"}
# Begin and end of a call around its arguments, what separates calls, and what is around all.
_TAGS: Final = {
    ToolFormat.HERMES: (
        ('<tool_call>\n{"name": %s, "arguments": ', "}\n</tool_call>"),
        "\n",
        ("", ""),
    ),
    ToolFormat.LLAMA3_JSON: (('{"name": %s, "parameters": ', "}"), "; ", ("", "")),
    ToolFormat.MISTRAL: (('{"name": %s, "arguments": ', "}"), ", ", ("[TOOL_CALLS] [", "]")),
}


def behind_reasoning(grammar: Grammar, reasoning: ReasoningFormat, begun: bool) -> Grammar:
    """Return the grammar of an answer that obeys `grammar` behind its reasoning, if it has any.
    `begun`: it is in the reasoning from the start."""
    answer = _format_of(grammar)
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
    return _tags(reasoned if begun else {"type": "or", "elements": [answer, reasoned]}, grammar)


def or_calls(
    grammar: Grammar, form: ToolFormat, tools: Sequence[Tool], single: bool
) -> tuple[Grammar, ToolFormat]:
    """Return the grammar of an answer that either obeys `grammar` or calls some of `tools`, and
    the format of its calls: the model's own, if that is JSON. `single`: of one call."""
    answer = _format_of(grammar)
    if answer is None:
        raise invalid(f"'{grammar.kind}' and tools that may be called do not go together.", "tools")
    if form in _TAGS:
        (begin, end), separator, (opening, closing) = _TAGS[form]
        tags = [
            {
                "type": "tag",
                "begin": begin % msgspec.json.encode(tool.function.name).decode(),
                "content": _schema(tool.function.parameters or ANY_ARGUMENTS),
                "end": end,
            }
            for tool in tools
        ]
        calls: _Format = {
            "type": "tags_with_separator",
            "tags": tags,
            "separator": separator,
            "at_least_one": True,
            "stop_after_first": single,
        }
        if opening:
            edges = [{"type": "const_string", "value": text} for text in (opening, closing)]
            calls = {"type": "sequence", "elements": [edges[0], calls, edges[1]]}
    else:
        form = ToolFormat.JSON_CALLS
        calls = _schema(calls_schema(tools, single))
    return _tags({"type": "or", "elements": [answer, calls]}, grammar), form


def schema_grammar(schema: object) -> Grammar:
    """Return the grammar of a JSON schema that comes from a request's tools."""
    return _bounded(Grammar(GrammarKind.JSON_SCHEMA, msgspec.json.encode(schema).decode()), "tools")


def _schema(schema: object) -> _Format:
    return {"type": "json_schema", "json_schema": schema}


def _format_of(grammar: Grammar) -> _Format | None:
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


def _tags(form: _Format, like: Grammar) -> Grammar:
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
