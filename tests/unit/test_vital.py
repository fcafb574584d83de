"""What must not end, and what happens when it does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine

import pytest

from memserve import vital
from memserve.vital import Vitals


async def forever() -> None:
    await asyncio.Event().wait()


async def broken() -> None:
    raise RuntimeError("broken")


async def cancelled_from_within() -> None:
    raise asyncio.CancelledError


async def finished() -> None:
    pass


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (broken, "it ended: RuntimeError('broken')"),
        (finished, "it ended: unasked"),
        (cancelled_from_within, "it ended: CancelledError()"),
    ],
)
async def test_a_task_that_ends_unasked_is_a_failure(
    work: Callable[[], Coroutine[None, None, None]], why: str
) -> None:
    told: list[str] = []
    vitals = Vitals(lambda: told.append(vitals.reason))
    vitals.task("it", work())
    vitals.task("another", work())
    async with asyncio.timeout(15):
        await vitals.failed.wait()
    await asyncio.sleep(0)
    assert told == [why]


async def test_a_task_that_is_cancelled_is_none() -> None:
    vitals = Vitals()
    task = vitals.task("it", forever())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,))
    await asyncio.sleep(0)
    assert not vitals.failed.is_set()


async def test_a_thread_that_ends_is_a_failure_unless_all_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vital, "LOOK_SECONDS", 0.01)
    over = threading.Event()
    watched, closed = Vitals(), Vitals()
    thread = threading.Thread(target=over.wait, name="one", daemon=True)
    thread.start()
    watched.thread(thread)
    closed.thread(thread)
    closed.close()
    assert not watched.failed.is_set()
    over.set()
    async with asyncio.timeout(15):
        await watched.failed.wait()
    assert watched.reason == "thread one ended: unasked"
    assert not closed.failed.is_set()
    watched.close()


async def test_errands_that_fail_are_counted_and_nothing_ends() -> None:
    vitals = Vitals()
    tasks = [vitals.errand("one", broken()) for _ in range(3)]
    await asyncio.wait((*tasks, vitals.errand("two", finished())))
    await asyncio.sleep(0)
    assert vitals.survived == {"one": 3}
    assert not vitals.failed.is_set()


async def test_a_thread_can_say_why() -> None:
    vitals = Vitals()
    thread = threading.Thread(target=vitals.fail, args=("pool", ValueError("no")))
    thread.start()
    async with asyncio.timeout(15):
        await vitals.failed.wait()
    assert vitals.reason == "pool ended: ValueError('no')"
