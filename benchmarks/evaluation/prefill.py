"""`python -m evaluation prefill`: what cached prefixes save, by the length of the prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import product
from statistics import median

import msgspec
from rich.table import Table

from memserve.engine.engine import Engine
from memserve.instance.probe import EngineProbe
from memserve.instance.profiling import ProfiledEngine
from memserve.models.resolve import Progress
from memserve.transfer.mempool import MemPool

CACHED_RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9)
_SHORTEST, _STEP = 128, 4  # each prompt is so many times as long as the one before
_WARM_TOKENS = 64

Prefill = Callable[[int, int], float]  # (prompt tokens, cached tokens): seconds to the first token


class PrefillCell(msgspec.Struct, frozen=True):
    """Prompts of one length of which as much is cached."""

    prompt_tokens: int
    ratio: float  # asked for
    cached_tokens: int  # whole blocks of it
    seconds: tuple[float, ...]  # to the first token, of each repeat


class PrefillBenchReport(msgspec.Struct, frozen=True):
    """Every length with every ratio."""

    cells: tuple[PrefillCell, ...]


def lengths(longest: int) -> list[int]:
    """From short to long, quarter by quarter."""
    found = [longest]
    while found[-1] // _STEP >= _SHORTEST:
        found.append(found[-1] // _STEP)
    return found[::-1]


def run_prefill_bench(
    engine: ProfiledEngine, longest: int, repeats: int, progress: Progress
) -> PrefillBenchReport:
    """Time an engine of its own, without a server: prompts of up to `longest` tokens.

    Raises OutOfBlocks, ProbeFailed.
    """
    layout = engine.layout
    blocks = 2 * (longest // layout.block_tokens + 1)
    device = str(engine.model.device)
    with (
        MemPool(layout, blocks, 0, f"prefill-{os.getpid()}", device) as pool,
        EngineProbe(Engine(engine.model, pool, engine.settings)) as probe,
    ):
        longest = min(longest, probe.longest_prompt)
        probe.prefill(min(_WARM_TOKENS, longest), 0)
        cells = measure(probe.prefill, lengths(longest), layout.block_tokens, repeats, progress)
    return PrefillBenchReport(cells)


def measure(
    prefill: Prefill,
    prompts: Sequence[int],
    block_tokens: int,
    repeats: int,
    progress: Progress,
) -> tuple[PrefillCell, ...]:
    """Every prompt in turn, `repeats` times: what drifts meets all of them."""
    points = [
        (prompt, ratio, int(prompt * ratio) // block_tokens * block_tokens)
        for prompt, ratio in product(prompts, CACHED_RATIOS)
    ]
    seconds: dict[tuple[int, float], list[float]] = {point[:2]: [] for point in points}
    for turn in range(repeats):
        progress(f"prompts of {prompts[0]} to {prompts[-1]} tokens, {turn + 1} of {repeats}")
        for prompt, ratio, cached in points:
            seconds[prompt, ratio].append(prefill(prompt, cached))
    return tuple(
        PrefillCell(prompt, ratio, cached, tuple(seconds[prompt, ratio]))
        for prompt, ratio, cached in points
    )


def prefill_bench_table(report: PrefillBenchReport) -> Table:
    """A line for each length; medians, and what is saved of the prompt without cache."""
    table = Table("prompt", title="ms to the first token, by the cached part of the prompt")
    for ratio in CACHED_RATIOS:
        table.add_column(f"{ratio:.0%} cached", justify="right")
    by_prompt: dict[int, list[PrefillCell]] = {}
    for cell in report.cells:
        by_prompt.setdefault(cell.prompt_tokens, []).append(cell)
    for prompt, cells in by_prompt.items():
        whole = median(cells[0].seconds)
        row = [f"{whole * 1e3:.0f}"]
        for cell in cells[1:]:
            value = median(cell.seconds)
            row.append(f"{value * 1e3:.0f} ({value / whole - 1:+.0%})")
        table.add_row(str(prompt), *row)
    return table
