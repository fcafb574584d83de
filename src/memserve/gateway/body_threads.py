"""Threads that read and tokenise requests which would hold up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

from memserve.api.compression import PIECE_BYTES, Decompression
from memserve.api.errors import queue_full
from memserve.api.http_message import Request
from memserve.api.limits import (
    LARGE_BODIES_AT_ONCE,
    LARGE_BODIES_WAITING,
    LARGE_BODY_BYTES,
    MAX_TOKENISED_CHARACTERS,
)

# Retry-After of refusals: by then, some of the waiting bodies, or texts, have been worked on.
LARGE_RETRY_SECONDS = 5
TEXT_RETRY_SECONDS = 1
INLINE_COMPRESSED = 4096  # bytes of a compressed body whose first piece comes on the event loop

T = TypeVar("T")


class BodyThreads:
    """Two thread pools with bounded queues. Cancelled work is dropped if it still waits."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenise")
        # A pool of their own: large bodies must not hold up texts of the usual size.
        self._large = ThreadPoolExecutor(LARGE_BODIES_AT_ONCE, thread_name_prefix="large-body")
        self._large_now = 0
        self._characters_now = 0  # tokenised now, or waiting for it, in the other pool

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)
        self._large.shutdown(cancel_futures=True)

    async def whole(self, request: Request, limit: int) -> bytes:
        """Return a request's body, decompressed if it was compressed. Raises ApiError: 413 above
        `limit` bytes, 415 for an unknown coding, 400, 429."""
        coding = request.header(b"content-encoding")
        if coding is None:
            return request.body
        decompression = Decompression(coding, request.body, limit)
        # A short body may become nothing after a long time: empty blocks.
        if len(request.body) <= INLINE_COMPRESSED and decompression.take(PIECE_BYTES):
            return decompression.rest()
        return await self.apart(decompression.rest)

    async def off_loop(self, characters: int, work: Callable[[], T]) -> T:
        """Run `work` on a text of `characters`. Raises ApiError (429) if more than
        MAX_TOKENISED_CHARACTERS would be under way."""
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
        """Run `work` on one large body. Raises ApiError (429) if LARGE_BODIES_WAITING wait."""
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
    """Run `work` on one of the threads; return its result. If this is cancelled before the
    work's turn, the work is not done and its references are freed at once: the executor alone
    would keep them until the turn comes."""
    kept = [work]
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: kept.pop()())
    finally:
        kept.clear()
