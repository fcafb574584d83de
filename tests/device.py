"""The device of tests of engines and hand-overs: MEMSERVE_TEST_DEVICE, by default the CPU.

`make gpu-test` runs them on a GPU.
"""

from __future__ import annotations

import os

DEVICE = os.environ.get("MEMSERVE_TEST_DEVICE", "cpu")
