"""Execution of one step on the device: tensors, forward pass, sampling."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from memserve.engine.attention import AttentionBackend, Span
from memserve.engine.batch import StepPlan
from memserve.engine.devices import runs_triton
from memserve.engine.model import Model
from memserve.engine.sampler import Sample, sample
from memserve.engine.scoring import PromptScores
from memserve.engine.torch_attention import TorchAttention
from memserve.pool.device_queue import Kernels, wait_for
from memserve.pool.pool import BlockPool
from memserve.types import RequestId, TokenArray

if TYPE_CHECKING:
    from memserve.engine.gpu.decode_graphs import DecodeGraphs  # Triton is not everywhere

log = logging.getLogger(__name__)


class Runner:
    """Runs step plans of one engine on its model and pool."""

    def __init__(self, model: Model, pool: BlockPool, kernels: Kernels) -> None:
        """`kernels`: the kernel queue of the model's device."""
        self._model = model
        self._kernels = kernels
        self._attention = attention_for(model, pool)
        self._graphs: DecodeGraphs | None = None

    def prepare(self, graph_rows: int) -> None:
        """Make the calling thread ready for steps. On a GPU, compile kernels and capture decode
        steps of up to `graph_rows` sequences (0: of none), which takes seconds."""
        device = self._model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the thread's current device
        if graph_rows:
            self._graphs = graphs_for(self._model, self._attention, graph_rows)

    def run(self, plan: StepPlan) -> dict[RequestId, Sample]:
        """Run a step. Returns a sample for each sequence that has no token without KV left.

        Returns after the step's kernels have run: the KV is complete, and no kernel writes to
        its blocks. After an error kernels may still run; see `finish`.
        """
        spans: list[Span] = []
        tokens = []
        keep, sampled = [], []
        scored: list[tuple[PromptScores, int]] = []  # with numbers of rows
        scored_rows: list[int] = []
        row = 0
        for scheduled in plan.scheduled:
            sequence, count = scheduled.sequence, scheduled.count
            begin, end = sequence.computed, sequence.computed + count
            spans.append(Span(row, count, begin, sequence.table.indices))
            tokens.append(sequence.tokens[begin:end])
            if sequence.scores is not None:
                rows = sequence.scores.rows(begin, end)
                scored.append((sequence.scores, len(rows)))
                scored_rows += [row + at for at in rows]
            row += count
            if end == sequence.length:
                keep.append(row - 1)
                sampled.append(sequence)
        logits = self._forward(plan, spans, tokens, keep + scored_rows)
        if scored_rows:
            _score(logits[len(keep) :], scored)
            logits = logits[: len(keep)]
        if not sampled:  # otherwise `sample` waits for the kernels
            self.finish()
            return {}
        chosen = sample(logits, [s.sampler for s in sampled])
        return {s.id: c for s, c in zip(sampled, chosen, strict=True)}

    def _forward(
        self,
        plan: StepPlan,
        spans: Sequence[Span],
        tokens: Sequence[TokenArray],
        keep: Sequence[int],
    ) -> torch.Tensor:
        """Queue the model's kernels. Returns logits [len(keep), vocab] of the rows `keep`."""
        on_layer = _layer_listener(plan)
        graphs = self._graphs
        if graphs is not None and on_layer is None and graphs.takes(spans, keep):
            return graphs.run(spans, np.concatenate(tokens))
        self._attention.plan(spans, len(plan.decodes), on_layer)
        device = self._model.device
        positions = [np.arange(span.context, span.total) for span in spans]
        return self._model.forward(
            torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(device),
            torch.from_numpy(np.concatenate(positions)).to(device),
            torch.tensor(keep, dtype=torch.int64, device=device),
            self._attention,
        )

    def finish(self) -> None:
        """Wait until all queued kernels have run. Raises RuntimeError if the device is lost."""
        wait_for(self._kernels)


def attention_for(model: Model, pool: BlockPool) -> AttentionBackend:
    """Return the attention backend for a model's device: Triton's kernels where they run."""
    views = pool.layer_views()
    if not runs_triton(model.device):
        return TorchAttention(views, model.dtype)
    from memserve.engine.gpu.attention import TritonAttention

    return TritonAttention(views, model.shape.heads)


def graphs_for(model: Model, attention: AttentionBackend, rows: int) -> DecodeGraphs | None:
    """Return graphs of decode steps of up to `rows` sequences, captured; None if the backend or
    the model has no use for them."""
    if not runs_triton(model.device):
        return None
    from memserve.engine.gpu.attention import TritonAttention
    from memserve.engine.gpu.decode_graphs import DecodeGraphs

    assert isinstance(attention, TritonAttention)
    try:
        return DecodeGraphs(model, attention, rows)
    except RuntimeError as error:
        log.warning("decode steps are computed without CUDA graphs: %s", error)
        return None


def _score(logits: torch.Tensor, scored: Sequence[tuple[PromptScores, int]]) -> None:
    """Give `logits` [rows, vocab] to the prompts whose tokens they predict, in order."""
    logits = logits.contiguous().cpu()  # the product for several rows is column-major
    for scores, count in scored:
        scores.add(logits[:count])
        logits = logits[count:]


def _layer_listener(plan: StepPlan) -> Callable[[int], None] | None:
    """Return the callback that each layer of the step calls, or None if no watch needs it. The
    completed blocks are the same in all layers."""
    told = [
        (watch, *blocks)
        for sequence, count in ((s.sequence, s.count) for s in plan.scheduled)
        if (watch := sequence.watch) is not None
        and watch.by_layer
        and (blocks := sequence.completes(count))[0] < blocks[1]
    ]
    if not told:
        return None

    def on_layer(layer: int) -> None:
        for watch, first, last in told:
            watch.ready(first, last, layer)

    return on_layer
