"""CPU seconds and peak memory of processes on this machine, from /proc."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

_TICKS = os.sysconf("SC_CLK_TCK")
_RESET_PEAK = b"5"  # written to `clear_refs`: resets the peak of resident memory


class ProcessStats(msgspec.Struct, frozen=True):
    """Resources that one process used during one run."""

    name: str
    cpu_seconds: float  # user and system, all threads
    peak_bytes: int  # resident, with shared pages; of the run, or the whole life (`_reset_peak`)


class ProcessMeter:
    """Measures processes from the constructor to `read`, which leaves out those that have ended."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        """`pids`: process ids by name."""
        self._pids = dict(pids)
        self._before = {}
        for name, pid in self._pids.items():
            _reset_peak(pid)
            if (used := _cpu_seconds(pid)) is not None:
                self._before[name] = used

    def read(self) -> tuple[ProcessStats, ...]:
        figures = []
        for name, before in self._before.items():
            pid = self._pids[name]
            used, peak = _cpu_seconds(pid), _peak_bytes(pid)
            if used is not None and peak is not None:
                figures.append(ProcessStats(name, used - before, peak))
        return tuple(figures)


def _cpu_seconds(pid: int) -> float | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    # The second field is the program's name in brackets, which may have spaces and brackets itself.
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _peak_bytes(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("VmHWM:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def _reset_peak(pid: int) -> None:
    try:
        Path(f"/proc/{pid}/clear_refs").write_bytes(_RESET_PEAK)
    except OSError:
        return  # another user's process, whose peak is then that of its whole life, or an ended one
