"""The log line of a request: unchanged for those that succeed, with the reason for others."""

from __future__ import annotations

import json
import logging

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.api.errors import context_length_exceeded, invalid, queue_full
from memserve.gateway.relay import Answer
from memserve.gateway.request_line import CLIENT_LEFT, RequestLine, read_reason
from memserve.logs import BoundedFormatter, JsonFormatter
from tests.gateway_harness import POST, Client


def line(body: bytes | None, status: int, request_id: bytes | None = b"r-1") -> RequestLine:
    reason = None if body is None else read_reason(body)
    return RequestLine(POST, request_id, None, Answer(), status, None, 0.25, reason)


def record(said: RequestLine) -> logging.LogRecord:
    return logging.LogRecord("g", logging.INFO, "f", 1, said, (), None)


BEFORE = (
    "/v1/completions request=r-1 call=- instance=- status={} prompt_tokens=- first=- total=0.2500"
)


def test_a_request_that_succeeds_has_its_line_as_ever() -> None:
    assert str(line(None, 200)) == BEFORE.format(200)


def test_a_refusal_ends_with_its_code_and_message() -> None:
    body = context_length_exceeded(100, 90, 20, "prompt").body()
    said = str(line(body, 400))
    assert said == BEFORE.format(400) + (
        " reason=context_length_exceeded: This model's maximum context length is 100 tokens. "
        "You requested 110 tokens: 90 in the prompt and 20 for the answer."
    )
    assert str(line(invalid("No.").body(), 400)).endswith(" reason=invalid_request_error: No.")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"error":{"message":"vLLM says no","code":400}}', "400: vLLM says no"),
        (b"<html>", "-: <html>"),
        (b'{"detail":"x"}', '-: {"detail":"x"}'),
        (b"\xff\x00", r"-: \ufffd\x00".replace(r"\ufffd", "\ufffd")),
    ],
)
def test_refusals_of_others_are_told_too(body: bytes, reason: str) -> None:
    assert str(read_reason(body)) == reason
    assert read_reason(b"") is None


@given(st.text(), st.text(), st.integers(1, 3000))
def test_a_reason_is_printable_and_bounded(message: str, code: str, times: int) -> None:
    text = (message * times).encode(errors="replace").decode()
    body = msgspec.json.encode(
        {"error": {"message": text, "code": code.encode(errors="replace").decode()}}
    )
    given = line(body, 400, b"\n\xff")
    said = BoundedFormatter("%(message)s").format(record(given))
    assert said.isprintable()
    assert len(said) < 1500
    fields = json.loads(JsonFormatter().format(record(given)))
    assert fields["status"] == 400
    assert len(fields["reason"]) < 600


def test_fields_are_the_texts() -> None:
    fields = line(queue_full("Full.", 3).body(), 429).fields()
    assert fields == {
        "path": "/v1/completions",
        "request": "r-1",
        "status": 429,
        "total": 0.25,
        "reason_code": "queue_full",
        "reason": "Full.",
    }


def test_a_reply_keeps_what_it_refused_with_and_nothing_else() -> None:
    good, bad = Client(), Client()
    good.reply.send(200, b"{}")
    bad.reply.send_error(invalid("No."))
    assert good.reply.refusal == b""
    assert bad.reply.refusal == bad.body
    assert "client_left" in str(RequestLine(POST, None, None, Answer(), 499, None, 1, CLIENT_LEFT))
