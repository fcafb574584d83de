"""The page of a load run: every run and process in it, and the spread of repeats."""

from __future__ import annotations

import msgspec

from memserve.bench.environment import capture_environment
from memserve.bench.serving_page import repeats_table, serving_page
from memserve.bench.tables import PlainTable, plain_tables
from memserve.bench.work import ServeBenchConfig
from tests.paper_runs import cells, made_up_run


def test_a_page_of_repeats() -> None:
    runs = [
        msgspec.structs.replace(made_up_run(cells()[0], ttft).run, name=name, repeat=repeat)
        for name in ("caching full", "caching off")
        for repeat, ttft in enumerate((1.0, 2.0, 3.0))
    ]
    (table,) = plain_tables(repeats_table(runs))
    assert isinstance(table, PlainTable)
    assert [row[:2] for row in table.rows] == [("caching full", "3"), ("caching off", "3")]
    assert table.rows[0][table.headers.index("TTFT mean s")] == "2 ±2.5"
    config = ServeBenchConfig(repeats=3, concurrency=4)
    text = serving_page(capture_environment(), config, runs)
    assert "4 sessions at a time (closed loop), 3 repeats." in text
    assert text.count('<img class="plot"') == 4
    assert all(f"caching full #{n}" in text for n in (1, 2, 3))
    assert "prefill-0" in text


def test_a_run_without_an_answer_has_a_page_too() -> None:
    run = made_up_run(cells()[0], 1.0).run
    summary = msgspec.structs.replace(run.summary, ttft=None, tpot=None, jct=None, inter_token=None)
    empty = msgspec.structs.replace(run, summary=summary, requests=(), processes=())
    text = serving_page(capture_environment(), ServeBenchConfig(), [empty])
    assert "<img" not in text
    assert "0.1 sessions begin per second (Poisson)" in text
