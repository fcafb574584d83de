"""A device whose kernels run when the test says so. Protects: nothing is inserted, freed or passed
on before the kernels that write it have run."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from memserve.api.generate import SamplingParams
from memserve.engine import engine as engine_module
from memserve.engine.fence import FencedObserver, KernelFence
from memserve.engine.model import Model
from memserve.engine.request import EngineRequest, TokenOutput
from memserve.pool.pool import BlockPool
from memserve.pool.storage import BlockStore
from memserve.types import RefArray, RequestId
from tests.engine_harness import load, running_engine
from tests.tiny_models import VOCAB, save_tiny_model

PATIENCE = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(save_tiny_model("gemma3", tmp_path_factory.mktemp("models")))


class Queue:
    """A queue of kernels (`Kernels`) with one that has not run since the last `queued`."""

    def __init__(self) -> None:
        self.pending = False
        self.waits = 0
        self.lost = False

    def mark(self) -> Queue:
        return self

    def synchronize(self) -> None:
        self.waits += 1
        self.pending = False  # what was lost writes nothing, either
        if self.lost:
            raise RuntimeError("the device is lost")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, model: Model) -> Queue:
    """The engine's device; every step of the model leaves kernels that have not run. Whoever looks
    at samples has waited for them. Insertions, allocations, frees and swaps meanwhile are refused.
    """
    queue = Queue()
    forward, sample = Model.forward, engine_module.Runner.run.__globals__["sample"]

    def queued(self: Model, *given: object) -> torch.Tensor:
        queue.pending = True
        return forward(self, *given)  # type: ignore[arg-type]

    def sampled(*given: object) -> object:
        queue.pending = False
        return sample(*given)

    monkeypatch.setattr(engine_module, "kernels_of", lambda device: queue)
    monkeypatch.setattr(Model, "forward", queued)
    monkeypatch.setattr("memserve.engine.runner.sample", sampled)
    for owner, name in (
        (BlockPool, "insert"),
        (BlockPool, "alloc_mem"),  # evicts
        (BlockPool, "free_mem"),
        (BlockStore, "copy_from"),
    ):
        inner = getattr(owner, name)

        def behind(
            it: object, *given: object, inner: Callable[..., object] = inner, **options: object
        ) -> object:
            assert not queue.pending, "kernels may still write to these blocks"
            return inner(it, *given, **options)

        monkeypatch.setattr(owner, name, behind)
    return queue


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, VOCAB, length)]


def test_blocks_of_a_step_without_samples_are_inserted_behind_its_kernels(
    model: Model, kernels: Queue
) -> None:
    with running_engine(model, max_tokens=16, mixed_tokens=16) as engine:
        assert len(engine.run(prompt(100), 4)) == 4
    assert kernels.waits >= 6  # chunks of 16 tokens


def test_blocks_of_a_cancelled_sequence_are_freed_behind_its_kernels(
    model: Model, kernels: Queue
) -> None:
    with running_engine(model, max_tokens=24, mixed_tokens=24) as engine:
        ids = [engine.submit(prompt(150, seed), 20) for seed in range(4)]
        engine.outputs.wait_tokens(ids[0], 1)
        engine.engine.cancel(ids)  # type: ignore[arg-type]
        engine.run(prompt(20, 9), 2)


def test_blocks_are_swapped_behind_the_kernels_that_use_them(model: Model, kernels: Queue) -> None:
    """Also those of preempted sequences, and from DRAM back."""
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    requests = [
        EngineRequest(RequestId(str(seed)), np.array(prompt(90, seed), dtype=np.int32), params)
        for seed in range(4)
    ]
    with running_engine(model, hbm_blocks=18, max_tokens=32, mixed_tokens=32) as engine:
        engine.engine.submit(requests)  # at once: each run has the same steps
        answers = engine.finish(*(request.id for request in requests))
        assert [len(tokens) for tokens in answers] == [60] * 4
        stats = engine.pool.stats()
        assert stats.swapped_out
        assert stats.swapped_in
        assert engine.engine.stats().preemptions


def test_what_a_failed_step_has_queued_runs_before_its_blocks_are_free(
    model: Model, kernels: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = Model.forward

    def failing(self: Model, *given: object) -> torch.Tensor:
        queued(self, *given)  # type: ignore[arg-type]
        raise ValueError("half way")

    monkeypatch.setattr(Model, "forward", failing)
    with running_engine(model) as engine:
        request = engine.submit(prompt(40), 4)
        engine.outputs.wait_finished(request)
        (output,) = engine.outputs.of(request)
        assert isinstance(output, TokenOutput)
        assert "half way" in (output.error or "")
    assert kernels.waits > 0


def test_an_engine_whose_device_is_lost_still_tells_everybody(model: Model, kernels: Queue) -> None:
    with running_engine(model, max_tokens=16, mixed_tokens=16) as engine:
        kernels.lost = True
        request = engine.submit(prompt(100), 4)
        engine.outputs.wait_finished(request)
        assert "lost" in (engine.outputs.of(request)[-1].error or "")


class Event:
    """A mark that is reached when the test says so."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.error: RuntimeError | None = None

    def synchronize(self) -> None:
        assert self.reached.wait(PATIENCE)
        if self.error is not None:
            raise self.error


class Events:
    def __init__(self) -> None:
        self.made: list[Event] = []
        self.idle = False  # marks are reached at once

    def mark(self) -> Event:
        self.made.append(Event())
        if self.idle:
            self.made[-1].reached.set()
        return self.made[-1]


class Watch:
    by_layer = True

    def __init__(self) -> None:
        self.told: list[tuple[int, int, int | None]] = []
        self.changed = threading.Semaphore(0)

    def begin(self, refs: RefArray) -> Watch:
        return self

    def ready(self, first: int, last: int, layer: int | None) -> None:
        self.told.append((first, last, layer))
        self.changed.release()
        if layer == 13:
            raise ValueError("unlucky")

    def superseded(self, refs: RefArray) -> None: ...

    def released(self, computed: int) -> None: ...


def test_calls_wait_for_their_kernels_in_order() -> None:
    events, watch = Events(), Watch()
    fence = KernelFence(events)
    observed = FencedObserver(watch, fence).begin(np.empty(0, dtype=np.int64))
    assert observed is not None
    for layer in range(3):
        observed.ready(0, 1, layer)
    assert watch.told == []
    for event in reversed(events.made):
        event.reached.set()
    fence.close()
    assert watch.told == [(0, 1, 0), (0, 1, 1), (0, 1, 2)]


def test_a_call_that_fails_does_not_stop_the_others() -> None:
    events, watch = Events(), Watch()
    fence = KernelFence(events)
    for layer in (13, 14):
        fence.after(lambda layer=layer: watch.ready(0, 1, layer))  # type: ignore[misc]
        events.made[-1].reached.set()
    fence.close()
    assert [layer for _, _, layer in watch.told] == [13, 14]


def test_after_an_error_nothing_is_called_and_nothing_is_kept() -> None:
    events, watch = Events(), Watch()
    fence = KernelFence(events)
    for layer in range(100):
        fence.after(lambda layer=layer: watch.ready(0, 1, layer))  # type: ignore[misc]
    events.made[0].error = RuntimeError("a device was lost")
    for event in events.made:
        event.reached.set()
    fence.close()
    assert watch.told == []
    assert fence._due.empty()
    fence.after(lambda: watch.ready(0, 1, 0))
    assert len(events.made) == 100
    assert fence._due.empty()


@pytest.mark.parametrize("by_layer", [False, True])
def test_an_engine_tells_of_blocks_behind_their_kernels(
    model: Model, monkeypatch: pytest.MonkeyPatch, by_layer: bool
) -> None:
    events, watch = Events(), Watch()
    watch.by_layer = by_layer
    monkeypatch.setattr(engine_module, "kernels_of", lambda device: events)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    request = EngineRequest(
        RequestId("r"), np.array(prompt(40), dtype=np.int32), params, observer=watch
    )
    with running_engine(model) as engine:
        engine.engine.submit([request])
        engine.outputs.wait_finished("r")  # the step's one sample has waited for its kernels
        early = list(watch.told)
        events.idle = True
        for event in events.made:
            event.reached.set()
    assert early == []
    layers = range(model.shape.layers) if by_layer else [None]
    assert watch.told == [(0, 2, layer) for layer in layers]
