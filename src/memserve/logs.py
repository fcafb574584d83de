"""Log formatting: one escaped line of limited length for each record, as text or as JSON.

Ids, addresses and errors come from clients, members and peers, so they must not be able to forge a
line or fill the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, Protocol, runtime_checkable

import msgspec

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

# Characters of a message. A longer one contains data from outside.
MAX_MESSAGE = 4096
# Characters of one value in a message, so that a long value does not displace the rest.
MAX_VALUE = 256
# Of a traceback. Its last lines are kept, which have the exception.
MAX_TRACE_LINES = 200

_encode = msgspec.json.Encoder().encode
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


@runtime_checkable
class FieldedMessage(Protocol):
    """A message with fields of its own in a line of JSON. Its text is `str` of it."""

    def fields(self) -> Mapping[str, object]:
        """Return the fields: JSON values, whose texts are printable and bounded."""


class JsonFormatter(BoundedFormatter):
    """Formats a record as one JSON object: `time` (UTC), `level`, `logger`, `message`, the fields
    of a `FieldedMessage`, and `exception` with the last lines of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        said, fields = record.msg, {}
        if not isinstance(said, str) and isinstance(said, FieldedMessage):
            fields = dict(said.fields())
        trace = {"exception": self.formatException(record.exc_info)} if record.exc_info else {}
        return json_line(
            record.name, record.getMessage(), record.levelname, record.created, {**fields, **trace}
        )


def worth_a_line(count: int, first: int = 1) -> bool:
    """Return whether so many failures in a row are `first` of them, or twice as many as at the
    last line: what fails for days is not logged each time."""
    times, rest = divmod(count, first)
    return times > 0 and not rest and not times & (times - 1)


def json_line(
    logger: str,
    message: str,
    level: str = "INFO",
    at: float | None = None,
    more: Mapping[str, object] | None = None,
) -> str:
    """Return a log line as JSON. `at`: seconds since the epoch; None: now."""
    moment = datetime.fromtimestamp(time.time() if at is None else at, UTC)
    line = {
        "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": level,
        "logger": logger,
        "message": shown(message, MAX_MESSAGE),
        **(more or {}),
    }
    return _encode(line).decode()


def json_child_line(line: str) -> str:
    """Return a child's line, `NAME: LINE` as `Child.show_output` gives it, as JSON: its own object
    with the name as `process`, or an object with a text as the message."""
    name, _, said = line.partition(": ")
    if said.startswith('{"time":') and said.endswith("}"):
        return f'{{"process":{_encode(name).decode()},{said[1:]}'
    return json_line("output", said, more={"process": name})


def log_to_stderr(level: LogLevel = "info", form: LogFormat = "text") -> None:
    """Log to standard error, with times, from `level` on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else BoundedFormatter(_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def logs_json() -> bool:
    """Return whether this process logs as JSON."""
    return any(isinstance(one.formatter, JsonFormatter) for one in logging.getLogger().handlers)
