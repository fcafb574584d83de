"""Lines of a stream of bytes, none of them too long."""

from __future__ import annotations

# Longer than any line that says something: a traceback's, or one about a request. What is
# behind it is data that somebody sent.
MAX_LINE_BYTES = 8192


class Lines:
    """Splits what comes in pieces; holds no more than `limit` bytes of a line without an end."""

    def __init__(self, limit: int = MAX_LINE_BYTES) -> None:
        self._limit = limit
        self._begun = bytearray()  # of the last line, as much as is kept
        self._length = 0  # of it, as it came

    def feed(self, data: bytes) -> list[str]:
        """The lines that end in `data`, without their ends. A longer one is cut and says by
        how many bytes."""
        *ended, rest = data.split(b"\n")
        lines = []
        for part in ended:
            self._add(part)
            lines.append(self._take())
        self._add(rest)
        return lines

    def end(self) -> list[str]:
        """The last line, if the stream ends without an end of it."""
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
