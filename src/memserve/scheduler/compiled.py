"""Registry of the scheduler's numba functions. `Scheduler()` compiles them, no import does."""

from __future__ import annotations

from memserve.compiled import Kernels

_KERNELS = Kernels("the scheduler")
compiled = _KERNELS.compiled
inlined = _KERNELS.inlined
prepare = _KERNELS.prepare
