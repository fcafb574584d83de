"""Printing lines without ever waiting for whoever reads them.

A terminal that is paused, a pipe that nobody reads, a full disk: a process that supervises
others must go on all the same, or its children wait for it in turn.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from types import TracebackType
from typing import Self

STDOUT, STDERR = 1, 2  # file descriptors
# What waits for a slow reader: seconds of a busy cluster's log, 8 MiB at most.
MAX_WAITING = 1024  # lines
# How long `close` waits for lines to be taken: what ends must not hang at a terminal.
CLOSE_SECONDS = 1.0
_FULL_SECONDS = 0.1  # between looks whether a descriptor that does not block has room again


class LinePrinter:
    """Writes lines to a file descriptor, from a thread of its own. A context manager.

    What does not fit into the queue, or cannot be written, is dropped and counted; the next
    line that is written comes after `[N lines dropped]`.
    """

    def __init__(self, fd: int) -> None:
        """`fd` stays the caller's."""
        self.dropped = 0  # lines, since the beginning
        self._fd = fd
        self._waiting: deque[str] = deque()
        self._changed = threading.Condition()
        self._told = 0  # of the dropped ones
        self._closing = False
        # A daemon: it may be in a `write` that never returns when the process ends.
        self._thread = threading.Thread(target=self._run, name="line-printer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def show(self, line: str) -> None:
        """Print a line, soon. Waits for nothing and raises nothing."""
        with self._changed:
            if len(self._waiting) >= MAX_WAITING or self._closing:
                self.dropped += 1
                return
            self._waiting.append(line)
            self._changed.notify()

    def close(self) -> None:
        """Print what waits, unless that takes too long, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                line = self._waiting.popleft()
                dropped = self.dropped
            note = f"[{dropped - self._told} lines dropped]\n" if dropped > self._told else ""
            if self._write(f"{note}{line}\n".encode(errors="replace")):
                self._told = dropped
            else:
                with self._changed:
                    self.dropped += 1

    def _write(self, data: bytes) -> bool:
        """All of it; False if that cannot be done."""
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # somebody else has made the descriptor non-blocking
                select.select((), (self._fd,), (), _FULL_SECONDS)
            except OSError:  # no space left, nobody there: the next line may fare better
                return False
        return True


class LineStream:
    """A file to log to (`logging.StreamHandler.setStream`) that a printer writes."""

    def __init__(self, printer: LinePrinter) -> None:
        self._printer = printer

    def write(self, text: str) -> None:
        """A record, with its end of line."""
        self._printer.show(text.removesuffix("\n"))

    def flush(self) -> None:
        pass
