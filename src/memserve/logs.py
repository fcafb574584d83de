"""Log formatting: one escaped line of limited length for each record.

Ids, addresses and errors come from clients, members and peers, so they must not be able to forge a
line or fill the log.
"""

from __future__ import annotations

import logging
from types import TracebackType

# Characters of a message. A longer one contains data from outside.
MAX_MESSAGE = 4096
# Characters of one value in a message, so that a long value does not displace the rest.
MAX_VALUE = 256
# Of a traceback. Its last lines are kept, which have the exception.
MAX_TRACE_LINES = 200

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def shown(value: object, limit: int = MAX_VALUE) -> str:
    """Return the text of a value from outside for a log: one line with the first `limit` characters
    and the number of those that were cut. Unprintable characters are escaped, to at most
    `2 * limit` characters."""
    text = str(value)
    cut = len(text) - limit
    if cut > 0:
        text = text[:limit]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)[: 2 * limit]
    return f"{text}[{cut} more]" if cut > 0 else text


class BoundedFormatter(logging.Formatter):
    """Formats a record as one line of at most MAX_MESSAGE characters of message, and the last
    MAX_TRACE_LINES lines of a traceback, indented, behind it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        message = record.message
        if len(message) > MAX_MESSAGE or not message.isprintable():
            record.message = shown(message, MAX_MESSAGE)
        return super().formatMessage(record)

    def formatException(  # noqa: N802 - logging's name
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None]
        | tuple[None, None, None],
    ) -> str:
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"    {shown(line, MAX_MESSAGE)}" for line in lines[-MAX_TRACE_LINES:])


def log_to_stderr(level: int = logging.INFO) -> None:
    """Log to standard error, with times, from `level` on."""
    handler = logging.StreamHandler()
    handler.setFormatter(BoundedFormatter(_FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
