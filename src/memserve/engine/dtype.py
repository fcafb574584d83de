"""Choice of a dtype for `dtype = "auto"`."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch

from memserve.cpu import cpu_flags

# Instructions for products of bfloat16: x86's, Arm's.
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def choose_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which `device` computes fast: bfloat16 where the hardware multiplies it,
    else float16 on a GPU, and float32 on a CPU.

    Depends on the hardware alone, not on timings: instances with other dtypes move no KV.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return cpu_dtype(cpu_flags())


def cpu_dtype(flags: AbstractSet[str]) -> torch.dtype:
    """Return the dtype for a CPU with these features."""
    return torch.float32 if _BFLOAT16.isdisjoint(flags) else torch.bfloat16
