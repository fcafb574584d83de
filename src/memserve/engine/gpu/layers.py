"""Layer operations on a GPU, by Triton's kernels."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import triton
from torch import Tensor

from memserve.engine.gpu import layer_kernels as kernels
from memserve.engine.layer_ops import Activation, Norm

# Elements that a thread reads at once: 16 bytes of two-byte numbers.
_THREAD = 8
_WARP = 32 * _THREAD
_MAX_WARPS = 16
_GATE_BLOCK = 4 * _WARP
_HALVES = 2 * _WARP  # elements of a tile of first (or second) halves of heads

# A fused multiply-add leaves out a rounding that Transformers' models make.
_ROUNDED = {"enable_fp_fusion": False}


class TritonLayers:
    """`LayerOps` on NVIDIA GPUs of compute capability 8.0 and later. Each call is one launch."""

    dtypes: Collection[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)
    merges = True

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        out = torch.empty_like(x)
        kernels.rms_norm[(_rows(x),)](x, norm.gain, out, norm.eps, **_constants(x, norm))
        return out

    def add_and_norm(self, residual: Tensor, x: Tensor, norm: Norm) -> Tensor:
        out = torch.empty_like(x)
        kernels.add_and_norm[(_rows(x),)](
            residual, x, norm.gain, out, norm.eps, **_constants(x, norm)
        )
        return out

    def norm_and_add(self, residual: Tensor, x: Tensor, norm: Norm) -> None:
        kernels.norm_and_add[(_rows(x),)](residual, x, norm.gain, norm.eps, **_constants(x, norm))

    def rotate(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: tuple[Norm, Norm] | None
    ) -> None:
        tokens, heads, dim = q.shape
        kv_heads = k.shape[1]
        assert q.stride()[1:] == k.stride()[1:] == (dim, 1)
        assert cos.shape[-1] == dim
        q_norm, k_norm = norms or (None, None)
        half_pad = triton.next_power_of_2(dim // 2)
        tile = max(1, _HALVES // half_pad)
        kernels.rotate[(tokens, triton.cdiv(heads, tile) + triton.cdiv(kv_heads, tile))](
            q,
            k,
            cos,
            sin,
            q_norm.gain if q_norm else cos,
            k_norm.gain if k_norm else cos,
            q_norm.eps if q_norm else 0.0,
            k_norm.eps if k_norm else 0.0,
            q.stride(0),
            k.stride(0),
            HEADS=heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            HALF_PAD=half_pad,
            TILE=tile,
            NORM=norms is not None,
            EARLY=q_norm is not None and q_norm.early,
            num_warps=_warps(tile * half_pad),
            **_ROUNDED,
        )

    def gate(self, x: Tensor, up: Tensor, activation: Activation) -> Tensor:
        width = x.shape[-1]
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        kernels.gate[(_rows(x), triton.cdiv(width, _GATE_BLOCK))](
            x,
            up,
            out,
            x.stride(-2),
            up.stride(-2),
            WIDTH=width,
            BLOCK=_GATE_BLOCK,
            GELU_TANH=activation is Activation.GELU_TANH,
            num_warps=_warps(_GATE_BLOCK),
            **_ROUNDED,
        )
        return out


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _constants(x: Tensor, norm: Norm) -> dict[str, Any]:
    """Return what kernels that take a row per program are compiled for."""
    width = x.shape[-1]
    pad = triton.next_power_of_2(width)
    shape = {"WIDTH": width, "WIDTH_PAD": pad, "EARLY": norm.early}
    return {**shape, "num_warps": _warps(pad), **_ROUNDED}


def _warps(elements: int) -> int:
    """Return the warps of a program for so many elements, a power of 2: as few as give each thread
    16 bytes, since a thread that another one repeats could read what that one has written."""
    return min(max(elements // _WARP, 1), _MAX_WARPS)
