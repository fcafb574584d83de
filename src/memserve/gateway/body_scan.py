"""Compiled scans of request bodies, without the GIL: counts of a body's fields and elements, taken
and checked before it is parsed, and arrays of token ids.

A parser makes an object for each array, object, string and number: of 16 MB of `[],[],...` it
makes 400 MB, and holds the interpreter (GIL) for 2 s. Counting takes 1 to 3 ns per byte; to read a
prompt of thousands of token ids takes microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.api.errors import invalid
from memserve.api.limits import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_DEPTH,
    MAX_FIELDS,
    MAX_LOGIT_BIASES,
    MAX_MESSAGE_VALUES,
    MAX_METADATA_ENTRIES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_VALUES,
)
from memserve.compiled import Kernels
from memserve.types import TokenArray

_KERNELS = Kernels("request bodies", without_gil=True)
compiled = _KERNELS.compiled
prepare = _KERNELS.prepare


_QUOTE, _BACKSLASH, _COMMA = map(ord, '"\\,')
_OPEN_ARRAY, _OPEN_OBJECT, _CLOSE_ARRAY, _CLOSE_OBJECT = map(ord, "[{]}")
_TOO_MANY_FIELDS = -1
_TOO_DEEP = -2  # minus the number of fields: the last one is too deep

# Elements that a field may have, at any depth; a flat array of n has n. None: not limited here,
# since token ids make no objects, and `prompts` counts prompts.
_VALUES: Final[Mapping[bytes, int | None]] = {
    b"prompt": None,
    b"tokens": None,
    b"messages": MAX_MESSAGE_VALUES,
    b"input": MAX_MESSAGE_VALUES,
    b"documents": MAX_MESSAGE_VALUES,
    b"tools": MAX_MESSAGE_VALUES,
    b"response_format": MAX_MESSAGE_VALUES,
    b"structured_outputs": MAX_MESSAGE_VALUES,
    b"guided_json": MAX_MESSAGE_VALUES,
    b"stop": MAX_STOP_STRINGS,
    b"stop_token_ids": MAX_STOP_TOKEN_IDS,
    b"allowed_token_ids": MAX_ALLOWED_TOKEN_IDS,
    b"bad_words": MAX_BAD_WORDS,
    b"logit_bias": MAX_LOGIT_BIASES,
    b"metadata": MAX_METADATA_ENTRIES,
}


def check_body(body: bytes) -> None:
    """Raise ApiError (400) with the field's name if the body nests too deeply, or has too many
    elements. Invalid JSON passes: the parser reports it. All bodies are checked here before they
    are decoded: decoders, and whatever walks through what they make, follow depth by recursion."""
    fields = np.empty((MAX_FIELDS, 3), dtype=np.int64)
    count = _scan.run(np.frombuffer(body, dtype=np.uint8), fields)
    if count <= _TOO_DEEP:
        begin, end, _ = fields[max(0, _TOO_DEEP - count - 1)].tolist()
        name = None if count == _TOO_DEEP else _name(body, begin, end)
        what = "The request body" if name is None else f"'{name}'"
        message = f"{what} is nested too deeply: a request may be {MAX_DEPTH} deep."
        raise invalid(message, name, "invalid_json")
    if count == _TOO_MANY_FIELDS:
        raise invalid(f"The request has more than {MAX_FIELDS} fields.")
    for begin, end, values in fields[:count].tolist():
        limit = _VALUES.get(body[begin:end], MAX_VALUES) if end - begin <= 64 else MAX_VALUES
        if limit is not None and values > limit:
            name = _name(body, begin, end)
            raise invalid(f"'{name}' has {values} elements, and at most {limit} may be.", name)


def _name(body: bytes, begin: int, end: int) -> str:
    return body[begin : min(end, begin + 64)].decode("utf-8", "replace")


def count_values(json: bytes) -> int | None:
    """Return how many arrays, objects and elements a JSON value has; None if it nests deeper than
    MAX_DEPTH, or is not valid."""
    fields = np.empty((1, 3), dtype=np.int64)
    count = _scan.run(np.frombuffer(b'{"":%b}' % json, dtype=np.uint8), fields)
    return int(fields[0, 2]) if count == 1 else None


def count_elements(json: memoryview) -> int:
    """Return how many elements a valid JSON array has; 0 for any other value."""
    return int(_elements.run(np.frombuffer(json, dtype=np.uint8)))


@compiled("int64(Array(uint8, 1, 'C', readonly=True), int64[:, ::1])")
def _scan(text: NDArray[np.uint8], fields: NDArray[np.int64]) -> int:
    """Fill `fields`, [fields, 3]: begin and end of each name, as offsets, and how many arrays,
    objects and commas its value has. Return the number of fields, or a negative error code."""
    depth, count, at = 0, 0, 0
    name_next = False
    while at < len(text):
        byte = text[at]
        if byte == _QUOTE:
            begin = at + 1
            at = begin
            while at < len(text) and text[at] != _QUOTE:
                at += 2 if text[at] == _BACKSLASH else 1
            if name_next and depth == 1:
                if count == len(fields):
                    return _TOO_MANY_FIELDS
                fields[count, 0], fields[count, 1], fields[count, 2] = begin, at, 0
                count += 1
                name_next = False
        elif byte in (_OPEN_ARRAY, _OPEN_OBJECT):
            depth += 1
            if depth > MAX_DEPTH:
                return _TOO_DEEP - count
            if depth == 1:
                name_next = True
            elif count:
                fields[count - 1, 2] += 1
        elif byte in (_CLOSE_ARRAY, _CLOSE_OBJECT):
            depth -= 1
        elif byte == _COMMA:
            if depth == 1:
                name_next = True
            elif count:
                fields[count - 1, 2] += 1
        at += 1
    return count


@compiled("int64(Array(uint8, 1, 'C', readonly=True))")
def _elements(text: NDArray[np.uint8]) -> int:
    depth, commas, at = 0, 0, 0
    if not len(text) or text[0] != _OPEN_ARRAY:
        return 0
    while at < len(text):
        byte = text[at]
        if byte == _QUOTE:
            at += 1
            while at < len(text) and text[at] != _QUOTE:
                at += 2 if text[at] == _BACKSLASH else 1
        elif byte in (_OPEN_ARRAY, _OPEN_OBJECT):
            depth += 1
        elif byte in (_CLOSE_ARRAY, _CLOSE_OBJECT):
            depth -= 1
        elif byte == _COMMA and depth == 1:
            commas += 1
        at += 1
    return commas + 1


_ZERO, _NINE, _SPACE = map(ord, "09 ")
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
    if len(text) < 3 or text[0] != _OPEN_ARRAY or text[-1] != _CLOSE_ARRAY:
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
        elif byte in (_COMMA, _CLOSE_ARRAY):
            if not digits:
                return _NOT_PLAIN
            ids[count] = value
            count, value, digits, over = count + 1, np.int64(0), 0, False
        elif byte <= _SPACE:  # no other control character is outside a string of valid JSON
            over = digits > 0
        else:
            return _NOT_PLAIN
    return count
