"""The watchdog of a child process: ends it when its parent ends, even by SIGKILL.

The parent holds the writing end of the child's standard input and never writes. The kernel closes
that end when the parent ends, and the child reads the end of the file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

# Seconds of the first SIGTERM, an orderly stop, until the second, which does not wait for running
# requests, and of the second until SIGKILL. Short, since without a parent nobody needs the answers.
FORCE_SECONDS = 3.0
KILL_SECONDS = 15.0


def exit_with_parent() -> None:
    """From now on, end this process when its standard input closes."""
    threading.Thread(target=_watch, name="watchdog", daemon=True).start()


def _watch() -> None:
    # If standard input cannot be read, the process ends, too: it could outlive its parent.
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    for number, seconds in (
        (signal.SIGTERM, FORCE_SECONDS),
        (signal.SIGTERM, KILL_SECONDS),
        (signal.SIGKILL, 0.0),
    ):
        os.kill(os.getpid(), number)
        time.sleep(seconds)
