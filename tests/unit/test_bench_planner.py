"""The planner's comparison: equal loads for every split, honest sums, and cells that are kept."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from rich.console import Console

from evaluation.planner import live
from evaluation.planner.day import Day, Phase, kind_of
from evaluation.planner.live import SPLITS, LiveConfig, live_table, run_live
from evaluation.planner.page import planner_plot, planner_tables, verdict
from evaluation.planner.run import (
    PLANNER,
    Cell,
    PhaseFigures,
    PlannerEvalConfig,
    PlannerEvalResult,
    Shape,
    dense_splits,
    phases_of,
    run_planner_evaluation,
)
from memserve.config import ClusterConfig, ModelConfig
from memserve.errors import ConfigError
from memserve.planner.contract import Split
from tests.fakes import MODEL, FakeCluster, FakeEngine, tiny_tokenizer

SMALL = PlannerEvalConfig(
    instances=4,
    splits=(0, 2),
    conversation_rate=0.5,
    agent_rate=2.0,
    phases=2,
    phase_seconds=20.0,
    conversation_seconds=20.0,
    agent_seconds=20.0,
    warm_seconds=5.0,
)


def encode(text: str) -> list[int]:
    return [ord(letter) % 250 for letter in text]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """200 conversations within 100 s, and two agents of two steps."""
    trace = tmp_path / "mooncake"
    trace.mkdir()
    lines = [
        {
            "timestamp": 500 * n,
            "input_length": 1000,
            "output_length": 20,
            "hash_ids": [2 * n, 2 * n + 1],
        }
        for n in range(200)
    ]
    (trace / "conversation_trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    react = tmp_path / "react"
    react.mkdir()
    (react / "fever_prompt.json").write_text(json.dumps({"webthink_simple3": "example " * 100}))
    step = {"thought": "think of it", "action": "search[it]", "observation": "it was found"}
    runs = [{"id": n, "question": f"Is {n} so?", "steps": [step, step]} for n in range(2)]
    (react / "fever_trajectories.jsonl").write_text("\n".join(map(json.dumps, runs)))
    return tmp_path


def test_equal_phases_give_equal_requests_at_the_rates_that_were_asked_for(data: Path) -> None:
    day = Day(data, 50_000, encode)
    plan = [Phase("conversations", 20.0, 2.0), Phase("agents", 50.0, 8.0)]
    first, second = (day.sessions(plan, seed=3) for _ in range(2))
    assert [(s.arrival, [r.id for r in s.requests]) for s in first] == [
        (s.arrival, [r.id for r in s.requests]) for s in second
    ]
    assert first[0].requests[0] is not second[0].requests[0]  # results are written into them
    kinds = [(kind_of(r), s.arrival) for s in first for r in s.requests]
    told = [at for kind, at in kinds if kind == "conversations"]
    asked = [at for kind, at in kinds if kind == "agents"]
    assert len(told) == pytest.approx(40, abs=2)
    assert len(asked) == pytest.approx(400, rel=0.2)
    assert max(told) < 20.0 <= min(asked)
    assert day.sessions(plan, seed=4)[-1].arrival != first[-1].arrival


def test_a_later_phase_goes_on_where_the_trace_was_left(data: Path) -> None:
    day = Day(data, 50_000, encode)
    talk, act = Phase("conversations", 20.0, 2.0), Phase("agents", 5.0, 1.0)
    names = [
        r.id for s in day.sessions([talk, act, talk], 0) for r in s.requests
        if kind_of(r) == "conversations"
    ]  # fmt: skip
    assert len(names) == len(set(names)) == pytest.approx(80, abs=2)
    with pytest.raises(ConfigError, match="shorter phases"):
        day.sessions([talk] * 10, 0)


def test_requests_that_fit_no_instance_are_left_out_and_counted(data: Path) -> None:
    with pytest.raises(ConfigError, match="no request fits 900 tokens"):
        Day(data, 900, encode)
    assert Day(data, 1100, encode).refused == 0


def test_the_day_takes_turns() -> None:
    assert [one.kind for one in phases_of(SMALL, "day")] == ["conversations", "agents"]
    assert [one.rate for one in phases_of(SMALL, "day")] == [2.0, 8.0]
    assert [one.kind for one in phases_of(SMALL, "agents")] == ["agents"]


def test_cells_that_are_kept_are_not_simulated_again(data: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    lines: list[str] = []
    arguments = SMALL, data, ("conversations", "day"), encode
    first = run_planner_evaluation(*arguments, lines.append, kept)
    assert [(one.load, one.name) for one in first.cells] == [
        (load, name) for load in ("conversations", "day") for name in ("planner", "4C", "2P2D")
    ]
    for cell in first.cells:
        assert sum(one.requests for one in cell.phases) > 0
    assert sum(", " in line and "served" in line for line in lines) == 6
    lines.clear()
    assert run_planner_evaluation(*arguments, lines.append, kept) == first
    assert not any("served" in line for line in lines)


def test_no_cell_is_begun_behind_the_minutes(data: Path) -> None:
    result = run_planner_evaluation(SMALL, data, ("agents",), encode, lambda _: None, minutes=0)
    assert result.cells == ()


def test_splits_are_dense_and_begin_with_all_colocated() -> None:
    assert dense_splits(16) == (0, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert dense_splits(64)[:3] == (0, 8, 12)


def cell(prefill: int, *shares: float, load: str = "day") -> Cell:
    phases = tuple(
        PhaseFigures(
            "conversations" if at % 2 == 0 else "agents", 10.0, 100, int(100 * s), 0.1, 0.01
        )
        for at, s in enumerate(shares)
    )
    split = Split(prefill, 4 - prefill) if prefill > 0 else Split(colocated=4)
    return Cell(load, prefill, phases, (Shape(0.0, split),), (0.5, -1.0, 1.0, 0.25), 1.0)  # type: ignore[arg-type]


def test_the_verdict_is_against_the_best_fixed_split_of_each_figure() -> None:
    cells = [cell(PLANNER, 0.9, 0.9), cell(0, 1.0, 0.2), cell(2, 0.6, 0.6)]
    said = verdict("day", cells)
    assert "50.0% more than 4C by the mean of phases" in said or "more than 2P2D" in said
    worse = verdict("day", [cell(PLANNER, 0.5), cell(2, 1.0)])
    assert "50.0% less than 2P2D" in worse


def test_table_and_plot_have_every_split() -> None:
    cells = (cell(PLANNER, 0.9, 0.9), cell(0, 1.0, 0.2), cell(2, 0.6, 0.6))
    result = PlannerEvalResult(4, 3, cells)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(planner_tables(result))
    page = captured.get()
    for name in ("planner", "4C", "2P2D", "3 conversations fit"):
        assert name in page
    assert planner_plot(result).startswith("<?xml")
    with pytest.raises(ConfigError, match="no day"):
        planner_plot(PlannerEvalResult(4, 0, cells[:1]))


async def test_a_live_run_counts_each_phase_and_answers_that_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configs: list[ClusterConfig] = []
    engines = FakeEngine(), FakeEngine()
    with FakeCluster(tiny_tokenizer(tmp_path), engines) as cluster:

        @asynccontextmanager
        async def started(config: ClusterConfig) -> AsyncIterator[FakeCluster]:
            configs.append(config)
            yield cluster

        monkeypatch.setattr(live, "running_up", started)
        monkeypatch.setattr(live, "SPLITS", dict(list(SPLITS.items())[:2]))
        short = LiveConfig(
            seconds=0.4,
            reading_rate=20.0,
            reading_prompt=30,
            reading_output=2,
            writing_rate=20.0,
            writing_prompt=5,
            writing_output=4,
            ttft=60.0,
            tpot=60.0,
            repeats=1,
        )
        model = ModelConfig(served_name=MODEL)
        result = await run_live(short, model, lambda line: None)
        broken = await run_live(short, ModelConfig(served_name="another"), lambda line: None)
    planned, fixed = result.runs
    assert (planned.split, fixed.split) == ("planner", "1P3D")
    assert [one.planner.enabled for one in configs[:2]] == [True, False]
    assert [table.count for table in configs[1].instance] == [1, 3]
    assert planned.served == (1.0, 1.0, 1.0)
    assert planned.failed == 0
    assert all(seconds > 0 for seconds in planned.ttft)
    assert broken.runs[0].served == (0.0, 0.0, 0.0)
    assert broken.runs[0].failed > 0
    console = Console(width=200)
    with console.capture() as captured:
        console.print(live_table(result))
    assert "planner" in captured.get()
