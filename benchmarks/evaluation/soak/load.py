"""The mixed load of a soak: a bit of everything that clients do, good and bad, from a seed."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from evaluation.soak.client import Outcome, Reply, SoakClient

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "then",
    "it",
    "sleeps",
    "for",
    "a",
    "while",
]
_TENANTS = 5
_TURNS = 3  # of a conversation, at most
_LOWEST_TOKEN, _HIGHEST_TOKEN = 10, 300  # that every vocabulary has, special ones apart
# What is refused, each with an error in the API's form.
_BAD: tuple[tuple[str, bytes], ...] = (
    (COMPLETIONS, b"{"),
    (COMPLETIONS, b"\xff\xfe"),
    (COMPLETIONS, b"[]"),
    (COMPLETIONS, b'{"prompt": 7}'),
    (COMPLETIONS, b'{"prompt": "x", "max_tokens": -1}'),
    (COMPLETIONS, b'{"prompt": "x", "n": 100000}'),
    (COMPLETIONS, b'{"prompt": "x", "temperature": "hot"}'),
    (COMPLETIONS, b'{"prompt": [2147483647]}'),
    (COMPLETIONS, b'{"prompt": "x", "no_such_field": 1}'),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}"),
    (CHAT, b'{"messages": []}'),
    (CHAT, b'{"messages": [{"role": "cook", "content": "x"}]}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "model": "no such model"}'),
    ("/v1/nothing", b"{}"),
)


class KindTally(msgspec.Struct):
    """What became of the requests of one kind."""

    kind: str
    requests: int = 0
    answered: int = 0
    left: int = 0  # the client hung up
    refused: int = 0
    failed: int = 0
    unanswered: int = 0
    wrong: int = 0  # answers that were not what they were before, or that should not have been


class SoakLoad:
    """Requests of every kind, and what became of them."""

    def __init__(
        self, client: SoakClient, seed: int, probes: int, prompt_tokens: int, output_tokens: int
    ) -> None:
        """`probes`: prompts that are asked again and again; `prompt_tokens`: of the longest."""
        self.tallies: dict[str, KindTally] = {}
        self.troubles: Counter[str] = Counter()  # what was said of failures, by kind
        self._client = client
        self._seed = seed
        self._prompt_tokens = prompt_tokens
        self._output_tokens = output_tokens
        source = random.Random(f"{seed} probes")
        self._probes = [self._tokens(source, 0.8 if i % 2 else 0.2) for i in range(probes)]
        self._first: dict[int, tuple[int, ...]] = {}
        self._histories: dict[int, list[dict[str, str]]] = defaultdict(list)
        self._kinds: dict[str, tuple[int, Callable[[random.Random, int], Awaitable[Reply]]]] = {
            "probe": (6, self._probe),
            "chat": (5, self._chat),
            "token ids": (3, self._token_ids),
            "whole answer": (3, self._whole),
            "several choices": (2, self._samples),
            "stop strings": (2, self._stops),
            "tenant": (2, self._tenant),
            "hang-up": (2, self._hang_up),
            "bad request": (2, self._bad),
            "slow reader": (1, self._slow),
        }

    async def run(self, client: int, phase: int, over: asyncio.Event) -> None:
        """One client, one request after the other, until it is `over`."""
        source = random.Random(f"{self._seed} {phase} {client}")
        names = list(self._kinds)
        weights = [weight for weight, _ in self._kinds.values()]
        while not over.is_set():
            (kind,) = source.choices(names, weights)
            self._count(kind, await self._kinds[kind][1](source, client))
            # People think, and machines do not.
            await asyncio.sleep(source.choice((0.0, 0.0, 0.05, 0.2)))

    def total(self, outcome: str) -> int:
        counts: list[int] = [msgspec.structs.asdict(t)[outcome] for t in self.tallies.values()]
        return sum(counts)

    def _count(self, kind: str, reply: Reply) -> None:
        tally = self.tallies.setdefault(kind, KindTally(kind))
        tally.requests += 1
        match reply.outcome:
            case Outcome.ANSWERED:
                tally.answered += 1
                tally.wrong += bool(reply.detail)
            case Outcome.LEFT:
                tally.left += 1
            case Outcome.REFUSED:
                tally.refused += 1
            case Outcome.FAILED:
                tally.failed += 1
            case Outcome.UNANSWERED:
                tally.unanswered += 1
        if reply.detail and not (kind == "bad request" and reply.outcome is Outcome.REFUSED):
            self.troubles[f"{kind}: {reply.outcome}: {reply.detail}"] += 1

    async def _probe(self, source: random.Random, client: int) -> Reply:
        """Greedy: the same tokens every time, whoever computes them and beside whom."""
        number = source.randrange(len(self._probes))
        reply = await self._client.ask(
            COMPLETIONS,
            {
                **self._greedy(self._probes[number]),
                "return_token_ids": True,
                "stream": source.random() < 0.5,
            },
        )
        if reply.outcome is not Outcome.ANSWERED:
            return reply
        first = self._first.setdefault(number, reply.tokens)
        if reply.tokens == first:
            return reply
        said = f"probe {number}: {list(reply.tokens)}, and first {list(first)}"
        return Reply(Outcome.ANSWERED, reply.status, detail=said)

    async def _chat(self, source: random.Random, client: int) -> Reply:
        """A turn of this client's conversation, with all turns before it."""
        history = self._histories[client]
        if len(history) >= 2 * _TURNS:
            history.clear()
        asked = {"role": "user", "content": self._text(source)}
        reply = await self._client.ask(
            CHAT,
            {
                "messages": [*history, asked],
                "max_tokens": self._output_tokens,
                "temperature": 0.7,
                "stream": source.random() < 0.7,
                "user": f"user-{client}",
            },
        )
        if reply.outcome is Outcome.ANSWERED:
            history += [asked, {"role": "assistant", "content": reply.text}]
        else:
            history.clear()
        return reply

    async def _token_ids(self, source: random.Random, client: int) -> Reply:
        fields = self._greedy(self._tokens(source, source.random()))
        return await self._client.ask(COMPLETIONS, {**fields, "stream": True})

    async def _whole(self, source: random.Random, client: int) -> Reply:
        fields = {"prompt": self._text(source), "max_tokens": self._output_tokens, "seed": 7}
        return await self._client.ask(COMPLETIONS, fields)

    async def _samples(self, source: random.Random, client: int) -> Reply:
        fields = self._greedy(self._tokens(source, source.random()))
        wanted = {"n": source.randint(2, 4), "temperature": 0.9, "stream": source.random() < 0.5}
        return await self._client.ask(COMPLETIONS, {**fields, **wanted})

    async def _stops(self, source: random.Random, client: int) -> Reply:
        stops = {"stop": ["e", ". ", "\n\n"][: source.randint(1, 3)], "stream": True}
        fields = {"prompt": self._text(source), "max_tokens": self._output_tokens}
        return await self._client.ask(COMPLETIONS, {**fields, **stops})

    async def _tenant(self, source: random.Random, client: int) -> Reply:
        """The probes' prompts in caches of their own."""
        salt = {"cache_salt": f"tenant-{source.randrange(_TENANTS)}", "stream": True}
        return await self._client.ask(
            COMPLETIONS, {**self._greedy(source.choice(self._probes)), **salt}
        )

    async def _hang_up(self, source: random.Random, client: int) -> Reply:
        fields = self._greedy(self._tokens(source, source.random()))
        asked = {**fields, "max_tokens": 4 * self._output_tokens, "stream": True}
        return await self._client.ask(COMPLETIONS, asked, leave_after=source.randrange(4))

    async def _slow(self, source: random.Random, client: int) -> Reply:
        return await self._client.read_slowly(
            COMPLETIONS, self._greedy(self._tokens(source, source.random()))
        )

    async def _bad(self, source: random.Random, client: int) -> Reply:
        path, body = source.choice(_BAD)
        reply = await self._client.send(path, body)
        if reply.outcome is Outcome.ANSWERED:
            return Reply(Outcome.ANSWERED, reply.status, detail=f"answered: {body[:100]!r}")
        return reply

    def _greedy(self, prompt: list[int]) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "max_tokens": self._output_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }

    def _tokens(self, source: random.Random, share: float) -> list[int]:
        count = max(1, round(share * self._prompt_tokens))
        return [source.randint(_LOWEST_TOKEN, _HIGHEST_TOKEN) for _ in range(count)]

    def _text(self, source: random.Random) -> str:
        # A conversation has `_TURNS` of these and answers; a word is one to three tokens.
        words = max(1, self._prompt_tokens // (8 * _TURNS))
        return " ".join(source.choices(_WORDS, k=source.randint(1, words)))


def described(troubles: Counter[str], most: int = 20) -> tuple[str, ...]:
    """The most frequent ones, with how often they were."""
    return tuple(
        f"{count} x {json.dumps(what)[1:-1]}" for what, count in troubles.most_common(most)
    )
