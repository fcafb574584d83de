"""Which number format is fastest for a model on this machine, by measuring it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

# The work that the choice is made for: a chat turn's uncached prompt, and its answer.
PREFILL_TOKENS = 256
DECODE_TOKENS = 128
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


def choose_dtype(hidden: int, parameters: int, device: torch.device) -> DtypeChoice:
    """Time matrix products of a model's size in each format this device computes with.

    `hidden` is the model's width and `parameters` its weights that every token passes; a
    request is `PREFILL_TOKENS` in one go and `DECODE_TOKENS` one by one. Takes well under a
    second. On a GPU the answer is bfloat16 where there is hardware for it, else float16.
    """
    if device.type == "cuda":
        fast = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return DtypeChoice(fast, ())
    # One matrix, large enough to come from memory at every decode step as a model does.
    rows = max(1, min(parameters // hidden, 64 * 1024 * 1024 // hidden))
    times = []
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.zeros(rows, hidden, dtype=dtype)
        prefill = _seconds(torch.zeros(PREFILL_TOKENS, hidden, dtype=dtype), weight)
        decode = _seconds(torch.zeros(1, hidden, dtype=dtype), weight)
        total = (prefill + DECODE_TOKENS * decode) * parameters / (rows * hidden)
        times.append((total, dtype))
    times.sort(key=lambda t: t[0])
    return DtypeChoice(times[0][1], tuple((str(d).removeprefix("torch."), s) for s, d in times))


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    best = float("inf")
    with torch.inference_mode():
        torch.nn.functional.linear(x, weight)
        for _ in range(_REPEATS):
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best = min(best, time.perf_counter() - started)
    return best
