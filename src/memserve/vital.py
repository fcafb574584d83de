"""Supervision of the tasks and threads that a process cannot work without.

When one of them ends, the process logs the reason, is unhealthy and ends itself, so that its
supervisor restarts it. A failure that can be retried (of one poll, event or errand) is logged
and counted instead, and the process continues.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from memserve.logs import shown, worth_a_line

log = logging.getLogger(__name__)

# Interval of checks whether threads live, since they do not report their end; same as the
# interval at which members are polled.
LOOK_SECONDS = 1.0

T = TypeVar("T")


class Vitals:
    """The vital tasks and threads of one event loop, watched until `close`."""

    def __init__(self, on_failure: Callable[[], None] | None = None) -> None:
        """`on_failure` is called once, on the loop, when a vital task or thread has ended."""
        self.failed = asyncio.Event()
        self.reason = ""  # name of the ended task or thread, and its error
        self.survived: Counter[str] = Counter()  # failures that were survived, by name
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._watching: asyncio.TimerHandle | None = None
        self._errands: set[asyncio.Task[Any]] = set()

    def task(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a vital coroutine, which must not end before it is cancelled."""
        task = self._loop.create_task(work, name=name)
        task.add_done_callback(self._task_ended)
        return task

    def errand(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine that may end. A failure is logged and counted, even if no caller awaits
        the task."""
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
        """Count an unexpected failure of an operation that is retried. Failures 1, 2, 4, 8, ...
        of a name are logged with their traceback."""
        self.survived[name] += 1
        count = self.survived[name]
        if worth_a_line(count):
            log.error("%s failed (%d times so far)", shown(name), count, exc_info=error)

    def fail(self, name: str, error: BaseException | None) -> None:
        """Report that a vital task or thread has ended. May be called from any thread."""
        self._loop.call_soon_threadsafe(self._fail, name, error)

    def close(self) -> None:
        """Stop watching: from now on tasks and threads may end."""
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()

    # --- inside ---------------------------------------------------------------------------

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            if not task.cancelling():  # cancelled without a call of `task.cancel`
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
