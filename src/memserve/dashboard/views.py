"""HTML of what changes each second, from a snapshot and its rates. Knows no NiceGUI.

Templates escape what they are given: ids and reasons come from members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import jinja2
import msgspec

from memserve.api.timeline import Timeline
from memserve.scheduler.decision_view import DecisionView
from memserve.scheduler.prefix_view import PrefixReport
from memserve.watch import reasons, text
from memserve.watch.history import History
from memserve.watch.rates import Flow, FlowKind, Rates
from memserve.watch.snapshot import DecisionSeen, MemberSeen, Snapshot

MAX_ARROWS = 40  # the largest flows: more of them cannot be told apart
MAX_FLOW_ROWS = 20
MAX_HOLDERS = 6  # of a prefix, that are named

_templates = jinja2.Environment(
    loader=jinja2.PackageLoader("memserve.dashboard"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_templates.globals.update(
    age=text.age,
    parts=text.parts,
    seconds=text.seconds,
    share=text.share,
    short=text.short,
    size=text.size,
    used=text.used,
    others=reasons.others,
    predicted=reasons.predicted,
    reason=reasons.reason,
    state=reasons.state,
    terms_of=reasons.terms_of,
)


class Arrow(msgspec.Struct, frozen=True):
    """A flow as `dashboard.js` draws it. `share`: of the largest one, for its width."""

    source: str
    target: str
    kind: str  # forward, returned
    label: str
    share: float


class Opened(NamedTuple):
    """The decision that a page shows: by its request and time, since a request that was lost has
    several."""

    request: str
    at: float | None = None

    def find(self, decisions: Sequence[DecisionSeen]) -> DecisionSeen | None:
        """Return the decision, or None."""
        for seen in decisions:
            if seen.view.request == self.request and self.at in (None, seen.view.at):
                return seen
        return None


def cluster_html(snapshot: Snapshot, rates: Rates) -> str:
    """Return the members as cards, by host."""
    by_host = sorted(snapshot.members, key=_host)
    hosts = [(host, list(members)) for host, members in groupby(by_host, key=_host)]
    flows = _largest(rates, MAX_FLOW_ROWS)
    return _render("cluster.html", snapshot=snapshot, rates=rates, hosts=hosts, flows=flows)


def arrows(rates: Rates) -> list[Arrow]:
    """Return the largest flows, for the script that draws them between cards."""
    flows = _largest(rates, MAX_ARROWS)
    return [
        Arrow(
            flow.source,
            flow.target,
            "forward" if flow.kind is FlowKind.FORWARD else "returned",
            f"{text.size(flow.rate)}/s",
            flow.rate / flows[0].rate,
        )
        for flow in flows
    ]


def cluster_tiles(history: History) -> str:
    """Return the figures of the whole cluster."""
    snapshot, rates = history.latest, history.rates
    if snapshot is None:
        return ""
    totals = snapshot.totals
    ready = sum(member.summary.state == "ready" for member in snapshot.members)
    return tiles(
        ("members ready", f"{ready} of {len(snapshot.members)}"),
        ("requests", f"{totals.running}"),
        ("queued at the gateway", f"{totals.waiting}"),
        ("requests/s", text.short(rates.answered)),
        ("tokens/s", text.short(rates.whole.tokens)),
        ("TTFT, median", text.seconds(rates.first_token.p50)),
        ("hits", text.share(rates.whole.hit_ratio)),
        ("KV moved/s", text.size(rates.kv_bytes)),
    )


def tiles(*named: tuple[str, str]) -> str:
    return _render("tiles.html", tiles=named)


def requests_html(
    snapshot: Snapshot,
    now: float,
    wanted: str,
    opened: Opened | None,
    kept: DecisionSeen | None,
    timeline: Timeline | None = None,
) -> str:
    """Return the decisions that name `wanted`, and the opened one. `kept`: it, as it was last seen,
    for when it is no longer among the snapshot's; `timeline`: its, once it has ended."""
    words = wanted.lower().split()
    found = [seen for seen in snapshot.decisions if all(w in _words(seen.view) for w in words)]
    shown = None if opened is None else opened.find(snapshot.decisions) or kept
    return _render(
        "requests.html",
        decisions=found,
        filtered=bool(words),
        now=now,
        opened=shown,
        lost=opened is not None and shown is None,
        longest=1.0 if shown is None else longest(shown.view, timeline),
        timeline=timeline,
    )


class Phase(NamedTuple):
    """A part of a time line: seconds from the call's arrival at the instance."""

    name: str  # a term of predictions; of forwarded requests, prepare, server and answer, too
    begin: float
    seconds: float


def phases(told: Timeline) -> list[Phase]:
    """Return the phases of a request in the order in which they passed, without empty ones. The
    prompt's computation is one for each chunk.

    A forwarded request is at the `server` until its first byte (its first token, if streamed), and
    `answer` is the rest."""
    found: list[Phase] = []
    at = 0.0
    for name, seconds in (
        ("prepare", told.prepare),
        ("fetch", told.fetch),
        ("queue", told.queue),
    ):
        found.append(Phase(name, at, seconds))
        at += seconds
    submitted, end = at - told.queue, at + told.prefill
    for chunk in told.chunks[:-1]:
        until = min(max(submitted + chunk.end, at), end)
        found.append(Phase("prefill", at, until - at))
        at = until
    found.append(Phase("prefill", at, end - at))
    at = end
    rest = (("transfer", told.transfer), ("queue", told.queue_here), ("decode", told.decode))
    for name, seconds in rest:
        found.append(Phase(name, at, seconds))
        at += seconds
    if (forwarded := told.forwarded) is not None and forwarded.sent is not None:
        first = forwarded.end if forwarded.first is None else forwarded.first
        found.append(Phase("server", forwarded.sent, first - forwarded.sent))
        found.append(Phase("answer", first, forwarded.end - first))
    return [phase for phase in found if phase.seconds > 0]


def totals(told: Timeline) -> list[tuple[str, float]]:
    """Return the seconds of each phase, in order; a prompt's chunks are one."""
    return [
        (name, sum(phase.seconds for phase in run))
        for name, run in groupby(phases(told), key=lambda phase: phase.name)
    ]


def longest(decision: DecisionView, timeline: Timeline | None = None) -> float:
    """Return the seconds that a whole bar stands for: the longest of what was predicted and what
    happened."""
    whole = [reasons.predicted(candidate)[1] for candidate in decision.candidates]
    whole += (reasons.predicted(decision.chosen)[1], decision.happened.whole or 0.0)
    if timeline is not None:
        whole.append(timeline.whole)
    return max(*whole, decision.happened.first_token or 0.0) or 1.0


def cache_html(snapshot: Snapshot, rates: Rates) -> str:
    """Return the members' cache figures."""
    return _render("cache.html", snapshot=snapshot, rates=rates)


def prefixes_html(report: PrefixReport, said: Mapping[str, str]) -> str:
    """Return the hottest prefixes and the space by tenant. `said`: what prefixes say, by id."""
    most = max((tenant.held for tenant in report.tenants), default=0) or 1
    return _render("prefixes.html", report=report, said=said, most=most, shown=MAX_HOLDERS)


_templates.globals.update(phases=phases, totals=totals)


def _render(name: str, **values: object) -> str:
    return _templates.get_template(name).render(values)


def _host(member: MemberSeen) -> str:
    return member.host


def _largest(rates: Rates, count: int) -> list[Flow]:
    return sorted(rates.flows, key=lambda flow: flow.rate, reverse=True)[:count]


def _words(decision: DecisionView) -> str:
    told = (decision.request, decision.chosen.path, reasons.state(decision))
    return " ".join(told).lower()
