"""What others send cannot forge log lines, nor fill the log."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping

import pytest

from memserve.cluster.launches import instance_launches
from memserve.config import ClusterConfig, InstanceConfig, LogConfig, parse_config
from memserve.flags import flags_of, to_flags, with_flags
from memserve.logs import (
    MAX_MESSAGE,
    BoundedFormatter,
    JsonFormatter,
    json_child_line,
    json_line,
    shown,
)
from memserve.secrets import Secret


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


def as_json(given: logging.LogRecord) -> dict[str, object]:
    line = JsonFormatter().format(given)
    assert line.isprintable()
    decoded: dict[str, object] = json.loads(line)
    return decoded


def test_a_line_of_json_has_time_level_logger_and_message() -> None:
    given = record("%d of %s", 3, "x")
    given.created = 1_700_000_000.25
    assert JsonFormatter().format(given) == (
        '{"time":"2023-11-14T22:13:20.250Z","level":"INFO","logger":"x","message":"3 of x"}'
    )


@pytest.mark.parametrize("value", ["a\n\x1b[2J\u2028\x9b", "\ud800", '"}\\', "x" * 1_000_000])
def test_json_says_what_text_says(value: str) -> None:
    given = record("%s failed", value)
    assert as_json(given)["message"] == BoundedFormatter("%(message)s").format(given)


def test_fields_and_an_exception_are_in_the_object() -> None:
    class Message:
        def __str__(self) -> str:
            return "as text"

        def fields(self) -> Mapping[str, object]:
            return {"status": 200}

    try:
        raise ValueError("bad\nline")
    except ValueError:
        given = logging.LogRecord("x", logging.ERROR, "f", 1, Message(), (), sys.exc_info())
    line = as_json(given)
    assert (line["message"], line["status"], line["level"]) == ("as text", 200, "ERROR")
    assert str(line["exception"]).endswith("line")
    assert BoundedFormatter("%(message)s").format(given).startswith("as text\n")


def test_a_childs_lines_become_json_with_its_name() -> None:
    own = json_line("memserve.x", "said")
    assert json.loads(json_child_line(f"gateway: {own}")) == {
        **json.loads(own),
        "process": "gateway",
    }
    other = json.loads(json_child_line('prefill-0: INFO vllm: "ready": yes'))
    assert (other["process"], other["message"]) == ("prefill-0", 'INFO vllm: "ready": yes')


def test_children_log_as_the_cluster_does() -> None:
    config = parse_config("[log]\nlevel = 'warning'\nformat = 'json'")
    assert config.log == LogConfig(level="warning", format="json")
    flags = ["--log-level", "warning", "--log-format", "json"]
    assert to_flags(config.log) == flags
    given = dict(zip(("log_level", "log_format"), flags[1::2], strict=True))
    assert with_flags(LogConfig(), given) == config.log
    assert [flag.name for flag in flags_of(LogConfig)] == flags[::2]
    (launch,) = instance_launches(config, Secret(("x",)))
    arguments = list(launch.arguments)
    at = arguments.index("--log-level")
    assert arguments[at : at + 4] == flags
    # By default nothing is added.
    plain = ClusterConfig(instance=(InstanceConfig(),))
    (launch,) = instance_launches(plain, Secret(("x",)))
    arguments = launch.arguments
    assert not [argument for argument in arguments if argument.startswith("--log")]
