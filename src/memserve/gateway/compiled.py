"""What a gateway compiles when it starts: it looks at bodies, and leaves the interpreter to
other threads meanwhile."""

from __future__ import annotations

from memserve.compiled import Kernels

_KERNELS = Kernels("request bodies", without_gil=True)
compiled = _KERNELS.compiled
prepare = _KERNELS.prepare
