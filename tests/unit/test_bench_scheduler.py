"""The scheduler's benchmark measures every policy, on both layouts and sizes."""

from __future__ import annotations

from rich.console import Console

from memserve.bench.scheduler import SchedulerWorkload, run_scheduler_bench, scheduler_bench_table
from memserve.scheduler.policies import POLICIES


def test_every_policy_is_timed() -> None:
    workload = SchedulerWorkload(
        instances=4, prompts=20, prompt_tokens=256, prefixes=3, prefix_tokens=64, decisions=30
    )
    report = run_scheduler_bench(workload)

    many, few = report.policies[: 2 * len(POLICIES)], report.policies[2 * len(POLICIES) :]
    for rows in (many, few):
        assert [row.policy for row in rows] == 2 * list(POLICIES)
    assert {row.candidates for row in many} == {4, 6}  # 2 x 2 pairs, 2 alone
    assert {row.candidates for row in few} == {2}  # a pair, and its decode instance alone
    assert {(row.instances, row.prompt_tokens) for row in few} == {(2, 400)}
    assert all(row.decide.p99 >= row.decide.p50 > 0 for row in report.policies)
    console = Console(width=160)
    with console.capture() as capture:
        console.print(scheduler_bench_table(report))
    assert "prompt-tree" in capture.get()
