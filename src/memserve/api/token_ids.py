"""A prompt's token ids, as a gateway hands them on."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import overload

import msgspec
import numpy as np

from memserve.types import TokenArray

_encode = msgspec.json.Encoder().encode


class TokenIds(Sequence[int]):
    """Ids with both of their forms: an array [ids] int32, and JSON, which is what an instance is
    sent. Equal to any sequence of the same ids. Never changes."""

    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("array", "highest", "json")

    def __init__(self, array: TokenArray, json: msgspec.Raw, highest: int) -> None:
        self.array = array
        self.json = json
        self.highest = highest  # of them; -1: there are none

    @classmethod
    def of(cls, ids: Sequence[int]) -> TokenIds:
        """Ids that are there one by one. struct.error: one of them is no integer, or too large."""
        if isinstance(ids, TokenIds):
            return ids
        # Several times faster than numpy with a sequence of Python's integers.
        array = np.frombuffer(struct.pack(f"{len(ids)}i", *ids), dtype=np.int32)
        return cls(array, msgspec.Raw(_encode(ids)), max(ids, default=-1))

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[int]:
        return iter(self.array.tolist())

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[int]: ...

    def __getitem__(self, at: int | slice) -> int | Sequence[int]:
        found: int | Sequence[int] = self.array[at].tolist()
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"TokenIds({list(self)})"
