"""This machine's CPU, as Linux tells it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_FLAGS = ("flags", "Features")  # on x86, on Arm


def cpu_name() -> str:
    """Return the CPU's name; the machine type if it has none."""
    return next(_values("model name"), platform.machine())


def cpu_flags() -> frozenset[str]:
    """Return the names of the CPU's instruction sets and features; empty if they are not told."""
    return frozenset(next(_values(*_FLAGS), "").split())


def _values(*keys: str) -> Iterator[str]:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            yield value.strip()
