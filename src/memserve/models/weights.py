"""Numbers of a model's weights, from the headers of its safetensors files."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

# A header has some 100 bytes for each tensor.
_MAX_HEADER_BYTES = 64 * 1024 * 1024
_LENGTH_BYTES = 8

_Dimension = Annotated[int, Meta(ge=0, le=1 << 48)]


class _Tensor(msgspec.Struct, frozen=True):
    shape: Annotated[list[_Dimension], Meta(max_length=16)] = []


_decode = msgspec.json.Decoder(dict[str, _Tensor]).decode


def count_parameters(directory: Path) -> int:
    """Return the number of weights in a model directory. Files that cannot be read count nothing:
    who loads them says what is wrong."""
    return sum(_count(file) for file in directory.glob("*.safetensors"))


def _count(file: Path) -> int:
    try:
        with file.open("rb") as data:
            size = int.from_bytes(data.read(_LENGTH_BYTES), "little")
            if size > _MAX_HEADER_BYTES:
                return 0
            tensors = _decode(data.read(size))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return 0
    return sum(prod(tensor.shape) for tensor in tensors.values() if tensor.shape)
