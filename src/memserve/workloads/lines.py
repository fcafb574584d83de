"""Reads JSON lines; an error is one line of text that names the file and the line's number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from memserve.errors import ConfigError
from memserve.workloads.session import open_data

# Room for a document of millions of words; a longer line means that the file is no JSON lines.
MAX_LINE_BYTES = 64 * 1024 * 1024
_SHOWN = 200  # most characters of an error that are shown

_Record = TypeVar("_Record")


def read_lines(
    path: Path, kind: type[_Record], limit: int | None = None, most: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, _Record]]:
    """Yield the first `limit` records, each with its line number from 1; empty lines are skipped.
    Raises ConfigError, also for lines of more than `most` bytes."""
    decoder = msgspec.json.Decoder(kind)
    number = found = 0
    with open_data(path) as file:
        while limit is None or found < limit:
            number += 1
            try:
                line = file.readline(most + 1)
            except OSError as error:
                raise ConfigError(f"{path}:{number}: {error.strerror}") from error
            if not line:
                return
            if len(line) > most:
                raise ConfigError(f"{path}:{number}: a line of more than {most} bytes")
            if line.isspace():
                continue
            found += 1
            try:
                record = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ConfigError(f"{path}:{number}: {shown(error)}") from error
            yield number, record


def shown(error: Exception) -> str:
    """Return an error's text on one line, cut to `_SHOWN` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
