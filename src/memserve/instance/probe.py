"""`Probe`: timing of one engine's prefills and decode steps."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np

from memserve.api.generate import FinishReason, SamplingParams
from memserve.engine.engine import Engine
from memserve.engine.request import EngineProtocol, EngineRequest, TokenOutput
from memserve.errors import MemserveError
from memserve.tokens import NO_TOKENS
from memserve.types import Namespace, RequestId, TokenArray

# Timeout of one measurement: an engine that takes longer has hung.
POINT_SECONDS = 300.0
_FAILURES = (FinishReason.ERROR, FinishReason.CANCELLED)


class ProbeFailed(MemserveError):
    """The engine failed or hung during a measurement, or reported unexpected cached tokens."""


class Probe(ABC):
    """Runs and times sequences of random tokens on an engine that has no other user."""

    def __init__(
        self, engine: EngineProtocol, token_ids: TokenArray, block_tokens: int, room_tokens: int
    ) -> None:
        """`engine` is not started yet; this context manager starts and stops it. `token_ids`:
        prompts are made of these. `room_tokens`: of KV memory."""
        self.tells_cached = True  # whether the engine reports cached tokens: then they are checked
        self.block_tokens = block_tokens
        self.room_tokens = room_tokens
        self._engine = engine
        self._token_ids = token_ids
        self._changed = threading.Condition()
        # By sequence, seconds of `perf_counter` and tokens of each output.
        self._outputs: dict[RequestId, list[tuple[float, int]]] = {}
        self._left = 0  # unfinished sequences
        self._cached: list[int] = []  # cached tokens of each sequence, as the engine reports them
        self._error: str | None = None
        self._calls = 0
        self._rng = np.random.default_rng(0)

    @abstractmethod
    def _cache(self, prompts: Sequence[TokenArray], tokens: int, namespace: Namespace) -> None:
        """Have the engine cache the first `tokens` of each prompt, whole blocks and less than the
        prompt. Raises ProbeFailed."""

    @abstractmethod
    def _forget(self, namespace: Namespace) -> None:
        """Drop the blocks cached in `namespace`, if the engine can do that."""

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
        """The maximum number of tokens of a timed prompt."""
        return self._engine.info.max_tokens - 1

    def prefill(self, prompt_tokens: int, cached_tokens: int) -> float:
        """Return the seconds from submission to the first token. `cached_tokens`: a multiple of
        the block size."""
        started = self._run(1, prompt_tokens, cached_tokens, 1)
        ((ended, _), *_), *_ = self._outputs.values()
        return ended - started

    def decode(self, sequences: int, context_tokens: int, steps: int) -> float:
        """Return the typical seconds of a decode step, of `steps` steps of `sequences` sequences
        with about `context_tokens` tokens of context each."""
        block = self.block_tokens
        cached = (context_tokens - 1) // block * block
        self._run(sequences, context_tokens, cached, steps + 1)
        times = [
            (later - before) / tokens
            for outputs in self._outputs.values()
            for (before, _), (later, tokens) in list(pairwise(outputs))[-steps:]
        ]
        if not times:
            raise ProbeFailed(f"each of {sequences} sequences came in one piece: no step to time")
        seconds = self._typical(times)
        if seconds <= 0:
            raise ProbeFailed(f"all tokens of {sequences} sequences came at once: no step to time")
        return seconds

    def _typical(self, times: Sequence[float]) -> float:
        """Return the median of the steps' seconds, on which few slow steps have no effect."""
        return float(np.median(times))

    def _run(self, sequences: int, prompt: int, cached: int, outputs: int) -> float:
        """Generate `outputs` tokens for each of `sequences` random prompts. Returns the start
        time, seconds of `perf_counter`."""
        self._calls += 1
        namespace = Namespace(f"memserve-probe-{id(self)}-{self._calls}")
        prompts = [self._rng.choice(self._token_ids, prompt) for _ in range(sequences)]
        try:
            if cached:
                self._cache(prompts, cached, namespace)
            started = self._generate(prompts, outputs, namespace)
        finally:
            self._forget(namespace)
        if self.tells_cached and any(found != cached for found in self._cached):
            raise ProbeFailed(f"expected {cached} cached tokens, and found {self._cached}")
        return started

    def _generate(self, prompts: Sequence[TokenArray], outputs: int, namespace: Namespace) -> float:
        """Run the prompts; returns the start time. Raises ProbeFailed."""
        params = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True)
        self._calls += 1
        requests = [
            EngineRequest(RequestId(f"{namespace}-{self._calls}-{i}"), prompt, params, namespace)
            for i, prompt in enumerate(prompts)
        ]
        with self._changed:
            self._outputs.clear()
            self._cached.clear()
            self._left = len(prompts)
            started = time.perf_counter()
            self._engine.submit(requests)
            if not self._changed.wait_for(lambda: not self._left, POINT_SECONDS):
                raise ProbeFailed(f"a probe of the engine took over {POINT_SECONDS:.0f} s")
        if self._error is not None:
            raise ProbeFailed(self._error)
        return started

    def _sink(self, outputs: Sequence[TokenOutput]) -> None:
        """The engine's `OutputSink`, called from its thread."""
        now = time.perf_counter()
        with self._changed:
            for output in outputs:
                if output.token_ids:
                    self._outputs.setdefault(output.id, []).append((now, len(output.token_ids)))
                if output.finish_reason is not None:
                    if output.finish_reason in _FAILURES:
                        self._error = output.error or "the engine ended during a measurement"
                    self._cached.append(output.usage.cached_tokens or 0)
                    self._left -= 1
            self._changed.notify_all()


class EngineProbe(Probe):
    """Probe of the built-in engine. Leaves the engine's pool empty again.

    Cached prefixes are blocks of arbitrary bytes, in a namespace that is deleted before the call
    returns. Attention over them takes as long as over real KV.
    """

    def __init__(self, engine: Engine) -> None:
        self._pool = engine.pool
        block = self._pool.layout.block_tokens
        token_ids = np.arange(engine.info.vocab_size, dtype=np.int32)
        super().__init__(engine, token_ids, block, self._pool.stats().hbm.total * block)

    def _cache(self, prompts: Sequence[TokenArray], tokens: int, namespace: Namespace) -> None:
        for prompt in prompts:
            refs = self._pool.alloc_mem(tokens // self.block_tokens)
            self._pool.insert(prompt[:tokens], refs, namespace)

    def _forget(self, namespace: Namespace) -> None:
        self._pool.delete(NO_TOKENS, namespace)
