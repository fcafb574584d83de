"""`Timeline`: when the phases of one ended request passed, in `GET /timeline` of an instance."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from memserve.api.forward import ForwardPath
from memserve.types import RequestId

TIMELINE_PATH = "/timeline"  # ?request=ID
MAX_CHUNKS = 64  # of a prefill; a longer one's last entry has the rest
MAX_PAUSES = 32

_Seconds = Annotated[float, Meta(ge=0, le=1e9)]


class Chunk(NamedTuple):
    """A part of a prompt that was computed in one step. `end`: seconds since the sequence was
    submitted to the engine that computed it."""

    end: float
    tokens: int


class Pause(NamedTuple):
    """A long time between two outputs, by preemption or by others' prefills; of a forwarded stream,
    between two pieces of the server's. `begin`: seconds since the call's arrival."""

    begin: float
    seconds: float


class Forwarded(msgspec.Struct, frozen=True):
    """Time line of a request that an instance forwards to its vLLM server. Moments are seconds
    since the call's arrival; None: it did not come to that.

    From `sent` to `first` the request was in the server's queue, and computed; only the server
    knows how long each took.
    """

    path: ForwardPath
    stream: bool
    sent: _Seconds | None  # when its body went to the server
    first: _Seconds | None  # the answer's first byte; of a stream, the first token's
    end: _Seconds
    status: int | None  # of the server's answer
    bytes: int  # of the answer's body, as far as it came
    error: str | None  # why the answer is not whole: an error's code, or `cancelled`


class Timeline(msgspec.Struct, frozen=True):
    """The phases of a request's sequence that ended last, in seconds, in the order in which they
    passed. With `handed_over`, another instance had the phases before `queue_here`.

    With `forwarded`, the phases are those before its body went to the vLLM server, and of the
    token counts, those are None that only the server knows.
    """

    request: RequestId
    ended: bool  # False: it was given up, or failed
    handed_over: bool
    prompt_tokens: int | None
    cached_tokens: int | None  # of the prompt, where it was computed
    output_tokens: int | None
    preemptions: int | None
    fetch: _Seconds
    queue: _Seconds
    prefill: _Seconds  # to the first token
    transfer: _Seconds  # of the KV that was still to be sent then
    queue_here: _Seconds  # behind a hand-over
    decode: _Seconds  # pauses included
    chunks: Annotated[tuple[Chunk, ...], Meta(max_length=MAX_CHUNKS)] = ()
    pauses: Annotated[tuple[Pause, ...], Meta(max_length=MAX_PAUSES)] = ()
    forwarded: Forwarded | None = None

    @property
    def prepare(self) -> float:
        """Seconds before a forwarded request went to the server that no phase explains: instances
        that did not answer, and the way to those that did."""
        if self.forwarded is None:
            return 0.0
        sent = self.forwarded.end if self.forwarded.sent is None else self.forwarded.sent
        return max(0.0, sent - self.fetch - self.queue - self.prefill - self.transfer)

    @property
    def whole(self) -> float:
        if self.forwarded is not None:
            return self.forwarded.end
        computed = self.fetch + self.queue + self.prefill + self.transfer
        return computed + self.queue_here + self.decode
