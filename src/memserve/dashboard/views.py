"""HTML of what changes each second, from a snapshot and its rates. Knows no NiceGUI.

Templates escape what they are given: ids and reasons come from members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import jinja2
import msgspec

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
    snapshot: Snapshot, now: float, wanted: str, opened: Opened | None, kept: DecisionSeen | None
) -> str:
    """Return the decisions that name `wanted`, and the opened one. `kept`: it, as it was last seen,
    for when it is no longer among the snapshot's."""
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
        longest=1.0 if shown is None else longest(shown.view),
    )


def longest(decision: DecisionView) -> float:
    """Return the seconds that a whole bar stands for: the longest of what was predicted and what
    happened."""
    whole = [reasons.predicted(candidate)[1] for candidate in decision.candidates]
    whole += (reasons.predicted(decision.chosen)[1], decision.happened.whole or 0.0)
    return max(*whole, decision.happened.first_token or 0.0) or 1.0


def cache_html(snapshot: Snapshot, rates: Rates) -> str:
    """Return the members' cache figures."""
    return _render("cache.html", snapshot=snapshot, rates=rates)


def prefixes_html(report: PrefixReport, said: Mapping[str, str]) -> str:
    """Return the hottest prefixes and the space by tenant. `said`: what prefixes say, by id."""
    most = max((tenant.held for tenant in report.tenants), default=0) or 1
    return _render("prefixes.html", report=report, said=said, most=most, shown=MAX_HOLDERS)


def _render(name: str, **values: object) -> str:
    return _templates.get_template(name).render(values)


def _host(member: MemberSeen) -> str:
    return member.host


def _largest(rates: Rates, count: int) -> list[Flow]:
    return sorted(rates.flows, key=lambda flow: flow.rate, reverse=True)[:count]


def _words(decision: DecisionView) -> str:
    told = (decision.request, decision.chosen.path, reasons.state(decision))
    return " ".join(told).lower()
