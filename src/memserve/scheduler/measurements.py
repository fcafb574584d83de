"""What was measured of an instance: the points that a cost model is fitted to and checked on."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.scheduler.contract import Path

_Count = Annotated[int, Meta(ge=0)]
_Seconds = Annotated[float, Meta(gt=0)]


class PrefillPoint(msgspec.Struct, frozen=True):
    """A prompt computed alone, up to its first token."""

    prompt_tokens: _Count
    cached_tokens: _Count
    seconds: _Seconds


class DecodePoint(msgspec.Struct, frozen=True):
    """One step of a batch."""

    sequences: _Count
    context_tokens: _Count  # of all sequences
    seconds: _Seconds


class TransferPoint(msgspec.Struct, frozen=True):
    """Blocks moved to another pool, from the call to the acknowledgement."""

    path: Path
    num_bytes: _Count
    pieces: _Count
    seconds: _Seconds


class Measurements(msgspec.Struct, frozen=True):
    """Medians of repeats."""

    prefill: tuple[PrefillPoint, ...] = ()
    decode: tuple[DecodePoint, ...] = ()
    transfer: tuple[TransferPoint, ...] = ()
    # Of the time of prefills and decode steps, how much their threads waited for a core that
    # something else had. Such times are not the instance's own.
    waited: Annotated[float, Meta(ge=0)] = 0.0
