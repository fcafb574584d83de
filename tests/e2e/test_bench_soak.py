"""A soak of seconds: a whole `memserve up`, its instances without a model."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from evaluation.soak.page import write_plot
from evaluation.soak.run import SoakConfig, SoakReport, SoakResult, run_soak
from evaluation.soak.vitals import process_tree
from memserve.config import ClusterConfig, GatewayConfig, InstanceConfig, ModelConfig
from memserve.types import Role
from tests.fakes import MODEL, save_tiny_tokenizer

FAKE = (sys.executable, "-m", "tests.e2e.fake_memserve")
SHORT = SoakConfig(minutes=0.1, interval=0.2, clients=2, prompt_tokens=40, output_tokens=8)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterConfig:
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    paths = [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return ClusterConfig(
        model=ModelConfig(path=str(tmp_path), served_name=MODEL),
        gateway=GatewayConfig(workers=2),
        instance=(InstanceConfig(role=Role.PREFILL), InstanceConfig(role=Role.DECODE)),
    )


async def test_a_sound_cluster_is_found_sound(cluster: ClusterConfig, tmp_path: Path) -> None:
    before = set(process_tree(os.getpid()))  # other tests' servers of forks live on
    result = await run_soak(SHORT, cluster, lambda _: None, log=tmp_path / "log", command=FAKE)
    assert result.cut_short is None
    names = sorted(record.life.name for record in result.processes)
    assert names == ["decode-1", "gateway", "prefill-0", "up", "worker-0", "worker-1"]
    assert all(len(record.samples) > 5 for record in result.processes)
    assert {kind.kind for kind in result.kinds} >= {"probe", "chat", "hang-up", "bad request"}
    assert sum(kind.wrong + kind.unanswered + kind.failed for kind in result.kinds) == 0
    assert {look.instance for look in result.quiet} == {"prefill-0", "decode-1"}
    assert sum(look.leaked for look in result.quiet) == 0
    write_plot(tmp_path / "plot.html", SoakReport.of(SHORT, result))
    write_plot(tmp_path / "plot.svg", SoakReport.of(SHORT, result))
    for plot in (tmp_path / "plot.html", tmp_path / "plot.svg"):
        assert "Resident memory" in plot.read_text()
    assert {*process_tree(os.getpid())} <= before  # nothing is left


async def test_a_cluster_that_ends_cuts_the_run_short(
    cluster: ClusterConfig, tmp_path: Path
) -> None:
    """And what there was by then is told."""

    def kill(line: str) -> None:
        if "begin" in line:
            (up,) = (life for life in process_tree(os.getpid()) if "up" in _line(life.pid))
            os.kill(up.pid, signal.SIGKILL)

    result: SoakResult = await run_soak(SHORT, cluster, kill, log=tmp_path / "log", command=FAKE)
    assert result.cut_short is not None
    assert "memserve up ended with -9" in result.cut_short
    assert not result.sound


def _line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
