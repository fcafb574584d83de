"""`Measurements` of an instance: the points that a cost model is fitted to and checked on."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from memserve.scheduler.contract import Path

_Count = Annotated[int, Meta(ge=0)]
_Seconds = Annotated[float, Meta(gt=0)]


class PrefillPoint(msgspec.Struct, frozen=True):
    """Prefill of one prompt alone, up to its first token."""

    prompt_tokens: _Count
    cached_tokens: _Count
    seconds: _Seconds


class DecodePoint(msgspec.Struct, frozen=True):
    """One decode step of a batch."""

    sequences: _Count
    context_tokens: _Count  # sum over the sequences
    seconds: _Seconds


class TransferPoint(msgspec.Struct, frozen=True):
    """Transfer of blocks to another pool, from the call to the acknowledgement."""

    path: Path
    num_bytes: _Count
    pieces: _Count
    seconds: _Seconds


class Measurements(msgspec.Struct, frozen=True):
    """Measured points, each the median of repeats."""

    prefill: tuple[PrefillPoint, ...] = ()
    decode: tuple[DecodePoint, ...] = ()
    transfer: tuple[TransferPoint, ...] = ()
    # Seconds that threads waited for a core that other work had, per second of prefills and decode
    # steps. With a high value the figures are not the instance's own.
    waited: Annotated[float, Meta(ge=0)] = 0.0
