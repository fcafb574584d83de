"""Parser of a JSON array of token ids into an int32 array. Without an object for each id, a prompt
of thousands takes microseconds."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.gateway.compiled import compiled
from memserve.types import TokenArray

_OPEN, _CLOSE, _COMMA, _ZERO, _NINE, _SPACE = map(ord, "[],09 ")
_HIGHEST = 2**31 - 1
_NOT_PLAIN = -1


def plain_token_ids(json: msgspec.Raw) -> TokenArray | None:
    """Return the ids, [tokens] int32, of a valid JSON value that is an array of token ids (0 to
    2**31 - 1), at least one; None for any other value."""
    text: NDArray[np.uint8] = np.frombuffer(json, dtype=np.uint8)
    room = np.empty(len(text) // 2 + 1, dtype=np.int32)  # an id takes two bytes with its comma
    count = _parse.run(text, room)
    return room[:count] if count > 0 else None


@compiled("int64(Array(uint8, 1, 'C', readonly=True), int32[::1])")
def _parse(text: NDArray[np.uint8], ids: TokenArray) -> int:
    """Fill `ids` from a JSON array of decimal numbers. Return how many there are, or _NOT_PLAIN
    for any other text."""
    if len(text) < 3 or text[0] != _OPEN or text[-1] != _CLOSE:
        return _NOT_PLAIN
    count, value, digits = 0, np.int64(0), 0
    over = False  # white space has ended the number
    for at in range(1, len(text)):
        byte = np.int64(text[at])
        if _ZERO <= byte <= _NINE:
            if over or (digits and value == 0):
                return _NOT_PLAIN
            value = 10 * value + byte - _ZERO
            digits += 1
            if value > _HIGHEST:
                return _NOT_PLAIN
        elif byte in (_COMMA, _CLOSE):
            if not digits:
                return _NOT_PLAIN
            ids[count] = value
            count, value, digits, over = count + 1, np.int64(0), 0, False
        elif byte <= _SPACE:  # no other control character is outside a string of valid JSON
            over = digits > 0
        else:
            return _NOT_PLAIN
    return count
