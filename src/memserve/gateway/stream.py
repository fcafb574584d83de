"""What a client has got of its stream, so that another instance can go on where one was lost.

`api/chunks.py` has the contract: each of an instance's events begins with a comment line that
names its tokens. These lines are taken out and kept, unread until they are needed; the rest is
relayed, whole events only. A stream whose first event has no such line (an unmodified vLLM's)
is relayed as it is, and cannot be continued.
"""

from __future__ import annotations

from http import HTTPStatus

from memserve.api.chunks import DONE
from memserve.api.generate import GenerateCall
from memserve.api.http_message import EVENTS_HEADERS, Headers, Reply
from memserve.clock import Clock
from memserve.tokens import from_ids
from memserve.types import TokenArray

EVENT_END = b"\n\n"
_COLON = ord(":")
_DIGITS = frozenset(b"0123456789")
# JSON escapes quotation marks within strings: these bytes are always what they look like.
_ERROR = b'data: {"error":'
_OK = HTTPStatus.OK.value
_USAGE = b'"choices":[],"usage":'


class ClientStream:
    """One client's stream, over all the instances that have a part in it."""

    def __init__(self, call: GenerateCall, reply: Reply, headers: Headers, clock: Clock) -> None:
        self.reply = reply
        self.first_byte: float | None = None  # when it went to the client
        self.pauses: list[float] = []  # seconds, one for each instance that was lost
        self.error: bytes | None = None  # the event with which the current instance gave up
        self._call = call
        self._headers = headers
        self._clock = clock
        # None: nothing has come yet.
        self._resumable: bool | None = None if call.forward is None else False
        self._events: list[bytes] = []  # comments: b"<choice> <id>,<id>"
        self._usage_sent = False
        self._done = False
        self._last_byte = 0.0
        self._interrupted = False
        self._rest = b""  # of an event that has not come whole

    @property
    def resumable(self) -> bool:
        """Another instance could go on (or begin, where nothing has been sent)."""
        return self._resumable is True or not self.reply.started

    @property
    def complete(self) -> bool:
        """The client has all of it."""
        return self._done or self.reply.ended

    def received(self, data: bytes, last: bool) -> None:
        """Bytes of the current instance's stream; `last`: it has ended in order."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not data.endswith(EVENT_END):
            data = self._whole(data, last)
        if data:
            data = self._taken_out(data)
        if last and (self._done or not self._resumable) and self.error is None:
            self._begin()
            self.reply.end(data)
        elif data:
            self._begin()
            self.reply.write(data)

    def begin_attempt(self) -> None:
        """What comes from now on is another instance's."""
        self._rest = b""
        self.error = None
        self._interrupted = self.reply.started

    def tokens(self) -> tuple[TokenArray, ...]:
        """What the client has of each choice; () if that is nothing at all."""
        if not self._events:
            return ()
        ids: list[list[int]] = [[] for _ in range(len(self._call.prompts) * self._call.n)]
        for event in self._events:
            choice, _, named = event.partition(b" ")
            if named:
                ids[int(choice)] += map(int, named.split(b","))
        return tuple(map(from_ids, ids))

    def finish(self) -> bool:
        """End a stream that lacks nothing but its end. Whether that was so."""
        if not self.reply.started:
            return False
        if self._done:
            self.reply.end()
        elif self._usage_sent:
            self.reply.end(DONE)
        return self.reply.ended

    def fail(self, error: bytes) -> None:
        """End with an error event: the instance's own if it had one."""
        self._begin()
        self.reply.end(self.error or error)

    def _begin(self) -> None:
        now = self._clock.now()
        if not self.reply.started:
            self.first_byte = now
            self.reply.start(_OK, (*EVENTS_HEADERS, *self._headers))
        elif self._interrupted:
            self.pauses.append(now - self._last_byte)
        self._interrupted = False
        self._last_byte = now

    def _whole(self, data: bytes, last: bool) -> bytes:
        """Events that are whole; the rest waits."""
        if last and not self._resumable:
            return data
        end = data.rfind(EVENT_END) + 1
        end += 1 if end else 0
        self._rest = data[end:]
        return data[:end]

    def _taken_out(self, data: bytes) -> bytes:
        """What the client gets of whole events."""
        if self._resumable is None:
            self._resumable = _is_comment(data)
        if not self._resumable:
            return data
        if _is_comment(data) and data.find(b"\n:", 1) < 0:  # one event, mostly
            end = data.index(b"\n")
            self._events.append(data[1:end])
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

    def _all_taken_out(self, data: bytes) -> bytes:
        # A line break before each, so that a comment is found at the start too; it goes again.
        before, *parts = (b"\n" + data).split(b"\n:")
        kept = [before]
        for part in parts:
            if not part[:1].isdigit():  # somebody else's comment
                kept.append(b"\n:" + part)
                continue
            comment, _, text = part.partition(b"\n")
            self._events.append(comment)
            if text:  # none: held back, and its empty line went with the next comment
                kept.append(b"\n" + text.removeprefix(b"\n"))
        return b"".join(kept)[1:]


def _is_comment(data: bytes) -> bool:
    return data[0] == _COLON and data[1] in _DIGITS
