"""The built-in engine against Transformers' `generate`: same weights, threads and prompts.

The two take turns, so that a drift of the machine's speed affects both; ratios are per pair.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
import torch
from rich.table import Table
from transformers import AutoModelForCausalLM

from memserve.api.generate import SamplingParams
from memserve.engine.batch import BatchLimits
from memserve.engine.engine import Engine, EngineSettings
from memserve.engine.model import Model, load_model
from memserve.engine.request import EngineRequest, TokenOutput
from memserve.engine.team import use_one_thread, with_team
from memserve.pool.pool import BlockPool
from memserve.types import RequestId, TokenArray

DECODE_TOKENS = 32
BATCH_PROMPT_TOKENS = 64


class Comparison(msgspec.Struct, frozen=True):
    """Median seconds of equal work in both, and the median and quartiles of the pairs' ratio."""

    engine: float
    generate: float
    ratio: float  # engine / generate, median of pairs
    ratio_low: float
    ratio_high: float


class BatchPoint(msgspec.Struct, frozen=True):
    """Decoding `batch` sequences at once."""

    batch: int
    step_seconds: float
    tokens_per_second: float
    speedup: float  # tokens per second, against one sequence


class EngineBenchReport(msgspec.Struct, frozen=True):
    """The result of `run_engine_bench`."""

    model: str
    dtype: str
    device: str
    threads: int
    repeats: int
    prompt_tokens: int
    prefill: Comparison
    decode_step: Comparison
    batches: tuple[BatchPoint, ...]


def run_engine_bench(
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    threads: int = 1,
    prompt_tokens: int = 1024,
    batches: Sequence[int] = (1, 4, 16),
    repeats: int = 7,
    progress: Callable[[str], None] = lambda _: None,
) -> EngineBenchReport:
    """Measure prefill of one prompt, a decode step at batch 1, and decoding in batches."""
    use_one_thread()
    progress(f"loading {directory.name} twice")
    model = with_team(threads, lambda: load_model(directory, dtype, torch.device(device)))
    generate = _Generate(directory, dtype, device)
    rng = np.random.default_rng(0)

    def prompt(tokens: int) -> TokenArray:
        return rng.integers(10, model.shape.vocab_size, tokens, dtype=np.int32)

    largest = max(batches)
    blocks = 64 + largest * (BATCH_PROMPT_TOKENS + DECODE_TOKENS) // 16
    blocks += 2 * (prompt_tokens + DECODE_TOKENS) // 16
    layout = model.layout(directory.name, 16, True)
    with BlockPool(layout, blocks, 0, instance="bench", device=device) as pool:
        engine = _TimedEngine(model, pool, threads, largest)
        pairs = []
        for repeat in range(repeats + 1):  # the first warms up
            progress(f"one prompt, {repeat} of {repeats}")
            ours = engine.run([prompt(prompt_tokens)], DECODE_TOKENS)
            theirs = with_team(threads, lambda: generate.run(prompt(prompt_tokens), DECODE_TOKENS))
            pairs.append((ours, theirs))
        points = []
        for batch in batches:
            progress(f"decoding {batch} at once")
            points.append(_batch_point(engine, prompt, batch, repeats))
    return EngineBenchReport(
        model=directory.name,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        threads=threads,
        repeats=repeats,
        prompt_tokens=prompt_tokens,
        prefill=_compare([(a[0], b[0]) for a, b in pairs[1:]]),
        decode_step=_compare([(a[1], b[1]) for a, b in pairs[1:]]),
        batches=tuple(
            BatchPoint(n, step, n / step, (n / step) / (points[0][0] / points[0][1]))
            for n, step in points
        ),
    )


def _batch_point(
    engine: _TimedEngine, prompt: Callable[[int], TokenArray], batch: int, repeats: int
) -> tuple[int, float]:
    steps = []
    for _ in range(max(3, repeats // 2)):
        prompts = [prompt(BATCH_PROMPT_TOKENS) for _ in range(batch)]
        steps.append(engine.run(prompts, DECODE_TOKENS)[1])
    return batch, median(steps)


def _compare(pairs: Sequence[tuple[float, float]]) -> Comparison:
    ratios = sorted(a / b for a, b in pairs)
    return Comparison(
        engine=median(a for a, _ in pairs),
        generate=median(b for _, b in pairs),
        ratio=median(ratios),
        ratio_low=ratios[len(ratios) // 4],
        ratio_high=ratios[-1 - len(ratios) // 4],
    )


class _Generate:
    """Transformers' generation with its own cache and its default attention."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True
        )
        self._model.to(torch.device(device))  # type: ignore[arg-type]
        self._model.generation_config.eos_token_id = None
        self._device = device

    def run(self, prompt: TokenArray, tokens: int) -> tuple[float, float]:
        """Return the seconds to the first token, and per further token."""
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(self._device)
        first = self._time(ids, 1)
        return first, (self._time(ids, tokens) - first) / (tokens - 1)

    def _time(self, ids: torch.Tensor, tokens: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(  # type: ignore[misc]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
            )
        return time.perf_counter() - started


class _TimedEngine:
    """Times the engine as a server runs it: on its own thread, with greedy sampling.

    Each run has its own engine, whose threads must not exist while `generate` computes.
    """

    def __init__(self, model: Model, pool: BlockPool, threads: int, batch: int) -> None:
        self._model = model
        self._pool = pool
        self._settings = EngineSettings(
            name="bench",
            threads=threads,
            limits=BatchLimits(max_tokens=2048, mixed_tokens=2048, max_running=batch),
            max_waiting=batch,
        )

    def run(self, prompts: Sequence[TokenArray], tokens: int) -> tuple[float, float]:
        """Return the seconds to the first token, and the mean of a decode step with all prompts."""
        times: list[float] = []
        left = len(prompts)
        done = threading.Event()

        def sink(outputs: Sequence[TokenOutput]) -> None:
            nonlocal left
            times.append(time.perf_counter())
            left -= sum(o.finish_reason is not None for o in outputs)
            if not left:
                done.set()

        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        requests = [
            EngineRequest(RequestId(str(i)), prompt, params) for i, prompt in enumerate(prompts)
        ]
        engine = Engine(self._model, self._pool, self._settings)
        engine.start(sink)
        try:
            started = time.perf_counter()
            engine.submit(requests)
            done.wait()
        finally:
            engine.stop()
        # If the prompts together fit into one step's budget, all decode from the second step on.
        return times[0] - started, float(np.mean(np.diff(times)[-(tokens - 2) :]))


def engine_bench_table(report: EngineBenchReport) -> Table:
    """Return the report as a table."""
    table = Table(
        title=f"{report.model}, {report.dtype}, {report.device}, {report.threads} threads, "
        f"median of {report.repeats}"
    )
    for column in ("", "engine", "generate", "ratio (quartiles)"):
        table.add_column(column, justify="right")
    for name, row in (
        (f"prefill of {report.prompt_tokens} tokens", report.prefill),
        (f"decode step behind {report.prompt_tokens} tokens", report.decode_step),
    ):
        table.add_row(
            name,
            f"{row.engine * 1e3:.1f} ms",
            f"{row.generate * 1e3:.1f} ms",
            f"{row.ratio:.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f})",
        )
    for point in report.batches:
        table.add_row(
            f"decode step of {point.batch} behind {BATCH_PROMPT_TOKENS}",
            f"{point.step_seconds * 1e3:.1f} ms",
            "",
            f"{point.tokens_per_second:.0f} tokens/s ({point.speedup:.1f} x)",
        )
    return table
