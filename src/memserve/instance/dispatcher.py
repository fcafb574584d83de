"""Delivery of the engine's outputs from its thread to the answers of calls.

The `Dispatcher` of an instance moves outputs to the event loop, with one wake-up per step, and puts
each into the `Mailbox` of its call. Self-tests and prefills read a mailbox themselves; a `Run`
makes the bytes of a client's answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from memserve.api.errors import ApiError
from memserve.clock import Clock
from memserve.engine.request import TokenOutput
from memserve.instance.generation import Generation
from memserve.instance.submission import Submission
from memserve.tracing.span import Span
from memserve.types import RequestId


class Mailbox:
    """Queue of one call's outputs. Used on the event loop."""

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
        """Make `take` raise `error`."""
        self._error = error
        self._wake()

    async def take(self) -> list[TokenOutput]:
        """Wait for outputs; return all since the last `take`, at least one. One caller at a time.

        Raises the ApiError given to `fail`.
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
    """Routes the engine's outputs to the mailboxes of their calls."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        on_failure: Callable[[str, BaseException], None],
    ) -> None:
        """`on_failure` is called if outputs could not be delivered: their calls would wait for
        ever."""
        self._on_failure = on_failure
        self._loop = loop
        self._clock = clock
        self._mailboxes: dict[RequestId, Mailbox] = {}
        self.last_output = clock.now()  # time of the engine's last outputs

    def sink(self, outputs: Sequence[TokenOutput]) -> None:
        """The engine's `OutputSink`, called from its thread."""
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    @contextmanager
    def mailbox(self, ids: Sequence[RequestId]) -> Iterator[Mailbox]:
        """Context with a mailbox that collects the outputs of these sequences."""
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


class Run:
    """One running call: reads the engine's outputs and makes the bytes of the answer."""

    def __init__(
        self,
        generation: Generation,
        mailbox: Mailbox,
        submission: Submission,
        clock: Clock,
        span: Span | None = None,
    ) -> None:
        self.generation = generation
        self.span = span
        self.produced: dict[RequestId, list[int]] = {}  # token ids by sequence
        self._mailbox = mailbox
        self._submission = submission
        self._clock = clock

    async def step(self) -> bytes:
        """Wait for outputs of the engine. Returns the bytes to stream, possibly none.

        Raises ApiError if the answer cannot be completed.
        """
        # Without unfinished sequences, no output arrives.
        outputs = await self._mailbox.take() if self.generation.unfinished else []
        for output in outputs:
            self.produced.setdefault(output.id, []).extend(output.token_ids)
        data = self.generation.feed(outputs, self._clock.now())
        if self.generation.failure is not None:
            raise self.generation.failure
        if self.generation.stopped:
            self._submission.cancel(self.generation.stopped)
            self.generation.stopped = []
        return data
