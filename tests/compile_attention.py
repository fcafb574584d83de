"""`python -m tests.compile_attention`: compile the attention kernels for GPUs, on any machine.

It records what `TritonAttention` launches, and gives that to Triton's compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from memserve.engine.attention import Span
from memserve.engine.gpu import attention, attention_kernels
from memserve.engine.gpu.attention import TritonAttention

# Bytes of shared memory that a block of threads can have, by compute capability.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


def output_of(module: str) -> str:
    """What a module like this one prints, in a process without Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


class Recorder:
    """Stands for a kernel: keeps its arguments instead of launching it."""

    def __init__(self, kernel: JITFunction, launched: list[tuple[JITFunction, dict[str, Any]]]):
        self._kernel = kernel
        self._launched = launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._record

    def _record(self, *args: Any, **named: Any) -> None:
        given = dict(zip(self._kernel.arg_names, args, strict=False)) | named
        self._launched.append((self._kernel, given))


def launches(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> list[Any]:
    """What a step of one decode and one prefill launches."""
    launched: list[tuple[JITFunction, dict[str, Any]]] = []
    attention._multiprocessors = lambda device: 132  # an H100's
    for name in ("write", "attend", "merge"):
        setattr(
            attention.kernels,  # type: ignore[attr-defined]
            name,
            Recorder(KERNELS[name], launched),
        )
    backend = TritonAttention([torch.empty(4, 2, 16, kv_heads, dim, dtype=dtype)], heads)
    backend.plan([Span(0, 1, 8, np.array([1])), Span(1, 20, 0, np.array([2, 3]))], 1)
    q = torch.empty(21, heads, dim, dtype=dtype)
    k = torch.empty(21, kv_heads, dim, dtype=dtype)
    backend.run(0, q, k, k, 0.1, None, None)
    return launched


def compiled(kernel: JITFunction, given: dict[str, Any], capability: int) -> Any:
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature = {
        name: "constexpr" if name in constants else type_of(given[name])
        for name in kernel.arg_names
    }
    # As at a launch: what is known to be a multiple of 16 is read 16 bytes at a time.
    attributes = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if name not in constants and is_aligned(given[name])
    }
    constexprs = {name: given[name] for name in constants}
    source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {name: given[name] for name in OPTIONS & given.keys()}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32"}
        return "*" + names[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def is_aligned(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


KERNELS = {name: getattr(attention_kernels, name) for name in ("write", "attend", "merge")}


def main() -> None:
    count = 0
    for dtype, heads, kv_heads, dim in (
        (torch.bfloat16, 32, 8, 128),
        (torch.bfloat16, 4, 1, 256),
        (torch.float32, 4, 1, 256),
    ):
        for kernel, given in launches(dtype, heads, kv_heads, dim):
            for capability, most in SHARED.items():
                made = compiled(kernel, given, capability)
                used = made.metadata.shared
                print(capability, kernel.__name__, dtype, dim, used, flush=True)
                assert used <= most, (kernel.__name__, capability, used)
                count += 1
    print(f"{count} kernels")


if __name__ == "__main__":
    main()
