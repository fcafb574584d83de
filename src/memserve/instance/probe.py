"""`EngineProbe` times an engine's steps; `Samples` keeps the times that nothing disturbed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from memserve.api.generate import SamplingParams
from memserve.engine.engine import Engine
from memserve.engine.request import EngineRequest, TokenOutput
from memserve.errors import MemserveError
from memserve.tokens import NO_TOKENS
from memserve.types import Namespace, RequestId, TokenArray

# Timeout of one measurement: an engine that takes longer has hung.
POINT_SECONDS = 300.0


class ProbeFailed(MemserveError):
    """The engine failed or hung during a measurement, or cached other tokens than expected."""


class EngineProbe:
    """Runs and times an engine that has no other user. Leaves the engine's pool empty again.

    Cached prefixes are blocks of arbitrary bytes, in a namespace that is deleted before the call
    returns. Attention over them takes as long as over real KV.
    """

    def __init__(self, engine: Engine) -> None:
        """`engine` is not started yet; this context manager starts and stops it."""
        self._engine = engine
        self._pool = engine.pool
        self._changed = threading.Condition()
        self._times: list[float] = []  # ends of steps with outputs, seconds of `perf_counter`
        self._left = 0  # unfinished sequences
        self._cached: list[int] = []  # cached tokens of each sequence, as the engine reports them
        self._error: str | None = None
        self._calls = 0
        self._rng = np.random.default_rng(0)

    def __enter__(self) -> Self:
        self._engine.start(self._sink)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._engine.stop()

    @property
    def longest_prompt(self) -> int:
        """Maximum of tokens of a timed prompt."""
        return self._engine.info.max_tokens - 1

    def prefill(self, prompt_tokens: int, cached_tokens: int) -> float:
        """Seconds from submission to the first token. `cached_tokens`: of whole blocks."""
        started = self._run(1, prompt_tokens, cached_tokens, 1)
        return self._times[0] - started

    def decode(self, sequences: int, context_tokens: int, steps: int) -> float:
        """Median seconds of `steps` decode steps of `sequences` sequences with about
        `context_tokens` tokens of context each."""
        block = self._pool.layout.block_tokens
        cached = (context_tokens - 1) // block * block
        self._run(sequences, context_tokens, cached, steps + 1)
        return float(np.median(np.diff(self._times)[-steps:]))

    def _run(self, sequences: int, prompt: int, cached: int, outputs: int) -> float:
        """Generate `outputs` tokens for each of `sequences` random prompts. Returns the start
        time, seconds of `perf_counter`."""
        self._calls += 1
        namespace = Namespace(f"memserve-probe-{id(self)}-{self._calls}")
        prompts = [self._prompt(prompt) for _ in range(sequences)]
        try:
            for tokens in prompts:
                self._pretend_cached(tokens[:cached], namespace)
            return self._time(prompts, cached, outputs, namespace)
        finally:
            self._pool.delete(NO_TOKENS, namespace)

    def _prompt(self, tokens: int) -> TokenArray:
        return self._rng.integers(0, self._engine.info.vocab_size, tokens, dtype=np.int32)

    def _pretend_cached(self, tokens: TokenArray, namespace: Namespace) -> None:
        blocks = len(tokens) // self._pool.layout.block_tokens
        if blocks:
            self._pool.insert(tokens, self._pool.alloc_mem(blocks), namespace)

    def _time(
        self, prompts: Sequence[TokenArray], cached: int, outputs: int, namespace: Namespace
    ) -> float:
        params = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True)
        requests = [
            EngineRequest(RequestId(f"{namespace}-{i}"), prompt, params, namespace)
            for i, prompt in enumerate(prompts)
        ]
        with self._changed:
            self._times.clear()
            self._cached.clear()
            self._left = len(prompts)
            started = time.perf_counter()
            self._engine.submit(requests)
            if not self._changed.wait_for(lambda: not self._left, POINT_SECONDS):
                raise ProbeFailed(f"a probe of the engine took over {POINT_SECONDS:.0f} s")
        if self._error is not None:
            raise ProbeFailed(self._error)
        if any(found != cached for found in self._cached):
            raise ProbeFailed(f"{cached} tokens were to be cached and {self._cached} were found")
        return started

    def _sink(self, outputs: Sequence[TokenOutput]) -> None:
        """The engine's `OutputSink`, called from its thread."""
        now = time.perf_counter()
        with self._changed:
            self._times.append(now)
            for output in outputs:
                if output.finish_reason is not None:
                    self._error = output.error
                    self._cached.append(output.usage.cached_tokens or 0)
                    self._left -= 1
            self._changed.notify_all()


# Maximum share of a clean sample's time that threads waited for a core. OpenMP's threads spin
# for each other, so all lose the time that one of them waits.
_CLEAN = 0.03
_INSTANT = 1e-9

Point = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured time."""

    seconds: float
    waited: float  # seconds that this process's threads waited for a core, per wall second

    @property
    def clean(self) -> bool:
        return self.waited <= _CLEAN


class Samples:
    """Distinct points to measure, and the samples of each."""

    def __init__(self, points: Iterable[Point]) -> None:
        self.points = list(dict.fromkeys(points))
        self.taken: dict[Point, list[Sample]] = {}

    def take(self, point: Point, run: Callable[[int, int], float]) -> None:
        """Add a sample of `point`; `run(*point)` returns its seconds."""
        waited, began = seconds_waited(), time.perf_counter()
        seconds = run(*point)
        wall = max(time.perf_counter() - began, _INSTANT)
        share = (seconds_waited() - waited) / wall
        self.taken.setdefault(point, []).append(Sample(seconds, share))

    @property
    def disturbed(self) -> list[Point]:
        """Measured points without a clean sample."""
        return [point for point, took in self.taken.items() if not any(s.clean for s in took)]

    @property
    def believed(self) -> dict[Point, Sample]:
        """For each measured point the median of its clean samples (the lower one of two), or else
        the sample with the least `waited`."""
        return {point: _believe(took) for point, took in self.taken.items()}


def _believe(took: Sequence[Sample]) -> Sample:
    clean = sorted((sample for sample in took if sample.clean), key=lambda s: s.seconds)
    if not clean:
        return min(took, key=lambda s: s.waited)
    return clean[(len(clean) - 1) // 2]


def seconds_waited() -> float:
    """Total seconds that this process's live threads have waited for a core so far; 0.0 if the
    kernel does not count them."""
    nanoseconds = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(task.read_text().split()[1])
        except OSError:
            continue  # a thread that has ended
    return nanoseconds * 1e-9
