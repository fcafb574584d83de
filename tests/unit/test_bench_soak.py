"""What a soak makes of its samples, and of what is said by servers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections import Counter

import msgspec
import pytest

from evaluation.soak.client import Outcome, _whole
from evaluation.soak.cluster import to_toml
from evaluation.soak.load import KindTally, described
from evaluation.soak.page import over_time, soak_tables, verdict
from evaluation.soak.run import (
    TOLERANCES,
    QuietLook,
    Sample,
    SoakResult,
    default_cluster,
    record_of,
)
from evaluation.soak.trend import Tolerance, theil_sen, trend_of
from evaluation.soak.vitals import Life, Vitals, name_of, process_tree, vitals
from memserve.bench.plots import draw
from memserve.config import ClusterConfig, GatewayConfig, InstanceConfig, ModelConfig, parse_config
from memserve.types import Role

HOUR = [float(at) for at in range(0, 3600, 5)]
MB = 2**20
NARROW = Tolerance(1.0, 0.0)
UP = Life("up", 1, 1)


def noise(seed: int) -> list[float]:
    source = random.Random(seed)
    return [source.gauss(0, 1) for _ in HOUR]


def test_a_slope_is_found_among_noise_and_peaks() -> None:
    values = [100 + 0.01 * at + n for at, n in zip(HOUR, noise(1), strict=True)]
    for place in range(0, len(values), 7):
        values[place] += 10_000
    trend = trend_of(HOUR, values, NARROW)
    assert trend is not None
    assert trend.per_hour == pytest.approx(36, rel=0.1)
    assert trend.flat is False


def test_noise_and_what_fills_during_the_warm_up_are_flat() -> None:
    values = [min(at, 600) + n for at, n in zip(HOUR, noise(2), strict=True)]
    trend = trend_of(HOUR, values, NARROW)
    assert trend is not None
    assert trend.flat is True
    assert trend.first == pytest.approx(600, abs=1)


def test_a_step_up_is_growth_and_a_step_down_is_none() -> None:
    def step(height: float) -> list[float]:
        return [100 + height * (at > 2400) for at in HOUR]

    up, down = trend_of(HOUR, step(50), NARROW), trend_of(HOUR, step(-50), NARROW)
    assert up is not None
    assert down is not None
    assert (up.growth, down.growth, down.flat) == (50, -50, True)


def test_few_samples_say_nothing() -> None:
    trend = trend_of([0, 1, 2], [1, 2, 3], NARROW)
    assert trend is not None
    assert trend.flat is None
    assert trend_of([], [], NARROW) is None
    assert trend_of([5], [1], NARROW) is not None


def test_slopes_of_long_runs_are_taken_of_some_samples() -> None:
    import numpy as np

    times = np.arange(100_000, dtype=np.float64)
    assert theil_sen(times, 3 * times + 1) == pytest.approx(3)


def samples(private: list[float], fds: int = 20) -> list[Sample]:
    return [
        Sample(at, Vitals(int(p) + 5, int(p), 0, 0, fds, 9))
        for at, p in zip(HOUR, private, strict=True)
    ]


def test_processes_are_judged_by_all_their_figures() -> None:
    flat = record_of(UP, samples([100 * MB for _ in HOUR]))
    leaks = record_of(UP, samples([100 * MB + 0.1 * MB * at for at in HOUR]))
    short = record_of(UP, samples([100 * MB for _ in HOUR])[:5])
    assert [verdict(each) for each in (flat, leaks, short)] == [
        "flat",
        "grows: private, rss",
        "too short",
    ]
    assert set(flat.trends) == set(TOLERANCES)


def result(**changes: object) -> SoakResult:
    quiet = QuietLook(10, "decode-1", active=0, detached=0, pinned=0, cached=7, whole=True)
    records = (record_of(UP, samples([MB for _ in HOUR])),)
    sound = SoakResult(60, (KindTally("probe", 10, 10),), records, (quiet,), ())
    return msgspec.structs.replace(sound, **changes)


def test_a_result_is_sound_or_not_and_can_be_read_back() -> None:
    assert result().sound
    assert not result(kinds=(KindTally("probe", 10, 9, wrong=1),)).sound
    assert not result(kinds=(KindTally("chat", 10, 9, unanswered=1),)).sound
    assert not result(cut_short="memserve up ended").sound
    for changes in ({"active": 1}, {"detached": 2}, {"pinned": 3}, {"whole": False}):
        look = msgspec.structs.replace(result().quiet[0], **changes)
        assert not result(quiet=(look,)).sound
    assert msgspec.json.decode(msgspec.json.encode(result()), type=SoakResult) == result()
    assert soak_tables(result()).renderables
    drawn = draw(*over_time(result()))
    assert all(f">{plot.title}</text>" in drawn for plot in over_time(result()))


def test_this_process_has_vitals() -> None:
    before = vitals(os.getpid())
    assert before is not None
    with open(os.devnull) as _:
        over = threading.Event()
        thread = threading.Thread(target=over.wait)
        thread.start()
        during = vitals(os.getpid())
        over.set()
        thread.join()
    assert during is not None
    assert during.fds == before.fds + 1
    assert during.threads == before.threads + 1
    assert before.rss > before.private > 0
    assert vitals(2**22 + 1) is None


def test_children_are_found_by_name() -> None:
    code = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, "instance", "--id", "decode-1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        tree = process_tree(os.getpid(), "test")
        child.communicate()
    assert tree[0].name == "test"
    assert ("decode-1", child.pid) in [(life.name, life.pid) for life in tree]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("python -m memserve gateway --port 1", "gateway"),
        ("python -m memserve gateway --port 1 --worker 1:5,6", "worker-1"),
        ("python -m memserve instance --id prefill-0 --port 0", "prefill-0"),
        ("/usr/bin/env x", "env"),
    ],
)
def test_names_of_processes(line: str, name: str) -> None:
    assert name_of(line.split()) == name


def test_configurations_are_written_as_they_are_read() -> None:
    config = ClusterConfig(
        model=ModelConfig(path='a "model" \\ €', dtype="float32"),
        gateway=GatewayConfig(port=1, access_log=False),
        instance=(*default_cluster(), InstanceConfig(role=Role.DECODE, cpus=(0, 1))),
    )
    assert parse_config(to_toml(config)) == config


def test_answers_are_told_from_errors_in_the_apis_form_and_from_nothing() -> None:
    error = b'{"error": {"message": "no", "type": "invalid_request_error"}}'
    assert _whole(400, error).outcome is Outcome.REFUSED
    assert _whole(503, error).outcome is Outcome.REFUSED
    assert _whole(500, error).outcome is Outcome.FAILED
    assert _whole(500, b"Internal Server Error").outcome is Outcome.UNANSWERED
    told = _whole(200, b'{"choices": [{"text": "a", "token_ids": [5]}, {"text": "b"}]}')
    assert (told.outcome, told.text, told.tokens) == (Outcome.ANSWERED, "ab", (5,))


def test_troubles_are_described_in_one_line_each() -> None:
    assert described(Counter({"a\nb": 2, "c": 1})) == ("2 x a\\nb", "1 x c")
