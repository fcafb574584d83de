"""The bytes that an engine leaves in its pool are the KV of their tokens, whatever happened
meanwhile: swaps, preemptions, cancelled prompts. A wrong block seldom shows in the next token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memserve.engine.model import Model
from memserve.types import RequestId
from tests.engine_harness import Harness, load, running_engine
from tests.tiny_models import VOCAB, save_tiny_model

BLOCK = 16
ROUNDS = 6
PROMPTS = 10
# The order of sums depends on who shares a step.
TOLERANCE = {"atol": 2e-4, "rtol": 2e-3}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(save_tiny_model(request.param, tmp_path_factory.mktemp("models")))


def cached_kv(engine: Harness, tokens: list[int]) -> torch.Tensor:
    """[blocks, layers, 2, block_tokens, kv_heads, head_dim] of the cached prefix."""
    with engine.pool.match(np.array(tokens, np.int32)) as match:
        return engine.pool.read(match.refs).cpu()


def test_cached_bytes_are_those_of_a_prompt_that_is_alone(model: Model) -> None:
    rng = np.random.default_rng(5)
    shared = [int(t) for t in rng.integers(3, VOCAB, 50)]
    prompts = [
        [*shared[: int(rng.integers(0, 50))], *map(int, rng.integers(3, VOCAB, int(length)))]
        for length in rng.integers(1, 120, PROMPTS)
    ]
    with running_engine(model, hbm_blocks=80, dram_blocks=0, max_tokens=1024) as alone:
        expected = []
        for prompt in prompts:
            alone.run(prompt, 1)
            expected.append(cached_kv(alone, prompt))
            alone.pool.delete([])

    compared = 0
    with running_engine(
        model, hbm_blocks=18, dram_blocks=60, max_tokens=64, mixed_tokens=24, max_running=5
    ) as engine:
        for _ in range(ROUNDS):
            order = rng.permutation(PROMPTS)
            requests = [engine.submit(prompts[i], int(rng.integers(20, 60))) for i in order]
            cancelled = [r for r in requests if rng.random() < 0.3]
            engine.outputs.wait_tokens(next(r for r in requests if r not in cancelled), 1)
            engine.engine.cancel([RequestId(r) for r in cancelled])
            engine.pool.swap_out(int(rng.integers(0, 18)))
            engine.outputs.wait_finished(*(r for r in requests if r not in cancelled))
            for prompt, whole in zip(prompts, expected, strict=True):
                found = cached_kv(engine, prompt)
                compared += len(found)
                torch.testing.assert_close(found, whole[: len(found)], **TOLERANCE)
        stats = engine.engine.stats()
        assert stats.preemptions > 0
        assert stats.cancelled > 0
        assert engine.pool.stats().swapped_in > 0
    assert compared > ROUNDS * PROMPTS
