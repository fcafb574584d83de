"""The engine gives the tokens that Transformers' `generate` gives, however KV came about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memserve.engine.model import Model
from tests.engine_harness import load, running_engine
from tests.tiny_models import CONFIGS, VOCAB, Reference, save_tiny_model


class Case:
    """One architecture: our model and the reference, with the same weights."""

    def __init__(self, name: str, root: Path) -> None:
        directory = save_tiny_model(name, root)
        self.name = name
        self.model: Model = load(directory)
        self.reference = Reference(directory)


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("models"))


def prompt(length: int, seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, VOCAB, length)]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
def test_cold(case: Case, length: int) -> None:
    tokens = prompt(length, length)
    with running_engine(case.model) as engine:
        assert engine.run(tokens, 24) == case.reference.generate(tokens, 24)


@pytest.mark.parametrize("aggregated", [True, False])
def test_cached_prefix(case: Case, aggregated: bool) -> None:
    shared, first, second = prompt(70, 1), prompt(20, 2), prompt(33, 3)
    with running_engine(case.model, aggregated=aggregated) as engine:
        engine.run(shared + first, 20)
        request = engine.submit(shared + second, 20)
        assert engine.finish(request) == [case.reference.generate(shared + second, 20)]
        assert engine.cached(request) == 64
        # The whole prompt is cached now; its last token is computed all the same.
        again = engine.submit(shared + second, 20)
        assert engine.finish(again) == [case.reference.generate(shared + second, 20)]
        assert engine.cached(again) == (70 + 33 - 1) // 16 * 16


def test_conversation_reuses_answers(case: Case) -> None:
    history, known = prompt(30, 4), 0
    with running_engine(case.model) as engine:
        for turn in range(4):
            history += prompt(9, 10 + turn)
            request = engine.submit(history, 25)
            [answer] = engine.finish(request)
            assert answer == case.reference.generate(history, 25)
            assert engine.cached(request) >= known - 16
            history += answer
            known = len(history)


@pytest.mark.parametrize("chunk", [16, 17, 50])
def test_chunked_prefill(case: Case, chunk: int) -> None:
    tokens = prompt(140, 5)
    with running_engine(case.model, max_tokens=chunk) as engine:
        assert engine.run(tokens, 10) == case.reference.generate(tokens, 10)


def test_mixed_batch(case: Case) -> None:
    """Long and short prompts, decoding and prefilling together, sharing prefixes."""
    shared = prompt(48, 6)
    prompts = [shared + prompt(n, 20 + n) for n in (1, 5, 40, 90)] + [prompt(7, 7), prompt(130, 8)]
    with running_engine(case.model, max_tokens=64, mixed_tokens=24, hbm_blocks=128) as engine:
        requests = [engine.submit(p, 12 + 3 * i) for i, p in enumerate(prompts)]
        for i, answer in enumerate(engine.finish(*requests)):
            assert answer == case.reference.generate(prompts[i], 12 + 3 * i), i


def test_swapped_out_prefix(case: Case) -> None:
    tokens = prompt(90, 9)
    with running_engine(case.model) as engine:
        first = engine.run(tokens, 20)
        assert engine.pool.swap_out(64) > 0
        assert engine.pool.stats().hbm.cached == 0
        request = engine.submit(tokens, 20)
        assert engine.finish(request) == [first] == [case.reference.generate(tokens, 20)]
        assert engine.cached(request) == 80
        assert engine.pool.stats().swapped_in > 0


@pytest.mark.parametrize("dram_blocks", [0, 8, 64])
def test_preemption(case: Case, dram_blocks: int) -> None:
    """More sequences than HBM can hold: some give way and come back, from DRAM or anew."""
    prompts = [prompt(40 + 5 * i, 30 + i) for i in range(5)]
    with running_engine(case.model, hbm_blocks=18, dram_blocks=dram_blocks) as engine:
        requests = [engine.submit(p, 60) for p in prompts]
        for i, answer in enumerate(engine.finish(*requests)):
            assert answer == case.reference.generate(prompts[i], 60), i
        assert engine.engine.stats().preemptions > 0


def test_ephemeral_sequences_leave_nothing(case: Case) -> None:
    tokens = prompt(90, 11)
    with running_engine(case.model, hbm_blocks=18) as engine:
        expected = case.reference.generate(tokens, 60)
        # Two at once do not fit: one gives way, and finds its own blocks again.
        requests = [
            engine.submit(tokens, 60, namespace=f"own-{i}", ephemeral=True) for i in range(3)
        ]
        assert engine.finish(*requests) == [expected] * 3
        assert [engine.cached(request) for request in requests] == [0] * 3
        assert engine.engine.stats().preemptions > 0
        stats = engine.pool.stats()
        assert (stats.hbm.cached, stats.dram.cached) == (0, 0)


def test_namespaces_do_not_share(case: Case) -> None:
    tokens = prompt(64, 12)
    with running_engine(case.model) as engine:
        engine.run(tokens, 4, namespace="a")
        request = engine.submit(tokens, 4, namespace="b")
        assert engine.finish(request) == [case.reference.generate(tokens, 4)]
        assert engine.cached(request) == 0
