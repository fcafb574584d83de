"""`RequestLine`: what a gateway's log says of a request, as text and as fields of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from memserve.api.generate import GenerateCall
from memserve.api.http_message import Request
from memserve.gateway.relay import Answer
from memserve.logs import shown

MAX_REQUEST_ID = 256  # bytes of X-Request-Id that are echoed
# Bytes of an error's body that are decoded for its message; our own errors have below 1,000.
_MAX_REFUSAL_BYTES = 16 * 1024
_MAX_CODE = 64  # characters
_MAX_PLAN = 1024


class Reason(NamedTuple):
    """Why a request failed: an error's code and message, printable and bounded."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


CLIENT_LEFT = Reason("client_left", "the client hung up before its answer had ended")


class _Error(msgspec.Struct, frozen=True):
    message: str = ""
    type: str | None = None
    code: str | int | None = None  # vLLM's is the status


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Error


_decode = msgspec.json.Decoder(_ErrorBody).decode


def read_reason(refusal: bytes | bytearray) -> Reason | None:
    """Return the reason that an error's body tells; None without a body."""
    if not refusal:
        return None
    try:
        error = _decode(refusal[:_MAX_REFUSAL_BYTES]).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Reason("-", shown(refusal[:_MAX_REFUSAL_BYTES].decode(errors="replace")))
    return Reason(shown(error.code or error.type or "-", _MAX_CODE), shown(error.message))


class RequestLine(msgspec.Struct, frozen=True, eq=False):
    """A request's outcome, times in seconds, and route. A `FieldedMessage`."""

    request: Request
    request_id: bytes | None  # the client's
    call: GenerateCall | None
    answer: Answer
    status: int
    first: float | None  # to the first byte
    total: float
    reason: Reason | None  # of a status from 400 on

    def __str__(self) -> str:
        call, answer, route, first = self.call, self.answer, self.answer.route, self.first
        trace = None if answer.trace is None else answer.trace.id
        return (
            f"{self.request.path}"
            f" request={'-' if self.request_id is None else _escaped(self.request_id)}"
            f"{'' if answer.key is None else f' key={answer.key}'}"
            f"{'' if trace is None else f' trace={trace}'}"
            f" call={'-' if call is None else call.id}"
            f" instance={'-' if route is None else route.member.id}"
            f"{'' if call is None or call.forward is None else ' forwarded'}"
            f" status={self.status}{' broken' if answer.broken else ''}"
            f" prompt_tokens={'-' if call is None else sum(map(len, call.prompts))}"
            f" first={'-' if first is None else f'{first:.4f}'} total={self.total:.4f}"
            f"{''.join(f' pause={pause:.3f}' for pause in answer.pauses)}"
            f"{'' if route is None else f' plan={route.explain()}'}"
            f"{'' if self.reason is None else f' reason={self.reason}'}"
        )

    def fields(self) -> Mapping[str, object]:
        """Return the same as JSON values, by the names of the text; absent if there is none."""
        call, answer, route = self.call, self.answer, self.answer.route
        known: dict[str, object] = {
            "path": shown(self.request.path),
            "request": None if self.request_id is None else _escaped(self.request_id),
            "key": answer.key,
            "trace": None if answer.trace is None else answer.trace.id,
            "call": None if call is None else call.id,
            "instance": None if route is None else route.member.id,
            "forwarded": None if call is None or call.forward is None else True,
            "status": self.status,
            "broken": answer.broken or None,
            "prompt_tokens": None if call is None else sum(map(len, call.prompts)),
            "first": None if self.first is None else round(self.first, 6),
            "total": round(self.total, 6),
            "pauses": [round(pause, 6) for pause in answer.pauses] or None,
            "plan": None if route is None else shown(route.explain(), _MAX_PLAN),
            "reason_code": None if self.reason is None else self.reason.code,
            "reason": None if self.reason is None else self.reason.message,
        }
        return {name: value for name, value in known.items() if value is not None}


def _escaped(request_id: bytes) -> str:
    return ascii(request_id[:MAX_REQUEST_ID])[2:-1]
