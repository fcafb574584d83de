"""When the kernels of a GPU have run: they do long after the call that queued them has returned.

Nothing that they write may be read, and nothing that they may still write may be given away, before
that. The runner therefore waits for the kernels of each step, so that insertion and freeing, which
follow a step, follow its kernels; what observers want to know earlier comes from `KernelFence`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from memserve.engine.observer import PrefillObserver, PrefillWatch
from memserve.types import RefArray

log = logging.getLogger(__name__)


class Mark(Protocol):
    """A place in the queue of a device's kernels: a CUDA event."""

    def synchronize(self) -> None:
        """Returns when everything before it has run. Raises RuntimeError if the device is lost."""
        ...


class Kernels(Protocol):
    """What the engine's thread has queued on its device."""

    def mark(self) -> Mark | None:
        """The end of the queue as it is now. None: nothing is queued, all has run."""
        ...


class CudaKernels:
    """Kernels on a GPU: a call returns when its kernels are queued, long before they have run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


class NoKernels:
    """On a CPU a call returns when it is done."""

    def mark(self) -> None:
        return None


def kernels_of(device: torch.device) -> Kernels:
    return CudaKernels(device) if device.type == "cuda" else NoKernels()


class _Due(NamedTuple):
    mark: Mark
    call: Callable[[], None]


class KernelFence:
    """Calls back, in order and from a thread of its own, when the kernels queued so far have
    run. The engine's thread owns it."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._lost = False  # nothing that is queued, now or later, is ever called
        self._due: queue.SimpleQueue[_Due | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine-fence", daemon=True)
        self._thread.start()

    @property
    def thread(self) -> threading.Thread:
        """It ends with `close`; to be watched before that."""
        return self._thread

    def after(self, call: Callable[[], None]) -> None:
        """Have `call` called behind everything that this thread has queued; never, once the device
        was lost."""
        if self._lost:
            return
        mark = self._kernels.mark()
        if mark is None:
            call()
        else:
            self._due.put(_Due(mark, call))

    def close(self) -> None:
        """Returns when all calls have been made."""
        self._due.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (due := self._due.get()) is not None:
            if self._lost:
                continue  # so that what waits is let go
            try:
                due.mark.synchronize()
            except RuntimeError:
                # The device is lost, and the engine with it: it tells everybody. Nothing is
                # ready any more, and nothing may be sent.
                log.exception("a device failed; what it computed is not sent")
                self._lost = True
                continue
            try:
                due.call()
            except Exception:
                # One transfer's, which then ends by its deadline; the others wait for this thread.
                log.exception("a block that is ready was not passed on")


class FencedObserver:
    """Passes on what an engine on a GPU says, `ready` behind the kernels."""

    def __init__(self, inner: PrefillObserver, fence: KernelFence) -> None:
        self._inner = inner
        self._fence = fence

    def begin(self, refs: RefArray) -> PrefillWatch | None:
        watch = self._inner.begin(refs)
        return None if watch is None else _FencedWatch(watch, self._fence)


class _FencedWatch:
    def __init__(self, inner: PrefillWatch, fence: KernelFence) -> None:
        self.by_layer = inner.by_layer
        self._inner = inner
        self._fence = fence

    def ready(self, first: int, last: int, layer: int | None) -> None:
        self._fence.after(lambda: self._inner.ready(first, last, layer))

    def superseded(self, refs: RefArray) -> None:
        self._inner.superseded(refs)

    def released(self, computed: int) -> None:
        self._inner.released(computed)
