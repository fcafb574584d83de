"""Rows of the tables: what a cluster's snapshot and rates say, as text. Knows no Textual."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rich.text import Text

from memserve.api.status import InstanceState, MediumTotals
from memserve.types import Role
from memserve.watch import text
from memserve.watch.history import History, policies_of
from memserve.watch.latency import LATENCIES, GroupLatency
from memserve.watch.rates import MemberRates, Rates
from memserve.watch.reasons import others, predicted, reason, state, terms_of
from memserve.watch.snapshot import DecisionSeen, MemberSeen, Snapshot

BAR = 6  # cells of a bar, behind which its percentage stands
_STYLES = {"active": "green", "pinned": "magenta", "cached": "blue", "free": "bright_black"}
_GLYPHS = {"active": "█", "pinned": "▓", "cached": "▒", "free": "░"}  # also without colours
_STATES = {
    InstanceState.READY: "green",
    InstanceState.STARTING: "yellow",
    InstanceState.DRAINING: "yellow",
    InstanceState.DEAD: "red",
}
_ROLES = {Role.COLOCATED: "coloc."}

SortKey = tuple[int, float | str]


class Column(NamedTuple):
    """A column of the members' table. `key`: sorts; `descending`: by default."""

    name: str
    width: int
    key: Callable[[MemberSeen, MemberRates], SortKey]
    descending: bool = True


def _number(value: float | None) -> SortKey:
    return (0, 0.0) if value is None else (1, value)


COLUMNS = (
    Column("id", 11, lambda m, r: (1, m.id), descending=False),
    Column("role", 8, lambda m, r: (1, m.summary.role), descending=False),
    Column("kind", 9, lambda m, r: (1, m.summary.kind), descending=False),
    Column("state", 9, lambda m, r: (1, m.summary.state), descending=False),
    Column("HBM", BAR + 6, lambda m, r: _number(text.used(m.summary.hbm))),
    Column("DRAM", BAR + 6, lambda m, r: _number(text.used(m.summary.dram))),
    Column("run", 4, lambda m, r: _number(m.running)),
    Column("wait", 5, lambda m, r: _number(m.waiting)),
    Column("tok/s", 6, lambda m, r: _number(r.tokens)),
    Column("hits", 4, lambda m, r: _number(r.hit_ratio)),
)


def member_rows(
    snapshot: Snapshot, rates: Rates, sort: int, descending: bool, wanted: str = ""
) -> list[MemberSeen]:
    """Return the members that have `wanted` in a word of theirs, sorted by column `sort`; equal
    ones by id."""
    words = wanted.lower().split()
    key = COLUMNS[sort].key
    found = [m for m in snapshot.members if all(w in _words(m) for w in words)]
    found.sort(key=lambda m: m.id)
    found.sort(key=lambda m: key(m, rates.of(m.id)), reverse=descending)
    return found


def member_cells(member: MemberSeen, rates: MemberRates) -> tuple[Text | str, ...]:
    summary = member.summary
    style = _STATES[summary.state]
    quiet = member.misses > 0 and summary.state is not InstanceState.DEAD
    return (
        summary.id,
        _ROLES.get(summary.role, summary.role.value),
        summary.kind.value,
        Text("silent" if quiet else summary.state.value, "yellow" if quiet else style),
        bar(summary.hbm),
        bar(summary.dram),
        _right(str(member.running), 3),
        _right(str(member.waiting), 4),
        _right(text.short(rates.tokens).replace(" ", ""), 5),
        _right(text.share(rates.hit_ratio), 4),
    )


def bar(medium: MediumTotals) -> Text:
    """Return a bar of BAR cells, and the share of blocks that are not free."""
    if not medium.total:
        return Text(text.NONE, "bright_black")
    line = Text()
    kinds = text.parts(medium)
    for (name, _), width in zip(kinds, text.cells([n for _, n in kinds], BAR), strict=True):
        line.append(_GLYPHS[name] * width, _STYLES[name])
    return line.append(f"{text.share(text.used(medium)):>5}")


def decision_rows(snapshot: Snapshot, wanted: str = "") -> list[DecisionSeen]:
    """Return the decisions that name `wanted`, newest first."""
    words = wanted.lower().split()

    def told(seen: DecisionSeen) -> str:
        return f"{seen.view.request} {seen.view.chosen.path} {state(seen.view)}".lower()

    return [seen for seen in snapshot.decisions if all(w in told(seen) for w in words)]


DECISION_COLUMNS = (
    ("age", 7),
    ("request", 13),
    ("goes to", 20),
    ("state", 8),
    ("first", 7),
    ("planned", 8),
    ("whole", 7),
    ("planned ", 8),  # columns' names differ: they are their keys
)


def decision_cells(seen: DecisionSeen, now: float) -> tuple[Text | str, ...]:
    view = seen.view
    first, whole = predicted(view.chosen)
    condition = state(view)
    return (
        text.age(now - seen.made),
        _ending(view.request, 12),
        view.chosen.path,
        Text(condition, "" if condition == "ended" else "green"),
        text.seconds(view.happened.first_token),
        Text(text.seconds(first), "bright_black"),
        text.seconds(view.happened.whole),
        Text(text.seconds(whole), "bright_black"),
    )


def explanation(seen: DecisionSeen, lines: int) -> Text:
    """Return the reason of a decision, and its best candidates' terms, a line each."""
    view = seen.view
    shown = Text(no_wrap=True, overflow="ellipsis")
    shown.append(f"{view.request}", "bold").append(f"  {reason(view)}\n")
    best = (view.chosen, *others(view))[: lines - 1]
    room = min(max(len(candidate.path) for candidate in best), 24)
    for number, candidate in enumerate(best):
        shown.append("● " if number == 0 else "  ", "green")
        shown.append(f"{candidate.path:<{room}.{room}} ", "" if number == 0 else "bright_black")
        shown.append(f"{candidate.score:.3f}: ")
        parts = [(n, s) for n, s in terms_of(candidate.terms).items() if s >= 0.0005]
        shown.append("  ".join(f"{name} {text.seconds(s)}" for name, s in parts) or "at once")
        shown.append("\n")
    left = view.considered - min(lines - 1, len(view.candidates))
    if left > 0:
        shown.right_crop(1)
        shown.append(f"   (+{left} more)", "bright_black")
    return shown


def headline(snapshot: Snapshot) -> str:
    """Return the members by state, and what the gateways hold."""
    states = [member.summary.state for member in snapshot.members]
    counts = [f"{states.count(s)} {s}" for s in InstanceState if states.count(s)]
    totals = snapshot.totals
    told = f"members: {', '.join(counts)}" if counts else "no members"
    return f"{told}; requests: {totals.running} ({totals.waiting} queued)"


def figures(values: Iterable[tuple[str, Sequence[float | None], str]], width: int) -> Text:
    """Return sparklines in one line: name, line and present value of each."""
    items = list(values)
    room = max((width - 1) // len(items), 12)
    line = Text(no_wrap=True)
    for name, series, now in items:
        spark = max(room - len(name) - 9, 3)
        line.append(f" {name} ", "bold").append(text.sparkline(series, spark), "cyan")
        line.append(f" {now:<6}")
    return line


def latencies(history: History, width: int) -> Text:
    """Return the percentiles of latencies by policy and by role, and their medians over time."""
    points, rates = history.points, history.rates
    roles = [role for role in Role if any(role in point.latencies for point in points)]
    shown = Text(no_wrap=True, overflow="ellipsis")
    for name in policies_of(points):
        now = rates.policies.get(name, GroupLatency())
        past = [point.policies.get(name) for point in points]
        shown.append(_latency_lines(f"policy {name}", now, past, width))
    for role in roles:
        now = rates.latencies.get(role, GroupLatency())
        past = [point.latencies.get(role) for point in points]
        shown.append(_latency_lines(f"role {role.value}", now, past, width))
    return shown if shown else Text("no requests yet")


def _latency_lines(
    title: str, now: GroupLatency, past: Sequence[GroupLatency | None], width: int
) -> Text:
    lines = Text()
    lines.append(f"{title:<25.25}", "bold")
    lines.append("".join(f"{name:>8}" for name in ("p50", "p90", "p99")), "bright_black")
    lines.append("  p50 over time\n", "bright_black")
    for kind in LATENCIES:
        told = kind.of(now)
        medians = [None if each is None else kind.of(each).p50 for each in past]
        figures = "".join(f"{text.seconds(v):>8}" for v in (told.p50, told.p90, told.p99))
        lines.append(f"  {kind.name:<23}{figures}  ")
        lines.append(f"{text.sparkline(medians, max(width - 51, 3))}\n", "cyan")
    return lines


def _words(member: MemberSeen) -> str:
    s = member.summary
    return f"{s.id} {s.role.value} {s.kind.value} {s.state.value} {member.host}".lower()


def _right(value: str, width: int) -> str:
    return value.rjust(width)


def _ending(value: str, width: int) -> str:
    """Return the end of an identifier, which tells it from others."""
    return value if len(value) <= width else f"…{value[1 - width :]}"
