"""Steps of the built-in engine beside Transformers' `generate` with a static cache.

One process, one card, one model after the other: two copies of the weights may not fit. `floor` is
the least time that memory allows a decode step: weights and context read once, at the rate of a
copy within the card in the same run.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
from rich.table import Table
from torch import nn
from transformers import CompileConfig

from evaluation.gpu.device_time import median_seconds, seconds_of
from evaluation.gpu.llama import Size, config_of, random_llama, weight_bytes
from memserve.api.generate import SamplingParams
from memserve.bench.measure import BenchmarkError
from memserve.config import Positive, doc
from memserve.engine import attention
from memserve.engine.batch import BatchLimits
from memserve.engine.devices import device_name
from memserve.engine.engine import Engine, EngineSettings
from memserve.engine.model import Model, read_shape, ready
from memserve.engine.request import EngineRequest, TokenOutput
from memserve.models.resolve import Progress
from memserve.pool.pool import BlockPool
from memserve.types import RequestId, TokenArray

_BLOCK_TOKENS = 16
_CHUNK = 2048  # prompt tokens of a step
_COPY_BYTES = 1 << 30

GpuDtype = Literal["bfloat16", "float16", "float32"]


class StepsConfig(msgspec.Struct, frozen=True):
    """What is measured."""

    size: Annotated[Size, doc("the model: Llama's shapes, with random weights")] = "1b"
    device: Annotated[str, doc("'cuda', 'cuda:1'; 'cpu' to try it")] = "cuda"
    dtype: Annotated[GpuDtype, doc("of weights and KV")] = "bfloat16"
    prompt_tokens: Annotated[Positive, doc("of each prompt")] = 2048
    batches: Annotated[tuple[Positive, ...], doc("sequences of a decode step, as 1,16,64")] = (
        1,
        16,
        64,
    )
    steps: Annotated[Positive, doc("decode steps of each measurement")] = 64
    repeats: Annotated[Positive, doc("of every measurement; figures are medians")] = 5
    compiled: Annotated[bool, doc("`generate` compiles its decode steps, its default")] = True


class Timing(msgspec.Struct, frozen=True):
    """Median seconds of the engine and of `generate`; None: it did not run."""

    engine: float
    generate: float | None
    spread: tuple[float, float]  # quartiles of the engine's

    @property
    def faster(self) -> float | None:
        """How many times as fast the engine is."""
        return None if self.generate is None else self.generate / self.engine


class DecodeTiming(msgspec.Struct, frozen=True):
    """A decode step of `batch` sequences."""

    batch: int
    floor: float  # seconds
    step: Timing


class StepsReport(msgspec.Struct, frozen=True):
    """The result of `run_steps`."""

    config: StepsConfig
    card: str
    copy_gb_s: float  # read and written bytes of a copy within the card
    weight_gb: float
    prefill: Timing
    decodes: tuple[DecodeTiming, ...]


def run_steps(config: StepsConfig, progress: Progress) -> StepsReport:
    """Measure prefill of a prompt, and decode steps behind such prompts."""
    device = torch.device(config.device)
    rate = _copy_rate(device)
    progress(f"a copy within the device: {rate / 1e9:.0f} GB/s")
    prefills, steps, weights, token_bytes = _measure_engine(config, device, progress)
    gc.collect()
    _empty_cache(device)
    theirs_prefill, theirs = _measure_generate(config, device, progress)

    def timing(ours: Sequence[float], other: float | None) -> Timing:
        low, high = np.percentile(ours, [25, 75])
        return Timing(median(ours), other, (float(low), float(high)))

    return StepsReport(
        config=config,
        card=device_name(device),
        copy_gb_s=rate / 1e9,
        weight_gb=weights / 1e9,
        prefill=timing(prefills, theirs_prefill),
        decodes=tuple(
            DecodeTiming(
                batch,
                # A copy counts each byte twice, as read and as written.
                (weights + batch * config.prompt_tokens * token_bytes) / rate,
                timing(steps[batch], theirs.get(batch)),
            )
            for batch in config.batches
        ),
    )


def _copy_rate(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a copy within the device."""
    size = _COPY_BYTES if device.type == "cuda" else _COPY_BYTES // 16
    source = torch.zeros(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device, 10)


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _prompts(config: StepsConfig, count: int, seed: int) -> list[TokenArray]:
    rng = np.random.default_rng(seed)
    most = config_of(config.size).vocab_size
    return [rng.integers(3, most, config.prompt_tokens, dtype=np.int32) for _ in range(count)]


def _measure_engine(
    config: StepsConfig, device: torch.device, progress: Progress
) -> tuple[list[float], dict[int, list[float]], int, int]:
    """Return seconds of prefills, of steps by batch, bytes of weights, and of a token's KV."""
    attention.register()
    dtype = getattr(torch, config.dtype)
    module = random_llama(config.size, dtype, device, attention.ATTENTION_NAME)
    weights = weight_bytes(module)
    model = ready(module, read_shape(module.config, None), dtype, device)  # type: ignore[arg-type]
    layout = model.layout(config.size, _BLOCK_TOKENS, True)
    most = max(config.batches)
    # The first ones decode while the last ones' prompts are computed.
    tokens = config.steps + 2 * most
    blocks = most * -(-(config.prompt_tokens + tokens) // _BLOCK_TOKENS) + most
    with BlockPool(layout, blocks, 0, "gpu-steps", device) as pool:
        engine = _TimedEngine(model, pool, most)
        try:
            engine.prefill(_prompts(config, 1, 0)[0])
            prefills = [
                engine.prefill(_prompts(config, 1, 1 + i)[0]) for i in range(config.repeats)
            ]
            progress(f"engine: prefill {median(prefills) * 1e3:.1f} ms")
            steps: dict[int, list[float]] = {}
            for batch in config.batches:
                taken: list[float] = []
                for repeat in range(config.repeats):
                    prompts = _prompts(config, batch, 100 * batch + repeat)
                    taken += engine.steps(prompts, tokens)[-config.steps :]
                steps[batch] = taken
                progress(f"engine: {batch} sequences, {median(taken) * 1e3:.2f} ms a step")
        finally:
            engine.stop()
    return prefills, steps, weights, layout.token_bytes


class _TimedEngine:
    """An engine on its own thread, as a server runs it, with greedy sampling."""

    def __init__(self, model: Model, pool: BlockPool, batch: int) -> None:
        limits = BatchLimits(max_tokens=_CHUNK, mixed_tokens=_CHUNK, max_running=batch)
        settings = EngineSettings("steps", 1, limits, max_waiting=batch)
        self._engine = Engine(model, pool, settings)
        self._pool = pool
        self._made: list[tuple[float, int]] = []  # when, and of how many sequences
        self._left = 0
        self._error: str | None = None
        self._done = threading.Event()
        self._engine.start(self._sink)

    def _sink(self, outputs: Sequence[TokenOutput]) -> None:
        self._made.append((time.perf_counter(), len(outputs)))
        self._error = next((o.error for o in outputs if o.error is not None), self._error)
        self._left -= sum(output.finish_reason is not None for output in outputs)
        if not self._left or self._error is not None:
            self._done.set()

    def prefill(self, prompt: TokenArray) -> float:
        """Return the seconds to the first token."""
        started = time.perf_counter()
        return self._run([prompt], 1)[0][0] - started

    def steps(self, prompts: Sequence[TokenArray], tokens: int) -> list[float]:
        """Return the seconds between steps in which all sequences got a token."""
        made = self._run(prompts, tokens)
        full = len(prompts)
        return [b[0] - a[0] for a, b in pairwise(made) if a[1] == b[1] == full]

    def _run(self, prompts: Sequence[TokenArray], tokens: int) -> list[tuple[float, int]]:
        self._pool.delete([])
        self._made, self._left = [], len(prompts)
        self._done.clear()
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        requests = [EngineRequest(RequestId(str(i)), p, params) for i, p in enumerate(prompts)]
        self._engine.submit(requests)
        self._done.wait()
        if self._error is not None:
            raise BenchmarkError(self._error)
        return self._made

    def stop(self) -> None:
        self._engine.stop()


def _measure_generate(
    config: StepsConfig, device: torch.device, progress: Progress
) -> tuple[float | None, dict[int, float]]:
    """Return median seconds of a prefill, and of a step by batch; what failed is left out: the
    engine's figures are worth keeping."""
    model = random_llama(config.size, getattr(torch, config.dtype), device, "sdpa")
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    prefill: float | None = None
    steps: dict[int, float] = {}
    for batch in config.batches:
        prompts = torch.from_numpy(np.stack(_prompts(config, batch, batch)).astype(np.int64))
        ids = prompts.to(device)
        try:
            first, step = _generate_times(model, ids, config, device)
        except Exception as error:  # noqa: BLE001 - no memory, or its compiler's errors
            progress(f"generate: {batch} sequences failed: {type(error).__name__}: {error}")
            continue
        prefill = first if batch == 1 else prefill
        steps[batch] = step
        progress(f"generate: {batch} sequences, {step * 1e3:.2f} ms a step")
    return prefill, steps


def _generate_times(
    model: nn.Module, ids: torch.Tensor, config: StepsConfig, device: torch.device
) -> tuple[float, float]:
    """Return the seconds to the first token, and of a step."""

    # By default a second batch size is compiled for any size, which is slower than for one.
    static = CompileConfig(dynamic=False)

    def run(tokens: int) -> float:
        with torch.no_grad():
            return seconds_of(
                lambda: model.generate(  # type: ignore[operator]
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    do_sample=False,
                    cache_implementation="static",
                    disable_compile=not config.compiled,
                    compile_config=static,
                ),
                device,
            )

    few, many = 8, 8 + config.steps
    run(many), run(few), run(1)  # compile, for each of the caches' lengths
    firsts, steps = [], []
    for _ in range(max(3, config.repeats // 2)):
        firsts.append(run(1))
        shorter = run(few)
        steps.append((run(many) - shorter) / (many - few))
    return median(firsts), median(steps)


def steps_table(report: StepsReport) -> Table:
    """Return the report as a table."""
    config = report.config
    table = Table(
        title=f"Llama {config.size}, {config.dtype}, {report.card}: "
        f"{report.weight_gb:.1f} GB of weights, {report.copy_gb_s:.0f} GB/s"
    )
    for column in ("", "engine", "quartiles", "generate", "times as fast", "floor"):
        table.add_column(column, justify="right")

    def row(name: str, timing: Timing, floor: float | None) -> None:
        low, high = timing.spread
        table.add_row(
            name,
            f"{timing.engine * 1e3:.2f} ms",
            f"{low * 1e3:.2f} to {high * 1e3:.2f}",
            "-" if timing.generate is None else f"{timing.generate * 1e3:.2f} ms",
            "-" if timing.faster is None else f"{timing.faster:.2f}",
            "-" if floor is None else f"{floor * 1e3:.2f} ms",
        )

    row(f"prefill of {config.prompt_tokens}", report.prefill, None)
    for decode in report.decodes:
        name = f"step of {decode.batch} behind {config.prompt_tokens}"
        row(name, decode.step, decode.floor)
    return table
