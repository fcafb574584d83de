"""Recorder of a process's calls, which Python imports by itself from a folder on PYTHONPATH.

SIGUSR1 begins; SIGUSR2 writes the functions of `memserve` that ran since, in the order of their
first calls, to `WALK_DIRECTORY/<pid>`: a line each with module and qualified name. Only calls
count: code that numba has compiled, and structs without methods, are not seen.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

_PACKAGE = f"{os.sep}memserve{os.sep}"
_seen: dict[tuple[str, str], None] = {}
_recording = False


def _call(frame: FrameType, event: str, argument: Any) -> None:
    if _recording and event == "call":
        code = frame.f_code
        _, found, path = code.co_filename.rpartition(_PACKAGE)
        if found:
            _seen.setdefault((path, code.co_qualname))


def _begin(number: int, frame: FrameType | None) -> None:
    global _recording
    _seen.clear()
    _recording = True


def _end(number: int, frame: FrameType | None) -> None:
    global _recording
    _recording = False
    lines = "".join(f"{path}\t{name}\n" for path, name in list(_seen))
    target = Path(os.environ["WALK_DIRECTORY"], str(os.getpid()))
    part = target.with_suffix(".part")
    part.write_text(lines, encoding="utf-8")
    part.rename(target)


signal.signal(signal.SIGUSR1, _begin)
signal.signal(signal.SIGUSR2, _end)
sys.setprofile(_call)
threading.setprofile(_call)
