"""Runs of the paper's matrix that nobody measured, with figures that tests choose."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from evaluation.paper.matrix import Cell, CellRun, PaperConfig, groups, step_groups
from memserve.bench.loadgen import LoadResult, RequestRecord
from memserve.bench.measure import ServeRun
from memserve.bench.processes import ProcessStats
from memserve.bench.report import summarise
from memserve.config import ModelConfig

CONFIG = PaperConfig(data="data")


def cells(config: PaperConfig = CONFIG) -> list[Cell]:
    planned = (*groups(config, ModelConfig()), *step_groups(config, ModelConfig()))
    return [cell for group in planned for cell in group.cells]


def made_up_run(cell: Cell, ttft: float, busy: float = 0.5) -> CellRun:
    """Two equal requests of three tokens; the prefill instance is `busy` so much."""
    gap = 0.1
    times = (ttft, ttft + gap, ttft + 2 * gap)
    request = RequestRecord("s", 0, 0.0, 0.0, ttft, times, times[-1], 100, 50, 3, None)
    records = (request, msgspec.structs.replace(request, turn=1))
    processes = (ProcessStats("prefill-0", busy * times[-1], 10**9),)
    summary = summarise(LoadResult(records, 0))
    run = ServeRun(cell.topology, "m", None, summary, records, cell.repeat, 0, processes)
    return CellRun(cell, run)


def made_up_runs(ttft: Callable[[Cell], float], busy: float = 0.5) -> list[CellRun]:
    return [made_up_run(cell, ttft(cell), busy) for cell in cells()]
