"""Attention by PyTorch's `scaled_dot_product_attention`, on contexts gathered through block tables.

On CPUs a padded batch is faster than a call per sequence while the gathered context stays in cache
and reuses its memory, hence the groups of similar length and the workspace (figures:
docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from torch import Tensor

from memserve.engine.attention import Span, checked_dim
from memserve.engine.paged_batch import DecodeGroup, PagedBatch, Prefill, Workspace


class TorchAttention:
    """`AttentionBackend` for every device that PyTorch knows."""

    def __init__(self, views: Sequence[Tensor], dtype: torch.dtype) -> None:
        """`views`: the pool's, per layer [blocks, 2, block_tokens, kv_heads, head_dim]."""
        self._views = views
        self._dtype = dtype
        self._workspace = Workspace()
        self._on_layer: Callable[[int], None] | None = None
        self._batch: PagedBatch | None = None

    def plan(
        self, spans: Sequence[Span], decodes: int, on_layer: Callable[[int], None] | None = None
    ) -> None:
        self._batch = PagedBatch(self._views[0], spans, decodes, self._dtype)
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
        batch, view = self._batch, self._views[layer]
        assert batch is not None
        checked_dim(layer, k, v, view.shape[4])
        view[:, 0].index_put_((batch.write_block, batch.write_slot), k)
        view[:, 1].index_put_((batch.write_block, batch.write_slot), v)
        if self._on_layer is not None:
            self._on_layer(layer)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in batch.groups(window):
            out[group.rows] = _decode(q, view, group, self._workspace, scale, softcap)
        for prefill in batch.prefills(window):
            _prefill(q, k, v, view, prefill, self._workspace, scale, softcap, out)
        return out


def _decode(
    q: Tensor,
    view: Tensor,
    group: DecodeGroup,
    workspace: Workspace,
    scale: float,
    softcap: float | None,
) -> Tensor:
    rows = group.rows.shape[0]
    kv_heads, dim = view.shape[3], view.shape[4]
    keys, values = (
        context.view(rows, -1, kv_heads, dim)[:, group.seen].transpose(1, 2)
        for context in workspace.gather(view, group.table)
    )
    # The query heads of a KV head become queries of one head, so its keys are read once.
    queries = q[group.rows].view(rows, kv_heads, -1, dim)
    result = _attend(queries, keys, values, group.mask, False, scale, softcap)
    return result.reshape(rows, -1, dim)


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: Tensor,
    prefill: Prefill,
    workspace: Workspace,
    scale: float,
    softcap: float | None,
    out: Tensor,
) -> None:
    if prefill.packed is not None:
        keys, values = k[prefill.packed], v[prefill.packed]
    else:
        assert prefill.table is not None
        keys, values = (
            context[prefill.tokens] for context in workspace.gather(view, prefill.table)
        )
    for tile in prefill.tiles:
        result = _attend(
            q[tile.query].transpose(0, 1).unsqueeze(0),
            keys[tile.keys].transpose(0, 1).unsqueeze(0),
            values[tile.keys].transpose(0, 1).unsqueeze(0),
            tile.mask,
            tile.causal,
            scale,
            softcap,
        )
        out[tile.query] = result[0].transpose(0, 1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """q [n, heads, queries, dim], k and v [n, kv_heads, keys, dim] -> like q."""
    grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        if grouped and mask is not None and q.is_cuda:
            # CUDA's fused kernels support a mask or grouped heads, not both.
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            grouped = False
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    if grouped:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores + mask
    if causal:
        shape = scores.shape[2:]
        upper = torch.ones(shape, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(upper, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
