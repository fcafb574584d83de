"""Named POSIX shared memory that is removed even if its owner crashed.

A segment's name contains its process (PID namespace, pid, start time). The next pool that starts
removes the segments of dead processes. `multiprocessing.shared_memory` is not used, because its
resource tracker unlinks segments of other processes.
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

# Maximum bytes of a name: its path fits into the address of a Unix socket (108 bytes).
MAX_NAME = 90

_NAME = re.compile(re.escape(PREFIX) + r"(?P<ns>\d+)-(?P<pid>\d+)-(?P<start>\d+)-\d+", re.ASCII)
_serial = itertools.count()


class SharedSegment:
    """`size` bytes of zeroed shared memory, all allocated at once.

    The name is removed when the segment is closed or collected, or its process exits. Mappings
    in this process and in peers stay valid until they are unmapped.
    """

    def __init__(self, size: int, directory: Path = SHM_DIRECTORY) -> None:
        """Raises SharedMemoryFull if the file system has no room."""
        self.size = size
        self.path = directory / new_name()
        descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Reserve every page now: with a full /dev/shm, a first touch would raise SIGBUS.
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
        """Remove the name. The memory is freed with the last mapping of it."""
        self._unlink()


def new_name() -> str:
    """Return a name for a file that `sweep` removes after this process has ended."""
    return f"{PREFIX}{_process_tag()}-{next(_serial)}"


def is_segment_name(name: str) -> bool:
    """Return whether `name` has the form of `new_name`. Names that peers send are checked, so that
    they cannot lead to other files."""
    return len(name) <= MAX_NAME and _NAME.fullmatch(name) is not None


def leftovers(directory: Path = SHM_DIRECTORY) -> list[Path]:
    """Return the paths of the segments of dead processes.

    Only names of this PID namespace count: a container that shares the directory has other pids.
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
    """Remove the segments of dead processes; return their names."""
    removed = []
    for path in leftovers(directory):
        try:
            path.unlink()
        except OSError:  # another sweep removed it, it is another user's, or it is a directory
            continue
        removed.append(path.name)
    return removed


def _unlink(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has the object too, but does not own the segment
        path.unlink(missing_ok=True)


def _process_tag() -> str:
    pid = os.getpid()
    return f"{pid_namespace()}-{pid}-{start_time(pid)}"


def pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def start_time(pid: int) -> int | None:
    """Return the clock ticks from boot to the start of a running process; None if none runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command may hold spaces and parentheses: fields count from the last parenthesis.
    fields = stat.rpartition(")")[2].split()
    state, threads, start = fields[0], int(fields[17]), int(fields[19])
    # A zombie without other threads has no memory left.
    return None if state in "ZX" and threads <= 1 else start


def _no_room(size: int, directory: Path) -> str:
    room = os.statvfs(directory)
    return (
        f"cannot allocate {size} bytes of shared memory: {directory} has "
        f"{room.f_bavail * room.f_frsize} of {room.f_blocks * room.f_frsize} bytes left; "
        f"use fewer blocks, or enlarge it (docker run --shm-size, or mount -o remount,size=)"
    )
