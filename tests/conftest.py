"""Fixtures that every test directory shares."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported, here and in the processes that tests start. The tests' models are so
# small that OpenMP's threads mostly wait for each other, in a loop, on cores that others need.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before the GPU's kernels are imported: without a GPU, Triton's interpreter runs them.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before Ray is imported, by whichever test comes first: it reads this then.
os.environ["RAY_AUTH_MODE"] = "token"
