"""A prompt of token ids, from JSON to an array in one go: without an object for each of them, a
prompt of thousands costs a gateway microseconds."""

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
    """The ids [tokens], none of them negative, if these bytes, which are valid JSON, are an array
    of nothing else; None: they are a text, several prompts, or wrong."""
    text: NDArray[np.uint8] = np.frombuffer(json, dtype=np.uint8)
    room = np.empty(len(text) // 2 + 1, dtype=np.int32)  # an id takes two bytes with its comma
    count = _parse.run(text, room)
    return room[:count] if count > 0 else None


@compiled("int64(Array(uint8, 1, 'C', readonly=True), int32[::1])")
def _parse(text: NDArray[np.uint8], ids: TokenArray) -> int:
    """How many ids there are: decimal numbers between brackets, with commas and maybe white
    space."""
    if len(text) < 3 or text[0] != _OPEN or text[-1] != _CLOSE:
        return _NOT_PLAIN
    count, value, digits = 0, np.int64(0), 0
    over = False  # a space stands behind the number
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
