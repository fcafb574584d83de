"""The scheduler's benchmark measures every policy, on both layouts."""

from __future__ import annotations

from rich.console import Console

from memserve.bench.scheduler import SchedulerWorkload, run_scheduler_bench, scheduler_bench_table
from memserve.scheduler.policies import POLICIES


def test_every_policy_is_timed() -> None:
    workload = SchedulerWorkload(
        instances=4, prompts=20, prompt_tokens=256, prefixes=3, prefix_tokens=64, decisions=30
    )
    report = run_scheduler_bench(workload)

    assert [row.policy for row in report.policies] == 2 * list(POLICIES)
    assert {row.candidates for row in report.policies} == {4, 6}  # 2 x 2 pairs, 2 alone
    assert all(row.decide.p99 >= row.decide.p50 > 0 for row in report.policies)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(scheduler_bench_table(report))
    assert "prompt-tree" in capture.get()
