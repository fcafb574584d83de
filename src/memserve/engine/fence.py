"""Observers of prefills on a GPU, where a layer is computed long after its call has returned."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from memserve.engine.observer import PrefillObserver, PrefillWatch
from memserve.types import RefArray

log = logging.getLogger(__name__)


class _Due(NamedTuple):
    event: torch.cuda.Event
    call: Callable[[], None]


class KernelFence:
    """Calls back, in order and from a thread of its own, when the kernels queued so far have
    run. The engine's thread owns it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._due: queue.SimpleQueue[_Due | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine-fence", daemon=True)
        self._thread.start()

    def after(self, call: Callable[[], None]) -> None:
        """Have `call` called behind everything that this thread has queued."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._due.put(_Due(event, call))

    def close(self) -> None:
        """Returns when all calls have been made."""
        self._due.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (due := self._due.get()) is not None:
            try:
                due.event.synchronize()
            except RuntimeError:
                # The device is lost, and the engine with it: it tells everybody. Nothing is
                # ready any more, and nothing may be sent.
                log.exception("a device failed; what it computed is not sent")
                return
            due.call()


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
