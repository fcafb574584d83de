"""Printing lines from a thread, so that a slow reader never blocks the caller.

With a paused terminal, a pipe without a reader or a full disk, a supervising process must go on, or
its children block on their own output.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from types import TracebackType
from typing import Self

STDOUT, STDERR = 1, 2  # file descriptors
# Lines queued for a slow reader: seconds of a busy cluster's log, 8 MiB at most.
MAX_WAITING = 1024
# Longest wait of `close` for queued lines: an ending process must not hang at a terminal.
CLOSE_SECONDS = 1.0
_FULL_SECONDS = 0.1  # longest wait for room in a non-blocking descriptor before another try


class LinePrinter:
    """Writes lines to a file descriptor, from a thread of its own. A context manager.

    Lines that do not fit into the queue, or cannot be written, are dropped and counted; the next
    line that is written follows `[N lines dropped]`.
    """

    def __init__(self, fd: int) -> None:
        """The caller owns `fd`."""
        self.dropped = 0  # lines, since the beginning
        self._fd = fd
        self._waiting: deque[str] = deque()
        self._changed = threading.Condition()
        self._told = 0  # dropped lines that were reported
        self._closing = False
        # A daemon thread: at the end of the process it may be in a `write` that never returns.
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
        """Queue a line for printing. Never blocks, and raises nothing."""
        with self._changed:
            if len(self._waiting) >= MAX_WAITING or self._closing:
                self.dropped += 1
                return
            self._waiting.append(line)
            self._changed.notify()

    def close(self) -> None:
        """Print the queued lines, within CLOSE_SECONDS, and end the thread."""
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
        """Write all of `data`; return False if that fails."""
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # another process has made the descriptor non-blocking
                select.select((), (self._fd,), (), _FULL_SECONDS)
            except OSError:  # no space left, or no reader: the next line is tried again
                return False
        return True


class LineStream:
    """A file for `logging.StreamHandler.setStream` whose lines a printer writes."""

    def __init__(self, printer: LinePrinter) -> None:
        self._printer = printer

    def write(self, text: str) -> None:
        """Print a log record, which ends with a line end."""
        self._printer.show(text.removesuffix("\n"))

    def flush(self) -> None:
        pass


# Longer than any useful line, such as a traceback's. A longer one contains data from a request.
MAX_LINE_BYTES = 8192


class Lines:
    """Splits pieces of a stream into lines; holds at most `limit` bytes of an incomplete line."""

    def __init__(self, limit: int = MAX_LINE_BYTES) -> None:
        self._limit = limit
        self._begun = bytearray()  # the first bytes of the incomplete line
        self._length = 0  # of the incomplete line, with the bytes that are not kept

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that end in `data`, without line ends. A line of more than `limit` bytes
        is cut and tells how many bytes are missing."""
        *ended, rest = data.split(b"\n")
        lines = []
        for part in ended:
            self._add(part)
            lines.append(self._take())
        self._add(rest)
        return lines

    def end(self) -> list[str]:
        """Return the last line, if the stream has ended without a line end."""
        return [self._take()] if self._length else []

    def _add(self, part: bytes) -> None:
        self._length += len(part)
        self._begun += part[: max(0, self._limit - len(self._begun))]

    def _take(self) -> str:
        line = self._begun.decode(errors="replace").rstrip()
        cut = self._length - len(self._begun)
        self._begun.clear()
        self._length = 0
        return f"{line} [{cut} bytes cut]" if cut else line
