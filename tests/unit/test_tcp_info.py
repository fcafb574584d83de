"""When a connection's other end counts as silent, by what the kernel says of it."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, cast

from memserve.api.tcp_info import Silence

SECONDS = 8.0


class Kernel:
    """A connection's transport, socket and state. Times in seconds."""

    def __init__(self) -> None:
        self.unacknowledged = 0
        self.acknowledged_at = 0.0
        self.now = 0.0

    def get_extra_info(self, name: str) -> Any:
        return self

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        quiet = int(1000 * (self.now - self.acknowledged_at))
        return struct.pack("=B23xI28xI", 1, self.unacknowledged, quiet)[:size]


def silent_at(kernel: Kernel, watch: Silence, until: float) -> float | None:
    """When a look each quarter of a second finds it silent; None: not by then."""
    while kernel.now < until:
        kernel.now += 0.25
        if watch.lasts(cast(asyncio.Transport, kernel), kernel.now, SECONDS):
            return kernel.now
    return None


def test_who_has_acknowledged_all_may_be_quiet_for_ever() -> None:
    assert silent_at(Kernel(), Silence(), 1000) is None


def test_silence_begins_with_what_is_sent_not_with_the_last_word() -> None:
    kernel, watch = Kernel(), Silence()
    assert silent_at(kernel, watch, 100) is None
    kernel.unacknowledged = 1
    found = silent_at(kernel, watch, 200)
    assert found is not None
    assert 100 + SECONDS <= found <= 100 + 1.5 * SECONDS


def test_an_acknowledgement_begins_it_anew() -> None:
    kernel, watch = Kernel(), Silence()
    kernel.unacknowledged = 3
    for answered in range(6, 60, 6):
        assert silent_at(kernel, watch, answered) is None
        kernel.acknowledged_at = answered
    found = silent_at(kernel, watch, 100)
    assert found is not None
    assert found >= kernel.acknowledged_at + SECONDS
