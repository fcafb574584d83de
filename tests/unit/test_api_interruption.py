"""Blocks of a task that end when the client hangs up, and waits for clients that read slowly."""

from __future__ import annotations

import asyncio

import pytest

from memserve.api.interruption import HangUp, Interruption, caught_up
from tests.gateway_harness import POST, Client


@pytest.fixture
def client() -> Client:
    return Client(POST)


async def test_hanging_up_ends_the_block_and_nothing_else(client: Client) -> None:
    with HangUp(client.reply) as left:
        asyncio.get_running_loop().call_soon(client.reply.hung_up)
        await asyncio.sleep(60)
    assert left.happened
    await asyncio.sleep(0)  # the task itself is not cancelled


async def test_a_block_for_a_client_that_has_gone_ends_where_it_waits(client: Client) -> None:
    client.reply.gone = True
    with HangUp(client.reply) as left:
        await asyncio.sleep(60)
    assert left.happened
    with HangUp(client.reply) as left:
        pass
    await asyncio.sleep(0)
    assert not left.happened


async def test_a_block_that_ends_first_is_not_interrupted(client: Client) -> None:
    with HangUp(client.reply) as left:
        pass
    client.reply.hung_up()
    await asyncio.sleep(0)
    assert not left.happened


async def test_a_slow_client_is_waited_for(client: Client) -> None:
    await asyncio.wait_for(caught_up(client.reply), 10)
    client.reply.writable = False
    waiting = asyncio.create_task(caught_up(client.reply))
    await asyncio.sleep(0)
    assert client.reply.on_flow is not None
    client.reply.on_flow(True)
    await asyncio.sleep(0)
    assert not waiting.done()
    client.reply.on_flow(False)
    await asyncio.wait_for(waiting, 10)
    assert client.reply.on_flow is None


async def test_a_slow_client_that_hangs_up_is_not_waited_for(client: Client) -> None:
    client.reply.writable = False
    with HangUp(client.reply) as left:
        asyncio.get_running_loop().call_soon(client.reply.hung_up)
        await caught_up(client.reply)
    assert left.happened


async def test_a_cancellation_from_elsewhere_goes_through_the_block() -> None:
    async def work() -> None:
        with Interruption():
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_inner_block_leaves_the_outer_one_running() -> None:
    outer, inner = Interruption(), Interruption()
    with outer:
        with inner:
            asyncio.get_running_loop().call_soon(inner.interrupt)
            await asyncio.sleep(60)
        await asyncio.sleep(0)
    assert (inner.happened, outer.happened) == (True, False)
