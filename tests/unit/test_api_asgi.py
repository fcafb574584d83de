"""Bodies with a limit, and blocks that end when the client hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from memserve.api.asgi import ClientGone, HangUp, Interruption, read_body
from memserve.api.errors import ApiError


class Client:
    """What a server receives, message by message; then nothing."""

    def __init__(self, messages: Sequence[dict[str, Any]]) -> None:
        self.messages = list(messages)
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if self.messages:
            return self.messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}


def body(*parts: bytes) -> list[dict[str, Any]]:
    return [
        {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
        for index, part in enumerate(parts)
    ]


async def read(client: Client, limit: int, **headers: bytes) -> bytes:
    pairs = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    return await read_body({"headers": pairs}, client.receive, limit)


async def test_a_body_may_come_in_parts() -> None:
    assert await read(Client(body(b"ab", b"", b"c")), 3) == b"abc"


async def test_an_announced_body_that_is_too_large_is_refused_unread() -> None:
    client = Client(body(b"abcd"))
    with pytest.raises(ApiError) as refused:
        await read(client, 3, content_length=b"4")
    assert refused.value.status == 413
    assert len(client.messages) == 1


@pytest.mark.parametrize("parts", [(b"abcd",), (b"ab", b"cd", b"ef")])
async def test_an_unannounced_body_is_read_up_to_the_limit(parts: tuple[bytes, ...]) -> None:
    client = Client(body(*parts))
    with pytest.raises(ApiError) as refused:
        await read(client, 3)
    assert refused.value.status == 413
    assert len(client.messages) == max(0, len(parts) - 2)


async def test_a_client_that_leaves_while_sending_is_no_request() -> None:
    with pytest.raises(ClientGone):
        await read(Client([*body(b"a", b"b")[:1], {"type": "http.disconnect"}]), 3)


async def test_hanging_up_ends_the_block_and_nothing_else() -> None:
    client = Client([])
    with HangUp(client.receive) as hang_up:
        client.gone.set()
        await asyncio.sleep(60)
    assert hang_up.happened
    await asyncio.sleep(0)  # the task itself is not cancelled


async def test_a_block_that_ends_first_is_not_interrupted() -> None:
    client = Client([])
    with HangUp(client.receive) as hang_up:
        pass
    client.gone.set()
    await asyncio.sleep(0)
    assert not hang_up.happened


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
