"""What the dashboard's pages say: HTML, charts, and consequences of actions."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from importlib.resources import files

import msgspec
import pytest

from memserve.api.status import InstanceState, MediumTotals, PeerMoves
from memserve.api.timeline import Chunk, Pause, Timeline
from memserve.cluster.figures import GatewayTotals
from memserve.dashboard import charts, views
from memserve.dashboard.actions import Action, Kind, consequences, offered
from memserve.scheduler.decision_view import Outcome
from memserve.scheduler.prefix_view import PrefixHolder, PrefixReport, PrefixView, TenantSpace
from memserve.types import InstanceId, RequestId, Role
from memserve.watch.history import History, Point
from memserve.watch.latency import LATENCIES, GroupLatency, Percentiles
from memserve.watch.rates import rates_between
from memserve.watch.snapshot import DecisionSeen
from tests.watch_harness import busy_cluster, decision, member_of, seen, snapshot, stats_of

BAD = "<script>alert(1)</script>"


def words(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


@pytest.fixture
def history() -> History:
    told = History()
    for at in range(10, 16):
        told.add(busy_cluster(at))
    return told


def test_members_are_cards_by_host(history: History) -> None:
    assert history.latest is not None
    page = views.cluster_html(history.latest, history.rates)
    assert re.findall(r'data-member="(\w+)"', page) == ["d1", "d0", "p0"]
    assert re.findall(r'aria-label="host ([\d.]+)"', page) == ["10.0.0.7", "127.0.0.1"]
    assert 'class="card draining" data-member="d1"' in page
    assert "HBM: 10 active, 5 pinned, 45 cached, 40 free of 100 blocks" in page
    assert 'class="active" style="width:10.00%"' in page
    text = words(page)
    assert "prefill · memserve" in text
    assert "running 3 waiting 0 tokens/s 100 hits -" in text
    assert "tokens/s 0 hits 25%" in text
    assert "p0 d0 handed over or fetched 1 MB" in text.replace("1.0 MB", "1 MB")


def test_arrows_are_the_largest_flows_first(history: History) -> None:
    found = views.arrows(history.rates)
    assert [(a.source, a.target, a.kind, a.share) for a in found] == [
        ("p0", "d0", "forward", 1.0),
        ("d0", "d1", "forward", 0.5),
        ("d0", "p0", "returned", 1 / 1024),
    ]
    assert found[0].label == "1.0 MB/s"
    assert views.arrows(History().rates) == []


def test_arrows_are_bounded() -> None:
    names = [InstanceId(f"i{n}") for n in range(2 * views.MAX_ARROWS)]
    moves = {name: PeerMoves(1000 + n) for n, name in enumerate(names)}
    before = snapshot(0.0, [(member_of("a"), stats_of())])
    after = snapshot(1.0, [(member_of("a"), stats_of(moves=moves))])
    rates = rates_between(before, after)
    assert len(views.arrows(rates)) == views.MAX_ARROWS
    assert views.arrows(rates)[0].source == names[-1]
    assert views.cluster_html(after, rates).count("<td>handed over") == views.MAX_FLOW_ROWS


def test_tiles_tell_of_the_whole_cluster(history: History) -> None:
    text = words(views.cluster_tiles(history))
    assert "members ready 2 of 3" in text
    assert "requests 4 queued at the gateway 1 requests/s 10 tokens/s 150" in text
    assert "hits 25%" in text
    assert views.cluster_tiles(History()) == ""


def test_an_empty_cluster_says_so() -> None:
    empty = snapshot(0.0, [])
    rates = rates_between(empty, empty)
    assert "no instance yet" in views.cluster_html(empty, rates)
    assert "No decisions yet" in views.requests_html(empty, 0.0, "", None, None)
    assert "<td>" not in views.cache_html(empty, rates)


def test_an_opened_decision_shows_predictions_and_what_happened() -> None:
    told = snapshot(20.0, [], decisions=[decision("x", 18.0, Outcome(0.4, 1.5))])
    page = views.requests_html(told, 20.0, "", views.Opened("x", 18.0), None)
    text = words(page)
    assert "64 of 100 tokens cached; 200 ms less prefill than d1." in text
    assert "first token 400 ms (predicted 350 ms) · whole 1.5 s (predicted 1.4 s)" in text
    assert "p0 → d0 · chosen" in text
    assert "queue 100 ms · prefill 200 ms · transfer 50 ms · decode 1.0 s" in text
    assert views.longest(told.decisions[0].view) == 1.5
    widths = dict(re.findall(r'<i class="(\w+)" title="[^"]*" style="width:([\d.]+)%', page))
    assert widths["happened"] == "26.67"  # 0.4 of 1.5 s
    assert widths["rest"] == "73.33"
    assert float(widths["decode"]) == pytest.approx(100 / 1.5, abs=0.01)


def test_a_time_line_shows_when_each_phase_passed() -> None:
    told = Timeline(
        request=RequestId("x"),
        ended=True,
        handed_over=True,
        prompt_tokens=100,
        cached_tokens=16,
        output_tokens=9,
        preemptions=1,
        fetch=0.1,
        queue=0.2,
        prefill=0.4,
        transfer=0.05,
        queue_here=0.0,
        decode=1.25,
        chunks=(Chunk(0.3, 64), Chunk(0.6, 20)),
        pauses=(Pause(1.0, 0.5),),
    )
    assert [(name, round(begin, 6), round(end, 6)) for name, begin, end in views.phases(told)] == [
        ("fetch", 0.0, 0.1),
        ("queue", 0.1, 0.2),
        ("prefill", 0.3, 0.1),
        ("prefill", 0.4, 0.3),
        ("transfer", 0.7, 0.05),
        ("decode", 0.75, 1.25),
    ]
    seen = snapshot(20.0, [], decisions=[decision("x", 18.0, Outcome(0.7, 2.0))])
    page = views.requests_html(seen, 20.0, "", views.Opened("x", 18.0), None, told)
    text = words(page)
    assert "its time line at d0 2.0 s" in text
    assert "16 of 100 tokens cached, 9 generated; prompt in 2 chunks; 1 pause; 1 preemption" in text
    assert 'class="pause" title="pause of 500 ms, from 1.0 s" style="left:50.00%' in page


def test_an_opened_decision_stays_when_newer_ones_have_pushed_it_out() -> None:
    told = snapshot(20.0, [], decisions=[decision("new", 19.0)])
    opened = views.Opened("old", 1.0)
    kept = DecisionSeen(1.0, decision("old", 1.0))
    assert "old" in words(views.requests_html(told, 20.0, "", opened, kept))
    assert "no longer among" in views.requests_html(told, 20.0, "", opened, None)


def test_a_request_that_was_lost_has_two_decisions() -> None:
    told = snapshot(20.0, [], decisions=[decision("x", 18.0), decision("x", 19.0)])
    for at in (18.0, 19.0):
        found = views.Opened("x", at).find(told.decisions)
        assert found is not None
        assert found.view.at == at
    assert views.Opened("x", 5.0).find(told.decisions) is None
    assert views.Opened("x").find(told.decisions) is not None


def test_a_filter_keeps_decisions_by_word(history: History) -> None:
    assert history.latest is not None
    page = views.requests_html(history.latest, 15.0, "runs D0", None, None)
    assert re.findall(r"open=([\w-]+)", page) == ["cmpl-new"]
    assert "Nothing matches" in views.requests_html(history.latest, 15.0, "zzz", None, None)


def test_what_members_say_is_escaped() -> None:
    view = decision(BAD)
    chosen = msgspec.structs.replace(view.chosen, instance=InstanceId(BAD))
    view = msgspec.structs.replace(view, chosen=chosen, candidates=(chosen,), policy=BAD)
    member = msgspec.structs.replace(member_of(BAD), conflict=BAD)
    told = snapshot(0.0, [(member, stats_of())], decisions=[view])
    rates = rates_between(told, told)
    pages = (
        views.cluster_html(told, rates),
        views.cache_html(told, rates),
        views.requests_html(told, 0.0, "", views.Opened(BAD), None),
    )
    for page in pages:
        assert "<script" not in page
        assert html.escape(BAD) in page


def test_charts_are_thin_and_lose_no_failover() -> None:
    points = [Point(float(n), failovers=int(n in (3, 4, 700))) for n in range(901)]
    shown = charts.thin(points)
    assert len(shown) <= charts.MAX_SHOWN
    assert shown[-1].at == 900
    assert sum(point.failovers for point in shown) == 3
    assert charts.thin([]) == []


def test_latencies_are_in_milliseconds_with_gaps_and_marks() -> None:
    some = {Role.DECODE: GroupLatency(first_token=Percentiles(0.03, 0.05, 0.123456, 7))}
    points = [Point(1.0, latencies=some), Point(2.0, failovers=2)]
    chart = charts.latency(LATENCIES[0], points, Role.DECODE, epoch=100.0)
    names = [series["name"] for series in chart["series"]]
    assert names == ["p50", "p90", "p99"]
    assert chart["series"][0]["data"] == [[101_000, 30.0], [102_000, None]]
    assert chart["series"][2]["data"][0] == [101_000, 123.5]
    (mark,) = chart["series"][0]["markLine"]["data"]
    assert (mark["xAxis"], mark["label"]["formatter"]) == (102_000, "2 failover")


def test_an_objective_is_a_line_across() -> None:
    wanted = charts.Objectives(ttft=2.5, tpot=0.05)
    points = [Point(1.0)]
    first, between, each, whole = (
        charts.latency(kind, points, Role.DECODE, 0.0, wanted)["series"][0]["markLine"]["data"]
        for kind in LATENCIES
    )
    marks = [(mark["yAxis"], mark["label"]["formatter"]) for mark in (*first, *each)]
    assert marks == [(2500.0, "objective"), (50.0, "objective")]
    assert between == whole == []


def test_policies_are_lines_of_one_chart() -> None:
    quick = GroupLatency(first_token=Percentiles(0.03, 0.05, 0.1234567, 8))
    slow = GroupLatency(first_token=Percentiles(0.4, 0.5, 0.6, 1))
    points = [
        Point(1.0, policies={"session": slow, "prompt-tree": quick}),
        Point(2.0, policies={"session": GroupLatency(), "from later": slow}, failovers=1),
    ]
    wanted = charts.Objectives(ttft=0.5)
    chart = charts.latency_by_policy(LATENCIES[0], points, "p99", 100.0, wanted)
    assert {each["name"]: each["data"] for each in chart["series"]} == {
        "from later": [[101_000, None], [102_000, 600.0]],
        "prompt-tree": [[101_000, 123.5], [102_000, None]],
        "session": [[101_000, 600.0], [102_000, None]],
    }
    marks = chart["series"][0]["markLine"]["data"]
    assert [mark.get("xAxis", mark.get("yAxis")) for mark in marks] == [102_000, 500.0]
    (alone,) = charts.latency_by_policy(LATENCIES[0], points[:1], "p50", 0.0)["series"][1:]
    assert (alone["name"], alone["data"]) == ("session", [[1000, 400.0]])
    assert charts.latency_by_policy(LATENCIES[0], [], "p50", 0.0)["series"] == []


STYLES = files("memserve.dashboard") / "assets/dashboard.css"
TEXT_CONTRAST = 4.5  # WCAG 2.2, 1.4.3, level AA


def theme(dark: bool) -> dict[str, str]:
    """The colours of a theme by name, as the browser has them."""
    rules = re.findall(r"(:root|body\.body--dark) \{(.*?)\}", STYLES.read_text(), re.DOTALL)
    found: dict[str, str] = {}
    for selector, body in rules:
        if dark or selector == ":root":
            found.update(re.findall(r"(--[a-z]+): (#[0-9a-f]+);", body))
    return found


def luminance(colour: str) -> float:
    """The relative luminance of `#rgb` or `#rrggbb`, by WCAG."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def texts_of(options: object) -> Iterator[dict[str, str]]:
    """The parts of a chart's options that say what a text looks like."""
    if isinstance(options, list):
        for each in options:
            yield from texts_of(each)
    elif isinstance(options, dict):
        for name, value in options.items():
            if name in ("textStyle", "axisLabel", "label"):
                yield value
            yield from texts_of(value)


def test_contrast_is_computed_as_wcag_has_it() -> None:
    assert contrast("#fff", "#000000") == pytest.approx(21)
    assert contrast("#767676", "#fff") == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_of_charts_can_be_read(dark: bool) -> None:
    points = [Point(1.0, computed=1, policies={"session": GroupLatency()}, failovers=1)]
    wanted = charts.Objectives(ttft=1.0, tpot=1.0)
    drawn = [
        *(charts.latency(kind, points, Role.DECODE, 0.0, wanted) for kind in LATENCIES),
        charts.latency_by_policy(LATENCIES[0], points, "p50", 0.0, wanted),
        *(make(points, 0.0) for make in (charts.sources, charts.hits, charts.evictions)),
    ]
    colours = theme(dark)
    for options in drawn:
        found = list(texts_of(options))
        assert len(found) >= 4  # title, legend, both axes
        for text in found:
            name = re.fullmatch(
                r"getComputedStyle\(document\.body\)\.getPropertyValue\('(--[a-z]+)'\)",
                text[":color"],
            )
            assert name is not None
            assert contrast(colours[name[1]], colours["--card"]) >= TEXT_CONTRAST


def test_the_charts_of_the_cache() -> None:
    point = Point(1.0, computed=300, cached=100, in_hbm=50, from_dram=30, fetched=20, received=400)
    series = charts.sources([point], 0.0)["series"]
    assert {each["name"]: each["data"][0][1] for each in series} == {
        "computed": 300,
        "in HBM": 50,
        "in DRAM": 30,
        "fetched": 20,
        "handed over": 400,
    }
    series = charts.hits([point], 0.0)["series"]
    assert [each["data"][0][1] for each in series] == [12.5, 7.5, 5.0]
    assert charts.hits([Point(1.0)], 0.0)["series"][0]["data"] == [[1000, None]]
    assert len(charts.evictions([point], 0.0)["series"]) == 2


def test_prefixes_are_told_with_their_holders_and_escaped() -> None:
    holders = tuple(
        PrefixHolder(InstanceId(f"i{n}"), {"HBM": 3, "DRAM": n} if n else {})
        for n in range(views.MAX_HOLDERS + 2)
    )
    report = PrefixReport(
        (PrefixView("abcdef0123456789", "shared", 512, 128, 7, 65.0, holders),),
        (TenantSpace("shared", 30, 60),),
        left_out=4,
    )
    page = views.prefixes_html(report, {"abcdef0123456789": "<script>"})
    assert "abcdef01 shared 512 128 7 1 min i0 expected i1 3 HBM 1 DRAM" in words(page)
    assert "and 2 more" in words(page)
    assert "shared 60 30" in words(page)
    assert "and 4 more tenants" in words(page)
    assert "&lt;script&gt;" in page
    assert "No prefix was found again yet." in views.prefixes_html(PrefixReport(), {})


def cluster_of(**members: Role) -> object:
    return snapshot(
        0.0, [(member_of(name, role), stats_of(running=2)) for name, role in members.items()]
    )


def test_a_drain_says_what_goes_on() -> None:
    told = cluster_of(a=Role.COLOCATED, b=Role.COLOCATED)
    assert consequences(Action(Kind.DRAIN, "a"), told) == [
        "a gets no new requests.",
        "What runs goes on to its end: 2 running, 0 waiting sequences.",
        "It stays up, with its cache. Resume undoes this.",
    ]


@pytest.mark.parametrize("kind", [Kind.DRAIN, Kind.RESTART])
def test_the_last_one_of_its_kind_is_warned_of(kind: Kind) -> None:
    def warnings(**members: Role) -> str:
        found = consequences(Action(kind, "a"), cluster_of(**members))
        return " ".join(line for line in found if line.startswith("Warning"))

    assert "no other instance is ready" in warnings(a=Role.PREFILL)
    assert "computes prompts" in warnings(a=Role.PREFILL, b=Role.DECODE)
    assert "no ready decode" in warnings(a=Role.DECODE, b=Role.PREFILL)
    assert warnings(a=Role.DECODE, b=Role.PREFILL, c=Role.COLOCATED) == ""


def test_roles_and_restarts_say_what_becomes_of_the_cache() -> None:
    told = cluster_of(a=Role.PREFILL, b=Role.DECODE)
    changed = consequences(Action(Kind.ROLE, "a", Role.DECODE), told)
    assert changed[0] == "New requests use a as a decode instance instead of prefill."
    assert "Its cache stays." in changed
    assert changed[-1].startswith("Warning: no ready instance is left that computes prompts")
    restarted = consequences(Action(Kind.RESTART, "a"), told)
    assert "Its cache is lost: 50 cached blocks." in restarted
    gone = consequences(Action(Kind.DRAIN, "zzz"), told)
    assert gone == ["zzz is no longer a member."]


def test_only_what_makes_sense_is_offered() -> None:
    def of(state: InstanceState) -> tuple[Kind, ...]:
        (member,) = snapshot(0.0, [(member_of("a", state=state), None)]).members
        return offered(member)

    assert of(InstanceState.READY) == (Kind.DRAIN, Kind.ROLE, Kind.RESTART)
    assert of(InstanceState.DRAINING) == (Kind.RESUME, Kind.ROLE, Kind.RESTART)
    assert of(InstanceState.DEAD) == of(InstanceState.STARTING) == ()


def test_a_member_without_memory_has_no_bars() -> None:
    bare = msgspec.structs.replace(
        member_of("a"), hbm=MediumTotals(), dram=MediumTotals(), pool=False
    )
    told = snapshot(0.0, [(bare, None)], GatewayTotals(first_token=seen(0.1)))
    page = views.cluster_html(told, rates_between(told, told))
    assert 'class="bar"' not in page
    assert "no pool" in page
