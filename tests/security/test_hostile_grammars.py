"""Grammars that would crash an instance, or keep it busy: refused, or compiled all the same."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memserve.api.errors import ApiError
from memserve.api.grammar import Grammar, GrammarKind
from memserve.errors import RequestError
from memserve.grammars import gbnf_lark
from memserve.grammars.compiler import GrammarCompiler
from memserve.instance import grammars
from memserve.instance.grammars import Grammars
from tests.grammar_harness import compiler_of, save_model, schema_grammar


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def compiler(model: Path) -> GrammarCompiler:
    return compiler_of(model)


def chain(links: int) -> dict[str, Any]:
    """A schema of references, each to the next one."""
    parts: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(links)}
    return {"$defs": {**parts, f"a{links}": {"type": "string"}}, "$ref": "#/$defs/a0"}


async def compile_chain(directory: str, links: int) -> None:
    made = Grammars(compiler_of(Path(directory)))
    await made.compile(schema_grammar(chain(links)))
    made.close()


def test_a_long_chain_of_references_does_not_end_the_process(model: Path) -> None:
    """The library follows references by recursion, which no exception ends."""
    code = (
        "import asyncio, tests.security.test_hostile_grammars as t;"
        f"asyncio.run(t.compile_chain({str(model)!r}, 6000))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def ebnf(source: str) -> Grammar:
    return Grammar(GrammarKind.EBNF, source)


def rules(count: int) -> str:
    """GBNF in which each rule leads to the next one, in the worst order."""
    body = "".join(f'r{i} ::= r{i + 1} | r{i} "b"\n' for i in range(count))
    return f'root ::= r0\n{body}r{count} ::= "a"\n'


TAGS = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<",
        "content": {"type": "or", "elements": [{"type": "any_text"}] * 2000},
        "end": [f"</{i}>" for i in range(2000)],
    },
}
HOSTILE = {
    "spaces in a repetition": ebnf('root ::= "a"{' + " " * 200_000),
    "a lexer of n^2 states": Grammar(GrammarKind.REGEX, "a?" * 60_000),
    "a lexer of n^2 states in Lark": ebnf(
        'start: A\nA: "' + "a?" * 50_000 + '"\n' + "B: A\n" * 999
    ),
    "a multiple of a large number": schema_grammar({"type": "integer", "multipleOf": 1_000_003}),
    "a multiple of a fine number": schema_grammar({"type": "number", "multipleOf": 0.1234567}),
    "many rules in Lark": ebnf("start: r0\n" + 'r0: "a"\n' * 1500),
    "rules in the worst order": ebnf(rules(1600)),
    "parts times ends": Grammar(GrammarKind.STRUCTURAL_TAG, json.dumps(TAGS)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_would_take_too_long_is_refused(compiler: GrammarCompiler, what: str) -> None:
    with pytest.raises(RequestError):
        compiler.compile(HOSTILE[what])


HARMLESS = {
    "a thousand properties": {
        "type": "object",
        "properties": {f"p{i}": {"type": "string"} for i in range(1000)},
        "required": [f"p{i}" for i in range(1000)],
    },
    "a long text": {"type": "string", "maxLength": 100_000},
    "a multiple": {"type": "number", "multipleOf": 0.05},
    "an enumeration": {"enum": [f"the value number {i}" for i in range(1000)]},
    "formats": {
        "type": "object",
        "properties": {
            name: {"type": "string", "format": name}
            for name in ("date-time", "uuid", "email", "ipv4", "ipv6", "hostname", "uri")
        },
    },
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_people_ask_for_is_compiled(compiler: GrammarCompiler, what: str) -> None:
    compiler.compile(schema_grammar(HARMLESS[what]))


def test_a_terminal_is_written_once_however_often_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = []
    expression = gbnf_lark._Translation._expression

    def counted(self: Any, node: Any) -> str:
        written.append(node)
        return expression(self, node)

    monkeypatch.setattr(gbnf_lark._Translation, "_expression", counted)
    doubled = "".join(f"b{i} ::= b{i - 1} b{i - 1}\n" for i in range(1, 9))
    gbnf_lark.lark_of('root ::= "x" root ' + "| b8 " * 200 + f'\n{doubled}b0 ::= "ab"\n')
    assert len(written) < 200 * 8


class Refusing:
    def compile(self, grammar: Grammar) -> Any:
        raise RequestError("'guided_regex': no", "guided_regex")


async def test_a_refusal_is_a_new_exception_each_time() -> None:
    made = Grammars(Refusing())
    found = []
    for _ in range(2):
        with pytest.raises(ApiError) as refused:
            await made.compile(Grammar(GrammarKind.REGEX, "("))
        found.append(refused.value)
    made.close()
    assert found[0] is not found[1]
    assert found[0].__cause__ is None  # and keeps nothing of a request


class Counting:
    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, grammar: Grammar) -> Any:
        self.compiled.append(grammar.source)
        return object()


async def test_grammars_that_took_long_make_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(grammars.time, "thread_time", lambda: float(next(clock)))  # 1 s each
    monkeypatch.setattr(grammars, "MAX_KEPT_SECONDS", 2.5)
    counting = Counting()
    made = Grammars(counting)
    for source in "abcca":
        await made.compile(Grammar(GrammarKind.REGEX, source))
        await asyncio.sleep(0)  # for the callback that counts
    made.close()
    assert counting.compiled == list("abca")
