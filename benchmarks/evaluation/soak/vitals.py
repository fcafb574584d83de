"""What processes of this machine hold: memory, descriptors, threads, from /proc."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from memserve.pool.segment import PREFIX, SHM_DIRECTORY, pid_namespace, start_time

_PROC = Path("/proc")
_KB = 1024


class Vitals(msgspec.Struct, frozen=True):
    """One process at one moment. Bytes."""

    rss: int  # resident, with shared pages
    private: int  # of these, anonymous ones: heaps and stacks, no files and no shared memory
    pss: int  # resident, shared pages divided by those who share them; 0: not to be had
    shm: int  # of its segments in /dev/shm, mapped or not
    fds: int
    threads: int


class Life(msgspec.Struct, frozen=True):
    """A process, from its start to its end: another one may have its name or its number."""

    name: str
    pid: int
    started: int  # clock ticks since boot


def vitals(pid: int) -> Vitals | None:
    """None: it is gone, or somebody else's."""
    try:
        status = _fields(_PROC / str(pid) / "status")
        return Vitals(
            rss=status["VmRSS"] * _KB,
            private=status["RssAnon"] * _KB,
            pss=_pss(pid),
            shm=_segment_bytes(pid),
            fds=len(os.listdir(_PROC / str(pid) / "fd")),
            threads=status["Threads"],
        )
    except (OSError, KeyError):  # a zombie has a status, but no memory
        return None


def process_tree(root: int, name: str = "up") -> tuple[Life, ...]:
    """The process and everything that it has started, by the names that `memserve` gives."""
    children = _children()
    found = []
    waiting = [root]
    for pid in waiting:
        if (started := start_time(pid)) is not None:
            found.append(Life(name if pid == root else _name(pid), pid, started))
        waiting += children[pid]
    return tuple(found)


def name_of(arguments: list[str]) -> str:
    """What a process is called by its command line: an instance's id, `gateway`, `worker-0`."""
    for flag, form in (("--worker", "worker-{}"), ("--id", "{}")):
        if flag in arguments[:-1]:
            value = arguments[arguments.index(flag) + 1]
            return form.format(value.partition(":")[0] if flag == "--worker" else value)
    known = ("gateway", "instance", "up")
    return next((word for word in arguments if word in known), Path(arguments[0]).name)


def _name(pid: int) -> str:
    try:
        line = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        line = ""
    return name_of(line.split("\0")[:-1] or ["?"])


def _children() -> dict[int, list[int]]:
    """By parent."""
    found: dict[int, list[int]] = defaultdict(list)
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            for parent in _parent(entry):
                found[parent].append(int(entry.name))
    return found


def _parent(entry: Path) -> Iterator[int]:
    try:
        stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has just ended
        return
    yield int(stat.rpartition(")")[2].split()[1])


def _fields(file: Path) -> dict[str, int]:
    """What has a number; memory is in kB."""
    found = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdecimal():
            found[name] = int(number[0])
    return found


def _pss(pid: int) -> int:
    try:
        return _fields(_PROC / str(pid) / "smaps_rollup").get("Pss", 0) * _KB
    except OSError:  # not allowed, or an old kernel
        return 0


def _segment_bytes(pid: int) -> int:
    total = 0
    for path in SHM_DIRECTORY.glob(f"{PREFIX}{pid_namespace()}-{pid}-*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total
