"""Teams of threads end with the work that they are for. In processes of their own, as any thread
of this one may have a team by now."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

_COUNT = """
import os, time, torch
from memserve.engine.team import use_one_thread, with_team

def threads():
    return len(os.listdir("/proc/self/task"))

def product():
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))
    return threads()

def falls_to(count):
    deadline = time.monotonic() + 30
    while threads() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    return threads() <= count
"""


def run(script: str) -> None:
    code = _COUNT + textwrap.dedent(script)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in Linux's /proc")
class TestTeam:
    def test_a_team_is_there_for_its_work_and_no_longer(self) -> None:
        run(
            """
            use_one_thread()
            before = threads()
            assert product() == before, "alone means without helpers"
            assert with_team(3, product) == before + 3
            assert falls_to(before)
            assert torch.get_num_threads() == 1
            """
        )

    def test_what_goes_wrong_is_raised(self) -> None:
        run(
            """
            def fail():
                raise ValueError("told")

            try:
                with_team(2, fail)
            except ValueError as error:
                assert str(error) == "told"
            else:
                raise AssertionError("nothing was raised")
            """
        )
