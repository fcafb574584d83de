"""The dashboard that `memserve up` starts: its link works, and what becomes of it harms nobody."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import psutil
import pytest

from memserve.cluster.restarts import RestartLimits
from memserve.config import ClusterConfig, DashboardConfig, LogConfig, PlannerConfig
from memserve.dashboard.child import DashboardChild
from memserve.dashboard.guard import TOKEN_VARIABLE
from memserve.secrets import Secret
from tests.fakes import save_tiny_tokenizer

NOBODY = "http://127.0.0.1:9"  # a gateway that is away: the dashboard waits for it
SECRET = Secret(("a secret of this test",))
AT_ONCE = RestartLimits(first_pause=0.01, longest_pause=0.01)
ANY_PORT = ClusterConfig(dashboard=DashboardConfig(port=0))


class Running:
    """What a dashboard's supervisor tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.links: asyncio.Queue[str] = asyncio.Queue()

    def process(self) -> psutil.Process:
        (found,) = (p for p in psutil.Process().children() if "dashboard" in p.cmdline())
        return found


@asynccontextmanager
async def running(config: ClusterConfig) -> AsyncIterator[Running]:
    told = Running()
    child = DashboardChild(config, told.lines.append, told.lines.append, limits=AT_ONCE)
    work = asyncio.ensure_future(child.run(NOBODY, SECRET, told.links.put_nowait))
    try:
        yield told
    finally:
        work.cancel()
        await asyncio.wait((work,))
    assert not [p for p in psutil.Process().children() if "dashboard" in p.cmdline()]


def opened(line: str) -> bool:
    """Whether the link of a line lets in."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: object) -> None:
            return None

    link = re.findall(r"http\S+", line)[-1]
    try:
        urllib.request.build_opener(Stay).open(link, timeout=20)
    except urllib.error.HTTPError as answer:
        return answer.code == 303
    return False


async def test_its_link_outlives_a_crash() -> None:
    async with running(ANY_PORT) as told:
        link = await told.links.get()
        assert await asyncio.to_thread(opened, link)
        first = told.process()
        assert SECRET.values[0] not in " ".join(first.cmdline())
        first.kill()
        for _ in range(1000):
            try:
                assert await asyncio.to_thread(opened, link)
                break
            except OSError:  # of a process that has just ended, or listens not yet
                await asyncio.sleep(0.05)
        else:
            pytest.fail("it was not started again")
        assert told.process() != first
        assert any("dashboard ended with" in line for line in told.lines)
        assert told.links.empty()


async def test_what_the_planner_plans_for_is_drawn_in() -> None:
    planner = PlannerConfig(enabled=True, ttft=1.5, tpot=0.05)
    async with running(msgspec.structs.replace(ANY_PORT, planner=planner)) as told:
        assert await asyncio.to_thread(opened, await told.links.get())
        assert "--ttft 1.5 --tpot 0.05" in " ".join(told.process().cmdline())
    async with running(ANY_PORT) as told:  # without a planner there are no objectives
        await told.links.get()
        assert "--ttft" not in told.process().cmdline()


async def test_a_taken_port_is_told_and_another_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = msgspec.structs.replace(ANY_PORT, dashboard=DashboardConfig(port=port))
        async with running(config) as told:
            link = await told.links.get()
            assert urlsplit(link.split()[-1]).port not in (None, port)
    assert any(f"another port than {port}" in line for line in told.lines)


async def test_one_that_always_crashes_is_given_up() -> None:
    told = Running()
    child = DashboardChild(
        ANY_PORT, told.lines.append, told.lines.append, limits=AT_ONCE, module="memserve.nothing"
    )
    await child.run(NOBODY, SECRET, told.links.put_nowait)
    assert "no dashboard any more: dashboard crashed too often" in told.lines[-1]
    assert told.links.empty()


async def test_its_token_is_in_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told goes into a log of JSON lines: there the token must be one of the operator's."""
    config = msgspec.structs.replace(ANY_PORT, log=LogConfig(format="json"))
    told = Running()
    await DashboardChild(config, told.lines.append, told.lines.append).run(
        NOBODY, SECRET, told.links.put_nowait
    )
    assert TOKEN_VARIABLE in told.lines[0]
    monkeypatch.setenv(TOKEN_VARIABLE, "a token of the operator's")
    async with running(config) as told:
        assert (await told.links.get()).endswith("/")


def test_memserve_up_starts_it_when_it_serves(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    root = str(Path(__file__).parents[2])
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), root]
    flags = ["--model", str(tmp_path), "--role", "colocated", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.fake_memserve", "up", *flags, "--dashboard-port", "0"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "dashboard is at" in line), None)
        assert line is not None, process.communicate()
        assert opened(line)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
