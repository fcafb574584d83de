"""A child that cannot outlive its parent, by whatever means the parent ends.

The parent holds the writing end of the child's standard input and never writes. The kernel
closes it with the parent, SIGKILL included, and the child reads the end of the file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

# Without a parent nobody waits for answers long. First an orderly stop, then one that no
# longer waits for running requests, then none is waited for at all.
FORCE_SECONDS = 3.0
KILL_SECONDS = 15.0


def exit_with_parent() -> None:
    """From now on, end this process when its standard input closes."""
    threading.Thread(target=_watch, name="watchdog", daemon=True).start()


def _watch() -> None:
    # Whatever keeps it from watching: this process might outlive its parent, and must not.
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
