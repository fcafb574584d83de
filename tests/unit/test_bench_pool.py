"""The pool's benchmark measures the same work on both sides, and can be printed and stored."""

from __future__ import annotations

import msgspec
import numpy as np
from rich.console import Console

from memserve.bench.pool import (
    BLOCK_TOKENS,
    ChainedHashes,
    PoolBenchReport,
    PoolWorkload,
    pool_bench_table,
    run_pool_bench,
)

TINY = PoolWorkload(prompts=20, prompt_tokens=128, prefixes=2, prefix_tokens=64, turns=3)


def test_a_report_is_complete_and_survives_json() -> None:
    report = run_pool_bench(TINY, stored_blocks=(200, 400))
    assert [(p.policy, p.stored_blocks) for p in report.evictions] == [
        ("lru", 200),
        ("lru", 400),
        ("cost", 200),
        ("cost", 400),
    ]
    assert msgspec.json.decode(msgspec.json.encode(report), type=PoolBenchReport) == report
    console = Console(record=True, width=120)
    console.print(pool_bench_table(report))
    assert "chained hashes" in console.export_text()


def test_the_baseline_finds_the_longest_prefix() -> None:
    index = ChainedHashes()
    tokens = np.arange(4 * BLOCK_TOKENS, dtype=np.int32)
    index.insert(tokens, [10, 11, 12, 13])
    assert index.match(tokens) == [10, 11, 12, 13]
    other = tokens.copy()
    other[2 * BLOCK_TOKENS] = -1
    assert index.match(other) == [10, 11]
    assert index.match(tokens[BLOCK_TOKENS:]) == []
