"""`Timeline`: when the phases of one ended request passed, in `GET /timeline` of an instance."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

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
    """A long time between two outputs, by preemption or by others' prefills. `begin`: seconds since
    the call's arrival."""

    begin: float
    seconds: float


class Timeline(msgspec.Struct, frozen=True):
    """The phases of a request's sequence that ended last, in seconds, in the order in which they
    passed. With `handed_over`, another instance had the phases before `queue_here`."""

    request: RequestId
    ended: bool  # False: it was given up, or failed
    handed_over: bool
    prompt_tokens: int
    cached_tokens: int  # of the prompt, where it was computed
    output_tokens: int
    preemptions: int
    fetch: _Seconds
    queue: _Seconds
    prefill: _Seconds  # to the first token
    transfer: _Seconds  # of the KV that was still to be sent then
    queue_here: _Seconds  # behind a hand-over
    decode: _Seconds  # pauses included
    chunks: Annotated[tuple[Chunk, ...], Meta(max_length=MAX_CHUNKS)] = ()
    pauses: Annotated[tuple[Pause, ...], Meta(max_length=MAX_PAUSES)] = ()

    @property
    def first_token(self) -> float:
        """Seconds from the arrival to the first token."""
        return self.fetch + self.queue + self.prefill

    @property
    def whole(self) -> float:
        return self.first_token + self.transfer + self.queue_here + self.decode
