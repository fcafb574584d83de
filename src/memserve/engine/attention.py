"""Attention over block tables: the function that Transformers' models call for each layer.

A step is one packed batch `[1, tokens]`: one row per decoding sequence, then the prefill chunks
one after the other. Each layer writes its new K and V into the pool's layer view, and gathers the
context through the sequences' block tables. Tables and masks are made once per step and sliding
window (`PagedBatch`).

Kernels are PyTorch's `scaled_dot_product_attention`. On CPUs a padded batch is faster than a call
per sequence while the gathered context stays in cache and reuses its memory, hence the groups of
similar length and the workspace (figures: docs/architecture.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memserve.engine.paged_batch import DecodeGroup, PagedBatch, Prefill, Workspace
from memserve.errors import ModelError

ATTENTION_NAME = "memserve_paged"


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kv: PagedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Transformers' attention interface over a paged pool.

    query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim], with rotary embedding
    applied. Returns [1, tokens, heads, dim]. Raises ModelError for attention sinks, and for heads
    whose size differs from the pool's.
    """
    if s_aux is not None:
        raise ModelError("attention sinks are not supported by the built-in engine")
    layer = module.layer_idx
    assert isinstance(layer, int)
    view = kv.views[layer]
    if key.shape[3] != view.shape[4] or value.shape[3] != view.shape[4]:
        raise ModelError(
            f"layer {layer} has K and V of {key.shape[3]} and {value.shape[3]} dimensions, "
            f"the pool's blocks hold {view.shape[4]}"
        )
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    view[:, 0].index_put_((kv.write_block, kv.write_slot), k)
    view[:, 1].index_put_((kv.write_block, kv.write_slot), v)
    if kv.on_layer is not None:
        kv.on_layer(layer)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in kv.groups(sliding_window):
        out[group.rows] = _decode(q, view, group, kv.workspace, scale, softcap)
    for prefill in kv.prefills(sliding_window):
        _prefill(q, k, v, view, prefill, kv.workspace, scale, softcap, out)
    return out.unsqueeze(0), None


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


def _no_mask(*_: object, **__: object) -> None:
    """Make no mask for Transformers: `PagedBatch` makes the masks from block tables."""


def register() -> None:
    """Make `attn_implementation=ATTENTION_NAME` known to Transformers. Idempotent."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _no_mask)
