"""Metrics of a gateway's edge: connections, refusals by reason, and survived failures."""

from __future__ import annotations

from collections.abc import Callable

from memserve.api.http_limits import HttpCounters
from memserve.api.metric import Label, MetricSpec, Page, counter
from memserve.gateway.access import Access
from memserve.vital import Vitals

_CONNECTIONS = counter(
    "memserve_connections_total",
    "connections",
    "Connections that clients opened, those that were refused included.",
)
_REFUSED: dict[str, Callable[[HttpCounters, Access], int]] = {
    "connections": lambda counters, access: counters.refused_connections,
    "malformed": lambda counters, access: counters.malformed,
    "body_memory": lambda counters, access: counters.bodies_refused,
    "body_unwanted": lambda counters, access: counters.turned_away,
    "head_timeout": lambda counters, access: counters.head_timeouts,
    "body_timeout": lambda counters, access: counters.body_timeouts,
    "stalled": lambda counters, access: counters.stalled,
    "silent": lambda counters, access: counters.silent,
    "idle": lambda counters, access: counters.evicted,
    "api_key": lambda counters, access: access.unauthorised,
    "cross_origin": lambda counters, access: access.foreign,
    "secret": lambda counters, access: access.verifier.refused,
}
_REFUSALS = counter(
    "memserve_refusals_total",
    "requests",
    "Requests and connections that were refused, or closed, before they cost anything: no room for "
    "a connection or a body, not HTTP, a body of somebody who may not ask, too slow in sending or "
    "reading, gone without a word, idle while others needed the room, no valid API key, a foreign "
    "web page, no secret.",
    Label("why", tuple(_REFUSED)),
)
_SURVIVED = counter(
    "memserve_survived_failures_total",
    "failures",
    "Errors inside the gateway that nobody foresaw and that were got over by trying again. Each is "
    "in the log, with a traceback, and is worth a report.",
    Label("what", text="what failed, for instance `poll`"),
)


class EdgeMetrics:
    """Reads the counters of the HTTP server, `Access` and `Vitals`."""

    metrics: tuple[MetricSpec, ...] = (_CONNECTIONS, _REFUSALS, _SURVIVED)

    def __init__(self, counters: HttpCounters, access: Access, vitals: Vitals) -> None:
        self._counters = counters
        self._access = access
        self._vitals = vitals

    async def report(self, page: Page) -> None:
        page.add(_CONNECTIONS, self._counters.connections)
        for why, count in _REFUSED.items():
            page.add(_REFUSALS, count(self._counters, self._access), why)
        for what, times in self._vitals.survived.items():
            page.add(_SURVIVED, times, what)
