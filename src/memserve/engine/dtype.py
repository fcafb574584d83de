"""Choice of the fastest dtype for a model on this machine, by measurement."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from memserve.engine.linear import speed_up_products
from memserve.engine.model import WeightCount
from memserve.engine.team import with_team

# Assumed request: the uncached prompt of a chat turn, and its answer.
PREFILL_TOKENS = 256
DECODE_TOKENS = 128
# Weights of the timed matrix, about: too large for a CPU's caches, like a model's weights.
SAMPLE_WEIGHTS = 32 * 1024 * 1024
_REPEATS = 3
# float32 is chosen if bfloat16 takes this many times as long. KV moves only between instances with
# the same dtype, so that two of them must not differ by the noise of a busy machine.
FLOAT32_GAIN = 2.0


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """A dtype, with the predictions that led to it."""

    dtype: torch.dtype
    seconds: tuple[tuple[str, float], ...]  # (dtype, predicted per request)

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds)
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} (matrix products of one request here: {figures})"


def choose_dtype(weights: WeightCount, device: torch.device, threads: int) -> DtypeChoice:
    """Return bfloat16 on a CPU, or float32 if that is much faster (FLOAT32_GAIN), by timing matrix
    products of a model's width with `threads` threads. Takes well under a second.

    On a GPU: bfloat16 if the hardware supports it, else float16, without timing.
    """
    if device.type == "cuda":
        fast = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return DtypeChoice(fast, ())
    return with_team(threads, lambda: chosen(*_times(weights)))


def chosen(bfloat16: float, float32: float) -> DtypeChoice:
    """Return the choice for predicted seconds of a request."""
    dtype = torch.float32 if bfloat16 >= FLOAT32_GAIN * float32 else torch.bfloat16
    return DtypeChoice(dtype, (("bfloat16", bfloat16), ("float32", float32)))


def _times(weights: WeightCount) -> list[float]:
    """Return the predicted seconds of a request in bfloat16 and in float32."""
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
        times.append(total / matrix.numel())
    return times


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    best = float("inf")
    rows, hidden = weight.shape
    layer = torch.nn.Linear(hidden, rows, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    speed_up_products(layer)  # as `load_model` does
    with torch.inference_mode():
        layer(x)
        for _ in range(_REPEATS):
            started = time.perf_counter()
            layer(x)
            best = min(best, time.perf_counter() - started)
    return best
