"""Tool calls and reasoning in the texts of models, case by case."""

from __future__ import annotations

import json

import pytest

from memserve.api.answer.delta import CallDelta, Delta, tool_call_id
from memserve.api.answer.format import AnswerFormat, ReasoningFormat, ToolFormat
from memserve.api.answer.known_templates import TEMPLATES
from memserve.api.answer.parser import AnswerParser
from memserve.api.answer.pythonic import MAX_ARGUMENTS
from tests.answer_harness import WRITERS, calls_of, deltas, format_of, parsed

HERMES, LLAMA = ToolFormat.HERMES, ToolFormat.LLAMA3_JSON
MISTRAL, CODER, PYTHONIC = ToolFormat.MISTRAL, ToolFormat.QWEN3_CODER, ToolFormat.PYTHONIC


@pytest.mark.parametrize(
    ("form", "text", "calls", "content"),
    [
        # In the order that the model chose, with what else it wrote.
        (HERMES, '<tool_call>{"arguments":{"a":1},"id":7,"name":"add"}</tool_call>', "add a=1", ""),
        (HERMES, '<tool_call>{"name":"add","arguments":{"a":1},"x":[]}</tool_call>', "add a=1", ""),
        (HERMES, '<tool_call>{"name":"add"}</tool_call>', "add", ""),
        (HERMES, '<tool_call>{"name":"add","arguments":null}</tool_call>', "add", ""),
        (HERMES, '<tool_call>{"name":"add","arguments":"{\\"a\\": 1}"}', "add a=1", ""),
        (HERMES, '<tool_call>{"name":"add","parameters":{"a":1}}', "add a=1", ""),
        (HERMES, '<tool_call><tool_call>{"name":"add"}</tool_call>', "add", "<tool_call>"),
        (HERMES, 'One.\n<tool_call>{"name":"add"}</tool_call>\nTwo.', "add", "One.\nTwo."),
        (HERMES, '<tool_call>{"name":"add"}</tool_call> <tool_call>no', "add", " <tool_call>no"),
        (HERMES, '<tool_call>{"name":"mcp.list-all/x"}</tool_call>', "mcp.list-all/x", ""),
        (LLAMA, '<|python_tag|>{"name":"add","parameters":{"a":1}}', "add a=1", ""),
        (LLAMA, '{"name":"add"}\n{"name":"add"}', "add;add", ""),
        (LLAMA, '{"name":"add"};\n{"name":"sub"}', "add", ';\n{"name":"sub"}'),
        (LLAMA, 'Sure: {"name":"add"}', "", 'Sure: {"name":"add"}'),
        (MISTRAL, '[TOOL_CALLS]add[CALL_ID]abc123[ARGS]{"a": 1}', "add a=1", ""),
        (MISTRAL, '[TOOL_CALLS]add {"a": 1}', "add a=1", ""),
        (MISTRAL, '[TOOL_CALLS]{"name":"add","arguments":{"a":1}}', "add a=1", ""),
        (MISTRAL, '[TOOL_CALLS][{"name":"add"}, {"name":"sub"}]', "add", ', {"name":"sub"}]'),
        (CODER, "<function=add>\n<parameter=a>\n1\n</parameter>\n</function>", "add a=1", ""),
        (CODER, "<tool_call><function=add></function></tool_call>.", "add", "."),
        (CODER, "<tool_call><function=sub></function>", "", "<tool_call><function=sub></function>"),
        (PYTHONIC, "[add(a=1), add(a=2,)]", "add a=1;add a=2", ""),
        (PYTHONIC, "<|python_start|>[add(a=1)]<|python_end|>", "add a=1", ""),
        (PYTHONIC, "Yes<|python_start|>[add()]", "add", "Yes"),
        (PYTHONIC, "[add(1)]", "", "[add(1)]"),
        (PYTHONIC, "[add(a=b)]", "", "[add(a=b)]"),
        (PYTHONIC, "[add(a=1), sub()]", "add a=1", ", sub()]"),
        (PYTHONIC, "[1, 2]", "", "[1, 2]"),
    ],
)  # fmt: skip
def test_a_model_s_text(form: ToolFormat, text: str, calls: str, content: str) -> None:
    found = parsed(format_of(form), [text])
    said = [
        " ".join([name, *(f"{key}={value}" for key, value in arguments.items())])
        for name, arguments in calls_of(found)
    ]
    assert (";".join(said), found.content) == (calls, content)


def test_a_call_is_told_in_openai_s_order() -> None:
    text = 'Hm.<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    found = [delta for delta in deltas(format_of(HERMES), text) if not delta.empty]
    assert "".join(delta.content for delta in found) == "Hm."
    calls = [call for delta in found for call in delta.calls]
    assert calls[0] == CallDelta(0, "weather", "{")
    assert [call.name for call in calls[1:]] == [None] * (len(calls) - 1)
    assert "".join(call.arguments for call in calls) == '{"city": "Oslo"}'


def test_arguments_that_are_no_json_stay_what_the_model_wrote() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": oops}}</tool_call>'
    assert parsed(format_of(HERMES), [text]).calls == (CallDelta(0, "add", '{"a": oops}'),)


def test_parameters_of_qwen3_coder_have_their_schema_s_types() -> None:
    values = {
        "city": ' Oslo "N"\nNorway',
        "days": "3",
        "exact": "True",
        "unit": "none",
        "where": '{"a": [1]}',
        "free": "as it is",
    }
    lines = [f"<parameter={key}>\n{value}\n</parameter>" for key, value in values.items()]
    text = "<tool_call>\n<function=weather>\n" + "\n".join(lines) + "\n</function>\n</tool_call>"
    found = parsed(format_of(CODER), text)
    assert calls_of(found) == [
        (
            "weather",
            {
                "city": ' Oslo "N"\nNorway',  # a text, by its schema
                "days": 3,
                "exact": True,
                "unit": None,
                "where": {"a": [1]},
                "free": "as it is",
            },
        )
    ]
    numeric = "<function=weather><parameter=city>12</parameter></function>"
    assert calls_of(parsed(format_of(CODER), [numeric])) == [("weather", {"city": "12"})]


def test_python_s_literals_become_json() -> None:
    text = """[add(a='it\\'s', b="\\u00e9\\x41\\n", c=-1.5e3, d=(1, [None, True]), e={'k': {}})]"""
    assert calls_of(parsed(format_of(PYTHONIC), [text])) == [
        ("add", {"a": "it's", "b": "éA\n", "c": -1500.0, "d": [1, [None, True]], "e": {"k": {}}})
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        "a=" + "[" * 200 + "]" * 200,
        "a=1e999",
        "a=" + "9" * 5000,
        "a='" + "x" * MAX_ARGUMENTS + "'",
        "a={1: 2}",
        "a=1 b=2",
        "a='x",
    ],
)
def test_what_is_too_much_for_json_is_content(arguments: str) -> None:
    text = f"[add({arguments})]"
    assert parsed(format_of(PYTHONIC), [text]) == Delta(text)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>',
        "[add(a='\\ud800')]",
        "<function=add><parameter=a>\\ud800</parameter></function>",
    ],
)
def test_what_is_found_can_be_sent(text: str) -> None:
    for form in (HERMES, PYTHONIC, CODER):
        found = parsed(format_of(form), [text])
        json.dumps([found.content, *(call.arguments for call in found.calls)]).encode()
        "".join([found.content, *(call.arguments for call in found.calls)]).encode()


@pytest.mark.parametrize(
    ("form", "begun", "text", "reasoning", "content"),
    [
        (ReasoningFormat.QWEN3, False, "<think>\nwhy\n</think>\n\nyes\n", "why", "yes\n"),
        (ReasoningFormat.QWEN3, True, "why\n\nnot\n</think>\n\nyes", "why\n\nnot", "yes"),
        (ReasoningFormat.QWEN3, False, "yes</think>", "", "yes</think>"),
        (ReasoningFormat.QWEN3, False, " \n yes", "", " \n yes"),
        (ReasoningFormat.QWEN3, False, "<think>\n\n</think>\n\nyes", "", "yes"),
        (ReasoningFormat.QWEN3, True, "cut off\n", "cut off\n", ""),
        (ReasoningFormat.DEEPSEEK_R1, False, "why</think>yes", "why", "yes"),
        (ReasoningFormat.DEEPSEEK_R1, False, "<think>why</think>yes", "why", "yes"),
        (ReasoningFormat.MISTRAL, False, "[THINK]why[/THINK]yes", "why", "yes"),
    ],
)
def test_reasoning(
    form: ReasoningFormat, begun: bool, text: str, reasoning: str, content: str
) -> None:
    answer = AnswerFormat(reasoning=form, reasoning_begun=begun)
    assert parsed(answer, [text]) == Delta(content, reasoning)
    hidden = AnswerFormat(reasoning=form, reasoning_begun=begun, include_reasoning=False)
    assert parsed(hidden, text) == Delta(content)


def test_calls_are_looked_for_behind_the_reasoning_alone() -> None:
    call = '<tool_call>{"name": "add"}</tool_call>'
    form = format_of(HERMES, reasoning=ReasoningFormat.QWEN3)
    assert parsed(form, [f"<think>{call}</think>\n{call}"]) == Delta(
        "", call, (CallDelta(0, "add", "{}"),)
    )


def test_an_answer_of_one_call_is_over_when_that_ends() -> None:
    parser = AnswerParser(format_of(HERMES, parallel=False))
    parser.push('<tool_call>{"name": "add", "arguments": {}')
    assert not parser.over
    parser.push("}")
    assert parser.over
    parser.push('</tool_call> and <tool_call>{"name": "add"}</tool_call>')
    parser.finish()
    assert parser.take() == Delta("", "", (CallDelta(0, "add", "{}"),))


def test_ids_of_calls_are_the_same_wherever_they_are_made() -> None:
    ids = {
        tool_call_id(call, choice, index, HERMES)
        for call in ("chatcmpl-1", "chatcmpl-11")
        for choice in (0, 1, 11)
        for index in (0, 1, 11)
    }
    assert len(ids) == 18
    assert all(id.startswith("call_") and id.removeprefix("call_").isalnum() for id in ids)
    assert tool_call_id("c", 0, 0, HERMES) == tool_call_id("c", 0, 0, HERMES)
    short = tool_call_id("c", 0, 0, MISTRAL)  # Mistral's templates take no other
    assert len(short) == 9
    assert short.isalnum()


@pytest.mark.parametrize(
    "writer", [name for name, (form, _) in WRITERS.items() if form in TEMPLATES]
)
def test_a_long_answer_at_once_is_read_as_in_pieces(writer: str) -> None:
    """A format's delimiters are looked for once, not from each of them to the end again."""
    form, write = WRITERS[writer]
    text = write([("add", {"n": 1})] * 1500)
    found = parsed(format_of(form), [text])
    assert len(found.calls) == 1500
    assert found == parsed(format_of(form), [text[at : at + 4] for at in range(0, len(text), 4)])
