"""The queue of a device's kernels and copies, which run long after their calls return.

A thread that reads, publishes or frees memory which they write must first wait for a `Mark`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class Mark(Protocol):
    """A place in the queue of a device's kernels: a CUDA event."""

    def synchronize(self) -> None:
        """Wait until all kernels before the mark have run. Raises RuntimeError if the device is
        lost."""
        ...


class Kernels(Protocol):
    """Kernel queue of the calling thread on its device."""

    def mark(self) -> Mark | None:
        """Return a mark at the current end of the queue. None: all kernels have run."""
        ...


class CudaKernels:
    """Kernel queue of a GPU: the current CUDA stream of the calling thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


class NoKernels:
    """Kernel queue of a CPU, always empty: calls return when they are complete."""

    def mark(self) -> None:
        return None


def kernels_of(device: torch.device) -> Kernels:
    """Return the kernel queue of a device; its methods use the calling thread's stream."""
    return CudaKernels(device) if device.type == "cuda" else NoKernels()


def copy_stream_of(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Return a function that makes contexts in which the calling thread queues its work for a GPU
    on one CUDA stream for copies. Copies and kernels of steps do not wait for each other there:
    only waiting for a `Mark` orders them. On a CPU the contexts do nothing."""
    if device.type != "cuda":
        return nullcontext
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return lambda: torch.cuda.stream(stream)


def wait_for(kernels: Kernels) -> None:
    """Wait until all kernels that the calling thread has queued have run. Raises RuntimeError if
    the device is lost."""
    mark = kernels.mark()
    if mark is not None:
        mark.synchronize()
