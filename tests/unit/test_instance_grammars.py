"""Compilation beside the event loop: each grammar once, kept, bounded, and given up by nobody
else's leaving."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from memserve.api.errors import ApiError
from memserve.api.grammar import Grammar, GrammarKind
from memserve.errors import RequestError
from memserve.instance import grammars
from memserve.instance.grammars import Grammars
from memserve.tokens import NO_TOKENS, from_ids
from tests.waiting import until


class FakeGrammar:
    def __init__(self, source: str) -> None:
        self.source = source

    def matcher(self) -> None:
        raise AssertionError

    def ends(self, tokens: list[int]) -> bool:
        return tokens[-1] == 0

    def of_call(self) -> FakeGrammar:
        return self


class FakeCompiler:
    """Compiles while `gate` is set; refuses `bad`."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def compile(self, grammar: Grammar) -> FakeGrammar:
        self.compiled.append(grammar.source)
        self.gate.wait()
        self.threads.add(threading.current_thread().name)
        if grammar.source == "bad":
            raise RequestError("'guided_regex': bad", "guided_regex")
        return FakeGrammar(grammar.source)


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Grammars, FakeCompiler]]:
    compiler = FakeCompiler()
    made = Grammars(compiler)  # type: ignore[arg-type]
    try:
        yield made, compiler
    finally:
        compiler.gate.set()
        made.close()


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


async def test_equal_grammars_are_compiled_once_on_a_thread() -> None:
    async with running() as (made, compiler):
        compiler.gate.clear()
        asked = [asyncio.ensure_future(made.compile(regex("a"))) for _ in range(5)]
        await asyncio.sleep(0)
        compiler.gate.set()
        found = await asyncio.gather(*asked)
        assert all(one is found[0] for one in found)
        assert await made.compile(regex("a")) is found[0]
        assert compiler.compiled == ["a"]
        assert threading.current_thread().name not in compiler.threads


async def test_what_is_refused_is_told_each_time_and_compiled_once() -> None:
    async with running() as (made, compiler):
        for _ in range(3):
            with pytest.raises(ApiError) as refused:
                await made.compile(regex("bad"))
            assert (refused.value.status, refused.value.detail.param) == (400, "guided_regex")
            assert refused.value.detail.code == "invalid_grammar"
        assert compiler.compiled == ["bad"]


async def test_whoever_leaves_takes_nothing_from_the_others() -> None:
    async with running() as (made, compiler):
        compiler.gate.clear()
        first, second = (asyncio.ensure_future(made.compile(regex("a"))) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        compiler.gate.set()
        assert (await second).source == "a"  # type: ignore[attr-defined]
        assert first.cancelled()


async def test_what_nobody_waits_for_any_more_is_not_compiled() -> None:
    async with running() as (made, compiler):
        compiler.gate.clear()
        sources = ("a", "b", "c", "b")
        asked = [asyncio.ensure_future(made.compile(regex(source))) for source in sources]
        await until(lambda: compiler.compiled == ["a"], "the first compilation")
        for leaving in (asked[0], asked[1], asked[2]):  # the first is being compiled
            leaving.cancel()
        await asyncio.sleep(0.01)
        compiler.gate.set()
        assert (await asked[3]).source == "b"  # type: ignore[attr-defined]
        assert compiler.compiled == ["a", "b"]
        await made.compile(regex("c"))
        assert compiler.compiled == ["a", "b", "c"]
        assert made._waiting == 0
        assert not made._wanted


async def test_only_some_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_KEPT", 2)
    monkeypatch.setattr(grammars, "MAX_KEPT_CHARACTERS", 10)
    async with running() as (made, compiler):
        for source in ("a", "b", "a", "c", "a", "b"):
            await made.compile(regex(source))
        assert compiler.compiled == ["a", "b", "c", "b"]
        await made.compile(regex("x" * 9))  # leaves room for one more of one character
        await made.compile(regex("b"))
        await made.compile(regex("a"))
        assert compiler.compiled == ["a", "b", "c", "b", "x" * 9, "a"]
        await made.compile(regex("y" * 11))  # kept by nobody, and yet answered
        assert not made._kept


async def test_too_many_that_wait_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_WAITING", 2)
    async with running() as (made, compiler):
        compiler.gate.clear()
        asked = [asyncio.ensure_future(made.compile(regex(str(at)))) for at in range(3)]
        await until(lambda: asked[2].done(), "the refusal")
        error = asked[2].exception()
        assert isinstance(error, ApiError)
        assert (error.status, error.retry_after) == (429, 1)
        compiler.gate.set()
        await asyncio.gather(*asked[:2])
        await made.compile(regex("2"))


async def test_choices_that_their_tokens_have_ended_are_known() -> None:
    async with running() as (made, _):
        resumed = [from_ids([5, 0]), from_ids([5]), NO_TOKENS]
        assert (await made.constraints(regex("a"), resumed)).ended == {0}
        assert (await made.constraints(regex("a"))).ended == frozenset()
