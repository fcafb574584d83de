"""One step on the device: a plan into tensors, the model, a token for who wants one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from memserve.engine.batch import StepPlan
from memserve.engine.fence import Kernels
from memserve.engine.model import Model
from memserve.engine.paged_batch import PagedBatch, Span, Workspace
from memserve.engine.sampler import Sample, sample
from memserve.pool.pool import MemPool
from memserve.types import RequestId


class Runner:
    """Turns a plan into tensors, runs the model, samples."""

    def __init__(self, model: Model, pool: MemPool, kernels: Kernels) -> None:
        """`kernels`: of the model's device."""
        self._model = model
        self._kernels = kernels
        self._views = pool.layer_views()
        self._workspace = Workspace()

    def run(self, plan: StepPlan) -> dict[RequestId, Sample]:
        """Samples of the sequences whose every token has KV after this step.

        Returns when its kernels have run: the KV is there, and nothing writes to any block of the
        step any more. Not so after an error; see `finish`.
        """
        spans: list[Span] = []
        tokens, positions = [], []
        keep, sampled = [], []
        row = 0
        for scheduled in plan.scheduled:
            sequence, count = scheduled.sequence, scheduled.count
            begin, end = sequence.computed, sequence.computed + count
            spans.append(Span(row, count, begin, sequence.table.indices))
            tokens.append(sequence.tokens[begin:end])
            positions.append(np.arange(begin, end))
            row += count
            if end == sequence.length:
                keep.append(row - 1)
                sampled.append(sequence)
        batch = PagedBatch(
            self._views,
            spans,
            len(plan.decodes),
            self._model.dtype,
            self._workspace,
            _layer_listener(plan),
        )
        device = self._model.device
        logits = self._model.forward(
            torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(device),
            torch.from_numpy(np.concatenate(positions)).to(device),
            torch.tensor(keep, dtype=torch.int64, device=device),
            batch,
        )
        if not sampled:  # or to look at the logits would be to wait
            self.finish()
            return {}
        chosen = sample(logits, [s.sampler for s in sampled])
        return {s.id: c for s, c in zip(sampled, chosen, strict=True)}

    def finish(self) -> None:
        """Returns when what was queued has run. Raises RuntimeError if the device is lost."""
        mark = self._kernels.mark()
        if mark is not None:
            mark.synchronize()


def _layer_listener(plan: StepPlan) -> Callable[[int], None] | None:
    """What the layers of a step call, if a watch wants to know; for which blocks is the same
    for all of them."""
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
