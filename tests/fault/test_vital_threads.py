"""Threads of an instance that end although they should not: it is dead, and says so."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from memserve import vital
from memserve.api.status import InstanceState, PoolTotals
from memserve.clock import MonotonicClock
from memserve.errors import TransferError
from memserve.instance.instance import Instance
from memserve.instance.kv_events import KVEventPublisher
from memserve.instance.parts import Identity, Parts
from memserve.models.tokenizer import Tokenizer
from memserve.transfer.mempool import MemPool
from memserve.transfer.secret import cluster_keys
from memserve.types import Epoch, InstanceId, Role
from tests.fakes import MODEL, FakeEngine, tiny_tokenizer
from tests.pool_harness import LAYOUT, prompt, store
from tests.waiting import until


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vital, "LOOK_SECONDS", 0.01)


def _raises(*arguments: object, **named: object) -> None:
    raise RuntimeError("a fault that nobody foresaw")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("part", ["events", "transfer"])
async def test_an_instance_without_a_thread_is_dead(tokenizer: Tokenizer, part: str) -> None:
    pool = MemPool(LAYOUT, 8, 8, instance="i", epoch=Epoch(1))
    pool.serve("tcp://127.0.0.1:0")
    events = KVEventPublisher(pool, "127.0.0.1", cluster_keys("a secret"))
    engine = FakeEngine()

    def threads() -> tuple[threading.Thread, ...]:
        return (*pool.threads(), events.thread)

    identity = Identity(InstanceId("i"), Epoch(1), Role.COLOCATED, MODEL)
    instance = Instance(identity, MonotonicClock())
    parts = Parts(engine, tokenizer, PoolTotals, lambda: None, events=events, threads=threads)
    await instance.start(parts)
    assert instance.info().state is InstanceState.READY
    if part == "events":
        events._flush = _raises  # type: ignore[method-assign]
        store(pool, prompt(1))
        named = "kv-events"
    else:
        service = pool._service
        assert service is not None
        service._endpoint.on_tick = _raises  # type: ignore[method-assign]
        service._endpoint.on_beat = _raises  # type: ignore[method-assign]
        named = service.thread.name
    await until(instance.died.is_set, "its death")
    assert instance.info().state is InstanceState.DEAD
    assert not await instance.healthy()
    assert instance.vitals.reason == f"thread {named} ended: unasked"
    if part == "events":
        with pytest.raises(TransferError):  # and nobody waits for it
            events.snapshot()
    await instance.stop()
    events.close()
    pool.close()


async def test_outputs_that_cannot_be_delivered_are_a_death(tokenizer: Tokenizer) -> None:
    engine = FakeEngine()
    identity = Identity(InstanceId("i"), Epoch(1), Role.COLOCATED, MODEL)
    instance = Instance(identity, MonotonicClock())
    await instance.start(Parts(engine, tokenizer, PoolTotals, lambda: None))
    engine.sink([None])  # type: ignore[list-item]
    await until(instance.died.is_set, "its death")
    assert instance.vitals.reason.startswith("dispatcher ended: AttributeError(")
    await instance.stop()
