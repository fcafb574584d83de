"""Threads on which requests are read and tokenised that would hold up an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

from memserve.api.errors import queue_full
from memserve.api.limits import (
    LARGE_BODIES_AT_ONCE,
    LARGE_BODIES_WAITING,
    LARGE_BODY_BYTES,
    MAX_TOKENISED_CHARACTERS,
)

LARGE_RETRY_SECONDS = 5  # by when some of the large bodies that wait have been worked on
TEXT_RETRY_SECONDS = 1  # the same of other texts

T = TypeVar("T")


class BodyThreads:
    """Bounded in what waits for them. Cancelled, work that still waits is dropped."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenise")
        # Threads of their own: large bodies do not hold up texts of the usual size.
        self._large = ThreadPoolExecutor(LARGE_BODIES_AT_ONCE, thread_name_prefix="large-body")
        self._large_now = 0
        self._characters_now = 0  # that the other threads have, or will have

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)
        self._large.shutdown(cancel_futures=True)

    async def off_loop(self, characters: int, work: Callable[[], T]) -> T:
        """The work on a text: so many characters wait for their turn, and no more."""
        if self._characters_now + characters > MAX_TOKENISED_CHARACTERS:
            raise queue_full(
                f"{self._characters_now} characters are being tokenised, and no more than "
                f"{MAX_TOKENISED_CHARACTERS} may be.",
                TEXT_RETRY_SECONDS,
            )
        self._characters_now += characters
        try:
            return await _in(self._threads, work)
        finally:
            self._characters_now -= characters

    async def apart(self, work: Callable[[], T]) -> T:
        """The work on one large body: so many wait for their turn, and no more."""
        if self._large_now >= LARGE_BODIES_AT_ONCE + LARGE_BODIES_WAITING:
            raise queue_full(
                f"{self._large_now} request bodies of more than {LARGE_BODY_BYTES} bytes are "
                "worked on, and no more may wait.",
                LARGE_RETRY_SECONDS,
            )
        self._large_now += 1
        try:
            return await _in(self._large, work)
        finally:
            self._large_now -= 1


async def _in(threads: Executor, work: Callable[[], T]) -> T:
    """What the work returns on one of the threads. Cancelled before its turn, it is not done,
    and what it refers to is let go of at once: an executor keeps it until the turn comes."""
    kept = [work]
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: kept.pop()())
    finally:
        kept.clear()
