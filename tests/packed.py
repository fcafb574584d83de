"""Calls between processes of a cluster, written by hand: msgpack with whatever in it."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from memserve.api import msgpack
from memserve.types import TokenArray

HEADERS = {"content-type": msgpack.MEDIA}


def ids(*numbers: int) -> bytes:
    """Token ids as they travel."""
    return struct.pack(f"<{len(numbers)}i", *numbers)


def fields_of(call: msgspec.Struct) -> dict[str, Any]:
    """What a process would send of a call, to change something in it."""
    fields: dict[str, Any] = msgspec.msgpack.decode(msgpack.encode(call))
    return fields


def packed(fields: Mapping[str, Any]) -> bytes:
    return msgspec.msgpack.encode(fields)


def listed(prompts: Iterable[TokenArray]) -> list[Sequence[int]]:
    """Token ids of each, to compare."""
    return [prompt.tolist() for prompt in prompts]
