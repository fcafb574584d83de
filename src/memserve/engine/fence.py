"""Synchronisation with a GPU's kernels, which run long after the calls that queue them return.

A block must not be read, inserted or freed before the kernels that write it have run. The runner
therefore waits for the kernels of each step. Observers of a prefill are called earlier, from
`KernelFence`, as soon as the kernels of one layer have run.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from memserve.engine.observer import PrefillObserver, PrefillWatch
from memserve.pool.device_queue import Kernels, Mark
from memserve.types import RefArray

log = logging.getLogger(__name__)


class _Due(NamedTuple):
    mark: Mark
    call: Callable[[], None]


class KernelFence:
    """Makes calls, in order and in its own thread, when the kernels queued before them have run.
    Owned by the engine's thread."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._lost = False  # the device is lost: queued and later calls are dropped
        self._due: queue.SimpleQueue[_Due | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine-fence", daemon=True)
        self._thread.start()

    @property
    def thread(self) -> threading.Thread:
        """The calling thread; it must stay alive until `close`."""
        return self._thread

    def after(self, call: Callable[[], None]) -> None:
        """Make `call` when all kernels that this thread has queued have run; drop it if the device
        is lost."""
        if self._lost:
            return
        mark = self._kernels.mark()
        if mark is None:
            call()
        else:
            self._due.put(_Due(mark, call))

    def close(self) -> None:
        """Wait until all calls have been made or dropped, and end the thread."""
        self._due.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (due := self._due.get()) is not None:
            if self._lost:
                continue  # drop the call
            try:
                due.mark.synchronize()
            except RuntimeError:
                # The device is lost, and the engine fails with it. The KV of later calls is
                # invalid and must not be sent.
                log.exception("a device failed; what it computed is not sent")
                self._lost = True
                continue
            try:
                due.call()
            except Exception:
                # Only one transfer fails, by its deadline; other transfers need this thread.
                log.exception("a block that is ready was not passed on")


class FencedObserver:
    """Observer for an engine on a GPU: passes calls on to `inner`, `ready` through the fence."""

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
