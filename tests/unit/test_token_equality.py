"""Answers across two instances are those of Transformers' `generate`: every step of caching, mode
and transport, in memory that is too small for what is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from memserve.config import Caching, TransferMode
from memserve.pool.layout import KVLayout
from memserve.transfer import kv_link
from memserve.transfer.base import Transport
from memserve.transfer.mempool import MakeTransports
from memserve.transfer.shm import ShmTransport
from memserve.types import Owner, Role
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import Node, node, prompt_of
from tests.tiny_models import Reference, save_tiny_model
from tests.waiting import until

STEPS: tuple[Caching, ...] = get_args(Caching)
MODES: tuple[TransferMode, ...] = get_args(TransferMode)

# Four conversations, two of them with each system prompt. All that they ever need is three to
# four times what HBM holds, and each alone fits.
SYSTEMS, SESSIONS, TURNS, ANSWER = 2, 4, 3, 6
SYSTEM_TOKENS, USER_TOKENS = 37, 24
# Every prompt takes several steps, beside sequences that decode and without.
SMALL = {"hbm_blocks": 14, "dram_blocks": 10, "max_batch_tokens": 32, "mixed_batch_tokens": 16}


class Expected:
    """Conversations as Transformers has them; the same ones for every combination."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        reference = Reference(directory)
        self.conversations: list[list[tuple[list[int], list[int]]]] = []  # (prompt, answer)
        for session in range(SESSIONS):
            history = prompt_of(SYSTEM_TOKENS, seed=100 + session % SYSTEMS)
            turns = []
            for turn in range(TURNS):
                prompt = history + prompt_of(USER_TOKENS, seed=10 * session + turn)
                answer = reference.generate(prompt, ANSWER)
                turns.append((prompt, answer))
                history = prompt + answer
            self.conversations.append(turns)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    directory = save_tiny_model(request.param, tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return Expected(directory)


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_link, "LINGER_SECONDS", 0.3)


def transports(name: str) -> MakeTransports:
    if name == "shm":
        return lambda owner, layout: [ShmTransport(layout)]
    pytest.importorskip("nixl", reason="NIXL is not installed")
    from memserve.transfer.nixl import NixlTransport

    def make(owner: Owner, layout: KVLayout) -> Sequence[Transport]:
        return [NixlTransport(owner, layout, tls="tcp")]

    return make


async def talk(p: Node, d: Node, turns: list[tuple[list[int], list[int]]], salt: str) -> None:
    for prompt, answer in turns:
        completion = await d.answer(*prompt, tokens=ANSWER, prefill=[p], cache_salt=salt)
        assert completion.tokens == [answer], f"{salt}, prompt of {len(prompt)}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", ["shm", "nixl"])
@pytest.mark.parametrize("caching", STEPS)
async def test_tokens_are_those_of_generate(
    expected: Expected, caching: Caching, transport: str, mode: TransferMode
) -> None:
    options = {"mode": mode, "transports": transports(transport), **SMALL}
    async with (
        node(expected.directory, Role.PREFILL, caching, **options) as p,
        node(expected.directory, Role.DECODE, caching, **options) as d,
    ):
        await asyncio.gather(*(talk(p, d, turns, mode) for turns in expected.conversations))
        await p.settled()
        await d.settled()
        assert d.totals.failed == 0
        assert d.totals.blocks_received > 0
        if caching != "off":
            assert p.engine.stats().cached_prompt_tokens > 0
        for caches, one in ((caching != "off", p), (caching in ("pd", "full"), d)):
            stats = one.pool.stats()
            if caches:
                assert min(stats.evictions, stats.swapped_out, stats.swapped_in) > 0
            else:
                await until(lambda one=one: not one.cached, "nothing left of it")  # type: ignore[misc]
