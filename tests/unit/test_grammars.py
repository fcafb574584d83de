"""Compiled grammars: what they take, what is refused and where, and what they may cost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memserve.api.grammar import Grammar, GrammarKind
from memserve.errors import GrammarFailed, RequestError
from memserve.grammars import structural_tag
from memserve.grammars.compiler import (
    BURST_SECONDS,
    STEP_SECONDS,
    TOKEN_SECONDS,
    GrammarCompiler,
    LibraryGrammar,
)
from memserve.models.tokenizer import Tokenizer
from tests.fakes import tiny_tokenizer
from tests.grammar_harness import matches, schema_grammar

VOCAB = 333  # no multiple of 8, and wider than the tokenizer
REGEX, EBNF, CHOICE = GrammarKind.REGEX, GrammarKind.EBNF, GrammarKind.CHOICE
TAG = GrammarKind.STRUCTURAL_TAG


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB)


ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+   # a line each
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
ROW = '{"a":1,"b":[true,null]}'


def tag(name: str) -> dict[str, Any]:
    content = {"type": "json_schema", "json_schema": {"type": "boolean"}}
    return {"type": "tag", "begin": f"<f={name}>", "content": content, "end": "</f>"}


def tags(**options: bool) -> dict[str, Any]:
    named = {"type": "triggered_tags", "triggers": ["<f="], "tags": [tag("a"), tag("b")]}
    return {"type": "structural_tag", "format": {**named, **options}}


def format_(**fields: Any) -> str:
    return json.dumps({"format": fields})


STRUCTURE = {"begin": "<g>", "schema": {"const": 1}, "end": "."}
THINK = {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": ["</t>", "!!"]}
TAKEN: list[tuple[GrammarKind, str, list[str], list[str]]] = [
    (GrammarKind.JSON_OBJECT, "", ["{}", ROW, ' {"é": "\\n"}'.strip()], ["[]", "1", "{", "{a:1}"]),
    (GrammarKind.JSON_SCHEMA, "true", ["1", '"a"', ROW], ["", "a"]),
    (REGEX, "[0-9]{2}/(a|bc)", ["12/a", "00/bc"], ["1/a", "12/b", "12/aa"]),
    (REGEX, "^ab$", ["ab"], ["abc"]),
    (CHOICE, '["yes", "no", "nope", "é\\n"]', ["yes", "no", "nope", "é\n"], ["y", "nop", "yesno"]),
    (EBNF, ARITHMETIC, ["a=b\n", "a+(3*c)= d\n\nx=1\n"], ["a", "a=\n", "(a=b\n"]),
    (EBNF, 'root ::= "(" root ")" | [a-z]+ "z"', ["((abz))", "zz"], ["((ab))", "((abz)"]),
    (EBNF, 'start: "a" x\nx: /[0-9]+/', ["a1", "a22"], ["a", "1"]),
    (EBNF, 'root ::= [\\x41-C]{2} "\\u00e9" . "\\\\"', ["ACéx\\", "BBé\n\\"], ["Aé1\\", "ABéx"]),
    (TAG, json.dumps(tags()), ["", "hi", "hi<f=a>true</f>, <f=b>false</f>"], ["<f=c>", "<f=a>1"]),
    (TAG, json.dumps(tags(at_least_one=True)), ["<f=a>true</f>hi"], ["hi<f=a>true</f>", ""]),
    (TAG, json.dumps(tags(stop_after_first=True)), ["a<f=a>true</f>", "a"], ["<f=a>true</f>b"]),
    (
        TAG,
        json.dumps({"structures": [STRUCTURE], "triggers": ["<"]}),
        ["1 > 2", "x<g>1. y"],
        ["1 < 2", "<g>2."],
    ),
    (
        TAG,
        format_(type="sequence", elements=[THINK, tag("a")]),
        ["<t>so</t><f=a>true</f>", "<t>!!<f=a>false</f>"],
        ["<t>so", "<f=a>true</f>"],
    ),
    (
        TAG,
        format_(type="tags_with_separator", tags=[tag("a")], separator=", ", at_least_one=True),
        ["<f=a>true</f>", "<f=a>true</f>, <f=a>false</f>"],
        ["", "<f=a>true</f>, "],
    ),
    (
        TAG,
        format_(
            type="or",
            elements=[
                {"type": "const_string", "value": "no"},
                {"type": "regex", "pattern": "a/b?"},
                {"type": "grammar", "grammar": 'root ::= "g"+'},
                {"type": "repeat", "min": 2, "max": 3, "content": tag("b")},
            ],
        ),
        ["no", "a/", "gg", "<f=b>true</f><f=b>true</f>"],
        ["", "n", "<f=b>true</f>"],
    ),
]


@pytest.mark.parametrize(("kind", "source", "good", "bad"), TAKEN)
def test_what_a_grammar_takes(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    kind: GrammarKind,
    source: str,
    good: list[str],
    bad: list[str],
) -> None:
    grammar = compiler.compile(Grammar(kind, source))
    assert [text for text in good if not matches(grammar, tokenizer, text)] == []
    assert [text for text in bad if matches(grammar, tokenizer, text)] == []


def test_compact_json_has_no_white_space(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    for compact in (False, True):
        grammar = compiler.compile(schema_grammar(schema, compact))
        assert matches(grammar, tokenizer, '{"a":"x y"}')
        assert matches(grammar, tokenizer, '{ "a":\n"x y"}') is not compact
    source = format_(type="json_schema", json_schema=schema)
    inside = compiler.compile(Grammar(TAG, source, compact=True))
    assert not matches(inside, tokenizer, '{ "a":"x"}')


def test_special_tokens_are_tokens_and_not_their_spelling(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    source = format_(type="tag", begin="<bos>a", content={"type": "any_text"}, end="<eos>")
    grammar = compiler.compile(Grammar(TAG, source))
    bos, eos = tokenizer.special_tokens["<bos>"], tokenizer.special_tokens["<eos>"]
    inner = tokenizer.encode("a <eos", add_special_tokens=False)
    assert grammar.ends([bos, *inner, eos])
    assert not grammar.ends([bos, *inner])
    assert not matches(grammar, tokenizer, "b")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def schema(**fields: Any) -> str:
    return json.dumps(fields)


SCHEMA = GrammarKind.JSON_SCHEMA
DOUBLING = "\n".join(
    ["root ::= a0", *(f"a{at} ::= a{at + 1} a{at + 1}" for at in range(30)), 'a30 ::= "x"']
)
REFUSED: list[tuple[GrammarKind, str, str]] = [
    (SCHEMA, schema(items={"items": {"not": {}}}), "'not' at #/items/items"),
    (SCHEMA, schema(properties={"a/b": {"if": {}}}), "'if' at #/properties/a~1b"),
    (SCHEMA, schema(uniqueItems=True, type="array"), "'uniqueItems' at #"),
    (SCHEMA, schema(type="integer", minimum=3, maximum=2), "minimum"),
    (SCHEMA, "false", "false"),
    (SCHEMA, "[1]", "a schema is an object"),
    (SCHEMA, "{", "JSON"),
    (SCHEMA, schema(type="text"), "text"),
    (SCHEMA, schema(**{"x-guidance": {"lenient": True}}), "x-guidance"),
    (SCHEMA, '{"$ref":"#"}', "grammar failed"),
    (SCHEMA, '{"$ref":"http://localhost:1/s"}', "localhost"),
    (SCHEMA, '{"$ref":"file:///etc/passwd"}', "passwd"),
    (SCHEMA, json.dumps(nested(400)), "recursion limit"),
    (SCHEMA, '{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
    (SCHEMA, schema(properties={f"p{at}": {} for at in range(1001)}), "1001 properties at #"),
    (
        SCHEMA,
        schema(
            allOf=[
                {"anyOf": [{"properties": {f"{at}.{of}": {}}, "type": "object"} for of in range(4)]}
                for at in range(12)
            ]
        ),
        "too large",
    ),
    (SCHEMA, schema(type="integer", multipleOf=999_999_937), "too fine"),
    (REGEX, "(a", "unclosed group"),
    (REGEX, "(?=a)b", "look-ahead"),
    (REGEX, r"(a)\1", "backreferences"),
    (REGEX, ".*" * 2000, "lexer"),
    (REGEX, "(" * 20_000 + "a" + ")" * 20_000, "regular expression"),
    (EBNF, "root ::= x", "'x'"),
    (EBNF, 'x ::= "a"', "'root'"),
    (EBNF, 'root ::= "a\nb"', "line 1"),
    (EBNF, "root ::= " + "(" * 99 + '"a"' + ")" * 99, "parentheses"),
    (EBNF, DOUBLING, "symbols"),
    (EBNF, "start: x", "x"),
    (TAG, "{}", "'format'"),
    (TAG, "[", "structural tag"),
    (TAG, format_(type="token", token=1), "token"),
    (TAG, format_(type="any_text", excludes=["a"]), "excludes"),
    (TAG, format_(type="json_schema", json_schema={"not": {}}), "'not' at #/format/json_schema"),
    (TAG, format_(type="sequence", elements=[{"type": "any_text"}, tag("a")]), "free text"),
    (TAG, json.dumps({"format": {**tags()["format"], "triggers": ["<x"]}}), "0 triggers"),
]


@pytest.mark.parametrize(("kind", "source", "words"), REFUSED)
def test_a_refusal_says_what_is_wrong_and_where(
    compiler: GrammarCompiler, kind: GrammarKind, source: str, words: str
) -> None:
    with pytest.raises(RequestError) as refused:
        compiler.compile(Grammar(kind, source, param="structured_outputs.json"))
    assert refused.value.param == "structured_outputs.json"
    assert words in str(refused.value)
    assert "'structured_outputs.json'" in str(refused.value)


# Each compiles, and costs little for each token, or fails.
HARD: list[tuple[GrammarKind, str]] = [
    (SCHEMA, schema(type="array", items={"type": "integer"}, minItems=10**6, maxItems=10**9)),
    (SCHEMA, schema(type="string", minLength=10**6, maxLength=10**9)),
    (SCHEMA, schema(type="object", properties={f"p{at}": {} for at in range(1000)})),
    (SCHEMA, schema(type="string", pattern="^(a|b)*a(a|b){200}$")),
    (REGEX, "((a{1,100}){1,100}){1,100}b"),
    (REGEX, "(a|b)*a(a|b){2000}c"),
    (REGEX, r"(\p{L}{1,500}\w*){1,500}"),
    (EBNF, 'start: (a{0,100000}){0,100000}\na: "x" | "y"'),
    (EBNF, 'start: s\ns: s s s | "x" | "y" |'),
    (EBNF, 'root ::= root root | [a-z] | ""'),
]


@pytest.mark.parametrize(("kind", "source"), HARD)
def test_a_hard_grammar_goes_on_or_fails(
    compiler: GrammarCompiler, kind: GrammarKind, source: str
) -> None:
    matcher = compiler.compile(Grammar(kind, source)).matcher()
    random = np.random.default_rng(1)
    began, taken = time.thread_time(), 0
    for _ in range(300):
        try:
            bits, _ = matcher.allowed()
        except GrammarFailed:
            break
        tokens = np.flatnonzero(np.unpackbits(bits, count=VOCAB, bitorder="little"))
        if matcher.ended or not len(tokens):
            break
        matcher.accept(int(random.choice(tokens)))
        taken += 1
    # Of the processor's time; the last token may take a step's most.
    assert time.thread_time() - began < BURST_SECONDS + taken * (STEP_SECONDS + 0.002) + 1


def test_the_samples_of_a_call_share_what_a_hard_grammar_may_take(
    compiler: GrammarCompiler,
) -> None:
    compiled = compiler.compile(Grammar(EBNF, 'root ::= root root | [a-z] | ""'))
    letter = np.random.default_rng(1)
    call = compiled.of_call()
    matchers = [call.matcher() for _ in range(32)]
    began, steps = time.thread_time(), 0
    with pytest.raises(GrammarFailed, match="too long"):  # noqa: PT012
        while True:
            steps += 1
            for matcher in matchers:
                bits, _ = matcher.allowed()
                tokens = np.flatnonzero(np.unpackbits(bits, count=VOCAB, bitorder="little"))
                matcher.accept(int(letter.choice(tokens)))
    a_step = STEP_SECONDS + len(matchers) * TOKEN_SECONDS
    # Beside it, what the test does itself; the last token may take a step's most.
    assert time.thread_time() - began < BURST_SECONDS + steps * (a_step + 0.01) + 1
    with pytest.raises(GrammarFailed):  # in all of them
        matchers[0].allowed()
    compiled.of_call().matcher().allowed()  # not in another call


def test_a_thousand_optional_keys_can_be_written(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    source = schema(type="object", properties={f"p{at}": {"const": at} for at in range(1000)})
    grammar = compiler.compile(Grammar(SCHEMA, source))
    assert matches(grammar, tokenizer, '{"p3": 3, "p500": 500, "p999":999}')


def test_a_state_is_a_function_of_its_tokens(compiler: GrammarCompiler) -> None:
    grammar: LibraryGrammar = compiler.compile(Grammar(SCHEMA, schema(type="object")))
    random, tokens = np.random.default_rng(3), []
    matcher = grammar.matcher()
    for _ in range(60):
        bits, may_end = matcher.allowed()
        again = grammar.matcher()
        for token in tokens:  # without a look at what is allowed
            again.accept(token)
        assert again.ended == matcher.ended
        others, end = again.allowed()
        assert (bytes(others), end) == (bytes(bits), may_end)
        allowed = np.flatnonzero(np.unpackbits(bits, count=VOCAB, bitorder="little"))
        if not len(allowed):
            break
        tokens.append(int(random.choice(allowed)))
        matcher.accept(tokens[-1])


def test_a_token_that_is_not_allowed_fails(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Grammar(CHOICE, '["a"]')).matcher()
    matcher.accept(0)
    assert not matcher.ended
    with pytest.raises(GrammarFailed):
        matcher.allowed()


def test_neither_gateway_nor_instance_imports_the_library_before_it_is_needed() -> None:
    code = (
        "import sys, memserve.gateway.run, memserve.grammars.compiler; "
        "sys.exit('llguidance' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_special_tokens_are_found_in_a_text_longest_first() -> None:
    writer = structural_tag._Writer({"<a>": 1, "<a>b": 2, "<": 3}, compact=False)
    assert writer._literal("x<a>b<a>y<z") == '"x" <[2]> <[1]> "y" <[3]> "z"'
    assert writer._literal("") == '""'
    assert structural_tag._Writer({}, compact=False)._literal("<a>") == '"<a>"'


@pytest.mark.parametrize("version", ["1.7.6", "1.8.0", "0.9.2", "1", "1.8rc1", "unknown"])
def test_a_library_that_grammars_can_crash_is_refused(
    version: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    with pytest.raises(RequestError, match=f"llguidance 1.9 or newer; the server has {version}"):
        GrammarCompiler(tokenizer, VOCAB).compile(Grammar(REGEX, "a", "regex"))
