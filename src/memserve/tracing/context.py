"""Trace contexts in HTTP headers: `traceparent` and `tracestate` of W3C Trace Context, level 1."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

PARENT_HEADER = b"traceparent"
STATE_HEADER = b"tracestate"
# Characters of a `tracestate`; a longer one is dropped. W3C asks for at least 512.
MAX_STATE_CHARACTERS = 512
MAX_STATE_MEMBERS = 32  # W3C's

_SAMPLED = 1
_UNUSED_VERSION = b"ff"
_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[!-~]*)?")
_KEY = rb"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
_VALUE = rb"[ -+\--<>-~]{0,255}[!-+\--<>-~]"  # printable, without ',' and '='
_MEMBER = re.compile(b"(%b)=%b" % (_KEY, _VALUE))


class TraceContext(msgspec.Struct, frozen=True):
    """A span's place in a trace, as processes tell each other. Ids are not 0."""

    trace_id: int  # 128 bits
    span_id: int  # 64 bits
    sampled: bool  # whether the trace is recorded
    state: str = ""  # the client's `tracestate`, which is passed on

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{'01' if self.sampled else '00'}"

    def headers(self) -> dict[str, str]:
        """Return the headers for a request to another process."""
        headers = {"traceparent": self.traceparent}
        if self.state:
            headers["tracestate"] = self.state
        return headers

    def lines(self) -> bytes:
        """Return the same headers as lines of a request's head."""
        lines = f"traceparent: {self.traceparent}\r\n"
        if self.state:
            lines += f"tracestate: {self.state}\r\n"
        return lines.encode()


def read_context(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """Return the context of a request; None without exactly one valid `traceparent`. Header names
    are in lower case."""
    parent: bytes | None = None
    states: list[bytes] = []
    for name, value in headers:
        if name == PARENT_HEADER:
            if parent is not None:
                return None
            parent = value
        elif name == STATE_HEADER:
            states.append(value)
    match = None if parent is None else _PARENT.fullmatch(parent.strip(b" \t"))
    if match is None:
        return None
    version, trace, span, flags, more = match.groups()
    if version == _UNUSED_VERSION or (version == b"00" and more is not None):
        return None
    trace_id, span_id = int(trace, 16), int(span, 16)
    if not (trace_id and span_id):
        return None
    state = _state(b",".join(states)) if states else ""
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & _SAMPLED), state)


def _state(value: bytes) -> str:
    """Return a `tracestate`; "" for one that is not valid or too long. A valid one has no line
    breaks, so that it can be sent on in a header."""
    if len(value) > MAX_STATE_CHARACTERS:
        return ""
    members = [member for part in value.split(b",") if (member := part.strip(b" \t"))]
    keys = {match[1] for member in members if (match := _MEMBER.fullmatch(member))}
    # As many keys as members: each is valid, and none comes twice.
    if len(keys) != len(members) or len(members) > MAX_STATE_MEMBERS:
        return ""
    return b",".join(members).decode("ascii")
