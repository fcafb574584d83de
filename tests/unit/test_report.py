"""Figures of a run: from the schedule, without failed requests, reproducible from the file."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from memserve.api.request_stats import RequestStats
from memserve.bench.loadgen import LoadResult, RequestRecord
from memserve.bench.report import (
    Distribution,
    Slo,
    append_lines,
    serving_table,
    summarise,
    write_json,
)
from memserve.config import ModelConfig


def record(**changes: object) -> RequestRecord:
    base = RequestRecord(
        session="s",
        turn=0,
        scheduled=1.0,
        sent=1.5,
        first_token=2.0,
        chunk_times=(2.0, 2.3, 2.6),
        end=3.0,
        prompt_tokens=100,
        cached_tokens=25,
        output_tokens=4,
        error=None,
    )
    return msgspec.structs.replace(base, **changes)


def test_times_count_from_the_schedule_not_from_a_late_start() -> None:
    summary = summarise(LoadResult((record(),), unsent=0))
    assert summary.ttft is not None
    assert summary.jct is not None
    assert summary.lateness is not None
    assert (summary.ttft.mean, summary.jct.mean, summary.lateness.mean) == (1.0, 2.0, 0.5)


def test_tpot_spreads_the_time_after_the_first_token_over_the_other_tokens() -> None:
    """Three chunks may carry four tokens."""
    summary = summarise(LoadResult((record(),), unsent=0))
    assert summary.tpot is not None
    assert summary.tpot.mean == pytest.approx(0.2)
    single = summarise(LoadResult((record(output_tokens=1),), unsent=0))
    assert single.tpot is None


def test_failed_requests_are_counted_and_kept_out_of_the_figures() -> None:
    failed = record(error="HTTP 500", first_token=None, chunk_times=(), end=50.0)
    summary = summarise(LoadResult((record(), failed), unsent=2))
    assert (summary.requests, summary.failed, summary.unsent) == (2, 1, 2)
    assert summary.jct is not None
    assert summary.jct.count == 1
    assert summary.duration == 50.0
    assert summary.requests_per_second == pytest.approx(1 / 50)


def test_the_cached_ratio_is_of_all_prompt_tokens() -> None:
    """Not the mean of the requests' ratios: long prompts cost more."""
    records = (record(), record(prompt_tokens=300, cached_tokens=275))
    assert summarise(LoadResult(records, unsent=0)).cached_ratio == pytest.approx(0.75)


def test_percentiles_of_known_values() -> None:
    distribution = Distribution.of([float(i) for i in range(101)])
    assert distribution == Distribution(count=101, mean=50.0, p50=50.0, p90=90.0, p99=99.0)
    assert Distribution.of([]) is None


def test_a_run_without_one_success_still_reports() -> None:
    summary = summarise(LoadResult((), unsent=3))
    console = Console(width=100, record=True, quiet=True)
    console.print(serving_table([("a", summary), ("b", summary)]))
    assert summary.ttft is None


def test_json_holds_all_that_is_needed_to_measure_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = summarise(LoadResult((record(),), unsent=0))
    write_json(str(tmp_path / "new" / "r.json"), ModelConfig(path="m"), summary)
    written = json.loads((tmp_path / "new" / "r.json").read_text())
    assert written["config"]["path"] == "m"
    assert written["result"]["ttft"]["mean"] == 1.0
    assert {"commit", "cpu", "cores", "packages", "memserve", "time"} <= set(written["environment"])
    write_json("-", ModelConfig(), summary)
    assert json.loads(capsys.readouterr().out)["result"] == written["result"]


def test_inter_token_times_are_of_all_requests_together() -> None:
    late = record(chunk_times=(2.0, 2.9), output_tokens=2)
    summary = summarise(LoadResult((record(), late), unsent=0))
    assert summary.inter_token is not None
    assert summary.inter_token.count == 3
    assert summary.inter_token.mean == pytest.approx((0.3 + 0.3 + 0.9) / 3)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(), 3),
        (Slo(ttft=1.0), 2),
        (Slo(tpot=0.25), 3),
        (Slo(tpot=0.1), 2),  # one token has no time per token
        (Slo(ttft=0.9, tpot=0.25), 0),
    ],
)
def test_good_requests_keep_every_part_of_the_slo(slo: Slo, good: int) -> None:
    slow = record(first_token=2.5, chunk_times=(2.5, 2.6, 2.7), end=4.0)
    single = record(output_tokens=1, chunk_times=(2.0,))
    failed = record(error="HTTP 500")
    summary = summarise(LoadResult((record(), slow, single, failed), unsent=0), slo)
    assert summary.good_requests == good
    assert summary.goodput == pytest.approx(good / 4)


def test_what_moved_is_known_only_of_servers_that_tell() -> None:
    assert summarise(LoadResult((record(),), unsent=0)).moved_bytes is None
    figures = RequestStats(25, 16, 2, 3, 300, 200, 0, 0, 0, 0, 0, 0)
    summary = summarise(LoadResult((record(figures=figures), record()), unsent=0))
    assert (summary.moved_blocks, summary.moved_bytes, summary.avoided_bytes) == (5, 300, 200)
    assert summary.computed_tokens == 150


def test_lines_are_added_and_each_can_be_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    summary = summarise(LoadResult((record(),), unsent=0))
    append_lines(path, ModelConfig(path="m"), [summary, summary])
    append_lines(path, ModelConfig(path="n"), [summary])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["config"]["path"] for line in lines] == ["m", "m", "n"]
    assert all({"command", "environment", "result"} <= set(line) for line in lines)
