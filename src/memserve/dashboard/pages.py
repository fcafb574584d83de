"""The pages that show: Cluster, Requests, Cache, Latency."""

from __future__ import annotations

import msgspec
from nicegui import ui

from memserve.api.timeline import Timeline
from memserve.dashboard import charts, views
from memserve.dashboard.frame import Frame
from memserve.types import Role
from memserve.watch.history import policies_of
from memserve.watch.latency import LATENCIES
from memserve.watch.snapshot import UNKNOWN, DecisionSeen, Snapshot
from memserve.watch.watcher import PREFIX_SECONDS

ASKS = 3  # for a time line: one of an instance that has ended is not to be had
_BY_ROLE, _BY_POLICY = "by role", "by policy"
CHART_SECONDS = 2.0  # between updates of charts, which are the largest part of what is sent


def add_pages(frame: Frame, objectives: charts.Objectives, *, texts: bool = False) -> None:
    """Register the pages. `texts`: what prefixes say may be shown."""
    _add_cluster(frame)
    _add_requests(frame)
    _add_cache(frame, texts)
    _add_latency(frame, objectives)


def _add_cluster(frame: Frame) -> None:
    history = frame.watcher.history

    @ui.page("/")
    def cluster() -> None:
        def refresh() -> None:
            if history.latest is None:
                return
            tiles.set_content(views.cluster_tiles(history))
            cards.set_content(views.cluster_html(history.latest, history.rates))
            arrows = msgspec.json.encode(views.arrows(history.rates)).decode()
            ui.run_javascript(f"window.memserveFlows?.({arrows})")

        with frame.page("/", refresh):
            tiles = ui.html(sanitize=False).classes("w-full")
            cards = ui.html(sanitize=False).classes("w-full")


def _add_requests(frame: Frame) -> None:
    watcher, history = frame.watcher, frame.watcher.history

    @ui.page("/requests")
    def requests(open: str = "", at: float | None = None) -> None:
        opened = views.Opened(open, at) if open else None
        kept: DecisionSeen | None = None
        seen: Snapshot | None = None
        timeline: Timeline | None = None
        asked = 0  # times for the time line, which is there a moment after the end
        now = 0.0

        async def refresh() -> None:
            nonlocal kept, seen, now, timeline, asked
            if seen is None or not held.value:
                seen, now = history.latest, watcher.clock.now()
            if seen is None:
                return
            if opened is not None:
                kept = opened.find(seen.decisions) or kept
            over = kept is not None and kept.view.happened.whole is not None
            if kept is not None and over and timeline is None and asked < ASKS:
                asked += 1
                timeline = await watcher.timeline(kept)
            wanted = str(words.value or "")
            listed.set_content(views.requests_html(seen, now, wanted, opened, kept, timeline))

        with frame.page("/requests", refresh):
            with ui.row().classes("items-center"):
                words = ui.input("Filter: request, instance or state", on_change=refresh)
                words.props("dense clearable outlined").classes("w-72")
                held = ui.checkbox("Hold")
            listed = ui.html(sanitize=False).classes("w-full q-mt-sm")


def _add_cache(frame: Frame, texts: bool) -> None:
    watcher, history = frame.watcher, frame.watcher.history

    @ui.page("/cache")
    def cache() -> None:
        said: dict[str, str] = {}  # what prefixes say, by id, once somebody has asked

        def refresh() -> None:
            if history.latest is not None:
                members.set_content(views.cache_html(history.latest, history.rates))

        def draw() -> None:
            points, epoch = history.points, frame.epoch
            _update(hits, charts.hits(points, epoch))
            _update(sources, charts.sources(points, epoch))
            _update(blocks, charts.evictions(points, epoch))

        async def look() -> None:
            hottest.set_content(views.prefixes_html(await watcher.prefixes(), said))

        async def tell() -> None:
            report = await watcher.prefixes(text=True)
            said.update((each.id, each.text) for each in report.prefixes if each.text is not None)
            hottest.set_content(views.prefixes_html(report, said))

        with frame.page("/cache", refresh):
            hits, sources, blocks = (_chart() for _ in range(3))
            hottest = ui.html(sanitize=False).classes("w-full q-mt-sm")
            if texts:
                button = ui.button("Show what they say", icon="visibility", on_click=tell)
                button.props("outline dense no-caps")
            members = ui.html(sanitize=False).classes("w-full q-mt-sm")
        ui.timer(CHART_SECONDS, draw)
        ui.timer(PREFIX_SECONDS, look)


def _add_latency(frame: Frame, objectives: charts.Objectives) -> None:
    history = frame.watcher.history

    @ui.page("/latency")
    def latency() -> None:
        met: list[bool] = []  # the roles are known

        def refresh() -> None:
            known = policies_of(history.points)
            # Gateways that do not say theirs are no comparison.
            told = any(name != UNKNOWN for name in known)
            groups = [_BY_ROLE, _BY_POLICY] if told else [_BY_ROLE]
            if grouped.options != groups:
                grouped.set_options(groups, value=_kept(grouped.value, groups))
            members = () if history.latest is None else history.latest.members
            roles = {member.summary.role for member in members}
            names = [role.value for role in Role if role in roles]
            if names and chosen.options != names:
                best = busiest().value
                value = chosen.value if met and chosen.value in names else best
                chosen.set_options(names, value=_kept(value, names))
                met.append(True)

        def busiest() -> Role:
            """Return the role that has answered most of late."""
            told = history.rates.latencies
            return max(told, key=lambda role: told[role].whole.count, default=Role.COLOCATED)

        def draw() -> None:
            by_policy = grouped.value == _BY_POLICY
            of_role.set_visibility(not by_policy)
            of_policy.set_visibility(by_policy)
            role, percentile = Role(str(chosen.value)), str(share.value)
            points, epoch, wanted = history.points, frame.epoch, objectives
            for kind, chart in zip(LATENCIES, plots, strict=True):
                if by_policy:
                    drawn = charts.latency_by_policy(kind, points, percentile, epoch, wanted)
                else:
                    drawn = charts.latency(kind, points, role, epoch, wanted)
                _update(chart, drawn)

        with frame.page("/latency", refresh):
            with ui.row().classes("items-center"):
                grouped = ui.toggle([_BY_ROLE], value=_BY_ROLE).props("no-caps")
                with ui.row().classes("items-center") as of_role:
                    ui.label("At instances of the role")
                    chosen = ui.toggle([Role.COLOCATED.value], value=Role.COLOCATED.value)
                    chosen.props("no-caps")
                with ui.row().classes("items-center") as of_policy:
                    ui.label("At gateways of each policy")
                    share = ui.toggle(list(charts.PERCENTILES), value="p50").props("no-caps")
                of_policy.set_visibility(False)
                for toggle in (grouped, chosen, share):
                    toggle.on_value_change(draw)
            plots = [_chart() for _ in LATENCIES]
            ui.html(
                '<p class="soft">Percentiles of the last five seconds, from the buckets of the '
                "instances' or the gateways' histograms; a gap is a time without requests. At "
                "gateways latencies are as clients see them. Red lines: another "
                "instance went on with a stream. Dashed: the objectives (--ttft, --tpot).</p>",
                sanitize=False,
            )
        ui.timer(CHART_SECONDS, draw)


def _kept(value: object, options: list[str]) -> str:
    """Return the value that was chosen, or the first option if that is none any more."""
    return value if isinstance(value, str) and value in options else options[0]


def _chart() -> ui.echart:
    return ui.echart({}).classes("chart q-mt-sm")


def _update(chart: ui.echart, options: charts.Options) -> None:
    chart.options.clear()
    chart.options.update(options)
    chart.update()
