"""Time of work on a device, whose calls return before it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of `work` on an idle device, until all of it is done."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median of `repeats` runs, after one that is not counted."""
    return median([seconds_of(work, device) for _ in range(repeats + 1)][1:])


def synchronize(device: torch.device) -> None:
    """Wait for all work on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
