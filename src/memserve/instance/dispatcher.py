"""From the engine's thread to the event loop: one wake-up per step, whatever it produced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from memserve.api.errors import ApiError
from memserve.clock import Clock
from memserve.engine.request import TokenOutput
from memserve.types import RequestId


class Mailbox:
    """The outputs of one call that nobody has taken yet. Belongs to the event loop."""

    __slots__ = ("_error", "_outputs", "_waiter", "closed")

    def __init__(self) -> None:
        self.closed = False  # the call has ended
        self._outputs: list[TokenOutput] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: ApiError | None = None

    def put(self, output: TokenOutput) -> None:
        self._outputs.append(output)
        self._wake()

    def fail(self, error: ApiError) -> None:
        """Have the taker raise `error`."""
        self._error = error
        self._wake()

    async def take(self) -> list[TokenOutput]:
        """All outputs since the last call, at least one. One taker at a time.

        Raises ApiError if there will be none.
        """
        if not self._outputs and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        if self._error is not None:
            raise self._error
        outputs, self._outputs = self._outputs, []
        return outputs

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Dispatcher:
    """Routes outputs to the mailboxes of their calls."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        on_failure: Callable[[str, BaseException], None],
    ) -> None:
        """`on_failure`: outputs could not be delivered, and calls may wait for them for ever."""
        self._on_failure = on_failure
        self._loop = loop
        self._clock = clock
        self._mailboxes: dict[RequestId, Mailbox] = {}
        self.last_output = clock.now()  # when the engine last produced something

    def sink(self, outputs: Sequence[TokenOutput]) -> None:
        """The engine's `OutputSink`, called from its thread."""
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    @contextmanager
    def mailbox(self, ids: Sequence[RequestId]) -> Iterator[Mailbox]:
        """Collects the outputs of these sequences while the block runs."""
        mailbox = Mailbox()
        self._mailboxes.update(dict.fromkeys(ids, mailbox))
        try:
            yield mailbox
        finally:
            mailbox.closed = True
            for request_id in ids:
                del self._mailboxes[request_id]

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        self.last_output = self._clock.now()
        try:
            for output in outputs:
                mailbox = self._mailboxes.get(output.id)
                if mailbox is not None:  # else: cancelled while this batch was on its way
                    mailbox.put(output)
        except Exception as error:  # noqa: BLE001 - whatever it is, tokens are lost
            self._on_failure("dispatcher", error)
