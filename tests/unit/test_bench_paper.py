"""The paper's matrix: equal hardware, equal requests, nothing measured twice, honest verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from evaluation.paper import measure
from evaluation.paper.claims import CLAIMS, Claim, Finding, findings
from evaluation.paper.matrix import COMPARED, TOPOLOGIES, PaperConfig, groups
from evaluation.paper.measure import Budget, Kept, TimeIsUp, measure_groups
from evaluation.paper.page import paper_page
from evaluation.paper.simulate import RATES, SHAPES
from evaluation.paper.tables import measured_findings, reasons, reduce_runs
from memserve.bench.environment import capture_environment
from memserve.bench.measure import ServeRun
from memserve.bench.statistics import Estimate
from memserve.bench.work import ServeBenchConfig, Work
from memserve.clock import ManualClock
from memserve.config import ClusterConfig, ModelConfig
from memserve.errors import ConfigError
from memserve.models.resolve import ModelDirectory, Progress
from tests.paper_runs import CONFIG, cells, made_up_run, made_up_runs

T = TypeVar("T")
MODEL = ModelDirectory(Path("m"), "m")


def test_every_topology_has_the_same_hardware() -> None:
    for topology in TOPOLOGIES.values():
        instances = topology.cluster(ModelConfig()).instance
        assert [(i.threads, i.count) for i in instances] == [(1, 1), (1, 1)]
        assert len({(i.hbm_blocks, i.dram_blocks) for i in instances}) == 1


def test_the_matrix_is_three_workloads_three_rates_three_repeats_of_each() -> None:
    found = cells()
    assert len(set(map(str, found))) == len(found)
    counts = Counter((c.topology, c.config.workload) for c in found)
    assert all(counts[name, w] == 9 for name in COMPARED for w in ("sharegpt", "loogle", "react"))
    assert counts["1P1D pd", "react"] == 3


def test_topologies_get_the_same_requests() -> None:
    sent = {
        name: [(c.config, c.rate, c.repeat) for c in cells() if c.topology == name]
        for name in COMPARED
    }
    assert all(configs == sent["PD"] for configs in sent.values())


def test_the_quick_matrix_starts_each_topology_once() -> None:
    found = list(groups(PaperConfig(data="data", quick=True), ModelConfig()))
    assert [group.topology.name for group in found] == list(COMPARED)
    assert all(len(group.cells) == 3 for group in found)


def test_what_is_kept_is_found_again_and_other_settings_are_not(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    first, second, *_ = cells()
    kept.add(made_up_run(first, 1.0))
    again = Kept(tmp_path)
    assert again.has(first)
    assert not again.has(second)
    assert not again.has(cells(PaperConfig(data="data", seed=1))[0])
    assert [run.cell for run in again.of(cells())] == [first]


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"result": {}}\n')
    with pytest.raises(ConfigError, match=r"runs.jsonl:1: .*move it away"):
        Kept(tmp_path)


class FakeCluster:
    """Gives made-up runs, and counts them."""

    def __init__(self) -> None:
        self.started: list[ClusterConfig] = []
        self.runs: list[tuple[str, int]] = []

    async def or_failure(self, work: Awaitable[T]) -> T:
        return await work

    async def run(
        self, name: str, config: ServeBenchConfig, work: Work, progress: Progress, repeat: int = 0
    ) -> ServeRun:
        self.runs.append((name, repeat))
        return made_up_run(cells()[0], 1.0).run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    cluster = FakeCluster()

    @asynccontextmanager
    async def started(config: ClusterConfig, _: Progress) -> AsyncIterator[FakeCluster]:
        cluster.started.append(config)
        yield cluster

    monkeypatch.setattr(measure, "started_cluster", started)
    monkeypatch.setattr(measure, "load_sessions", lambda *_: ())
    return cluster


def ignore(_: str) -> None:
    pass


async def test_a_second_start_measures_only_what_is_missing(
    tmp_path: Path, fake: FakeCluster
) -> None:
    planned = list(groups(PaperConfig(data="data", quick=True), ModelConfig()))
    kept = Kept(tmp_path)
    for cell in (*planned[0].cells, planned[1].cells[0]):
        kept.add(made_up_run(cell, 1.0))
    clock = ManualClock()
    await measure_groups(planned, Kept(tmp_path), MODEL, Budget(60, clock), ignore)
    assert len(fake.started) == 3  # nothing of the first group was missing
    assert len([run for run in fake.runs if run[0] != "warm-up"]) == 8
    kept = Kept(tmp_path)
    assert all(kept.has(cell) for group in planned for cell in group.cells)


async def test_nothing_is_begun_when_time_is_up(tmp_path: Path, fake: FakeCluster) -> None:
    planned = list(groups(CONFIG, ModelConfig()))
    with pytest.raises(TimeIsUp):
        await measure_groups(planned, Kept(tmp_path), MODEL, Budget(0, ManualClock()), ignore)
    assert fake.started == []


def test_the_papers_table_is_whole() -> None:
    assert len(CLAIMS) == 18
    assert {claim.workload for claim in CLAIMS} == set(RATES)
    known = {claim for claim in CLAIMS if claim.paper is not None}
    assert len(known) == 16


@pytest.mark.parametrize(
    ("paper", "ours", "verdict"),
    [
        (-0.3, Estimate(-0.3, -0.4, -0.2, 9), "agrees"),
        (-0.3, Estimate(-0.14, -0.2, -0.1, 9), "agrees, other size"),
        (-0.3, Estimate(-0.7, -0.8, -0.6, 9), "agrees, other size"),
        (-0.3, Estimate(0.2, 0.1, 0.3, 9), "contradicts"),
        (-0.3, Estimate(-0.3, -0.7, 0.1, 9), "not clear"),
        (-0.3, Estimate(0.2, 0.2, 0.2, 1), "contradicts"),
        (-0.3, None, "not measured"),
        (None, Estimate(0.2, 0.1, 0.3, 9), None),
    ],
)
def test_verdicts(paper: float | None, ours: Estimate | None, verdict: str | None) -> None:
    assert Finding(Claim("w", "caching", "JCT mean", paper), ours).verdict == verdict


def test_changes_are_taken_between_the_right_topologies() -> None:
    base = {"PD": 4.0, "1P1D": 2.0, "1P1D-CC": 0.5}
    found = measured_findings(made_up_runs(lambda cell: base.get(cell.topology, 9.0) * cell.rate))
    caching = [
        f.ours for f in found if (f.claim.change, f.claim.figure) == ("caching", "TTFT mean")
    ]
    assert [ours.mean for ours in caching if ours] == pytest.approx([-0.75] * 3)
    assert [ours.runs for ours in caching if ours] == [9] * 3
    apart = [f.ours.mean for f in found if f.claim.change == "disaggregation" and f.ours]
    assert len(apart) == 6
    assert all(-0.5 < mean < -0.3 for mean in apart)  # of JCT, which is TTFT and the same decoding


def test_topologies_with_other_runs_are_not_compared() -> None:
    found = findings(lambda _, topology, __: [1.0] if topology == "PD" else [1.0, 2.0])
    assert {f.verdict for f in found if f.claim.change == "disaggregation" and f.claim.paper} == {
        "not measured"
    }


def test_the_report_says_what_contradicts_the_paper_and_what_is_missing() -> None:
    worse = {"PD": 1.0, "1P1D": 2.0, "1P1D-CC": 1.5}
    runs = made_up_runs(lambda cell: worse.get(cell.topology, 1.0))
    result = reduce_runs(runs, (), ("a note",), ("x: time was up",))
    against = reasons(result)
    assert against
    assert all("PD to 1P1D" in text for text in against)
    assert "prefill-0" in against[0]
    text = paper_page(capture_environment(), result, ())
    assert "x: time was up" in text
    assert "a note" in text
    assert all(part in text for part in ("sharegpt: TTFT mean s", "react: JCT P99 s", "Processes"))
    met = {target.text.split(":")[0]: target.met for target in result.targets[:3]}
    assert met == {"sharegpt": False, "loogle": False, "react": False}


def test_the_simulated_clusters_have_eight_devices() -> None:
    assert {s.colocated + s.prefill + s.decode for s in SHAPES} == {4}
    assert [s.name for s in SHAPES] == list(COMPARED)


@pytest.mark.parametrize(("busy", "said"), [(0.5, False), (0.0, True)])
def test_a_prefill_instance_that_was_left_out_is_the_reason(busy: float, said: bool) -> None:
    worse = {"PD": 1.0, "1P1D": 1.0, "1P1D-CC": 1.5}
    runs = made_up_runs(lambda cell: worse.get(cell.topology, 1.0), busy)
    against = [t for t in reasons(reduce_runs(runs, (), (), ())) if "to 1P1D-CC" in t]
    assert against
    assert all(("left the prefill instance idle" in text) == said for text in against)
