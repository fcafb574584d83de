"""`python -m tests.compile_layers`: compile the layers' kernels for GPUs, on any machine.

It records what a decode step's layers launch, and gives that to Triton's compiler.
"""

from __future__ import annotations

from typing import Any

import torch

from memserve.engine.gpu import layers
from memserve.engine.gpu.layers import TritonLayers
from memserve.engine.layer_ops import Activation, Norm
from tests.compile_attention import Recorder, compiled

KERNELS = {
    name: getattr(layers.kernels, name)
    for name in ("rms_norm", "add_and_norm", "norm_and_add", "rotate", "gate")
}
CAPABILITIES = (80, 90)


def launches(
    dtype: torch.dtype, width: int, heads: int, kv_heads: int, dim: int, hidden: int, gemma: bool
) -> list[Any]:
    """What each of the operations launches, once, for three tokens of a model's shape."""
    launched: list[Any] = []
    for name, kernel in KERNELS.items():
        setattr(layers.kernels, name, Recorder(kernel, launched))
    ops = TritonLayers()
    x, residual = torch.empty(2, 1, 3, width, dtype=dtype)
    norm, of_heads = (Norm(torch.empty(size), 1e-6, not gemma) for size in (width, dim))
    ops.rms_norm(x, norm)
    ops.add_and_norm(residual, x, norm)
    ops.norm_and_add(residual, x, norm)
    qkv = torch.empty(3, heads + 2 * kv_heads, dim, dtype=dtype)
    q, k, _ = qkv.split([heads, kv_heads, kv_heads], 1)
    cos, sin = torch.empty(2, 1, 3, dim, dtype=dtype)
    ops.rotate(q, k, cos, sin, (of_heads, of_heads) if gemma else None)
    gate, up = torch.empty(1, 3, 2 * hidden, dtype=dtype).split(hidden, -1)
    ops.gate(gate, up, Activation.GELU_TANH if gemma else Activation.SILU)
    return launched


def main() -> None:
    count = 0
    llama, gemma = (4096, 32, 8, 128, 14336, False), (640, 4, 1, 256, 2048, True)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in (llama, gemma):
            for kernel, given in launches(dtype, *shape):
                for capability in CAPABILITIES:
                    made = compiled(kernel, given, capability)
                    # In bfloat16 an A100 multiplies by adding to zero, and has no other way.
                    if capability >= 90 or dtype is torch.float32:
                        assert "fma." not in made.asm["ptx"], (kernel.__name__, dtype)
                    print(capability, kernel.__name__, dtype, flush=True)
                    count += 1
    print(f"{count} kernels")


if __name__ == "__main__":
    main()
