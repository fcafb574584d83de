"""Threads of servers that have left the core they were given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def pin_back(group: int, core: int) -> int:
    """Of a process group, put the threads that are bound to another core alone onto this one; how
    many there were."""
    moved = 0
    for thread in _threads(group):
        with suppress(OSError):  # it has ended
            if len(bound := os.sched_getaffinity(thread)) == 1 and bound != {core}:
                os.sched_setaffinity(thread, {core})
                moved += 1
    return moved


def _threads(group: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):  # it has ended
            if os.getpgid(int(entry.name)) == group:
                yield from [int(task.name) for task in (entry / "task").iterdir()]
