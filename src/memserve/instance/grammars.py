"""Grammars of an instance's calls: compiled on a thread of their own, each once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from memserve.api.errors import invalid, queue_full
from memserve.api.grammar import Grammar
from memserve.engine.constraint import CompiledGrammar
from memserve.errors import RequestError
from memserve.types import TokenArray

# Compiled grammars that are kept, used last: some hundred kilobytes each, and at most this many
# characters of their sources.
MAX_KEPT = 256
MAX_KEPT_CHARACTERS = 4 * 1024 * 1024
# Grammars that wait for the thread. Most take a millisecond, the hardest ones half a second.
MAX_WAITING = 64
RETRY_SECONDS = 1


class Compiled(CompiledGrammar, Protocol):
    def ends(self, tokens: list[int]) -> bool:
        """Whether no token may follow `tokens`."""


class Compiler(Protocol):
    def compile(self, grammar: Grammar) -> Compiled:
        """Compile a grammar. Raises RequestError."""


@dataclass(frozen=True, slots=True)
class Constraints:
    """The grammar of a call, and the choices that the call's resumed tokens end by it."""

    grammar: CompiledGrammar
    ended: frozenset[int] = frozenset()


class Grammars:
    """Compiles grammars and keeps them. Belongs to the event loop."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._waiting = 0
        self._characters = 0
        # Compiled, refused, or on their way; the one used last is the last.
        self._kept: OrderedDict[Grammar, Future[Compiled]] = OrderedDict()

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
        try:
            if not future.done():
                # Whoever gives up does not take it from the others.
                await asyncio.shield(asyncio.wrap_future(future))
            return future.result()
        except RequestError as error:
            raise invalid(str(error), error.param, "invalid_grammar") from error

    async def constraints(
        self, grammar: Grammar, resumed: Sequence[TokenArray] = ()
    ) -> Constraints:
        """Return the constraints of a call; `resumed`: as in `GenerateCall`. Raises ApiError as
        `compile` does."""
        compiled = await self.compile(grammar)
        if not resumed:
            return Constraints(compiled)
        # On the thread: replaying takes 1 to 2 us a token.
        replay = self._thread.submit(_ended, compiled, [ids.tolist() for ids in resumed])
        return Constraints(compiled, await asyncio.wrap_future(replay))

    def _begin(self, grammar: Grammar) -> Future[Compiled]:
        if self._waiting >= MAX_WAITING:
            raise queue_full(f"{self._waiting} grammars wait to be compiled", RETRY_SECONDS)
        self._waiting += 1
        future = self._thread.submit(self._compiler.compile, grammar)
        asyncio.wrap_future(future).add_done_callback(self._ended)
        self._kept[grammar] = future
        self._characters += len(grammar.source)
        while len(self._kept) > MAX_KEPT or self._characters > MAX_KEPT_CHARACTERS:
            dropped, _ = self._kept.popitem(last=False)
            self._characters -= len(dropped.source)
        return future

    def _ended(self, done: asyncio.Future[Compiled]) -> None:
        self._waiting -= 1
        if not done.cancelled():
            done.exception()  # whoever asked has it


def _ended(compiled: Compiled, choices: list[list[int]]) -> frozenset[int]:
    return frozenset(at for at, tokens in enumerate(choices) if tokens and compiled.ends(tokens))
