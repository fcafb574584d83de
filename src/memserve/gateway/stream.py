"""A client's stream, with the tokens that it has got, so that another instance can continue it.

`api/chunks.py` has the contract: each event of an instance begins with a comment line that names
its tokens. `ClientStream` removes and keeps these lines, unparsed until a failover needs them,
and relays the rest, whole events only. A stream whose first event has no such line (an unmodified
vLLM's) is relayed as it is, and cannot be continued.
"""

from __future__ import annotations

import re
from http import HTTPStatus

from memserve.api.chunks import DONE
from memserve.api.generate import GenerateCall
from memserve.api.http_message import EVENTS_HEADERS, Headers, Reply
from memserve.clock import Clock
from memserve.gateway.pace import Pace
from memserve.tokens import from_ids
from memserve.types import TokenArray

EVENT_END = b"\n\n"
_COLON = ord(":")
_DIGITS = frozenset(b"0123456789")
# No text can contain these bytes: JSON escapes quotation marks within strings.
_ERROR = b'data: {"error":'
_REFUSED = b'"type":"invalid_request_error"'
_OK = HTTPStatus.OK.value
_FINISHED = re.compile(rb'"finish_reason":"([a-z_]{1,32})"')
_USAGE = b'"choices":[],"usage":'


class ClientStream:
    """One client's stream, over all the instances that generate a part of it."""

    def __init__(self, call: GenerateCall, reply: Reply, headers: Headers, clock: Clock) -> None:
        self.reply = reply
        self.first_token: float | None = None  # clock time of its write to the client
        self.pauses: list[float] = []  # seconds without bytes, one for each failover
        self.error: bytes | None = None  # error event of the current instance
        self.finish_reasons: list[str] | None = None  # None: not noted, unless the owner wants them
        self.pace: Pace | None = None  # told of tokens as they are sent; None: nobody asks
        self._call = call
        self._headers = headers
        self._clock = clock
        # None: not known before the first event.
        self._resumable: bool | None = None if call.forward is None else False
        self._events: list[bytes] = []  # comments: b"<choice> <id>,<id>"
        self._unsent = 0  # tokens of events since the last write: some have no text yet
        self._usage_sent = False
        self._done = False
        self._last_byte = 0.0
        self._interrupted = False
        self._rest = b""  # first bytes of an incomplete event

    @property
    def resumable(self) -> bool:
        """Whether another instance can continue, or begin if nothing has been sent."""
        return self._resumable is True or not self.reply.started

    @property
    def complete(self) -> bool:
        """Whether the client has the whole stream."""
        return self._done or self.reply.ended

    def received(self, data: bytes, last: bool) -> None:
        """Relay bytes of the current instance's stream; `last`: that stream has ended in order."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not data.endswith(EVENT_END):
            data = self._whole(data, last)
        if data:
            data = self._taken_out(data)
            if self.finish_reasons is not None:
                self.finish_reasons += [each.decode() for each in _FINISHED.findall(data)]
        if last and (self._done or not self._resumable) and self.error is None:
            self._begin(data)
            self.reply.end(data)
        elif data:
            self._begin(data)
            self.reply.write(data)

    @property
    def tells_token(self) -> bool:
        """Whether the bytes received so far show that a token has been generated: any of an
        instance's own, since each of its events has tokens."""
        return self._call.forward is None or self.first_token is not None

    @property
    def refused(self) -> bool:
        """Whether the instance ended the stream with an error that the request is to blame for:
        another instance would, too."""
        return self.error is not None and _REFUSED in self.error

    def begin_attempt(self) -> None:
        """Start the stream of the next instance."""
        self._rest = b""
        self.error = None
        self._interrupted = self.reply.started

    def tokens(self) -> tuple[TokenArray, ...]:
        """Return the token ids that the client has, by choice, each [tokens] int32; () if it has
        no event."""
        if not self._events:
            return ()
        ids: list[list[int]] = [[] for _ in range(len(self._call.prompts) * self._call.n)]
        for event in self._events:
            choice, _, named = event.partition(b" ")
            if named:
                ids[int(choice)] += map(int, named.split(b","))
        return tuple(map(from_ids, ids))

    def finish(self) -> bool:
        """End a stream of which the client has all but the end. Return whether it has ended."""
        if not self.reply.started:
            return False
        if self._done:
            self.reply.end()
        elif self._usage_sent:
            self.reply.end(DONE)
        return self.reply.ended

    def fail(self, error: bytes) -> None:
        """End the stream with an error event: the instance's own, or else `error`."""
        self._begin()
        self.reply.end(self.error or error)

    def _begin(self, data: bytes = b"") -> None:
        """Note that `data` is written now; start the answer before."""
        now = self._clock.now()
        forward = self._call.forward
        if self.first_token is None and data and (forward is None or forward.tells_token(data)):
            self.first_token = now
        if not self.reply.started:
            self.reply.start(_OK, (*EVENTS_HEADERS, *self._headers))
        elif self._interrupted:
            self.pauses.append(now - self._last_byte)
        self._interrupted = False
        self._last_byte = now
        if self._unsent and self.pace is not None:
            self.pace.sent(self._unsent, now)
        self._unsent = 0

    def _whole(self, data: bytes, last: bool) -> bytes:
        """Return the whole events of `data`; keep the rest for later."""
        if last and not self._resumable:
            return data
        end = data.rfind(EVENT_END) + 1
        end += 1 if end else 0
        self._rest = data[end:]
        return data[:end]

    def _taken_out(self, data: bytes) -> bytes:
        """Return whole events as the client gets them: without token comments and error events."""
        if self._resumable is None:
            self._resumable = _is_comment(data)
        if not self._resumable:
            return data
        if _is_comment(data) and data.find(b"\n:", 1) < 0:  # one event, mostly
            end = data.index(b"\n")
            self._keep(data[1:end])
            data = data[end + 1 :].removeprefix(b"\n")
        else:
            data = self._all_taken_out(data)
        if data.endswith(DONE):
            self._done = True
        elif _ERROR in data:
            start = data.index(_ERROR)
            data, self.error = data[:start], data[start:]
        elif _USAGE in data:
            self._usage_sent = True
        return data

    def _keep(self, event: bytes) -> None:
        self._events.append(event)
        self._unsent += event.count(b",") + (event[-1] in _DIGITS and b" " in event)

    def _all_taken_out(self, data: bytes) -> bytes:
        # Prepend a line break, so that a comment at the start is found; removed at the end.
        before, *parts = (b"\n" + data).split(b"\n:")
        kept = [before]
        for part in parts:
            if not part[:1].isdigit():  # not a token comment
                kept.append(b"\n:" + part)
                continue
            comment, _, text = part.partition(b"\n")
            self._keep(comment)
            if text:  # none: no text yet, and the split removed the event's empty line
                kept.append(b"\n" + text.removeprefix(b"\n"))
        return b"".join(kept)[1:]


def _is_comment(data: bytes) -> bool:
    return data[0] == _COLON and data[1] in _DIGITS
