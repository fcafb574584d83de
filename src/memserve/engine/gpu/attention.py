"""Attention on a GPU: Triton kernels over block tables, without a copy of the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from memserve.engine.attention import Span, checked_dim
from memserve.engine.gpu import attention_kernels as kernels
from memserve.engine.gpu.step_tables import StepTables, tables_of

_PROGRAMS = 4  # per multiprocessor: decoding sequences are split until there are so many
_MAX_SPLITS = 64  # of one sequence; a power of 2, as every number of splits is
_LEAST_ROWS = 16  # of a tile: the matrix units take no fewer


class TritonAttention:
    """`AttentionBackend` for NVIDIA GPUs of compute capability 8.0 and later."""

    def __init__(self, views: Sequence[Tensor], heads: int) -> None:
        """`views`: the pool's, per layer [blocks, 2, block_tokens, kv_heads, head_dim], contiguous
        in head_dim. `heads`: query heads of a layer."""
        self._caches = [(view[:, 0], view[:, 1]) for view in views]
        first = self._caches[0][0]
        assert first.stride(3) == 1
        self.blocks, self.block_tokens, self._kv_heads, self._dim = first.shape
        self._device = first.device
        rows = _prefill_rows(self._dim, first.element_size())
        self._queries = max(1, rows // triton.next_power_of_2(heads // self._kv_heads))
        self._programs = _PROGRAMS * _multiprocessors(self._device)
        self._on_layer: Callable[[int], None] | None = None
        self._tables: StepTables | None = None

    def plan(
        self, spans: Sequence[Span], decodes: int, on_layer: Callable[[int], None] | None = None
    ) -> None:
        tables = tables_of(spans, decodes, self.block_tokens, self._queries, self._device)
        self.use(tables, on_layer)

    def use(self, tables: StepTables, on_layer: Callable[[int], None] | None = None) -> None:
        """As `plan`, with tables that are on the device, or will be when the kernels run."""
        self._tables = tables
        self._on_layer = on_layer

    def run(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        tables = self._tables
        assert tables is not None
        checked_dim(layer, k, v, self._dim)
        q, k, v = (_contiguous_heads(part) for part in (q, k, v))
        self._write(layer, k, v, tables.places)
        if self._on_layer is not None:
            self._on_layer(layer)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if len(tables.decodes):
            splits = self._splits(len(tables.decodes))
            self._attend(layer, q, tables, tables.decodes, 1, splits, scale, window, softcap, out)
        if len(tables.prefills):
            self._attend(
                layer, q, tables, tables.prefills, self._queries, 1, scale, window, softcap, out
            )
        return out

    def _splits(self, sequences: int) -> int:
        """Return the splits of each decoding sequence; the same for the same number of them, so
        that a CUDA graph can be captured."""
        wanted = triton.cdiv(self._programs, sequences * self._kv_heads)
        return min(int(triton.next_power_of_2(wanted)), _MAX_SPLITS)

    def _write(self, layer: int, k: Tensor, v: Tensor, places: Tensor) -> None:
        keys, values = self._caches[layer]
        kernels.write[(len(places),)](
            k,
            v,
            keys,
            values,
            places,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            *keys.stride()[:3],
            HEADS=self._kv_heads,
            DIM=self._dim,
            BLOCK_TOKENS=self.block_tokens,
            HEADS_PAD=triton.next_power_of_2(self._kv_heads),
            DIM_PAD=triton.next_power_of_2(self._dim),
        )

    def _attend(
        self,
        layer: int,
        q: Tensor,
        tables: StepTables,
        tiles: Tensor,
        queries: int,
        splits: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        out: Tensor,
    ) -> None:
        keys, values = self._caches[layer]
        heads = q.shape[1]
        group = heads // self._kv_heads
        # More heads than a tile's rows, or fewer rows than the least: rows without a head.
        group_pad = max(triton.next_power_of_2(group), _LEAST_ROWS // queries)
        dim_pad = max(triton.next_power_of_2(self._dim), 16)
        shape = _shape_of(queries * group_pad, dim_pad, q.element_size())
        parts = (len(tiles), heads, splits) if splits > 1 else (1,)
        sums = torch.empty((*parts, self._dim), dtype=torch.float32, device=q.device)
        peaks = torch.empty((*parts, 2), dtype=torch.float32, device=q.device)
        kernels.attend[(len(tiles), self._kv_heads, splits)](
            q,
            keys,
            values,
            tiles,
            tables.blocks,
            out,
            sums,
            peaks,
            scale,
            softcap or 0.0,
            window or 0,
            q.stride(0),
            q.stride(1),
            *keys.stride()[:3],
            HEADS=heads,
            GROUP=group,
            DIM=self._dim,
            BLOCK_TOKENS=self.block_tokens,
            GROUP_PAD=group_pad,
            DIM_PAD=dim_pad,
            QUERIES=queries,
            SPLITS=splits,
            SOFTCAP=softcap is not None,
            WINDOW=window is not None,
            **shape,
        )
        if splits > 1:
            kernels.merge[(len(tiles), heads)](
                sums, peaks, tiles, out, HEADS=heads, DIM=self._dim, DIM_PAD=dim_pad, SPLITS=splits
            )


def _prefill_rows(dim: int, bytes_each: int) -> int:
    """Return the rows (queries times heads of a group) of a prefill tile. With `_shape_of`: what
    fits in the 99 KiB of shared memory that the smallest of these GPUs have."""
    if bytes_each > 2:
        return 32
    return 128 if dim <= 128 else 64


def _shape_of(rows: int, dim: int, bytes_each: int) -> dict[str, int]:
    """Return keys per iteration, warps and pipeline stages of a tile with so many rows."""
    if bytes_each > 2:  # for float32 there are no matrix units that are exact
        return {"KEYS": 32, "num_warps": 4, "num_stages": 1}
    if rows > 64:
        return {"KEYS": 64, "num_warps": 8, "num_stages": 2}
    # Four stages: two for the addresses, which come from a table, two for keys and values.
    return {"KEYS": 64 if dim <= 128 else 32, "num_warps": 4, "num_stages": 4}


def _contiguous_heads(x: Tensor) -> Tensor:
    """Return `x` [tokens, heads, dim] with contiguous `dim`."""
    return x if x.stride(2) == 1 else x.contiguous()


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter, in tests
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
