"""Which number format is fastest for a model on this machine, by measuring it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from memserve.engine.linear import speed_up_products
from memserve.engine.model import WeightCount
from memserve.engine.team import with_team

# The work that the choice is made for: a chat turn's uncached prompt, and its answer.
PREFILL_TOKENS = 256
DECODE_TOKENS = 128
# One matrix of this many weights stands for the model: it comes from memory at every decode
# step, as the model does.
SAMPLE_WEIGHTS = 32 * 1024 * 1024
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """The fastest format, and why."""

    dtype: torch.dtype
    seconds: tuple[tuple[str, float], ...]  # predicted per request, best first

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds)
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} (matrix products of one request here: {figures})"


def choose_dtype(weights: WeightCount, device: torch.device, threads: int) -> DtypeChoice:
    """Time matrix products of a model's width in each format this device computes with.

    Takes well under a second on a CPU. On a GPU nothing is timed: it is bfloat16 where there
    is hardware for it, else float16.
    """
    if device.type == "cuda":
        fast = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return DtypeChoice(fast, ())
    return with_team(threads, lambda: _fastest(weights))


def _fastest(weights: WeightCount) -> DtypeChoice:
    hidden = weights.hidden
    rows = max(1, SAMPLE_WEIGHTS // hidden)
    times = []
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.zeros(rows, hidden, dtype=dtype)
        prefill = _seconds(torch.zeros(PREFILL_TOKENS, hidden, dtype=dtype), matrix)
        decode = _seconds(torch.zeros(1, hidden, dtype=dtype), matrix)
        total = prefill * weights.layers + DECODE_TOKENS * decode * (
            weights.layers + weights.output
        )
        times.append((total / matrix.numel(), dtype))
    times.sort(key=lambda t: t[0])
    return DtypeChoice(times[0][1], tuple((str(d).removeprefix("torch."), s) for s, d in times))


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    best = float("inf")
    rows, hidden = weight.shape
    layer = torch.nn.Linear(hidden, rows, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    speed_up_products(layer)  # as the engine will
    with torch.inference_mode():
        layer(x)
        for _ in range(_REPEATS):
            started = time.perf_counter()
            layer(x)
            best = min(best, time.perf_counter() - started)
    return best
