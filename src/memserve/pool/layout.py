"""The memory layout of one model's KV blocks."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from memserve.errors import ConfigError, LayoutMismatch, LengthMismatch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape, type and origin of KV blocks.

    A block holds the keys and values of `block_tokens` consecutive tokens in all layers.
    `aggregated`: a block is one contiguous run of bytes, and an extent is
    `[blocks, layers, 2, block_tokens, kv_heads, head_dim]`. Otherwise a block has one run per
    layer and K or V, and an extent is
    `[layers, 2, blocks, block_tokens, kv_heads, head_dim]`.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int = 16
    aggregated: bool = True
    model: str = ""
    revision: str = ""
    rope: str = ""  # positions are baked into cached keys
    quantization: str = ""
    # The pool of a tensor-parallel rank holds heads head_start to head_start + kv_heads - 1.
    head_start: int = 0
    total_kv_heads: int = 0  # KV heads of the model; 0 means kv_heads

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "block_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"KV layout: {name} is {getattr(self, name)}, at least 1 needed")
        if self.dtype not in DTYPES:
            raise ConfigError(f"KV layout: dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if not self.total_kv_heads:
            object.__setattr__(self, "total_kv_heads", self.kv_heads)
        if not 0 <= self.head_start <= self.total_kv_heads - self.kv_heads:
            raise ConfigError(
                f"KV layout: heads {self.head_start} to {self.head_start + self.kv_heads} "
                f"of {self.total_kv_heads}"
            )

    @property
    def heads(self) -> range:
        """The KV heads in these blocks, as numbers of the whole model's heads."""
        return range(self.head_start, self.head_start + self.kv_heads)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.torch_dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * self.token_bytes

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """`[layers, 2, block_tokens, kv_heads, head_dim]`."""
        return (self.layers, 2, self.block_tokens, self.kv_heads, self.head_dim)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all fields: equal if and only if all fields are equal."""
        return hashlib.sha256(msgspec.json.encode(asdict(self), order="sorted")).hexdigest()

    def require_kv(self, count: int, kv: torch.Tensor) -> None:
        """Raise LengthMismatch or LayoutMismatch unless `kv` is `[count, *block_shape]`."""
        expected = (count, *self.block_shape)
        if kv.ndim and kv.shape[0] != count:
            raise LengthMismatch(f"KV of {kv.shape[0]} blocks for {count} references")
        if tuple(kv.shape) != expected or kv.dtype != self.torch_dtype:
            raise LayoutMismatch(
                f"KV is {kv.dtype} {tuple(kv.shape)}, the pool's is {self.torch_dtype} {expected}"
            )

    def views(self, memory: torch.Tensor, blocks: int) -> torch.Tensor:
        """Return a view of flat uint8 `memory` as KV, without a copy.

        Shape: `[blocks, layers, 2, block_tokens, kv_heads, head_dim]`; not contiguous if the
        layout is not aggregated. Raises LengthMismatch if the sizes differ.
        """
        if memory.numel() != blocks * self.block_bytes:
            raise LengthMismatch(
                f"{memory.numel()} bytes for {blocks} blocks of {self.block_bytes} bytes"
            )
        typed = memory.view(self.torch_dtype)
        layers, two, *rest = self.block_shape
        if self.aggregated:
            return typed.view(blocks, layers, two, *rest)
        return typed.view(layers, two, blocks, *rest).permute(2, 0, 1, 3, 4, 5)

    def planes(self, memory: torch.Tensor, blocks: int) -> tuple[torch.Tensor, ...]:
        """Return views `[blocks, bytes of a run]` of flat uint8 `memory`, one for each contiguous
        piece of a block: blocks that follow each other do so in every plane."""
        return memory.view(1 if self.aggregated else 2 * self.layers, blocks, -1).unbind(0)

    def runs(self, memory: NDArray[np.uint8], blocks: int) -> NDArray[np.uint8]:
        """Return a view of flat host `memory` as `[blocks, runs, bytes of a run]`, without a
        copy; a block's runs are its contiguous pieces."""
        if self.aggregated:
            return memory.reshape(blocks, 1, self.block_bytes)
        runs = 2 * self.layers
        return memory.reshape(runs, blocks, self.block_bytes // runs).transpose(1, 0, 2)
