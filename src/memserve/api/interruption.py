"""Blocks of a task that end from outside: when their client hangs up, or when told to."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from memserve.api.http_message import Reply


class Interruption:
    """`with Interruption() as lost:` is a block that `lost.interrupt()` ends from outside.

    The block's task is cancelled where it waits, and goes on behind the block, with `happened`
    set. Any other cancellation passes through.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """`loop`: the running loop, if known; looking it up takes a system call."""
        self.happened = False
        self._loop = loop
        self._task: asyncio.Task[object] | None = None

    def interrupt(self) -> None:
        if self._task is not None and not self.happened:
            self.happened = True
            self._task.cancel()

    def __enter__(self) -> Self:
        self._task = asyncio.current_task(self._loop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        task, self._task = self._task, None
        if not self.happened or task is None:
            return False
        task.uncancel()
        return kind is asyncio.CancelledError


class HangUp(Interruption):
    """A block that ends when the client of `reply` hangs up, or has done so. It takes the reply's
    `on_gone`."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self._reply = reply

    def __enter__(self) -> Self:
        super().__enter__()
        if self._reply.gone:
            # Not at once: a task that cancels itself is cancelled where it next waits, which may
            # be behind the block.
            asyncio.get_running_loop().call_soon(self.interrupt)
        else:
            self._reply.on_gone = self.interrupt
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._reply.on_gone = None
        return super().__exit__(kind, error, trace)


async def caught_up(reply: Reply) -> None:
    """Wait while the client reads too slowly for what was written. Within a `HangUp`: one that
    has gone never catches up."""
    if reply.writable:
        return
    flowing = asyncio.Event()
    reply.on_flow = lambda paused: None if paused else flowing.set()
    await flowing.wait()
    reply.on_flow = None
