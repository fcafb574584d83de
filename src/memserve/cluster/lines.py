"""Splitting a stream of bytes into lines of limited length."""

from __future__ import annotations

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
