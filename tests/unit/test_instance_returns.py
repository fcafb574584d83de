"""KV that goes back to the prefill instance: how much at a time, and what is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from memserve.api.handoff import PoolPeer
from memserve.errors import PeerLost
from memserve.instance import remote_prefill
from memserve.transfer.kv_link import Pushed
from memserve.types import Namespace, TokenArray
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import Node, call_of, completed, pair, prompt_of
from tests.tiny_models import save_tiny_model
from tests.waiting import until

PROMPT = prompt_of(70, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


Hold = Callable[[Node], tuple[asyncio.Event, list[int]]]


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Hold:
    """Pushes of a node wait for an event; says how many have begun."""

    def hold(one: Node) -> tuple[asyncio.Event, list[int]]:
        gate, begun, push = asyncio.Event(), [0], one.link.push

        async def held(
            peer: PoolPeer, tokens: TokenArray, source: Namespace, target: Namespace
        ) -> Pushed:
            begun[0] += 1
            await gate.wait()
            return await push(peer, tokens, source, target)

        monkeypatch.setattr(one.link, "push", held)
        return gate, begun

    return hold


async def test_no_more_than_so_many_go_back_at_a_time(
    model: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_prefill, "MAX_RETURNS", 2)
    async with pair(model) as (p, d):
        gate, begun = hold(d)
        for seed in range(4):
            await d.complete(*prompt_of(40, seed), tokens=30, prefill=[p])
        await until(lambda: begun[0] == 2, "returns under way")
        assert (d.totals.returns, d.totals.returns_dropped) == (0, 2)
        gate.set()
        await until(lambda: d.totals.returns == 2, "their ends")
        await d.complete(*prompt_of(40, 9), tokens=30, prefill=[p])
        await until(lambda: d.totals.returns == 3, "another one")
        assert d.totals.returns_dropped == 2
        assert d.totals.blocks_returned == 3 * 2  # 69 tokens that have KV, less the prompt's


async def test_one_that_fails_is_counted_as_dropped(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(*_: object) -> Pushed:
        raise PeerLost("gone")

    async with pair(model) as (p, d):
        monkeypatch.setattr(d.link, "push", lost)
        await d.complete(*PROMPT, prefill=[p])
        await until(lambda: d.totals.returns_dropped == 1, "the failure")
        assert (d.totals.returns, d.totals.blocks_returned) == (0, 0)


async def test_a_next_turn_waits_for_what_it_will_want(
    model: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_prefill, "RETURN_SECONDS", 60.0)
    async with pair(model) as (p, d):
        gate, begun = hold(d)
        answer = await d.complete(*PROMPT, tokens=30, prefill=[p])
        await until(lambda: begun[0] == 1, "the return")
        # Another conversation does not wait for it.
        await d.complete(*prompt_of(40, 2), prefill=[p])
        assert d.totals.asked == 2
        prompt = PROMPT + answer.tokens[0] + prompt_of(20, 3)
        with d.instance.run(call_of(prompt, prefill=[p])) as run:
            for _ in range(20):
                await asyncio.sleep(0)
            assert d.totals.asked == 2
            gate.set()
            assert (await completed(run)).cached == 96


async def test_a_next_turn_does_not_wait_for_ever(
    model: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_prefill, "RETURN_SECONDS", 0.02)
    async with pair(model) as (p, d):
        gate, _ = hold(d)
        answer = await d.complete(*PROMPT, tokens=30, prefill=[p])
        prompt = PROMPT + answer.tokens[0] + prompt_of(20, 3)
        with d.instance.run(call_of(prompt, prefill=[p])) as run:
            assert (await completed(run)).cached == 64
        gate.set()
        await until(lambda: d.totals.returns == 2, "the returns")
