"""Role and state of an instance at run time: what may follow what, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from memserve.api.errors import ApiError
from memserve.api.generate import CallKind, GenerateCall, SamplingParams
from memserve.api.status import InstanceState, MemberKind, PoolTotals
from memserve.clock import MonotonicClock
from memserve.instance.instance import Instance
from memserve.instance.lifecycle import InstanceLifecycle
from memserve.instance.parts import Identity, Parts
from memserve.tokens import from_ids
from memserve.types import Epoch, InstanceId, Role
from tests.fakes import FakeEngine, tiny_tokenizer

READY, DRAINING, DEAD = InstanceState.READY, InstanceState.DRAINING, InstanceState.DEAD
Step = Callable[[InstanceLifecycle], None]


def lifecycle() -> tuple[InstanceLifecycle, list[tuple[InstanceState, Role]]]:
    news: list[tuple[InstanceState, Role]] = []
    made = InstanceLifecycle(InstanceId("i"), Role.DECODE)
    made.on_news(lambda: news.append((made.state, made.role)))
    return made, news


def test_a_drained_instance_can_be_ready_again_until_it_ends() -> None:
    one, news = lifecycle()
    one.become(READY)
    one.drain()
    one.drain()  # once more is no news
    one.resume()
    one.change_role(Role.PREFILL)
    one.change_role(Role.PREFILL)
    one.end(restart=True)
    assert news == [
        (READY, Role.DECODE),
        (DRAINING, Role.DECODE),
        (READY, Role.DECODE),
        (READY, Role.PREFILL),
        (DRAINING, Role.PREFILL),
    ]
    with pytest.raises(ApiError) as refused:
        one.resume()
    assert (refused.value.status, refused.value.detail.code) == (409, "instance_ending")
    assert one.restart


@pytest.mark.parametrize("state", [InstanceState.STARTING, DEAD])
@pytest.mark.parametrize(
    "step",
    [InstanceLifecycle.drain, InstanceLifecycle.resume, lambda one: one.change_role(Role.PREFILL)],
)
def test_what_is_not_serving_cannot_change(state: InstanceState, step: Step) -> None:
    one, news = lifecycle()
    one.become(state)
    news.clear()
    with pytest.raises(ApiError) as refused:
        step(one)
    assert (refused.value.status, refused.value.detail.code) == (409, f"instance_{state}")
    assert news == []


def test_a_dead_instance_that_ends_stays_dead() -> None:
    one, _ = lifecycle()
    one.become(DEAD)
    one.end()
    assert one.state is DEAD
    assert one.ending.is_set()


async def test_what_is_cached_follows_the_role_and_running_calls_do_not(tmp_path: Path) -> None:
    engine = FakeEngine()
    instance = Instance(Identity(InstanceId("i"), Epoch(1), Role.PREFILL, "m"), MonotonicClock())
    parts = Parts(
        engine,
        tiny_tokenizer(tmp_path),
        PoolTotals,
        lambda: None,
        sharing=frozenset({Role.PREFILL}),
    )
    await instance.start(parts)
    call = GenerateCall(
        "c",
        CallKind.COMPLETION,
        "m",
        1,
        (from_ids((1, 2)),),
        SamplingParams(max_tokens=4),
        stream=True,
    )
    ephemeral = []
    try:
        for role in (Role.PREFILL, Role.DECODE, Role.PREFILL):
            instance.lifecycle.change_role(role)
            with instance.run(call) as run:
                ephemeral.append(engine.submitted[-1].ephemeral)
                await run.step()
                instance.lifecycle.change_role(Role.COLOCATED)
                while not run.generation.finished:
                    await run.step()
            assert instance.info().role is Role.COLOCATED
    finally:
        engine.stop()
    assert ephemeral == [False, True, False]


async def test_a_role_that_an_instance_cannot_have_is_refused(tmp_path: Path) -> None:
    engine = FakeEngine()
    identity = Identity(InstanceId("v"), Epoch(1), Role.COLOCATED, "m", MemberKind.VLLM)
    instance = Instance(identity, MonotonicClock())
    await instance.start(Parts(engine, tiny_tokenizer(tmp_path), PoolTotals, lambda: None))
    try:
        instance.change_role(Role.COLOCATED)
        with pytest.raises(ApiError, match="hands no KV over") as refused:
            instance.change_role(Role.DECODE)
        assert (refused.value.status, refused.value.detail.code) == (409, "role_not_possible")
        assert instance.info().role is Role.COLOCATED
    finally:
        engine.stop()
