"""What is compiled when a scheduler is made, and not before."""

from __future__ import annotations

from memserve.compiled import Kernels

_KERNELS = Kernels("the scheduler")
compiled = _KERNELS.compiled
inlined = _KERNELS.inlined
prepare = _KERNELS.prepare
