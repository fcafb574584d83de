"""The engine as it runs on a GPU: Triton's kernels, and decode steps in graphs.

Without a GPU, Triton's interpreter runs the kernels, and a graph is a function that computes the
step again from the same buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from memserve.engine import runner
from memserve.engine.attention import Span
from memserve.engine.model import Model
from memserve.pool.pool import BlockPool
from tests.engine_harness import load, running_engine
from tests.tiny_models import CONFIGS, VOCAB, Reference, save_tiny_model

pytest.importorskip("triton", reason="Triton is not installed (Linux has it): pip install triton")
from memserve.engine.gpu import decode_graphs
from memserve.engine.gpu.attention import TritonAttention
from memserve.engine.gpu.decode_graphs import DecodeGraphs

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


class Recomputed:
    """Stands for a graph where there are none: the same tensors in, the same tensor out."""

    def __init__(self, work: Callable[[], torch.Tensor], result: torch.Tensor) -> None:
        self._work = work
        self._result = result

    def replay(self) -> None:
        self._result.copy_(self._work())


class Recompute:
    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Recomputed, torch.Tensor]:
        result = work().clone()
        return Recomputed(work, result), result


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the number of sequences of each step that ran as a graph."""
    replayed: list[int] = []
    run = DecodeGraphs.run

    def counted(self: DecodeGraphs, spans, tokens):  # type: ignore[no-untyped-def]
        replayed.append(len(spans))
        return run(self, spans, tokens)

    monkeypatch.setattr(DecodeGraphs, "run", counted)
    if not ON_GPU:
        monkeypatch.setattr(runner, "runs_triton", lambda device: True)
        monkeypatch.setattr(decode_graphs, "CudaCapture", Recompute)
    return replayed


@pytest.mark.parametrize("name", list(CONFIGS))
def test_tokens_equal_generate(name: str, tmp_path: Path, on_a_gpu: list[int]) -> None:
    """Cold, cached, and after a swap; three at once take the graph of four."""
    directory = save_tiny_model(name, tmp_path)
    rng = np.random.default_rng(0)
    prompts = [[int(t) for t in rng.integers(3, VOCAB, n)] for n in (20, 60, 61)]
    reference = Reference(directory)
    expected = [reference.generate(p, 8) for p in prompts]
    with running_engine(
        load(directory, DEVICE), hbm_blocks=18, dram_blocks=40, max_running=4
    ) as engine:
        assert isinstance(engine.engine._runner._attention, TritonAttention)
        for _ in range(2):
            requests = [engine.submit(p, 8) for p in prompts]
            assert engine.finish(*requests) == expected
            engine.pool.swap_out(18)
        assert engine.pool.stats().swapped_in > 0
    assert 3 in on_a_gpu


def test_a_step_with_a_prompt_or_too_many_sequences_runs_without_a_graph(
    tmp_path: Path, on_a_gpu: list[int]
) -> None:
    directory = save_tiny_model("llama", tmp_path)
    rng = np.random.default_rng(1)
    prompts = [[int(t) for t in rng.integers(3, VOCAB, 10 + n)] for n in range(4)]
    reference = Reference(directory)
    model = load(directory, DEVICE)
    with running_engine(model, hbm_blocks=40, dram_blocks=0, max_running=3) as engine:
        first = engine.submit(prompts[0], 20)
        engine.outputs.wait_tokens(first, 2)
        others = [engine.submit(p, 4) for p in prompts[1:]]
        got = engine.finish(first, *others)
        graphs = engine.engine._runner._graphs
    expected = [reference.generate(p, n) for p, n in zip(prompts, (20, 4, 4, 4), strict=True)]
    assert got == expected
    assert set(on_a_gpu) <= {1, 2, 3}
    assert graphs is not None
    one, two = Span(0, 1, 5, np.array([0])), Span(0, 2, 5, np.array([0]))
    assert graphs.takes([one] * 4, [0, 1, 2, 3])  # three, and one that a power of 2 has room for
    assert not graphs.takes([one] * 5, [0, 1, 2, 3, 4])
    assert not graphs.takes([one, two], [0, 2])
    assert not graphs.takes([one, one], [1])


def test_a_model_that_cannot_be_captured_runs_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(Recompute):
        def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Recomputed, torch.Tensor]:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_graphs, "CudaCapture", Refusing)
    directory = save_tiny_model("llama", tmp_path)
    with running_engine(load(directory, DEVICE), hbm_blocks=8, dram_blocks=0) as engine:
        assert engine.run([5, 6, 7], 4) == Reference(directory).generate([5, 6, 7], 4)
    assert "without CUDA graphs" in caplog.text


def test_what_a_graph_reads_stays_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay reads the memory of the capture, whoever has it by then."""
    read: set[int] = set()
    forward = Model.forward

    def recorded(self: Model, *given: torch.Tensor) -> torch.Tensor:
        read.update(tensor.untyped_storage().data_ptr() for tensor in given[:3])
        return forward(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "forward", recorded)
    model = load(save_tiny_model("llama", tmp_path), DEVICE)
    layout = model.layout("tiny", 16, True)
    with BlockPool(layout, 4, 0, instance="t0", device=DEVICE) as pool, torch.inference_mode():
        attention = TritonAttention(pool.layer_views(), model.shape.heads)
        graphs = DecodeGraphs(model, attention, 4)
        held = [value for value in vars(graphs).values() if isinstance(value, torch.Tensor)]
        assert read <= {tensor.untyped_storage().data_ptr() for tensor in held}
        assert len(read) == 2
