"""Identity of this host and process, and whether another process has ended."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.pool.segment import SHM_DIRECTORY, pid_namespace, start_time
from memserve.transfer.base import HostId, Natural

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@lru_cache(maxsize=1)
def host_id() -> HostId:
    """Return the host of this process. Containers on one machine differ unless they share
    /dev/shm."""
    return HostId(_BOOT_ID.read_text(encoding="ascii").strip(), os.stat(SHM_DIRECTORY).st_dev)


class ProcessTag(msgspec.Struct, frozen=True, array_like=True):
    """One process; `start` distinguishes it from a later process with the same pid."""

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
    """Return whether a process has certainly ended. Processes of other hosts and PID namespaces
    cannot be seen; nor can those of other users where /proc hides them."""
    if not is_visible(process):
        return False
    try:
        return start_time(process.pid) != process.start
    except PermissionError:
        return False


def is_visible(process: ProcessTag) -> bool:
    """Return whether `is_known_dead` will report the end of this process."""
    own = own_process()
    return (process.boot, process.pid_namespace) == (own.boot, own.pid_namespace)
