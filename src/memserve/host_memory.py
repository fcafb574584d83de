"""Memory of this machine that processes may still take, within the limits of their control groups.

Sources: proc(5), Linux's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A limit of version 1 without a limit is the largest multiple of a page within 63 bits.
_NO_LIMIT = 1 << 62
# Name of a group's limit, use, and the part of its use that is dropped when memory is short.
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes that are free, of `total`; `limit`: whose they are, in words."""

    free: int
    total: int
    limit: str

    def __str__(self) -> str:
        return f"{shown_bytes(self.free)} of {shown_bytes(self.total)} are free {self.limit}"


def host_memory(root: Path = Path("/")) -> HostMemory | None:
    """Return the memory of this machine, or of the control group around this process that has
    least free; None if the system does not tell. `root`: where /proc and /sys are."""
    lines = _read(root / "proc/meminfo").splitlines()
    sizes = {name: _number(rest) for name, _, rest in (line.partition(":") for line in lines)}
    total, free = sizes.get("MemTotal"), sizes.get("MemAvailable")
    if total is None or free is None:
        return None
    found = [HostMemory(free * 1024, total * 1024, "on this machine")]
    found += _groups(root)
    return min(found, key=lambda one: one.free)


def shown_bytes(size: float) -> str:
    """Return a size with a unit, as `1.5 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _groups(root: Path) -> Iterator[HostMemory]:
    """Yield the memory of the control groups with a limit, from this process's outwards. A path
    outside this process's view is that of its root group."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", _VERSION_2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _VERSION_1
        else:
            continue
        group = mount / path.strip().lstrip("/")
        if ".." in group.parts:
            group = mount
        while True:
            if (memory := _group(group, *names)) is not None:
                yield memory
            if group == mount:
                break
            group = group.parent


def _group(group: Path, limit_name: str, use_name: str, droppable_name: str) -> HostMemory | None:
    limit, used = _number(_read(group / limit_name)), _number(_read(group / use_name))
    if limit is None or used is None or limit >= _NO_LIMIT:
        return None
    droppable = 0
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == droppable_name:
            droppable = _number(value) or 0
    free = max(0, limit - used + droppable)
    return HostMemory(free, limit, "within the limit of this container (control group)")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """Return the number that a text begins with; None without one, as for `max`."""
    first = text.split()[:1]
    return int(first[0]) if first and first[0].isascii() and first[0].isdigit() else None
