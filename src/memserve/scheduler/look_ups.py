"""Looking up seconds in a cost model's tables, compiled.

Of two arguments one may stand for all of the other: then it has one element.
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
    """Fill `seconds`. Tables [tokens]: `base` of so many to compute; `behind` and `slope` besides,
    once and for each cached token, if any are cached; `windows` of all tokens, of which those of
    the cached ones are taken off, or empty.

    Returns 0, or else how many tokens the tables lack room for. Raises ValueError for a negative
    number of them.
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
    """Fill `seconds`. `base` [sequences]; `context` tokens of all of them, of which layers with
    windows read `window` of each sequence.

    Returns 0, or else how many sequences the table lacks room for. Raises ValueError for a
    negative number of them.
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
    """Fill `seconds`."""
    for at in range(len(seconds)):
        moved = num_bytes[at if len(num_bytes) > 1 else 0]
        runs = pieces[at if len(pieces) > 1 else 0]
        seconds[at] = once + per_byte * moved + per_piece * runs
