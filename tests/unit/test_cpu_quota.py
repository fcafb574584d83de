"""Shares of a core for processes, by real control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.cpu_quota import limited
from memserve.bench.measure import BenchmarkError


def test_processes_are_limited_and_let_go() -> None:
    sleeping = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    groups = Path(f"/proc/{sleeping.pid}/cgroup")
    try:
        with limited([sleeping.pid], 0.25):
            assert f"memserve-{os.getpid()}-{sleeping.pid}" in groups.read_text()
    except BenchmarkError as error:
        pytest.skip(f"{error} (run as root, where control groups can be written)")
    finally:
        after = groups.read_text()
        sleeping.kill()
        sleeping.wait()
    assert "memserve-" not in after


def test_a_process_that_has_gone_is_an_error() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with pytest.raises(BenchmarkError, match="cannot be limited"), limited([gone.pid], 0.25):
        pass
