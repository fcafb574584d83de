"""Token ids as callers give them, turned into int32."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from memserve.errors import InvalidTokens
from memserve.types import TokenArray

_DTYPE = np.dtype(np.int32)
_INT32 = np.iinfo(_DTYPE)


def as_tokens(tokens: ArrayLike) -> TokenArray:
    """`tokens` as a one-dimensional int32 array; an int32 array is returned as it is.

    Raises InvalidTokens for anything that is not a flat sequence of integers within int32.
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
    if array.dtype.kind == "O":  # numpy gave up: find what is no int, or too large a one
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
