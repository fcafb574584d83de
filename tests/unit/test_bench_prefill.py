"""The table of what cached prefixes save says what was measured."""

from __future__ import annotations

import pytest
from rich.console import Console

from evaluation.prefill import (
    CACHED_RATIOS,
    PrefillBenchReport,
    lengths,
    measure,
    prefill_bench_table,
)


def test_every_length_is_timed_with_every_ratio_in_whole_blocks() -> None:
    calls: list[tuple[int, int]] = []

    def prefill(prompt: int, cached: int) -> float:
        calls.append((prompt, cached))
        return (prompt - cached) * 1e-3

    cells = measure(prefill, lengths(2000), 16, 3, lambda _: None)
    assert lengths(2000) == [500, 2000]
    assert len(calls) == 3 * 2 * len(CACHED_RATIOS)
    assert calls[: len(calls) // 3] * 3 == calls  # in turns
    for cell in cells:
        assert cell.cached_tokens % 16 == 0
        assert 0 <= cell.prompt_tokens * cell.ratio - cell.cached_tokens < 16
        assert cell.seconds == ((cell.prompt_tokens - cell.cached_tokens) * 1e-3,) * 3
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(prefill_bench_table(PrefillBenchReport(cells)))
    shown = captured.get()
    assert "2000" in shown
    assert "1008 (-50%)" in shown  # ms, of 2000


@pytest.mark.parametrize(("longest", "expected"), [(100, [100]), (512, [128, 512])])
def test_lengths(longest: int, expected: list[int]) -> None:
    assert lengths(longest) == expected
