"""Compiled look-ups of seconds in a cost model's tables.

An argument with one element is broadcast to the length of the other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memserve.scheduler.compiled import compiled, inlined
from memserve.scheduler.contract import Seconds

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


@inlined
def _most(numbers: _Ints) -> int:
    most = 0
    for number in numbers:
        if number < 0:
            raise ValueError("a negative number of tokens or sequences")
        most = max(most, int(number))
    return most


@compiled(
    "int64(int64[::1], int64[::1], float64[::1], float64[::1], float64[::1], float64[::1], "
    "float64[::1])"
)
def prefill_look_up(
    prompt: _Ints,
    cached: _Ints,
    base: _Floats,
    behind: _Floats,
    slope: _Floats,
    windows: _Floats,
    seconds: Seconds,
) -> int:
    """Fill `seconds` with exec(x, c) for `prompt` x and `cached` c tokens.

    Tables in seconds, by n = x - c (at least 1): `base`; if c > 0 also `behind`, and `slope` per
    cached token. `windows`, by x and by c: attention in sliding-window layers, or empty. Returns 0,
    or the largest x or c if the tables are too short for it. Raises ValueError for negative counts.
    """
    most = max(_most(prompt), _most(cached))
    if most >= len(base):
        return most
    for at in range(len(seconds)):
        x, c = prompt[at if len(prompt) > 1 else 0], cached[at if len(cached) > 1 else 0]
        n = max(x - c, 1)
        each = base[n]
        if c > 0:
            each += behind[n]
            each += slope[n] * c
        if len(windows):
            each += windows[x] - windows[c]
        seconds[at] = each
    return 0


@compiled("int64(int64[::1], float64[::1], float64[::1], float64, float64, float64, float64[::1])")
def decode_look_up(
    sequences: _Ints,
    context: _Floats,
    base: _Floats,
    per_token: float,
    per_windowed_token: float,
    window: float,
    seconds: Seconds,
) -> int:
    """Fill `seconds` with decode steps of `sequences` with `context` tokens in sum.

    `base`: table of seconds by sequences; `per_token`: seconds per context token; `window`: tokens
    per sequence that sliding-window layers read. Returns 0, or the largest number of sequences if
    the table is too short for it. Raises ValueError for negative counts.
    """
    most = _most(sequences)
    if most >= len(base):
        return most
    for at in range(len(seconds)):
        rows = sequences[at if len(sequences) > 1 else 0]
        tokens = context[at if len(context) > 1 else 0]
        each = base[rows] + per_token * tokens
        if per_windowed_token > 0:
            each += per_windowed_token * min(tokens, rows * window)
        seconds[at] = each
    return 0


@compiled("void(float64[::1], float64[::1], float64, float64, float64, float64[::1])")
def link_seconds(
    num_bytes: _Floats,
    pieces: _Floats,
    once: float,
    per_byte: float,
    per_piece: float,
    seconds: Seconds,
) -> None:
    """Fill `seconds` of transfers: `once` + `per_byte` * bytes + `per_piece` * pieces."""
    for at in range(len(seconds)):
        moved = num_bytes[at if len(num_bytes) > 1 else 0]
        runs = pieces[at if len(pieces) > 1 else 0]
        seconds[at] = once + per_byte * moved + per_piece * runs
