"""Answers that are read by the response template of a model's tokenizer, as by Transformers."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_parsing import parse_response

from memserve.api.answer.delta import Delta, joined
from memserve.api.answer.format import AnswerFormat, Function, ToolFormat
from memserve.api.answer.parser import AnswerParser
from memserve.api.errors import ApiError
from memserve.errors import ModelError
from memserve.models.response_template import response_template
from memserve.models.tokenizer import Tokenizer
from tests.fakes import tiny_tokenizer

FUNCTIONS = (Function("weather", ("city",)), Function("add"))
JSON_CALLS: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|end_of_text\|>)"},
    },
}
TAGGED_CALLS: dict[str, Any] = {
    "start_anchor_pattern": r"<\|turn>model\s",
    "fields": {
        "reasoning_content": {
            "open": ["<think>", "<thought>"],
            "close": ["</think>", "</thought>"],
        },
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>(?:\s*<done>)?",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"
            },
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {},
    },
}
NAMED_CALLS: dict[str, Any] = {
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"close": ["<turn|>", "<eos>"]},
    },
}
STREAMED_CALLS: dict[str, Any] = {
    "start_anchor": "[answer]",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\[call (?P<name>\w+)\]",
            "close": "[/call]",
            "repeats": True,
            "content": "json",
            "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {},
    },
}
OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TWO = f"<tool_call>{OSLO}</tool_call>\n<tool_call>\n{OSLO}</tool_call>"
TAGGED = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\nNorway\n</parameter>\n"
    "</function>\n</tool_call>\n<done>"
)
TAGS_TWICE = (
    "<tool_call><function=add></function></tool_call>  <tool_call><function=add>"
    "</function>\n</tool_call>"
)
UNQUOTED = (
    '<|channel>thought\nhm<channel|><|tool_call>call:weather{city:<|"|>a "b"<|"|>,'
    "n:{m:[1,true]}}<tool_call|>"
)
PASSED_ON = '[call add] {"n": [1, {"m": null}]} [/call][call weather]{"city": "é"}[/call]'
TEXTS = [
    (JSON_CALLS, "", "Hello there.<|im_end|>\n<|end_of_text|>"),
    (JSON_CALLS, "", "<think>why not</think>\n\n  Hello.\n"),
    (JSON_CALLS, "<think>\n", "why\n not</think>Hello"),
    (JSON_CALLS, "", f"Let me see.\n{TWO}"),
    (JSON_CALLS, "", f"<think>a</think><tool_call>{OSLO}</tool_call>"),
    (TAGGED_CALLS, "", "<thought>hm</thought>so"),
    (TAGGED_CALLS, "", TAGGED),
    (TAGGED_CALLS, "", TAGS_TWICE),
    (NAMED_CALLS, "", UNQUOTED),
    (NAMED_CALLS, "<|channel>thought\n", "so<channel|>Yes.<turn|>"),
    (STREAMED_CALLS, "", PASSED_ON),
]
# What a prompt has begun: nothing said, some of it, an opening, a call's name and arguments.
BEGUN = [
    *[(template, begun, text) for template, begun, text in TEXTS if begun],
    (JSON_CALLS, "<think>a</think> so ", "  on<|im_end|>"),
    (JSON_CALLS, "<tool_", f"call>{OSLO}</tool_call>"),
    (JSON_CALLS, f"<tool_call>{OSLO[:20]}", f"{OSLO[20:]}</tool_call>"),
    (STREAMED_CALLS, "[call add]", '{"n": 1}[/call]'),
    (STREAMED_CALLS, '[call weather]{"city": "O\\', '"slo"}[/call] and'),
]


def read(template: dict[str, Any], pieces: list[str], begun: str = "", **fields: Any) -> Delta:
    form = AnswerFormat(ToolFormat.RESPONSE_TEMPLATE, FUNCTIONS, begun=begun, **fields)
    parser = AnswerParser(form, response_template(template))
    found = []
    for piece in pieces:
        parser.push(piece)
        found.append(parser.take())
    parser.finish()
    return joined([*found, parser.take()])


def told(delta: Delta) -> dict[str, Any]:
    """An answer as Transformers would tell it."""
    calls = [(call.name, json.loads(call.arguments)) for call in delta.calls]
    return {"content": delta.content, "reasoning": delta.reasoning, "calls": calls}


def by_transformers(template: dict[str, Any], text: str, begun: str) -> dict[str, Any]:
    message = parse_response(text, template, prefix=begun)
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return {
        "content": message.get("content", ""),
        "reasoning": message.get("thinking", message.get("reasoning_content", "")),
        "calls": [(call["name"], call["arguments"]) for call in calls],
    }


@pytest.mark.parametrize(("template", "begun", "text"), TEXTS)
def test_an_answer_is_read_as_by_transformers_wherever_it_is_cut(
    template: dict[str, Any], begun: str, text: str
) -> None:
    expected = by_transformers(template, text, begun)
    assert expected["content"] or expected["reasoning"] or expected["calls"]
    whole = read(template, [text], begun)
    assert told(whole) == expected
    assert read(template, list(text), begun) == whole
    for at in range(len(text)):
        assert read(template, [text[:at], text[at:]], begun) == whole


@pytest.mark.parametrize(("template", "begun", "text"), BEGUN)
def test_each_choice_goes_on_from_what_the_prompt_has_begun(
    template: dict[str, Any], begun: str, text: str
) -> None:
    form = AnswerFormat(ToolFormat.RESPONSE_TEMPLATE, FUNCTIONS, begun=begun)
    first = AnswerParser(form, response_template(template))
    choices = [first.anew() for _ in range(3)]
    found: list[list[Delta]] = [[] for _ in choices]
    for character in text:  # of all choices at the same time
        for parser, deltas in zip(choices, found, strict=True):
            parser.push(character)
            deltas.append(parser.take())
    whole = read(template, [text], begun)
    assert not whole.empty
    for parser, deltas in zip(choices, found, strict=True):
        parser.finish()
        assert joined([*deltas, parser.take()]) == whole


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call> and more',
        "so: <tool_call>{no json}</tool_call>",
        '<tool_call>{"name": "add", "arguments": {}',
        "<tool_call>" + "[" * 100_000,
    ],
)
def test_what_looks_like_a_call_and_is_none_is_content(text: str) -> None:
    for pieces in ([text], [text[:20], text[20:]]):
        assert read(JSON_CALLS, pieces) == Delta(text)


def test_arguments_in_json_are_passed_on_as_they_come() -> None:
    form = AnswerFormat(ToolFormat.RESPONSE_TEMPLATE, FUNCTIONS)
    parser = AnswerParser(form, response_template(STREAMED_CALLS))
    parser.push('Yes.\n[call weather] {"city": "Os')
    delta = parser.take()
    assert (delta.content, delta.calls[0].name) == ("Yes.", "weather")
    assert delta.calls[0].arguments == '{"city": "Os'


def test_an_answer_of_one_call_ends_with_it() -> None:
    text = f"<tool_call>{OSLO}</tool_call>\n<tool_call>{OSLO}</tool_call> more"
    found = read(JSON_CALLS, list(text), parallel=False)
    assert (len(found.calls), found.content) == (1, "")


def test_a_prompt_s_beginning_of_the_answer_is_found() -> None:
    template = response_template(TAGGED_CALLS)
    prompt = "<|turn>model\nold<|turn>user\nhi<|turn>model\n<think>\n"
    assert template.begun(prompt, 1.0) == "<think>\n"
    assert response_template(NAMED_CALLS).begun("no anchor", 1.0) == ""


BACKTRACKING = r"(a+)+(a+)+(a+)+b(?<=x)"
HOSTILE = [
    BACKTRACKING,
    r"(?:a?){40}(?:a){40}b",
    r"(?=a)",  # opens where it closes, without end
    r"a*",
    r"(?:)",
]


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("field", ["tool_calls", "reasoning_content", "content"])
def test_a_template_that_is_meant_to_hurt_costs_little_and_loses_nothing(
    pattern: str, field: str
) -> None:
    template = {
        "start_anchor_pattern": pattern,
        "fields": {
            "content": {},
            "other": {"open": "never"},
            field: {"open_pattern": pattern, "close_pattern": pattern, "content": "text"},
        },
    }
    if field == "content":
        template["fields"][field].pop("open_pattern")  # type: ignore[index]
    text = "a" * 3000
    begun = time.thread_time()
    read(template, list(text))
    # A budget by piece, and one at the start, each of which may be overdrawn once.
    assert time.thread_time() - begun < 3000 * 0.001 + 2
    begun = time.thread_time()
    response_template(template).begun(text * 20, 0.02)
    assert time.thread_time() - begun < 2


def test_a_pattern_that_takes_too_long_makes_the_rest_content() -> None:
    template = json.loads(json.dumps(STREAMED_CALLS))
    template["fields"]["tool_calls"]["open_pattern"] = f"(?P<name>{BACKTRACKING})"
    text = "so " + "a" * 200 + "[call add]{}[/call]"
    assert read(template, list(text)) == Delta(text)


def test_a_pause_that_is_not_the_patterns_takes_nothing_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of the garbage collector, which may run between any two lines, and take 0.1 s and more."""
    expected = [read(template, [text * 9], begun) for template, begun, text in TEXTS]
    pauses = itertools.cycle([0.0] * 40 + [0.3])
    paused = itertools.accumulate(pauses)
    monkeypatch.setattr(time, "thread_time", lambda: next(paused))
    for (template, begun, text), whole in zip(TEXTS, expected, strict=True):
        assert read(template, list(text * 9), begun) == whole


def test_values_that_take_long_use_up_the_same_budget() -> None:
    pattern = f"(?P<key>{BACKTRACKING})(?P<value>x)"
    template = _calls(close="</c>", content="xml-inline", content_args={"tag_pattern": pattern})
    text = ("<c>" + "a" * 300 + "</c>") * 200
    begun = time.thread_time()
    assert read(template, [text]) == Delta(text)
    assert time.thread_time() - begun < 2


def _calls(**more: Any) -> dict[str, Any]:
    field = {"open": "<c>", **more} if "open_pattern" not in more else more
    return {"fields": {"tool_calls": field, "content": {}}, "start_anchor": "x"}


def _deep_parsers(depth: int) -> dict[str, Any]:
    args: dict[str, Any] = {}
    for _ in range(depth):
        args = {"value_parser": {"name": "kv-lines", "args": args}}
    return _calls(content="kv-lines", content_args=args)


def test_a_tag_without_a_key_makes_no_argument() -> None:
    tag = "<(?:(?P<key>[a-z]+)=)?(?P<value>[0-9]+)>"
    named = {"name": "add", "arguments": "{content}"}
    template = _calls(
        close="</c>", content="xml-inline", content_args={"tag_pattern": tag}, transform=named
    )
    assert told(read(template, ["<c><a=1></c>"]))["calls"] == [("add", {"a": 1})]
    assert read(template, ["<c><a=1><2></c>"]) == Delta("<c><a=1><2></c>")


# Conditions that a stream can decide.
@pytest.mark.parametrize(
    "pattern",
    [
        *(r"\b<x>", r"\bx", r"<x>(?=a|b)", r"<x>(?!ab)", r"[$\b]x", r"\$x", r"\\bx", r"(?<=b)<x>"),
        r"(?=(?P<name>x+))x",
    ],
)
@pytest.mark.parametrize("text", ["b<x>ab", "b<x>b<x>", "$x \\bx", "a<x>", "xx", "bx<x>abx<x>c"])
def test_a_condition_in_a_pattern_does_not_depend_on_the_pieces(pattern: str, text: str) -> None:
    template = {
        "start_anchor": "x",
        "fields": {"thinking": {"open_pattern": pattern, "repeats": True}, "content": {}},
    }
    whole = read(template, [text])
    for at in range(len(text)):
        assert read(template, [text[:at], text[at:]]) == whole
    assert read(template, list(text)) == whole


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "Expected `object`"),
        ({"fields": {}, "start_anchor": "x"}, "length >= 1"),
        ({"fields": {"content": {}}}, "start_anchor"),
        ({"fields": {"content": {}, "more": {}}, "start_anchor": "x"}, "more than one"),
        ({"fields": {"content": {"opens": "x"}}, "start_anchor": "x"}, "opens"),
        ({"fields": {"content": {"open_pattern": "("}}, "start_anchor": "x"}, "missing"),
        ({"fields": {"content": {"open": ""}}, "start_anchor": "x"}, "length >= 1"),
        ({"fields": {"content": {"open": "a", "open_pattern": "a"}}, "start_anchor": "x"}, "and a"),
        ({"fields": {"content": {"join": " "}}, "start_anchor": "x"}, "'join'"),
        ({"fields": {"content": {"content": "yaml"}}, "start_anchor": "x"}, "yaml"),
        ({"fields": {"content": {}}, "start_anchor": "x", "version": 2}, "version"),
        ({"fields": {"content": {"open_pattern": "a" * 2001}}, "start_anchor": "x"}, "2000"),
        (_calls(open_pattern="(?:(?:a{1000}){1000}){1000}"), "repeats too often"),
        (_calls(open_pattern="a{1,100000000}"), "repeats too often"),
        *[
            (_calls(open_pattern=pattern), "next piece")
            for pattern in (
                *(r"\b<x>\b", r"<x>\B", r"x\m", r"x\M", r"<x>$", r"<x>|$", r"<x>(?:\Z|a)"),
                *(r"[^]\]$]\b", r"\\\b"),
            )
        ],
        (_calls(close_pattern="<x>$"), "next piece"),
        (_calls(content="xml-inline"), "tag_pattern"),
        (_calls(content="xml-inline", content_args={"tag_pattern": "(?P<key>a)"}), "tag_pattern"),
        (_calls(content="json", content_args={"string_delims": [["", ""]]}), "length >= 1"),
        (_calls(content="kv-lines", content_args={"line_sep": ""}), "length >= 1"),
        (_deep_parsers(3000), "recursion"),
    ],
)
def test_a_template_that_is_none_is_refused_with_the_reason(source: object, said: str) -> None:
    with pytest.raises(ModelError, match="response_template") as refused:
        response_template(source)
    assert said in str(refused.value)


def with_template(directory: Path, template: object) -> Tokenizer:
    tiny_tokenizer(directory, "{{ tools }}{{ messages }}")
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, "response_template": template}))
    return Tokenizer.load(directory)


def test_a_tokenizer_s_template_is_found_and_a_broken_one_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert with_template(tmp_path, JSON_CALLS).response_template is not None
    assert not caplog.records
    assert with_template(tmp_path, {"fields": {}}).response_template is None
    assert "tokenizer_config.json is not used" in caplog.text


def test_a_call_for_a_template_that_is_not_here_is_refused() -> None:
    with pytest.raises(ApiError, match="no response template"):
        AnswerParser(AnswerFormat(ToolFormat.RESPONSE_TEMPLATE))
