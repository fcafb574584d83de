"""What others send cannot forge log lines, nor fill the log."""

from __future__ import annotations

import logging
import sys

from memserve.logs import MAX_MESSAGE, BoundedFormatter, shown


def record(message: str, *values: object) -> logging.LogRecord:
    return logging.LogRecord("x", logging.INFO, "f", 1, message, values, None)


def test_a_line_is_a_line_whatever_is_in_it() -> None:
    forged = "id\n2026-01-01 INFO memserve: all is well\r\x1b[2J\x00\u2028"
    line = BoundedFormatter("%(levelname)s %(message)s").format(record("%s failed", forged))
    assert line == (r"INFO id\n2026-01-01 INFO memserve: all is well\r\x1b[2J\x00\u2028 failed")
    assert line.isprintable()


def test_a_line_has_a_longest_length() -> None:
    for value in ("i" * 1_200_000, "\n" * 1_200_000):
        line = BoundedFormatter("%(message)s").format(record("%s failed", value))
        assert line.endswith(f"[{1_200_007 - MAX_MESSAGE} more]")
        assert len(line) < 2 * MAX_MESSAGE + 50
    assert shown("x" * 300) == "x" * 256 + "[44 more]"
    assert shown("naïve 你好 👍") == "naïve 你好 👍"
    assert shown("\ud800") == r"\ud800"  # a lone surrogate, which no file takes


def test_an_exception_s_text_begins_no_line_either() -> None:
    try:
        raise ValueError("bad\nINFO memserve: all is well\n" + "x\n" * 10_000)
    except ValueError:
        given = record("it failed")
        given.exc_info = sys.exc_info()
    first, *others = BoundedFormatter("%(levelname)s %(message)s").format(given).splitlines()
    assert first == "INFO it failed"
    assert all(line.startswith("    ") for line in others)
    assert len(others) <= 200


def test_plain_messages_are_as_they_were() -> None:
    assert BoundedFormatter("%(message)s").format(record("%d of %s", 3, "x")) == "3 of x"
