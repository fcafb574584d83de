"""Shared memory outlives neither its pool nor a crash, and a full /dev/shm is an error."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memserve.errors import SharedMemoryFull
from memserve.pool.pool import BlockPool
from memserve.pool.segment import SHM_DIRECTORY, SharedSegment, pid_namespace, sweep
from tests.pool_harness import LAYOUT


def names() -> set[str]:
    return {path.name for path in SHM_DIRECTORY.glob(f"memserve-*-{os.getpid()}-*")}


def test_a_pool_leaves_no_segment_behind() -> None:
    before = names()
    with BlockPool(LAYOUT, 4, 4):
        assert len(names() - before) == 2
    assert names() <= before


def test_memory_in_use_stays_valid_after_the_pool() -> None:
    with BlockPool(LAYOUT, 4) as pool:
        layers = pool.layer_views()
    layers[0].fill_(3.0)
    assert float(layers[0].sum()) == 3.0 * layers[0].numel()


def test_segments_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from memserve.pool.segment import SharedSegment\n"
        "kept = SharedSegment(4096, Path(sys.argv[1])); print(kept.name, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    assert sweep(tmp_path) == []  # it lives
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert sweep(tmp_path) == [name]  # dead, though nobody has reaped it yet
    process.wait()
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_a_reused_pid_does_not_protect_a_segment(tmp_path: Path) -> None:
    with_own_pid = SharedSegment(4096, tmp_path)
    head, start, serial = with_own_pid.name.rsplit("-", 2)
    older = tmp_path / f"{head}-{int(start) - 1}-{serial}"
    older.touch()
    assert sweep(tmp_path) == [older.name]
    with_own_pid.close()


def test_the_sweep_leaves_strangers_alone(tmp_path: Path) -> None:
    # Another container may share /dev/shm: its pids are not ours to judge.
    foreign_namespace = tmp_path / "memserve-1-999999-5-0"
    unknown = tmp_path / "memserve-something"
    foreign_namespace.touch()
    unknown.touch()
    assert sweep(tmp_path) == []


def test_the_sweep_goes_past_what_is_no_segment(tmp_path: Path) -> None:
    # Anybody can make such a directory in /dev/shm; root may remove what anybody made.
    for serial in (0, 1):
        (tmp_path / f"memserve-{pid_namespace()}-999999999-1-{serial}").mkdir()
    dead = tmp_path / f"memserve-{pid_namespace()}-999999999-1-2"
    dead.touch()
    assert sweep(tmp_path) == [dead.name]


def test_a_full_file_system_is_an_error_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    before = names()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SharedMemoryFull, match=f"{4 * LAYOUT.block_bytes} bytes.*--shm-size"):
        BlockPool(LAYOUT, 4)
    assert names() <= before


def test_a_failed_growth_leaves_the_pool_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with BlockPool(LAYOUT, 4, 2, dram_segment_blocks=2) as pool:
        real, calls = os.posix_fallocate, []

        def full_at_second(descriptor: int, offset: int, size: int) -> None:
            calls.append(size)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "no space")
            real(descriptor, offset, size)

        before = names()
        monkeypatch.setattr(os, "posix_fallocate", full_at_second)
        with pytest.raises(SharedMemoryFull):
            pool.grow_dram(4)
        assert pool.stats().dram.total == 2
        assert names() == before
        pool.check_integrity()


def test_segments_are_private_to_the_user(tmp_path: Path) -> None:
    segment = SharedSegment(4096, tmp_path)
    assert segment.path.stat().st_mode & 0o777 == 0o600
    segment.close()
