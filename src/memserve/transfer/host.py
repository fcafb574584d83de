"""Identity of this host and process, and whether another process has ended."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.pool.segment import pid_namespace, start_time
from memserve.transfer.base import Natural
from memserve.transfer.regions import host_id


class ProcessTag(msgspec.Struct, frozen=True, array_like=True):
    """One process; `start` tells it from a later one with its pid."""

    boot: Annotated[str, Meta(max_length=64)]
    pid_namespace: Natural
    pid: Annotated[int, Meta(ge=1, lt=2**31)]
    start: Natural


def own_process() -> ProcessTag:
    return _tag(os.getpid())


@lru_cache(maxsize=1)
def _tag(pid: int) -> ProcessTag:
    started = start_time(pid)
    assert started is not None
    return ProcessTag(host_id().boot, pid_namespace(), pid, started)


def is_known_dead(process: ProcessTag) -> bool:
    """Whether it has certainly ended. A process of another host or PID namespace cannot be
    seen from here; nor can one of another user where /proc hides those."""
    if not is_visible(process):
        return False
    try:
        return start_time(process.pid) != process.start
    except PermissionError:
        return False


def is_visible(process: ProcessTag) -> bool:
    """Whether `is_known_dead` will say so once it has ended."""
    own = own_process()
    return (process.boot, process.pid_namespace) == (own.boot, own.pid_namespace)
