"""Conversations that are answered one turn at a time, with what each must move between hosts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from memserve.api.status import HandoffTotals
from tests.fault.conftest import Expected
from tests.hosts.cluster import BLOCK, Operator
from tests.hosts.conversations import Turn
from tests.hosts_harness import Host

# What processes say to each other beside KV, at most, in bytes: polls, events and heartbeats; and
# what the test itself asks, with a TLS handshake each time. KV of one block is 96 KiB.
TALK_A_SECOND, TALK_A_QUESTION = 15_000, 6_000


@dataclass
class Held:
    """Prefixes, in whole blocks, that an instance's cache must have."""

    prefixes: set[tuple[int, ...]] = field(default_factory=set)

    def lacks(self, tokens: list[int]) -> int:
        return sum(prefix not in self.prefixes for prefix in _whole(tokens))

    def add(self, tokens: list[int]) -> None:
        self.prefixes.update(_whole(tokens))


def _whole(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[:end]) for end in range(BLOCK, len(tokens) + 1, BLOCK)]


class Turns:
    """Has turns answered, and checks each: its tokens, and which blocks moved."""

    def __init__(
        self, operator: Operator, expected: Expected, prefill: str, decodes: Mapping[str, Host]
    ) -> None:
        """Names of the members: the one that computes prompts, and those that decode."""
        self._operator = operator
        self._expected = expected
        self._prefill = prefill
        self._decodes = decodes
        self._held = {name: Held() for name in (prefill, *decodes)}
        self.received = dict.fromkeys(decodes, 0)  # blocks
        self.returned = dict.fromkeys(decodes, 0)

    def talk(self, conversations: list[list[Turn]], talk_a_second: int) -> None:
        """Have all turns answered, and compare what went over each decode host's link with the KV
        that was missing. `talk_a_second`: other bytes that may cross it."""
        links = {name: host.traffic() for name, host in self._decodes.items()}
        asked, begin = self._operator.asked, time.monotonic()
        said: list[list[int]] = [[] for _ in conversations]
        for turns in zip(*conversations, strict=True):
            for turn, tokens in zip(turns, said, strict=True):
                tokens += turn.tokens
                tokens += self.answer(tokens, turn.answer)
        seconds, questions = time.monotonic() - begin, self._operator.asked - asked
        talk = talk_a_second * seconds + TALK_A_QUESTION * questions
        block = self._operator.stats(next(iter(self._decodes))).handoff.block_bytes
        assert sum(self.received.values()) * block > 5_000_000
        assert sum(self.returned.values()) > 0
        for name, host in self._decodes.items():
            link = host.traffic().since(links[name])
            received, returned = self.received[name] * block, self.returned[name] * block
            assert received < link.received < 1.1 * received + talk
            assert returned < link.sent < 1.1 * returned + talk

    def answer(self, prompt: list[int], count: int) -> list[int]:
        before = self._handoffs()
        answer = self._operator.complete(prompt, count)
        tokens: list[int] = answer["choices"][0]["token_ids"]
        assert tokens == self._expected(prompt, count)
        (name,) = (n for n, each in self._handoffs().items() if each.asked > before[n].asked)
        received = answer["usage"]["memserve"]["blocks_received"]
        assert received == self._held[name].lacks(prompt)
        self.received[name] += received
        # The last token's KV is computed only if another token follows.
        computed = [*prompt, *tokens[:-1]]
        self._held[name].add(computed)
        self._held[self._prefill].add(prompt)
        self._operator.until(lambda: self._is_back(name), "what the answer left goes back")
        returned = self._handoffs()[name].blocks_returned - before[name].blocks_returned
        assert returned == self._held[self._prefill].lacks(computed)
        self.returned[name] += returned
        self._held[self._prefill].add(computed)
        return tokens

    def _handoffs(self) -> dict[str, HandoffTotals]:
        return {name: self._operator.stats(name).handoff for name in self._decodes}

    def _is_back(self, name: str) -> bool:
        handoff = self._handoffs()[name]
        assert not handoff.failed + handoff.returns_dropped
        return handoff.returns == handoff.asked
