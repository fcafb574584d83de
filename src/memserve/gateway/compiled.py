"""The gateway's compiled kernels, which scan bodies without the GIL. Compiled at start."""

from __future__ import annotations

from memserve.compiled import Kernels

_KERNELS = Kernels("request bodies", without_gil=True)
compiled = _KERNELS.compiled
prepare = _KERNELS.prepare
