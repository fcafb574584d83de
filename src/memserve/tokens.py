"""Token ids as one-dimensional int32 arrays (`TokenArray`), and their wire format.

Messages carry the array's bytes: little-endian int32. Arrays read from bytes are read-only views.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from memserve.errors import InvalidTokens
from memserve.types import TokenArray

_DTYPE = np.dtype(np.int32)
_WIRE = np.dtype("<i4")
_INT32 = np.iinfo(_DTYPE)

TOKEN_BYTES = _WIRE.itemsize
NO_TOKENS: TokenArray = np.frombuffer(b"", dtype=np.int32)

# The type of a message field that holds tokens. Decoders see `bytes`, and so refuse all other
# types; the message's `__post_init__` replaces the bytes by `token_field(bytes)`, so that all
# other code sees an array.
if TYPE_CHECKING:
    WireTokens = TokenArray
else:
    WireTokens = bytes


def token_field(given: TokenArray | bytes) -> TokenArray:
    """Return the token ids [tokens] of a message field; an array is returned unchanged.

    Raises ValueError for bytes whose length is not a multiple of four, or with a negative id.
    """
    if not isinstance(given, bytes):
        return given
    tokens = from_wire(given)
    if len(tokens) and (lowest := int(tokens.min())) < 0:
        raise ValueError(f"token id {lowest} is negative")
    return tokens


def from_wire(data: bytes) -> TokenArray:
    """Return the tokens [tokens] in `data`, without a copy on little-endian hosts. Raises
    ValueError for a length that is not a multiple of four."""
    return np.frombuffer(data, dtype=_WIRE).astype(np.int32, copy=False)


def to_wire(tokens: TokenArray) -> bytes:
    """Return the tokens' bytes, TOKEN_BYTES each."""
    return tokens.astype(_WIRE, copy=False).tobytes()


def from_ids(ids: Sequence[int]) -> TokenArray:
    """Return token ids [tokens] from Python ints, such as a tokenizer's; several times faster
    than `as_tokens`. Raises struct.error for other types and for values outside int32."""
    return np.frombuffer(struct.pack(f"{len(ids)}i", *ids), dtype=np.int32)


def as_tokens(tokens: ArrayLike) -> TokenArray:
    """Return `tokens` as a one-dimensional int32 array; such an array is returned unchanged.

    Raises InvalidTokens for anything but a flat sequence of integers within int32.
    """
    if isinstance(tokens, np.ndarray) and tokens.dtype == _DTYPE and tokens.ndim == 1:
        return tokens
    try:
        array = np.asarray(tokens)
    except ValueError as error:  # ragged
        raise InvalidTokens(f"tokens are no flat sequence of integers: {error}") from error
    if array.ndim != 1:
        raise InvalidTokens(f"tokens have shape {array.shape}, one dimension needed")
    if not array.size:
        return np.empty(0, dtype=np.int32)
    if array.dtype.kind not in "iu":
        raise InvalidTokens(_describe_bad_type(array))
    if array.dtype.itemsize >= _INT32.dtype.itemsize:
        _check_range(array)
    return array.astype(np.int32)


def _check_range(array: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> None:
    bad = (array < _INT32.min) | (array > _INT32.max)
    if bad.any():
        at = int(bad.argmax())
        raise InvalidTokens(f"token {int(array[at])} at position {at} is outside of int32")


def _describe_bad_type(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
    if array.dtype.kind == "O":  # not an integer type: find the first invalid element
        for at, value in enumerate(array.tolist()):
            if isinstance(value, bool) or not isinstance(value, int):
                return f"token {value!r} at position {at} is no integer"
            if not _INT32.min <= value <= _INT32.max:
                return f"token {value} at position {at} is outside of int32"
    if array.dtype.kind == "f":
        fractions = array != np.trunc(array.astype(np.float64))
        at = int(fractions.argmax())
        return f"tokens are {array.dtype}, integers needed: {array[at]} at position {at}"
    return f"tokens are {array.dtype}, integers needed: {array[0]!r} at position 0"
