"""Triton kernels of attention over block tables: `write` new K and V, `attend`, `merge` splits.

The tables of a step are int32, in device memory:

- places [tokens]: slot of each token's K and V, `block * block_tokens + position in the block`;
  -1: none.
- tiles [tiles, 4]: consecutive queries of one sequence: their first row in the batch, their
  number, the position of the first one, and where the sequence's blocks begin in `blocks`.
- blocks: block indices of all sequences, one sequence after the other.

K and V of a layer are [blocks, block_tokens, kv_heads, dim] with any strides but in `dim`, which
is contiguous.

The loop over keys is that of FlashAttention-2 (Dao, https://arxiv.org/abs/2307.08691); the queries
of a KV head's group share a tile, so that K and V are read once for all of them. Decoding sequences
are split over programs, whose results `merge` joins, as in Flash-Decoding
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def write(
    k,
    v,
    k_cache,
    v_cache,
    places,
    k_row,
    k_head,
    v_row,
    v_head,
    kv_block,
    kv_token,
    kv_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Copy row `program_id(0)` of k and v [tokens, HEADS, DIM] to its place."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_PAD)[:, None]
    dim = tl.arange(0, DIM_PAD)[None, :]
    place = tl.load(places + row)
    kept = (head < HEADS) & (dim < DIM) & (place >= 0)
    block = (place // BLOCK_TOKENS).to(tl.int64)
    target = block * kv_block + (place % BLOCK_TOKENS) * kv_token + head * kv_head + dim
    tl.store(k_cache + target, tl.load(k + row * k_row + head * k_head + dim, mask=kept), mask=kept)
    tl.store(v_cache + target, tl.load(v + row * v_row + head * v_head + dim, mask=kept), mask=kept)


@triton.jit
def attend(
    q,
    k_cache,
    v_cache,
    tiles,
    blocks,
    out,
    sums,
    peaks,
    scale,
    softcap,
    window,
    q_row,
    q_head,
    kv_block,
    kv_token,
    kv_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Attention of the queries of tile `program_id(0)` for the query heads of KV head
    `program_id(1)`, over the part `program_id(2)` of SPLITS of the keys that they see.

    q [tokens, HEADS, DIM], contiguous in DIM. With one split, writes `out` [tokens, HEADS, DIM],
    contiguous. With more, tiles have one query, and what `merge` needs is written: `sums`
    [tiles, HEADS, SPLITS, DIM] float32, and `peaks` [tiles, HEADS, SPLITS, 2] float32, the
    maximum of the scores in powers of 2 and the weights' sum.

    A tile at position -1 sees no keys; its result is zero.
    """
    tile = tl.program_id(0)
    kv = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(tiles + tile * 4).to(tl.int64)
    count = tl.load(tiles + tile * 4 + 1)
    first = tl.load(tiles + tile * 4 + 2)
    table = blocks + tl.load(tiles + tile * 4 + 3)

    lane = tl.arange(0, QUERIES * GROUP_PAD)
    query = lane // GROUP_PAD
    member = lane % GROUP_PAD
    head = kv * GROUP + member
    position = first + query
    real = (query < count) & (member < GROUP)
    dim = tl.arange(0, DIM_PAD)
    q_at = (row + query)[:, None] * q_row + head[:, None] * q_head + dim[None, :]
    q_kept = real[:, None] & (dim < DIM)[None, :]
    queries = tl.load(q + q_at, mask=q_kept, other=0.0)

    last = first + count  # the keys [low, last) are seen by one of the queries
    low = 0
    if WINDOW:
        low = tl.maximum(first + 1 - window, 0) // KEYS * KEYS
    part = tl.cdiv(tl.cdiv(last - low, KEYS), SPLITS) * KEYS
    begin = low + split * part
    end = tl.minimum(begin + part, last)

    peak = tl.full([QUERIES * GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * GROUP_PAD], tl.float32)
    result = tl.zeros([QUERIES * GROUP_PAD, DIM_PAD], tl.float32)
    for start in range(begin, end, KEYS):
        at = start + tl.arange(0, KEYS)
        present = at < end
        block = tl.load(table + at // BLOCK_TOKENS, mask=present, other=0).to(tl.int64)
        token = block * kv_block + (at % BLOCK_TOKENS) * kv_token + kv * kv_head
        kv_kept = present[:, None] & (dim < DIM)[None, :]
        keys = tl.load(k_cache + token[:, None] + dim[None, :], mask=kv_kept, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if SOFTCAP:  # softcap * tanh(scores / softcap)
            scores = softcap - 2 * softcap / (tl.exp(scores * (2 / softcap)) + 1)
        seen = present[None, :] & (at[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (at[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores * LOG2_E, float("-inf"))
        peak_now = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen no key yet: any finite number, or the difference would be NaN.
        shift = tl.where(peak_now == float("-inf"), 0.0, peak_now)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(peak - shift)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v_cache + token[:, None] + dim[None, :], mask=kv_kept, other=0.0)
        result = result * shrink[:, None]
        result += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        peak = peak_now

    if SPLITS == 1:
        result = result / tl.where(total > 0, total, 1.0)[:, None]
        o_at = ((row + query)[:, None] * HEADS + head[:, None]) * DIM + dim[None, :]
        tl.store(out + o_at, result.to(out.dtype.element_ty), mask=q_kept)
    else:
        part_at = (tile.to(tl.int64) * HEADS + head) * SPLITS + split
        tl.store(sums + part_at[:, None] * DIM + dim[None, :], result, mask=q_kept)
        tl.store(peaks + part_at * 2, peak, mask=real)
        tl.store(peaks + part_at * 2 + 1, total, mask=real)


@triton.jit
def merge(
    sums,
    peaks,
    tiles,
    out,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Join the splits of tile `program_id(0)` and head `program_id(1)`: what `attend` wrote to
    `sums` and `peaks` -> `out` [tokens, HEADS, DIM]. SPLITS is a power of 2."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM_PAD)
    part_at = (tile.to(tl.int64) * HEADS + head) * SPLITS + split
    peak = tl.load(peaks + part_at * 2)
    total = tl.load(peaks + part_at * 2 + 1)
    highest = tl.max(peak, 0)
    weight = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
    whole = tl.sum(total * weight, 0)
    kept = (dim < DIM)[None, :] & (split >= 0)[:, None]
    parts = tl.load(sums + part_at[:, None] * DIM + dim[None, :], mask=kept, other=0.0)
    result = tl.sum(parts * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    row = tl.load(tiles + tile * 4).to(tl.int64)
    o_at = (row * HEADS + head) * DIM + dim
    tl.store(out + o_at, result.to(out.dtype.element_ty), mask=dim < DIM)
