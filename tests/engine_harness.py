"""An engine with a pool around a small model, driven synchronously by tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from memserve.api.generate import SamplingParams
from memserve.engine.batch import BatchLimits
from memserve.engine.constraint import CompiledGrammar
from memserve.engine.engine import Engine, EngineSettings
from memserve.engine.model import Model, load_model
from memserve.engine.request import EngineRequest, TokenOutput
from memserve.pool.pool import BlockPool
from memserve.types import RequestId
from tests.device import DEVICE

WAIT_SECONDS = 240.0  # less than a test may take: what was waited for is told


class Outputs:
    """Collects what an engine emits, by request."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._by_id: dict[str, list[TokenOutput]] = {}

    def __call__(self, outputs: Sequence[TokenOutput]) -> None:
        with self._changed:
            for output in outputs:
                self._by_id.setdefault(output.id, []).append(output)
            self._changed.notify_all()

    def of(self, request_id: str) -> list[TokenOutput]:
        with self._changed:
            return list(self._by_id.get(request_id, []))

    def tokens(self, request_id: str) -> list[int]:
        return [t for o in self.of(request_id) for t in o.token_ids]

    def wait_tokens(self, request_id: str, count: int) -> None:
        """Until the request has that many tokens."""
        self._wait(lambda: len(self.tokens(request_id)) >= count, request_id)

    def wait_finished(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self._wait(lambda i=request_id: self._finished(i), request_id)  # type: ignore[misc]

    def _finished(self, request_id: str) -> bool:
        outputs = self._by_id.get(request_id)
        return bool(outputs) and outputs[-1].finish_reason is not None

    def _wait(self, condition, what: str) -> None:  # type: ignore[no-untyped-def]
        with self._changed:
            if not self._changed.wait_for(condition, WAIT_SECONDS):
                raise TimeoutError(f"{what}: {self._by_id.get(what)}")


class Harness:
    """One engine and what it said."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.pool = engine.pool
        self.outputs = Outputs()
        self._next = 0

    def submit(
        self,
        prompt: Sequence[int],
        tokens: int,
        namespace: str = "",
        follows: str | None = None,
        priority: int = 0,
        output: Sequence[int] = (),
        prefill_only: bool = False,
        ephemeral: bool = False,
        grammar: CompiledGrammar | None = None,
        **params: object,
    ) -> str:
        """Queue a prompt for greedy generation of `tokens` tokens; returns its id."""
        request_id = RequestId(f"r{self._next}")
        self._next += 1
        options = {"temperature": 0.0, "ignore_eos": True, "max_tokens": tokens, **params}
        self.engine.submit(
            [
                EngineRequest(
                    id=request_id,
                    prompt=np.asarray(prompt, dtype=np.int32),
                    sampling=SamplingParams(**options),  # type: ignore[arg-type]
                    namespace=namespace,  # type: ignore[arg-type]
                    follows=follows,  # type: ignore[arg-type]
                    priority=priority,
                    output=np.asarray(output, dtype=np.int32),
                    prefill_only=prefill_only,
                    ephemeral=ephemeral,
                    grammar=grammar,
                )
            ]
        )
        return request_id

    def finish(self, *request_ids: str) -> list[list[int]]:
        """Wait for requests to end; their tokens."""
        self.outputs.wait_finished(*request_ids)
        return [self.outputs.tokens(i) for i in request_ids]

    def run(self, prompt: Sequence[int], tokens: int, **params: object) -> list[int]:
        """Generate and wait."""
        return self.finish(self.submit(prompt, tokens, **params))[0]  # type: ignore[arg-type]

    def cached(self, request_id: str) -> int:
        return self.outputs.of(request_id)[-1].usage.cached_tokens


def load(directory: Path, device: str = DEVICE) -> Model:
    return load_model(directory, torch.float32, torch.device(device))


@contextmanager
def running_engine(
    model: Model,
    *,
    hbm_blocks: int = 64,
    dram_blocks: int = 64,
    block_tokens: int = 16,
    aggregated: bool = True,
    max_tokens: int = 512,
    mixed_tokens: int = 64,
    max_running: int = 16,
    max_waiting: int = 64,
    threads: int = 1,
) -> Iterator[Harness]:
    """A started engine; on leaving it is stopped and its pool must be whole and quiet."""
    layout = model.layout("tiny", block_tokens, aggregated)
    with BlockPool(
        layout, hbm_blocks, dram_blocks, instance="t0", device=str(model.device)
    ) as pool:
        settings = EngineSettings(
            name="tiny",
            threads=threads,
            limits=BatchLimits(max_tokens, mixed_tokens, max_running),
            max_waiting=max_waiting,
        )
        engine = Engine(model, pool, settings)
        harness = Harness(engine)
        engine.start(harness.outputs)
        try:
            yield harness
        finally:
            engine.stop()
        pool.check_integrity()
        stats = pool.stats()
        for medium in (stats.hbm, stats.dram):
            assert medium.active == 0, "the engine still owns blocks"
            assert medium.pinned == 0, "the engine still pins blocks"
