"""`memserve top`, driven as a person would, on 80 columns and 24 lines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from textual.message_pump import MessagePump
from textual.pilot import Pilot
from textual.widgets import DataTable

from memserve import cli_watch
from memserve.api.status import MediumTotals
from memserve.clock import ManualClock
from memserve.errors import ConfigError
from memserve.scheduler.contract import Terms
from memserve.scheduler.decision_view import CandidateView
from memserve.top import rows
from memserve.top.app import TopApp
from memserve.types import InstanceId
from memserve.watch.snapshot import DecisionSeen, Snapshot
from memserve.watch.watcher import Watcher
from tests.watch_harness import URL, busy_cluster, decision, member_of, snapshot, stats_of


class Recorded(Watcher):
    """A busy cluster, a second further with each poll."""

    def __init__(self) -> None:
        super().__init__([URL], clock=ManualClock(20.0))
        self.seconds = 20
        self.recorded: Callable[[float], Snapshot] = busy_cluster
        self.away = False

    async def poll(self) -> None:
        if self.away:
            self.failures[URL] = f"no answer from {URL}: connection refused"
            return
        self.failures.clear()
        self.seconds += 1
        self.clock.advance(1)  # type: ignore[attr-defined]
        self.history.add(self.recorded(self.seconds))


class Screen:
    """The application under test, and what stands on its screen."""

    def __init__(self, app: TopApp, pilot: Pilot[None], watcher: Recorded) -> None:
        self.app = app
        self.pilot = pilot
        self.watcher = watcher

    @property
    def lines(self) -> list[str]:
        strips = self.app.screen._compositor.render_strips()
        return ["".join(segment.text for segment in strip) for strip in strips]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def column(self, table: str, name: str) -> list[str]:
        found = self.app.query_one(f"#{table}", DataTable)
        return [str(found.get_cell(row, name)).strip() for row in found.rows]

    async def polled(self, times: int = 1) -> None:
        """What the application does by itself once a second."""
        for _ in range(times):
            await self.watcher.poll()
            self.app._told()
        await self.settled()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.settled()

    async def settled(self) -> None:
        """Until all is drawn. The pilot's own waits take a process that gets no CPU for idle."""
        while self._at_work():
            await self.pilot.pause(0.01)

    def _at_work(self) -> bool:
        screen = self.app.screen
        pumps: list[MessagePump] = [self.app, screen, *screen.walk_children()]
        waiting = any(pump.message_queue_size or pump._next_callbacks for pump in pumps)
        drawn = not (screen._dirty_widgets or screen._layout_required or screen._callbacks)
        return waiting or not drawn


@asynccontextmanager
async def running(size: tuple[int, int] = (80, 24)) -> AsyncIterator[Screen]:
    watcher = Recorded()
    app = TopApp([], watcher=watcher, pause=3600)
    async with app.run_test(size=size) as pilot:
        screen = Screen(app, pilot, watcher)
        await screen.polled(2)
        yield screen


async def test_everything_fits_into_a_small_terminal() -> None:
    async with running() as screen:
        lines = screen.lines
        assert len(lines) == 24
        assert all(len(line) == 80 for line in lines)
        assert "members: 2 ready, 1 draining; requests: 4 (1 queued)" in lines[0]
        assert "tok/s" in lines[1]
        assert " 150 " in lines[1]
        assert "25%" in lines[1]
        assert lines[2].split() == [
            *("id↑", "role", "kind", "state", "HBM", "DRAM", "run", "wait", "tok/s", "hits")
        ]
        assert lines[3].startswith("d0 ")
        assert "60%" in lines[3]
        assert lines[3].split()[-4:] == ["3", "0", "100", "-"]
        assert lines[5].split()[0] == "p0"
        assert lines[5].split()[-1] == "25%"
        assert "p0 → d0" in screen.text
        assert "64 of 100 tokens cached; 200 ms less prefill than d1" in screen.text
        assert "● d0 0.500: queue 100 ms  prefill 200 ms  transfer 50 ms  decode 1.0 s" in (
            screen.text
        )
        assert "? help" in lines[-1]


async def test_members_are_sorted_by_key() -> None:
    async with running() as screen:
        assert screen.column("members", "id") == ["d0", "d1", "p0"]
        await screen.press("r")
        assert screen.column("members", "id") == ["p0", "d1", "d0"]
        for _ in range(7):
            await screen.press("s")
        assert "wait↓" in screen.text
        assert screen.column("members", "id") == ["d1", "d0", "p0"]
        await screen.press("s")
        assert screen.column("members", "tok/s") == ["100", "50", "0"]
        await screen.press("s")
        assert screen.column("members", "hits") == ["25%", "-", "-"]  # the unknown ones last
        await screen.press("S", "S")
        assert "wait↓" in screen.text


async def test_a_filter_keeps_what_it_names_until_escape() -> None:
    async with running() as screen:
        await screen.press("slash", *"decode ready", "enter")
        assert screen.column("members", "id") == ["d0"]
        await screen.press("slash", "escape")
        assert screen.column("members", "id") == ["d0", "d1", "p0"]
        await screen.press("slash", *"cmpl-2")
        assert screen.column("decisions", "request") == ["cmpl-2"]
        assert screen.column("members", "id") == []
        await screen.polled()
        assert screen.column("decisions", "request") == ["cmpl-2"]


async def test_the_selected_decision_stays_selected_while_others_come() -> None:
    async with running() as screen:
        decisions = [decision(f"cmpl-{i}", float(i), prefill=None) for i in range(30)]
        members = [(member_of("d0"), stats_of())]
        screen.watcher.recorded = lambda at: snapshot(at, members, decisions=decisions)
        await screen.polled()
        await screen.press("tab", "down", "down")
        assert "cmpl-27  64 of 100 tokens cached" in screen.text
        decisions += [decision(f"cmpl-{i}", float(i), prefill=None) for i in range(30, 33)]
        await screen.polled()
        assert "cmpl-27  64 of 100 tokens cached" in screen.text
        assert screen.app.query_one("#decisions", DataTable).cursor_row == 5
        await screen.press(*["up"] * 5)
        decisions += [decision("cmpl-new", 40.0)]
        await screen.polled()
        assert "cmpl-new  64 of 100 tokens cached" in screen.text  # at the top: the newest one


async def test_a_gateway_that_goes_away_is_said_and_met_again() -> None:
    async with running() as screen:
        screen.watcher.away = True
        await screen.polled()
        screen.watcher.clock.advance(7)  # type: ignore[attr-defined]
        await screen.polled()
        assert f"Trying again; these figures are 7 s old: no answer from {URL}" in screen.lines[1]
        assert screen.column("members", "id") == ["d0", "d1", "p0"]
        screen.watcher.away = False
        await screen.polled()
        assert "Trying again" not in screen.text


async def test_a_pause_holds_the_figures() -> None:
    async with running() as screen:
        await screen.press("p")
        assert "paused" in screen.lines[0]
        before = screen.column("decisions", "age")
        screen.watcher.clock.advance(100)  # type: ignore[attr-defined]
        await screen.polled(2)
        assert screen.column("decisions", "age") == before
        await screen.press("p")
        await screen.polled()
        assert "paused" not in screen.lines[0]


async def test_help_opens_and_closes_and_q_quits() -> None:
    async with running() as screen:
        await screen.press("question_mark")
        assert "█ active" in screen.text
        assert "Esc closes this" in screen.text  # all of it fits
        await screen.polled(2)
        await screen.press("escape")
        assert "█ active" not in screen.text
        await screen.pilot.press("q")
    assert screen.app.return_code == 0


async def test_latencies_are_told_by_policy_and_by_role() -> None:
    async with running() as screen:
        await screen.press("l")
        await screen.polled(2)
        lines = screen.lines
        (policy,) = (at for at, line in enumerate(lines) if "policy prompt-tree" in line)
        assert lines[policy].split()[3:6] == ["p50", "p90", "p99"]
        ttft, between, each, whole = (line.split() for line in lines[policy + 1 : policy + 5])
        # 30 ms is between the bounds 25 and 50 ms.
        assert ttft[1:8] == ["TTFT", "38", "ms", "48", "ms", "50", "ms"]
        assert "█" in ttft[8]
        assert [row[1] for row in (between, each, whole)] == ["inter-token", "TPOT", "JCT"]
        assert between[2:5] == ["-", "-", "-"]
        (role,) = (at for at, line in enumerate(lines) if "role decode" in line)
        assert role > policy
        assert lines[role + 1].split()[1:4] == ["TTFT", "18", "ms"]
        await screen.press("escape")
        assert "policy prompt-tree" not in screen.text


async def test_a_poll_may_end_before_the_latencies_are_composed() -> None:
    async with running() as screen:
        screen.app.action_latency()
        screen.app._told()
        await screen.settled()
        assert "policy prompt-tree" in screen.text


@pytest.mark.parametrize("size", [(40, 10), (200, 60)])
async def test_other_terminals(size: tuple[int, int]) -> None:
    async with running(size) as screen:
        assert all(len(line) == size[0] for line in screen.lines)
        await screen.pilot.resize_terminal(80, 24)
        await screen.polled()
        assert screen.lines[3].startswith("d0 ")


def test_bars_have_a_cell_for_whatever_there_is() -> None:
    assert rows.bar(MediumTotals(1000, 1, 1, 998)).plain == "█▒▒▒▒░ 100%"
    assert rows.bar(MediumTotals(100, 100)).plain == "░░░░░░   0%"
    assert rows.bar(MediumTotals()).plain == "-"


def test_an_explanation_says_how_many_candidates_it_leaves_out() -> None:
    view = decision("x")
    many = tuple(
        CandidateView(InstanceId(f"d{n}"), score=1.0 + n, terms=Terms(queue=n)) for n in range(5)
    )
    seen = DecisionSeen(0.0, type(view)("x", "p", 0.0, 0.0, many[0], 9, many))  # type: ignore[arg-type]
    lines = rows.explanation(seen, 3).plain.splitlines()
    assert len(lines) == 3
    assert lines[1].endswith("d0 1.000: at once")
    assert lines[2].endswith("d1 2.000: queue 1.0 s   (+7 more)")


def test_without_textual_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_watch, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs Textual: pip install 'memserve\[ui\]'"):
        cli_watch.top()
