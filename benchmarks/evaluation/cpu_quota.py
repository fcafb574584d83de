"""A share of a core for each of some processes, by control groups (Linux, root)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from memserve.bench.measure import BenchmarkError

_FIRST_VERSION = Path("/sys/fs/cgroup/cpu")
_SECOND_VERSION = Path("/sys/fs/cgroup")
# Microseconds in which a share is used up. Shorter than an objective for a token, so that a
# process that has to wait for the next period is slow, not late.
_PERIOD = 10_000


@contextmanager
def limited(pids: Sequence[int], cores: float) -> Iterator[None]:
    """Let each process have at most `cores` of CPU time, until the end of the block.

    Raises BenchmarkError where control groups cannot be made.
    """
    first = (_FIRST_VERSION / "cgroup.procs").exists()
    parent = _FIRST_VERSION if first else _SECOND_VERSION
    quota = round(cores * _PERIOD)
    made = []
    try:
        for pid in pids:
            group = parent / f"memserve-{os.getpid()}-{pid}"
            group.mkdir()
            made.append(group)
            if first:
                (group / "cpu.cfs_period_us").write_text(str(_PERIOD))
                (group / "cpu.cfs_quota_us").write_text(str(quota))
            else:
                (group / "cpu.max").write_text(f"{quota} {_PERIOD}")
            (group / "cgroup.procs").write_text(str(pid))
        yield
    except OSError as error:
        raise BenchmarkError(f"CPU time cannot be limited here: {error}") from error
    finally:
        for group in made:
            for member in (group / "cgroup.procs").read_text().split():
                (parent / "cgroup.procs").write_text(member)
            group.rmdir()
