"""What an engine tells of a prompt's KV: all of it, once, when it is final, and whose it is."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from memserve.api.generate import SamplingParams
from memserve.engine.model import Model
from memserve.engine.request import EngineRequest
from memserve.pool.pool import BlockPool
from memserve.types import RefArray, RequestId
from tests.engine_harness import Harness, load, running_engine
from tests.tiny_models import VOCAB, save_tiny_model

BLOCK = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(save_tiny_model("gemma3", tmp_path_factory.mktemp("models")))


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, VOCAB, length)]


class Reader:
    """Reads each block as soon as it is ready: one admission."""

    def __init__(self, pool: BlockPool, refs: RefArray, by_layer: bool) -> None:
        self.by_layer = by_layer
        self.refs = refs
        self.kv: dict[tuple[int, int], torch.Tensor] = {}  # (block, layer)
        self.superseded_refs: list[int] = []
        self.computed: int | None = None  # at the release
        self._pool = pool
        self._views = pool.layer_views()

    def ready(self, first: int, last: int, layer: int | None) -> None:
        assert first < last
        assert self.computed is None
        indices = self._pool.hbm_indices(self.refs[first:last])  # they are live
        for each in range(len(self._views)) if layer is None else [layer]:
            for block, index in zip(range(first, last), indices.tolist(), strict=True):
                assert (block, each) not in self.kv
                self.kv[block, each] = self._views[each][index].clone()

    def superseded(self, refs: RefArray) -> None:
        assert np.isin(refs, self.refs).all()
        self.superseded_refs += refs.tolist()

    def released(self, computed: int) -> None:
        assert self.computed is None
        self.computed = computed


class Recorder:
    """All admissions of one sequence."""

    def __init__(self, pool: BlockPool, by_layer: bool) -> None:
        self.readers: list[Reader] = []
        self.admitted = threading.Event()
        self._pool = pool
        self._by_layer = by_layer

    def begin(self, refs: RefArray) -> Reader:
        self.readers.append(Reader(self._pool, refs, self._by_layer))
        self.admitted.set()
        return self.readers[-1]


def request(tokens: list[int], name: str, recorder: Recorder) -> EngineRequest:
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    prompt = np.array(tokens, dtype=np.int32)
    return EngineRequest(RequestId(name), prompt, params, prefill_only=True, observer=recorder)


def submit(engine: Harness, tokens: list[int], name: str, by_layer: bool) -> Recorder:
    recorder = Recorder(engine.pool, by_layer)
    engine.engine.submit([request(tokens, name, recorder)])
    return recorder


@pytest.fixture(scope="module")
def expected(model: Model) -> torch.Tensor:
    """KV of `prompt(100)`, [6, layers, 2, 16, heads, dim], computed at once and alone."""
    with running_engine(model) as engine:
        engine.run(prompt(100), 2)
        with engine.pool.match(prompt(100)[:96]) as match:
            return engine.pool.read(match.refs)


def check(reader: Reader, expected: torch.Tensor) -> None:
    blocks, layers = expected.shape[:2]
    assert reader.computed == blocks
    assert set(reader.kv) == {(b, layer) for b in range(blocks) for layer in range(layers)}
    for (block, layer), kv in reader.kv.items():
        torch.testing.assert_close(kv, expected[block, layer], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("chunk", [7, 32, 512])
def test_every_block_is_named_once_and_final(
    model: Model, expected: torch.Tensor, chunk: int, by_layer: bool
) -> None:
    with running_engine(model, max_tokens=chunk, mixed_tokens=chunk) as engine:
        recorder = submit(engine, prompt(100), "cold", by_layer)
        engine.outputs.wait_finished("cold")
        (reader,) = recorder.readers
        check(reader, expected)
        recorder = submit(engine, prompt(100) + prompt(5, 1), "warm", by_layer)
        engine.outputs.wait_finished("warm")
        check(recorder.readers[0], expected)


@pytest.mark.parametrize("by_layer", [False, True])
def test_superseded_blocks_are_the_watchs(
    model: Model, expected: torch.Tensor, by_layer: bool
) -> None:
    with running_engine(model) as engine:
        recorders = {name: Recorder(engine.pool, by_layer) for name in ("one", "two")}
        # Three blocks in common: too few for one to wait for the other.
        prompts = prompt(100), [*prompt(100)[:48], *prompt(100, 1)]
        engine.engine.submit(
            [request(p, *each) for p, each in zip(prompts, recorders.items(), strict=True)]
        )
        engine.outputs.wait_finished("one", "two")
        first, second = (recorder.readers[0] for recorder in recorders.values())
        check(first, expected)
        assert not first.superseded_refs
        assert second.superseded_refs == second.refs[:3].tolist()
        assert engine.pool.stats().hbm.active == 3  # not given away behind the watch's back
        engine.pool.free_mem(second.refs[:3])


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_preempted_sequence_is_admitted_again_with_other_blocks(
    model: Model, expected: torch.Tensor, by_layer: bool
) -> None:
    """What decodes grows into the memory of the prompt that came last."""
    with running_engine(
        model, hbm_blocks=10, dram_blocks=20, max_tokens=16, mixed_tokens=1
    ) as engine:
        steady = engine.submit(prompt(20, 9), 100)
        engine.outputs.wait_tokens(steady, 1)
        recorder = submit(engine, prompt(100), "late", by_layer)
        engine.outputs.wait_finished("late")
        engine.finish(steady)
        assert engine.engine.stats().preemptions > 0
        *earlier, last = recorder.readers
        assert earlier
        assert all(reader.computed is not None and reader.computed < 6 for reader in earlier)
        check(last, expected)


def test_a_cancelled_sequence_lets_go(model: Model) -> None:
    with running_engine(model, max_tokens=1, mixed_tokens=1) as engine:
        recorder = submit(engine, prompt(100), "gone", False)
        assert recorder.admitted.wait(10)
        engine.engine.cancel([RequestId("gone")])
        engine.run(prompt(5), 2)
        (reader,) = recorder.readers
        assert reader.computed is not None
        assert reader.computed < 6


def test_prompts_without_a_whole_block_are_of_no_interest(model: Model) -> None:
    with running_engine(model) as engine:
        recorder = submit(engine, prompt(BLOCK - 1), "short", True)
        engine.outputs.wait_finished("short")
        assert not recorder.readers
