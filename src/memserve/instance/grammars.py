"""Grammars of an instance's calls: compiled on a thread of their own, each once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from memserve.api.errors import invalid, queue_full
from memserve.api.grammar import Grammar
from memserve.engine.constraint import CompiledGrammar
from memserve.errors import RequestError
from memserve.types import TokenArray

# Limits of kept grammars: number, characters of their sources, and seconds of their compilation
# (memory is proportional to these: up to 60 MB a second). The least recently used go first.
MAX_KEPT = 256
MAX_KEPT_CHARACTERS = 4 * 1024 * 1024
MAX_KEPT_SECONDS = 5.0
# Virtual memory. The library follows references by recursion, some kilobytes of stack for each.
STACK_BYTES = 512 * 1024 * 1024
# Grammars that wait for the thread. Most take a millisecond, the hardest ones half a second.
MAX_WAITING = 64
RETRY_SECONDS = 1


class Compiled(CompiledGrammar, Protocol):
    def ends(self, tokens: list[int]) -> bool:
        """Return whether no token may follow `tokens`."""

    def of_call(self) -> CompiledGrammar:
        """Return the grammar for the sequences of one call, which share one budget."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Result of one grammar: compiled, or refused, with the request's field at fault.
    `seconds`: of CPU time. Exceptions are not kept: each raise would add to their tracebacks."""

    compiled: Compiled | None
    refusal: str
    param: str | None
    seconds: float


class Compiler(Protocol):
    def compile(self, grammar: Grammar) -> Compiled:
        """Compile a grammar. Raises RequestError."""


@dataclass(frozen=True, slots=True)
class Constraints:
    """The grammar of a call, and the choices that the call's resumed tokens end by it."""

    grammar: CompiledGrammar
    ended: frozenset[int] = frozenset()


class Grammars:
    """Compiles grammars and keeps them. Used on the event loop."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._thread = _thread_with_stack()
        self._waiting = 0
        self._characters = 0
        self._seconds = 0.0
        # Compiled, refused or being compiled, by last use, ascending.
        self._kept: OrderedDict[Grammar, Future[_Outcome]] = OrderedDict()
        self._wanted: Counter[Grammar] = Counter()  # calls that wait, by grammar

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def compile(self, grammar: Grammar) -> Compiled:
        """Return a compiled grammar. Raises ApiError (400 if it cannot be compiled, 429 if too
        many wait)."""
        future = self._kept.get(grammar)
        if future is None:
            future = self._begin(grammar)
        else:
            self._kept.move_to_end(grammar)
        if not future.done():
            await self._compiled(grammar, future)
        outcome = future.result()
        if outcome.compiled is None:
            raise invalid(outcome.refusal, outcome.param, "invalid_grammar")
        return outcome.compiled

    async def _compiled(self, grammar: Grammar, future: Future[_Outcome]) -> None:
        """Wait for a grammar. If the last waiting caller gives up, the compilation is cancelled,
        unless it has begun."""
        self._wanted[grammar] += 1
        try:
            # A caller that gives up leaves the compilation to the other callers.
            await asyncio.shield(asyncio.wrap_future(future))
        finally:
            self._wanted[grammar] -= 1
            if not self._wanted[grammar]:
                del self._wanted[grammar]
                if future.cancel() and self._kept.get(grammar) is future:
                    del self._kept[grammar]
                    self._characters -= len(grammar.source)

    async def constraints(
        self, grammar: Grammar, resumed: Sequence[TokenArray] = ()
    ) -> Constraints:
        """Return the constraints of a call; `resumed`: as in `GenerateCall`. Raises ApiError as
        `compile` does."""
        compiled = await self.compile(grammar)
        if not resumed:
            return Constraints(compiled.of_call())
        # On the thread: replaying takes 1 to 2 us a token.
        replay = self._thread.submit(_ended, compiled, [ids.tolist() for ids in resumed])
        return Constraints(compiled.of_call(), await asyncio.wrap_future(replay))

    def _begin(self, grammar: Grammar) -> Future[_Outcome]:
        if self._waiting >= MAX_WAITING:
            raise queue_full(f"{self._waiting} grammars wait to be compiled", RETRY_SECONDS)
        self._waiting += 1
        future = self._thread.submit(_outcome, self._compiler, grammar)
        asyncio.wrap_future(future).add_done_callback(lambda _: self._ended(grammar, future))
        self._kept[grammar] = future
        self._characters += len(grammar.source)
        self._make_room()
        return future

    def _ended(self, grammar: Grammar, future: Future[_Outcome]) -> None:
        self._waiting -= 1
        if self._kept.get(grammar) is future:
            self._seconds += _seconds(future)
            self._make_room()

    def _make_room(self) -> None:
        while (
            len(self._kept) > MAX_KEPT
            or self._characters > MAX_KEPT_CHARACTERS
            or (self._seconds > MAX_KEPT_SECONDS and len(self._kept) > 1)
        ):
            dropped, future = self._kept.popitem(last=False)
            self._characters -= len(dropped.source)
            self._seconds -= _seconds(future)


def _seconds(future: Future[_Outcome]) -> float:
    """Return the CPU seconds of a compilation; 0 if it is pending, cancelled or failed."""
    if not future.done() or future.cancelled() or future.exception() is not None:
        return 0.0
    return future.result().seconds


def _thread_with_stack() -> ThreadPoolExecutor:
    """Return an executor with one thread, which has started, with STACK_BYTES of stack."""
    executor = ThreadPoolExecutor(1, "grammars")
    before = threading.stack_size(STACK_BYTES)
    try:
        executor.submit(int).result()
    finally:
        threading.stack_size(before)
    return executor


def _outcome(compiler: Compiler, grammar: Grammar) -> _Outcome:
    began = time.thread_time()
    try:
        compiled = compiler.compile(grammar)
    except RequestError as error:
        return _Outcome(None, str(error), error.param, time.thread_time() - began)
    return _Outcome(compiled, "", None, time.thread_time() - began)


def _ended(compiled: Compiled, choices: list[list[int]]) -> frozenset[int]:
    return frozenset(at for at, tokens in enumerate(choices) if tokens and compiled.ends(tokens))
