"""Epochs: numbers of an instance's lives, larger for later ones."""

from __future__ import annotations

import threading
import time

from memserve.types import Epoch

_last = 0
_lock = threading.Lock()


def new_epoch() -> Epoch:
    """Different for every pool of this process, and later than those before a restart."""
    global _last
    with _lock:
        _last = max(time.time_ns(), _last + 1)
        return Epoch(_last)
