"""Tasks and threads that a process needs: when one of them ends, the process says why, is not
healthy any more, and ends itself, so that whoever supervises it starts it again.

What fails and can simply be tried again (one poll, one event, one errand) is logged and counted
instead, and everything else goes on.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from memserve.logs import shown

log = logging.getLogger(__name__)

# Between looks at threads, which cannot say that they end: as often as members are polled.
LOOK_SECONDS = 1.0

T = TypeVar("T")


class Vitals:
    """Belongs to an event loop, until `close`."""

    def __init__(self, on_failure: Callable[[], None] | None = None) -> None:
        """`on_failure` is called once, on the loop, when something vital has ended."""
        self.failed = asyncio.Event()
        self.reason = ""  # what has ended, and why
        self.survived: Counter[str] = Counter()  # what failed and was tried again, by its name
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._watching: asyncio.TimerHandle | None = None
        self._errands: set[asyncio.Task[Any]] = set()

    def task(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what must not end before it is cancelled."""
        task = self._loop.create_task(work, name=name)
        task.add_done_callback(self._task_ended)
        return task

    def errand(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run what comes to an end; should it fail, that is logged and counted, also if nobody
        awaits it."""
        task = self._loop.create_task(work, name=name)
        self._errands.add(task)
        task.add_done_callback(self._errand_ended)
        return task

    def thread(self, thread: threading.Thread) -> None:
        """Watch a thread that must not end before `close`."""
        self._threads.append(thread)
        if self._watching is None:
            self._look()

    def survive(self, name: str, error: BaseException) -> None:
        """Count something that failed as nobody expected, and is tried again; log it now and
        then, with where it happened."""
        self.survived[name] += 1
        count = self.survived[name]
        if count & (count - 1) == 0:  # a power of two
            log.error("%s failed (%d times so far)", shown(name), count, exc_info=error)

    def fail(self, name: str, error: BaseException | None) -> None:
        """Something vital has ended. From any thread."""
        self._loop.call_soon_threadsafe(self._fail, name, error)

    def close(self) -> None:
        """From now on everything may end."""
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()

    # --- inside ---------------------------------------------------------------------------

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            if not task.cancelling():  # nobody has asked for it
                self._fail(task.get_name(), asyncio.CancelledError())
        else:
            self._fail(task.get_name(), task.exception())

    def _errand_ended(self, task: asyncio.Task[Any]) -> None:
        self._errands.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.survive(task.get_name(), error)

    def _look(self) -> None:
        for thread in self._threads:
            if not thread.is_alive():
                self._fail(f"thread {thread.name}", None)
        self._watching = self._loop.call_later(LOOK_SECONDS, self._look)

    def _fail(self, name: str, error: BaseException | None) -> None:
        if self._closed or self.failed.is_set():
            return
        self.reason = f"{name} ended: {shown(repr(error)) if error is not None else 'unasked'}"
        log.critical("%s; this process ends", self.reason, exc_info=error)
        self.failed.set()
        if self._on_failure is not None:
            self._on_failure()
