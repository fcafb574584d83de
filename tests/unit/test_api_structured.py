"""Fields that constrain an answer: one grammar, or a refusal by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memserve.api.errors import ApiError, NotUnderstood
from memserve.api.grammar import Grammar, GrammarKind
from memserve.api.limits import MAX_CHOICES, MAX_DEPTH, MAX_GRAMMAR_CHARACTERS
from memserve.api.openai import parse_chat, parse_completion, sampling_params
from memserve.gateway.body_scan import check_body

SCHEMA = {"type": "integer"}
TEXT = json.dumps(SCHEMA)
TAG = {"type": "structural_tag", "structures": [], "triggers": []}
NEW_TAG = {"type": "structural_tag", "format": {"type": "any_text"}}


def grammar(chat: bool = False, **fields: Any) -> Grammar | None:
    if chat:
        body = {"messages": [{"role": "user", "content": "x"}], **fields}
        return sampling_params(parse_chat(json.dumps(body).encode()), 5, None).grammar
    body = {"prompt": "x", **fields}
    return sampling_params(parse_completion(json.dumps(body).encode()), 5, None).grammar


def made(kind: GrammarKind, source: str, param: str, compact: bool = False) -> Grammar:
    return Grammar(kind, source, compact, param)


FORMAT = "response_format"
OUTPUTS = "structured_outputs"
CASES: list[tuple[dict[str, Any], Grammar | None]] = [
    ({}, None),
    ({FORMAT: None, OUTPUTS: None, "guided_json": None}, None),
    ({FORMAT: {"type": "text"}, OUTPUTS: {}}, None),
    ({OUTPUTS: {"json": None, "regex": None, "json_object": False}}, None),
    ({FORMAT: {"type": "json_object"}}, made(GrammarKind.JSON_OBJECT, "", FORMAT)),
    (
        {FORMAT: {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        made(GrammarKind.JSON_SCHEMA, TEXT, FORMAT),
    ),
    (
        {
            FORMAT: {
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": True, "description": "d", "schema": SCHEMA},
            },
            OUTPUTS: {},
        },
        made(GrammarKind.JSON_SCHEMA, TEXT, FORMAT),
    ),
    ({FORMAT: TAG}, made(GrammarKind.STRUCTURAL_TAG, json.dumps(TAG), FORMAT)),
    ({FORMAT: NEW_TAG}, made(GrammarKind.STRUCTURAL_TAG, json.dumps(NEW_TAG), FORMAT)),
    ({OUTPUTS: {"json": SCHEMA}}, made(GrammarKind.JSON_SCHEMA, TEXT, f"{OUTPUTS}.json")),
    ({OUTPUTS: {"json": TEXT}}, made(GrammarKind.JSON_SCHEMA, TEXT, f"{OUTPUTS}.json")),
    (
        {OUTPUTS: {"json": SCHEMA, "disable_any_whitespace": True, "disable_fallback": True}},
        made(GrammarKind.JSON_SCHEMA, TEXT, f"{OUTPUTS}.json", compact=True),
    ),
    ({OUTPUTS: {"regex": "a+"}}, made(GrammarKind.REGEX, "a+", f"{OUTPUTS}.regex")),
    (
        {OUTPUTS: {"choice": ["a", "é"]}},
        made(GrammarKind.CHOICE, '["a","é"]', f"{OUTPUTS}.choice"),
    ),
    ({OUTPUTS: {"grammar": "g"}}, made(GrammarKind.EBNF, "g", f"{OUTPUTS}.grammar")),
    (
        {OUTPUTS: {"structural_tag": json.dumps(TAG)}},
        made(GrammarKind.STRUCTURAL_TAG, json.dumps(TAG), f"{OUTPUTS}.structural_tag"),
    ),
    (
        {OUTPUTS: {"json_object": True, "regex": None}},
        made(GrammarKind.JSON_OBJECT, "", f"{OUTPUTS}.json_object"),
    ),
    ({"guided_json": SCHEMA}, made(GrammarKind.JSON_SCHEMA, TEXT, "guided_json")),
    ({"guided_json": TEXT}, made(GrammarKind.JSON_SCHEMA, TEXT, "guided_json")),
    ({"guided_regex": "a"}, made(GrammarKind.REGEX, "a", "guided_regex")),
    ({"guided_choice": ["a"]}, made(GrammarKind.CHOICE, '["a"]', "guided_choice")),
    ({"guided_grammar": "g"}, made(GrammarKind.EBNF, "g", "guided_grammar")),
]


@pytest.mark.parametrize(("fields", "expected"), CASES)
@pytest.mark.parametrize("chat", [True, False])
def test_fields_become_one_grammar(
    chat: bool, fields: dict[str, Any], expected: Grammar | None
) -> None:
    assert grammar(chat, **fields) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({FORMAT: {"type": "json_object"}, OUTPUTS: {"regex": "a"}}, f"{OUTPUTS}.regex"),
        ({FORMAT: {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": {}, "guided_choice": ["a"]}, "guided_choice"),
        ({OUTPUTS: {"regex": "a", "json_object": True}}, OUTPUTS),
        ({FORMAT: {"type": "json_schema"}}, FORMAT),
        ({OUTPUTS: {"regex": "a" * (MAX_GRAMMAR_CHARACTERS + 1)}}, f"{OUTPUTS}.regex"),
    ],
)
def test_what_no_server_takes_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        grammar(**fields)
    assert not isinstance(refused.value, NotUnderstood)
    assert (refused.value.status, refused.value.detail.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({FORMAT: {"type": "xml"}}, "xml"),
        ({FORMAT: "json"}, "object"),
        ({FORMAT: {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, "name"),
        ({FORMAT: {"type": "json_schema", "json_schema": {"name": "a"}}}, "schema"),
        ({OUTPUTS: {"whitespace_pattern": " ?"}}, "whitespace_pattern"),
        ({OUTPUTS: {"disable_additional_properties": True}}, "disable_additional_properties"),
        ({OUTPUTS: {"backend": "x"}}, "backend"),
        ({OUTPUTS: {"choice": []}}, "choice"),
        ({OUTPUTS: {"choice": ["a"] * (MAX_CHOICES + 1)}}, "choice"),
        ({OUTPUTS: {"choice": ["a", ""]}}, "choice"),
        ({OUTPUTS: {"regex": ""}}, "regex"),
        ({OUTPUTS: {"json_object": 1}}, "json_object"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_regex": 5}, "guided_regex"),
    ],
)
def test_what_a_vllm_may_take_is_not_understood_here(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(NotUnderstood) as refused:
        grammar(**fields)
    assert refused.value.status == 400
    assert refused.value.detail.param == next(iter(fields))
    assert words in refused.value.detail.message
    assert refused.value.detail.param in refused.value.detail.message


def test_deep_schemas_are_no_exception() -> None:
    def deep(levels: int) -> bytes:
        return b'{"prompt":"x","guided_json":' + b'{"a":' * levels + b"1" + b"}" * (levels + 1)

    with pytest.raises(ApiError, match="'guided_json' is nested too deeply") as refused:
        check_body(deep(MAX_DEPTH))
    assert refused.value.status == 400
    deepest = deep(MAX_DEPTH - 1)  # what the check lets pass is decoded without an exception
    check_body(deepest)
    sampling_params(parse_completion(deepest), 5, None)
