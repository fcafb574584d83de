"""Parsers of tool calls and reasoning, against any text and any way in which it comes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.api.answer.format import AnswerFormat, ReasoningFormat, ToolFormat
from memserve.api.answer.parser import AnswerParser
from memserve.api.answer.template_parser import TemplateParser
from tests.answer_harness import (
    AFTER_CONTENT,
    REASONING_FORMATS,
    TOOL_FORMATS,
    WHOLE,
    WRITERS,
    Call,
    calls_of,
    cut,
    deltas,
    format_of,
    parsed,
)

MOST_HELD = 32  # characters: the longest marker
MOST_HELD_OF_TEMPLATES = 400  # an opening with the longest name

# What answers are made of, so that markers and their parts meet in every order.
FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<function=weather>", "<function=", "</function>"),
    *("<parameter=city>", "<parameter=", "</parameter>", "<|python_tag|>", "<|python_start|>"),
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_end|>", "<think>", "</think>", "[THINK]"),
    *("[/THINK]", '{"name": "weather", "arguments": {', '"name": "add"', '"parameters": {}'),
    *('"arguments": "{}"', '"arguments": null', "weather", "add", "weather(city='", "add(", "=1"),
    *("[", "]", "{", "}", "(", ")", '"', "'", "\\", ",", ":", ";", " ", "\n", "<", ">", "\\ud800"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function", "<｜tool▁sep｜>", "add\n"),
    *("```json\n", "\n```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "</arg_value>"),
    *("<arg_key>a</arg_key>", "<arg_value>", "<|tool_call|>", "<|tool_call_begin|>", "functions."),
    *(":0", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_begin|>"),
    *("<|tool_calls_section_end|>", "<|channel|>", "analysis", "commentary", "final", " to="),
    *("<|message|>", "<|end|>", "<|start|>assistant", "<|call|>", " <|constrain|>json"),
    *("true", "null", "12", "-1.5e3", "é", "你好", "text"),
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=24).map("".join)
places = st.lists(st.integers(min_value=0, max_value=400), max_size=24)
formats = st.builds(
    format_of,
    st.sampled_from([ToolFormat.NONE, *TOOL_FORMATS]),
    parallel=st.booleans(),
    reasoning=st.sampled_from(ReasoningFormat),
    reasoning_begun=st.booleans(),
    include_reasoning=st.booleans(),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
keys = st.sampled_from(["n", "unit", "where_2"])
calls = st.lists(
    st.tuples(st.sampled_from(["weather", "add"]), st.dictionaries(keys, values, max_size=3)),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize(("tools", "write"), WRITERS.values(), ids=WRITERS)
@settings(deadline=None)
@given(st.sampled_from(["\n\nHello", "  x", "\n"]), places)
def test_what_follows_a_call_is_the_same_in_whatever_pieces_it_comes(
    tools: ToolFormat, write: Callable[[list[Call]], str], behind: str, places: list[int]
) -> None:
    form = format_of(tools)
    text = write([("add", {"n": 1})]) + behind
    whole = parsed(form, [text])
    assert parsed(form, cut(text, places)) == whole
    assert parsed(form, text) == whole


@settings(deadline=None)
@given(formats, texts, places)
def test_an_answer_is_the_same_in_whatever_pieces_it_comes(
    form: AnswerFormat, text: str, places: list[int]
) -> None:
    whole = parsed(form, [text])
    assert parsed(form, cut(text, places)) == whole
    assert parsed(form, text) == whole  # character by character


@settings(deadline=None)
@given(st.sampled_from([form for form in TOOL_FORMATS if form is not ToolFormat.OPENAI]), texts)
def test_what_is_no_call_is_content_to_the_letter(form: ToolFormat, text: str) -> None:
    found = parsed(format_of(form), [text])
    if not found.calls:
        assert found.content == text


@settings(deadline=None)
@given(texts, st.sampled_from(REASONING_FORMATS), st.booleans())
def test_reasoning_and_content_are_all_there_is(
    text: str, form: ReasoningFormat, begun: bool
) -> None:
    found = parsed(AnswerFormat(reasoning=form, reasoning_begun=begun), [text])
    said = found.reasoning + found.content
    for marker in ("<think>", "</think>", "[THINK]", "[/THINK]"):
        text, said = text.replace(marker, ""), said.replace(marker, "")
    assert "".join(said.split()) == "".join(text.split())


@pytest.mark.parametrize("writer", WRITERS)
@settings(deadline=None)
@given(st.data())
def test_calls_come_back_as_they_were_made(writer: str, data: st.DataObject) -> None:
    form, write = WRITERS[writer]
    made: list[Call] = data.draw(calls)
    lead = data.draw(st.sampled_from(["", "Let me see."])) if writer in AFTER_CONTENT else ""
    tail = data.draw(st.sampled_from(["", "Done."]))
    text = f"{lead}\n{write(made)}\n{tail}"
    found = parsed(format_of(form), cut(text, data.draw(places)))
    assert calls_of(found) == made
    assert "".join(found.content.split()) == "".join((lead + tail).split())


@pytest.mark.parametrize("writer", WRITERS)
def test_an_answer_may_break_off_anywhere(writer: str) -> None:
    form, write = WRITERS[writer]
    text = write([("add", {"city": "Oslo", "n": 3}), ("add", {})])
    whole = parsed(format_of(form), [text])
    for end in range(len(text)):
        found = parsed(format_of(form), [text[:end]])
        for call, full in zip(found.calls, whole.calls, strict=False):
            assert call.name == full.name
            assert full.arguments.startswith(call.arguments), text[:end]
        if not found.calls:
            assert found.content == text[:end]


@pytest.mark.parametrize("writer", WRITERS)
@settings(deadline=None)
@given(st.data())
def test_an_answer_that_breaks_off_has_what_was_there(writer: str, data: st.DataObject) -> None:
    form, write = WRITERS[writer]
    made: list[Call] = data.draw(calls)
    text = write(made)
    end = data.draw(st.integers(0, len(text)))
    found = parsed(format_of(form), cut(text[:end], data.draw(places)))
    whole = parsed(format_of(form), [text])
    for call, full in zip(found.calls, whole.calls, strict=False):
        assert call.name == full.name
        assert full.arguments.startswith(call.arguments)
    if not found.calls:
        assert found.content == text[:end]


@settings(deadline=None)
@given(calls, places)
def test_an_answer_without_parallel_calls_ends_with_the_first(
    made: list[Call], places: list[int]
) -> None:
    for form, write in WRITERS.values():
        text = write(made)
        found = parsed(format_of(form, parallel=False), cut(text, places))
        assert found.calls == parsed(format_of(form), [text]).calls[:1]
        assert found.content == ""


@settings(deadline=None)
@given(st.dictionaries(keys, values), places)
def test_a_named_function_s_arguments_are_the_answer(
    arguments: dict[str, object], places: list[int]
) -> None:
    form = format_of(ToolFormat.JSON_ARGUMENTS)
    found = parsed(form, cut(json.dumps(arguments), places))
    assert calls_of(found) == [("weather", arguments)]


@settings(deadline=None)
@given(st.sampled_from([name for name in WRITERS if name not in WHOLE]), st.text(min_size=40))
def test_long_arguments_are_passed_on_as_they_come(writer: str, city: str) -> None:
    form, write = WRITERS[writer]
    text = write([("weather", {"city": city})])
    with_arguments = [
        delta for delta in deltas(format_of(form), text) for call in delta.calls if call.arguments
    ]
    assert len(with_arguments) > 30


@settings(deadline=None)
@given(formats, texts | st.sampled_from(FRAGMENTS).map(lambda text: text * 100))
def test_no_text_is_read_over_and_over(form: AnswerFormat, text: str) -> None:
    parser = AnswerParser(form)
    for character in text:
        parser.push(character)
        for part in (parser._tools, parser._reasoning):
            if isinstance(part, TemplateParser):
                assert len(part._buffer) - part._at < MOST_HELD_OF_TEMPLATES
            else:
                assert part is None or len(part._held) < MOST_HELD
