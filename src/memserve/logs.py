"""Log lines that are lines, and no longer than one reads, whatever is in them.

Ids, addresses and errors come from outside: from clients, from members, from peers. They can
neither begin a line of their own nor fill the log.
"""

from __future__ import annotations

import logging
from types import TracebackType

# A message that says more says it with data that somebody sent.
MAX_MESSAGE = 4096  # characters
# One value in a message: so that a long one leaves the rest of the message its place.
MAX_VALUE = 256
# Of a traceback, which is ours but for the texts of exceptions. Its end says what happened.
MAX_TRACE_LINES = 200

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def shown(value: object, limit: int = MAX_VALUE) -> str:
    """A value from outside as a log shows it: its text in one line of at most `limit`
    characters and a note of how many were cut; what cannot be printed is escaped."""
    text = str(value)
    cut = len(text) - limit
    if cut > 0:
        text = text[:limit]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)[: 2 * limit]
    return f"{text}[{cut} more]" if cut > 0 else text


class BoundedFormatter(logging.Formatter):
    """One record, one line; a traceback's lines behind it are indented and counted."""

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
    """Have what this process logs printed to standard error, with times."""
    handler = logging.StreamHandler()
    handler.setFormatter(BoundedFormatter(_FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
