"""Triton kernels of what a decoder layer computes between its matrix products.

Tensors are float32, float16 or bfloat16. Arithmetic is in float32, and results are rounded to the
tensors' type where Transformers' models round them. Every value is cast to float32 as it is
loaded: Triton's interpreter, which runs the kernels in tests, has no arithmetic in bfloat16.

A kernel that works in place writes only what the same thread has read.
"""

import triton
import triton.language as tl


@triton.jit
def _rounded(value, like):
    """Return float32 `value` rounded to the type that pointer `like` points to."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _load(at, kept):
    return tl.load(at, mask=kept, other=0.0).to(tl.float32)


@triton.jit
def _store(at, value, kept):
    tl.store(at, value.to(at.dtype.element_ty), mask=kept)


@triton.jit
def _scaled(value, squares, gain, like, eps, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    """Return the RMS norm of `value`, not rounded to the type of `like`, from the sum of the
    squares of its row. EARLY: round before the gain, as Llama does."""
    value = value * tl.rsqrt(squares / WIDTH + eps)
    if EARLY:
        value = _rounded(value, like)
    return value * gain


@triton.jit
def rms_norm(x, gain, out, eps, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, EARLY: tl.constexpr):
    """out = norm(x) for row `program_id(0)` of [rows, WIDTH]; gain [WIDTH] float32."""
    at = tl.arange(0, WIDTH_PAD)
    kept = at < WIDTH
    row = tl.program_id(0).to(tl.int64) * WIDTH
    value = _load(x + row + at, kept)
    squares = tl.sum(value * value, 0)
    result = _scaled(value, squares, _load(gain + at, kept), out, eps, WIDTH, EARLY)
    _store(out + row + at, result, kept)


@triton.jit
def add_and_norm(
    residual, x, gain, out, eps, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, EARLY: tl.constexpr
):
    """residual += x; out = norm(residual), for row `program_id(0)` of [rows, WIDTH]."""
    at = tl.arange(0, WIDTH_PAD)
    kept = at < WIDTH
    row = tl.program_id(0).to(tl.int64) * WIDTH
    value = _rounded(_load(residual + row + at, kept) + _load(x + row + at, kept), residual)
    _store(residual + row + at, value, kept)
    squares = tl.sum(value * value, 0)
    result = _scaled(value, squares, _load(gain + at, kept), out, eps, WIDTH, EARLY)
    _store(out + row + at, result, kept)


@triton.jit
def norm_and_add(
    residual, x, gain, eps, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, EARLY: tl.constexpr
):
    """residual += norm(x), for row `program_id(0)` of [rows, WIDTH]."""
    at = tl.arange(0, WIDTH_PAD)
    kept = at < WIDTH
    row = tl.program_id(0).to(tl.int64) * WIDTH
    value = _load(x + row + at, kept)
    squares = tl.sum(value * value, 0)
    norm = _scaled(value, squares, _load(gain + at, kept), x, eps, WIDTH, EARLY)
    _store(residual + row + at, _load(residual + row + at, kept) + _rounded(norm, x), kept)


@triton.jit
def _rotate_heads(
    x,
    gain,
    cos,
    sin,
    first,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rotate TILE heads of `x` [HEADS, DIM] from `first` on; gain, cos and sin: [DIM]."""
    half: tl.constexpr = DIM // 2
    head = first + tl.arange(0, TILE)[:, None]
    column = tl.arange(0, HALF_PAD)[None, :]
    kept = (head < HEADS) & (column < half)
    at = head * DIM + column
    # Each thread loads the angles of its own columns: cheaper than to hand them over.
    shared = tl.broadcast_to(column, [TILE, HALF_PAD])
    a = _load(x + at, kept)
    b = _load(x + half + at, kept)
    if NORM:
        squares = (tl.sum(a * a, 1) + tl.sum(b * b, 1))[:, None]
        a_gain = _load(gain + shared, kept)
        b_gain = _load(gain + half + shared, kept)
        a = _rounded(_scaled(a, squares, a_gain, x, eps, DIM, EARLY), x)
        b = _rounded(_scaled(b, squares, b_gain, x, eps, DIM, EARLY), x)
    a_cos = _rounded(a * _load(cos + shared, kept), x)
    b_sin = _rounded(b * _load(sin + shared, kept), x)
    b_cos = _rounded(b * _load(cos + half + shared, kept), x)
    a_sin = _rounded(a * _load(sin + half + shared, kept), x)
    _store(x + at, a_cos - b_sin, kept)
    _store(x + half + at, b_cos + a_sin, kept)


@triton.jit
def rotate(
    q,
    k,
    cos,
    sin,
    q_gain,
    k_gain,
    q_eps,
    k_eps,
    q_row,
    k_row,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rotary embedding of row `program_id(0)` of q and k [tokens, heads, DIM] in place, after their
    norms if NORM. `program_id(1)`: which TILE heads, first those of q, then those of k.

    q_row and k_row: elements from one token to the next, whose heads are contiguous. cos and sin
    [tokens, DIM]; q_gain and k_gain [DIM] float32.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    q_tiles: tl.constexpr = (HEADS + TILE - 1) // TILE
    cos += row * DIM
    sin += row * DIM
    if tile < q_tiles:
        at, first = q + row * q_row, tile * TILE
        _rotate_heads(at, q_gain, cos, sin, first, q_eps, HEADS, DIM, HALF_PAD, TILE, NORM, EARLY)
    else:
        at, first = k + row * k_row, (tile - q_tiles) * TILE
        _rotate_heads(
            at, k_gain, cos, sin, first, k_eps, KV_HEADS, DIM, HALF_PAD, TILE, NORM, EARLY
        )


@triton.jit
def gate(
    x, up, out, x_row, up_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU_TANH: tl.constexpr
):
    """out = activation(x) * up for columns `program_id(1) * BLOCK` and following of row
    `program_id(0)` of [rows, WIDTH]. The activation is SiLU, or the tanh form of GELU.

    x_row and up_row: elements from one row to the next. `out` is contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = at < WIDTH
    value = _load(x + row * x_row + at, kept)
    power = value  # the activation is value * sigmoid(power)
    if GELU_TANH:  # 0.5 * (1 + tanh(z)) = sigmoid(2 * z)
        power = 1.5957691216057308 * (value + 0.044715 * value * value * value)
    active = _rounded(value / (1.0 + tl.exp(-power)), x)
    _store(out + row * WIDTH + at, active * _load(up + row * up_row + at, kept), kept)
