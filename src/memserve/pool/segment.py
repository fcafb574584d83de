"""Named POSIX shared memory whose owner is known, so that nothing outlives a crash.

A segment's name says which process made it (PID namespace, pid, start time). Segments of
processes that are gone are removed when the next pool starts. `multiprocessing.shared_memory`
does not do: its resource tracker unlinks segments that belong to other processes.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import re
import weakref
from pathlib import Path

from memserve.errors import SharedMemoryFull

SHM_DIRECTORY = Path("/dev/shm")
PREFIX = "memserve-"

# A path of it fits into an address of a Unix socket (108 bytes).
MAX_NAME = 90

_NAME = re.compile(re.escape(PREFIX) + r"(?P<ns>\d+)-(?P<pid>\d+)-(?P<start>\d+)-\d+", re.ASCII)
_serial = itertools.count()


class SharedSegment:
    """`size` bytes of shared memory, zeroed, all of them backed by memory.

    The name goes when the segment is closed, collected, or its process exits; mappings (here
    and in peers) stay valid as long as somebody uses them.
    """

    def __init__(self, size: int, directory: Path = SHM_DIRECTORY) -> None:
        """Raises SharedMemoryFull where the file system has no room."""
        self.size = size
        self.path = directory / new_name()
        descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Reserve every page now: a full /dev/shm is SIGBUS at first touch otherwise.
            os.posix_fallocate(descriptor, 0, size)
            self.buffer = mmap.mmap(descriptor, size)
        except OSError as error:
            os.unlink(self.path)
            if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise SharedMemoryFull(_no_room(size, directory)) from error
            raise
        finally:
            os.close(descriptor)
        self._unlink = weakref.finalize(self, _unlink, self.path, os.getpid())

    @property
    def name(self) -> str:
        return self.path.name

    def close(self) -> None:
        """Remove the name. The memory goes with the last tensor that views it."""
        self._unlink()


def new_name() -> str:
    """For a file of this process that `sweep` removes when the process is gone."""
    return f"{PREFIX}{_process_tag()}-{next(_serial)}"


def is_segment_name(name: str) -> bool:
    """Whether `new_name` of some process could have made it. A name that came over a wire must
    not lead anywhere else."""
    return len(name) <= MAX_NAME and _NAME.fullmatch(name) is not None


def leftovers(directory: Path = SHM_DIRECTORY) -> list[Path]:
    """The segments of dead processes.

    Only names of this PID namespace: another container may share the directory, and its
    pids mean nothing here.
    """
    found = []
    for path in directory.glob(PREFIX + "*"):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match["ns"]) != pid_namespace():
            continue
        if start_time(int(match["pid"])) != int(match["start"]):
            found.append(path)
    return found


def sweep(directory: Path = SHM_DIRECTORY) -> list[str]:
    """Remove the segments of dead processes; returns their names."""
    removed = []
    for path in leftovers(directory):
        try:
            path.unlink()
        except OSError:  # another sweep won; another user's; no segment at all but a directory
            continue
        removed.append(path.name)
    return removed


def _unlink(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child inherits the object, not the segment
        path.unlink(missing_ok=True)


def _process_tag() -> str:
    pid = os.getpid()
    return f"{pid_namespace()}-{pid}-{start_time(pid)}"


def pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of a running process; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command may hold spaces and parentheses: fields count from the last parenthesis.
    fields = stat.rpartition(")")[2].split()
    state, threads, start = fields[0], int(fields[17]), int(fields[19])
    # A zombie has no memory any more, once its last thread has gone.
    return None if state in "ZX" and threads <= 1 else start


def _no_room(size: int, directory: Path) -> str:
    room = os.statvfs(directory)
    return (
        f"{size} bytes of shared memory asked, {directory} has "
        f"{room.f_bavail * room.f_frsize} of {room.f_blocks * room.f_frsize} left; "
        f"use fewer blocks, or make it larger (docker run --shm-size, or mount -o remount,size=)"
    )
