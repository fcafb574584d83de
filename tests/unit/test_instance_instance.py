"""An instance's state: what it takes, what it calls healthy, what it leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from memserve.api.errors import ApiError
from memserve.api.generate import CallKind, GenerateCall, SamplingParams
from memserve.api.status import InstanceState, PoolTotals
from memserve.clock import ManualClock
from memserve.instance import health as module
from memserve.instance.health import IDLE_SECONDS, SelfTestFailed
from memserve.instance.instance import Instance
from memserve.instance.parts import Identity, Parts
from memserve.models.tokenizer import Tokenizer
from memserve.tokens import from_ids
from memserve.types import Epoch, InstanceId, Role
from tests.fakes import FakeEngine, tiny_tokenizer

CALL = GenerateCall(
    "c",
    CallKind.COMPLETION,
    "m",
    1,
    (from_ids((1, 2)),),
    SamplingParams(max_tokens=4),
    n=2,
    stream=True,
)
Start = Callable[[FakeEngine], Awaitable[Instance]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def start(tokenizer: Tokenizer, clock: ManualClock) -> AsyncIterator[Start]:
    engines: list[FakeEngine] = []

    async def run(engine: FakeEngine) -> Instance:
        engines.append(engine)
        identity = Identity(InstanceId("i"), Epoch(1), Role.COLOCATED, "m")
        instance = Instance(identity, clock)
        assert instance.state is InstanceState.STARTING
        await instance.start(Parts(engine, tokenizer, PoolTotals, lambda: None))
        return instance

    yield run
    for engine in engines:
        engine.stop()


async def test_an_instance_is_ready_when_it_has_produced_a_token(start: Start) -> None:
    engine = FakeEngine()
    instance = await start(engine)
    assert instance.state is InstanceState.READY
    assert len(engine.submitted) == 1
    assert await instance.healthy()
    assert len(engine.submitted) == 1  # that token was just now


async def test_an_engine_without_a_first_token_is_no_instance(start: Start) -> None:
    with pytest.raises(SelfTestFailed):
        await start(FakeEngine(fails="no kernel for this device"))


async def test_an_instance_at_rest_is_healthy_only_if_a_token_comes(
    start: Start, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    instance = await start(engine)
    clock.advance(IDLE_SECONDS + 1)
    assert await instance.healthy()
    assert len(engine.submitted) == 2
    monkeypatch.setattr(module, "HEALTH_SECONDS", 0.01)
    engine.gate.clear()
    clock.advance(IDLE_SECONDS + 1)
    assert not await instance.healthy()
    assert engine.cancels == [engine.submitted[-1].id]  # nobody waits for that token any more


async def test_an_engine_that_died_is_noticed_at_rest(start: Start, clock: ManualClock) -> None:
    engine = FakeEngine()
    instance = await start(engine)
    engine.crash()
    clock.advance(IDLE_SECONDS + 1)
    assert not await instance.healthy()
    assert (instance.state, instance.died.is_set()) == (InstanceState.DEAD, True)


async def test_leaving_a_run_early_cancels_its_sequences(start: Start) -> None:
    engine = FakeEngine()
    instance = await start(engine)
    engine.gate.clear()
    with instance.run(CALL):
        idle = asyncio.ensure_future(instance.lifecycle.idle())
        await asyncio.sleep(0)
        assert not idle.done()
    await idle
    assert engine.cancels == ["c.0-0-0", "c.0-0-1"]
    stats = instance.stats()
    assert stats is not None
    ended = stats.latencies.ended
    assert (ended.abort, ended.stop, ended.length, ended.error) == (2, 0, 0, 0)


async def test_a_run_to_the_end_cancels_nothing(start: Start) -> None:
    engine = FakeEngine()
    instance = await start(engine)
    with instance.run(CALL) as run:
        data = b""
        while not run.generation.finished:
            data += await run.step()
    assert data.endswith(b"data: [DONE]\n\n")
    assert engine.cancels == []
    stats = instance.stats()
    assert stats is not None
    assert stats.latencies.ended.abort == 0


@pytest.mark.parametrize("ending", ["drain", "crash"])
async def test_an_instance_that_ends_takes_nothing_new(start: Start, ending: str) -> None:
    engine = FakeEngine()
    instance = await start(engine)
    instance.lifecycle.drain() if ending == "drain" else engine.crash()
    with pytest.raises(ApiError) as refused, instance.run(CALL):
        pass
    assert refused.value.status == 503
    assert refused.value.retry_after is not None
    await instance.lifecycle.idle()
