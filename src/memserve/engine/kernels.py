"""Compiled CPU kernels: norms, rotary embedding, GELU and argmax for bfloat16; grammars' masks.

PyTorch has no bfloat16 kernels for most of these formulas: it converts to float32 and passes over
the data once per operation. Here each formula is one pass over rows that stay in the core's cache.
Results are rounded where Transformers' models round them, and a row's result depends on that row
alone. The kernels use one thread: for the few rows of a decode step a barrier costs more than the
work, and for a prompt's rows they take a few percent of the time of its matrix products.

Arrays of bfloat16 are uint16 here, the upper half of a float32's bits.

Functions that kernels call must be in this file, see `compiled.py`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memserve.compiled import Kernels

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]

_BLOCK_ROWS = 64  # rows that `first_maxima` reduces to one number per column
_INFINITY = 0x7F80  # the value of `_ordered` for +infinity
# Sums may be reordered, which vectorises them; NaN and infinities keep IEEE semantics.
_REORDER = {"reassoc", "contract", "nsz"}

_KERNELS = Kernels("the engine", fastmath=_REORDER, without_gil=True)
prepare = _KERNELS.prepare  # compiles the kernels, at start, so that no request waits for it


@_KERNELS.inlined
def _up(bits: np.uint16) -> np.float32:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_KERNELS.inlined
def _down(value: np.float32) -> np.uint16:
    """Round to the nearest bfloat16, ties to even. NaN becomes any NaN, infinity or zero."""
    bits = np.float32(value).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


@_KERNELS.inlined
def _round(value: np.float32) -> np.float32:
    return _up(_down(value))


@_KERNELS.inlined
def _normalise(row: Bits, gain: Floats, eps: float, early: bool, out: Bits) -> None:
    """RMS norm of one row. `early`: round before the gain too, as Llama does."""
    width = len(row)
    squares = np.float32(0)
    for i in range(width):
        value = _up(row[i])
        squares += value * value
    factor = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
    if early:
        for i in range(width):
            out[i] = _down(_round(_up(row[i]) * factor) * gain[i])
    else:
        for i in range(width):
            out[i] = _down(_up(row[i]) * factor * gain[i])


@_KERNELS.compiled("void(uint16[:,::1],float32[::1],float32,boolean,uint16[:,::1])")
def rms_norm(x: Bits, gain: Floats, eps: float, early: bool, out: Bits) -> None:
    """out = norm(x), [rows, width]."""
    for row in range(x.shape[0]):
        _normalise(x[row], gain, eps, early, out[row])


@_KERNELS.compiled("void(uint16[:,::1],uint16[:,::1],float32[::1],float32,boolean,uint16[:,::1])")
def add_and_norm(residual: Bits, x: Bits, gain: Floats, eps: float, early: bool, out: Bits) -> None:
    """residual += x; out = norm(residual), [rows, width]."""
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            residual[row, i] = _down(_up(residual[row, i]) + _up(x[row, i]))
        _normalise(residual[row], gain, eps, early, out[row])


@_KERNELS.compiled("void(uint16[:,::1],uint16[:,::1],float32[::1],float32,boolean)")
def norm_and_add(residual: Bits, x: Bits, gain: Floats, eps: float, early: bool) -> None:
    """x = norm(x); residual += x, [rows, width]."""
    for row in range(x.shape[0]):
        _normalise(x[row], gain, eps, early, x[row])
        for i in range(x.shape[1]):
            residual[row, i] = _down(_up(residual[row, i]) + _up(x[row, i]))


@_KERNELS.inlined
def _rotate_row(x: Bits, cos: Bits, sin: Bits) -> None:
    half = len(x) // 2
    for i in range(half):
        a, b = _up(x[i]), _up(x[i + half])
        x[i] = _down(_round(a * _up(cos[i])) + _round(-b * _up(sin[i])))
        x[i + half] = _down(_round(b * _up(cos[i + half])) + _round(a * _up(sin[i + half])))


@_KERNELS.compiled("void(uint16[:,:,::1],uint16[:,::1],uint16[:,::1])")
def rotate(x: Bits, cos: Bits, sin: Bits) -> None:
    """Rotary position embedding of `x` [rows, heads, dim] in place; cos and sin [rows, dim]."""
    for row in range(x.shape[0]):
        for head in range(x.shape[1]):
            _rotate_row(x[row, head], cos[row], sin[row])


@_KERNELS.inlined
def _exp(x: np.float32) -> np.float32:
    """exp(x) to float32's precision, with `x` clamped to -87..87.

    Computed as a power of 2 times Cephes' polynomial of the rest, which vectorises; the library's
    exp is a call per number.
    """
    x = min(max(x, np.float32(-87)), np.float32(87))
    power = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    # ln 2 in two parts, the first one exact in products with `power`.
    rest = x - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    value = np.float32(1.9875691500e-4)
    value = value * rest + np.float32(1.3981999507e-3)
    value = value * rest + np.float32(8.3334519073e-3)
    value = value * rest + np.float32(4.1665795894e-2)
    value = value * rest + np.float32(1.6666665459e-1)
    value = value * rest + np.float32(5.0000001201e-1)
    value = value * rest * rest + rest + np.float32(1)
    scale: np.float32 = np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(value * scale)


@_KERNELS.compiled("void(uint16[:,::1],uint16[:,::1])")
def gelu_gate(gate: Bits, up: Bits) -> None:
    """gate = gelu(gate) * up, [rows, width]; the tanh form of gelu as x * sigmoid(2 * ...)."""
    for row in range(gate.shape[0]):
        for i in range(gate.shape[1]):
            x = _up(gate[row, i])
            inner = x * (np.float32(1) + np.float32(0.044715) * x * x)
            inner *= np.float32(-1.5957691216)
            active = x / (np.float32(1) + _exp(inner))
            if inner > np.float32(87):  # `_exp` clamps here
                active = np.float32(0)
            gate[row, i] = _down(_round(active) * _up(up[row, i]))


@_KERNELS.inlined
def _ordered(bits: np.int16) -> np.int16:
    """Map bfloat16 bits to an integer with the order of the numbers; -0.0 comes before 0.0, and
    NaN last."""
    sign = np.int16(np.int16(bits >> np.int16(15)) & np.int16(0x7FFF))
    value = np.int16(bits ^ sign)
    return np.int16(0x7FFF) if value < np.int16(-0x7F81) else value


@_KERNELS.compiled("void(int16[:,::1],int64[::1])")
def first_maxima(columns: NDArray[np.int16], out: NDArray[np.int64]) -> None:
    """Write the row of the first maximum of each column of `columns` [length, n], bfloat16 bits,
    to `out` [n]. -1 if the column has a NaN or its maximum is infinite or zero (of either sign):
    the caller then searches that column.

    Blocks of rows are reduced to one number per column, which vectorises; then the block with the
    maximum is searched.
    """
    length, n = columns.shape
    best = np.full(n, -0x8000, np.int16)
    block = np.zeros(n, np.int64)
    here = np.empty(n, np.int16)
    for begin in range(0, length, _BLOCK_ROWS):
        here[:] = -0x8000
        for i in range(begin, min(begin + _BLOCK_ROWS, length)):
            for column in range(n):
                here[column] = max(here[column], _ordered(columns[i, column]))
        for column in range(n):
            if here[column] > best[column]:
                best[column] = here[column]
                block[column] = begin
    for column in range(n):
        out[column] = -1
        if abs(best[column]) >= _INFINITY or best[column] == 0 or best[column] == -1:
            continue
        for i in range(block[column], length):
            if _ordered(columns[i, column]) == best[column]:
                out[column] = i
                break


@_KERNELS.compiled("void(uint8[::1],float32[::1])")
def keep_allowed(bits: NDArray[np.uint8], logits: Floats) -> None:
    """Set the `logits` [vocab] of tokens whose bit is 0 to -inf; bit t % 8 of `bits` [t // 8] is
    that of token t, and tokens without one are not allowed."""
    for at in range(0, len(logits), 8):
        byte = bits[at // 8] if at // 8 < len(bits) else np.uint8(0)
        if byte == 255:
            continue
        for token in range(at, min(at + 8, len(logits))):
            if not (byte >> np.uint8(token - at)) & np.uint8(1):
                logits[token] = -np.inf
