"""Waiting, on the test's own event loop, for what other threads and tasks do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

# Much longer than anything takes: a test that gets there has failed.
PATIENCE = 60.0


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never came: {what}"
        await asyncio.sleep(0.005)
