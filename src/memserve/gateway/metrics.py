"""A gateway's Prometheus metrics: its own requests, and every instance's state and statistics."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping

import memserve
from memserve.api.histogram import Histogram
from memserve.api.http_limits import HttpCounters
from memserve.api.instance_metrics import (
    BUILD,
    INSTANCE_METRICS,
    STATE,
    report_instance,
    report_state,
)
from memserve.api.metric import (
    INSTANCE,
    Label,
    MetricSource,
    MetricSpec,
    Page,
    counter,
    gauge,
    histogram,
    page_of,
)
from memserve.api.status import MemberKind
from memserve.api.vllm_metrics import VLLM_METRICS, report_vllm
from memserve.cluster.member import Member
from memserve.cluster.membership import Membership
from memserve.gateway.access import Access
from memserve.types import Role, new_epoch
from memserve.vital import Vitals

_GATEWAY = gauge(
    "memserve_gateway_info",
    "1",
    "Always 1; the label tells the gateway's settings, to compare gateways by.",
    Label("policy", text="the routing policy"),
)
_REQUESTS = counter(
    "memserve_requests_total",
    "requests",
    "Requests that generate (chat, completions, and what is passed on to vLLM servers) and are "
    "over, by what they were answered with. 499: the client left before.",
    Label("endpoint", text="the request's path"),
    Label("status", text="the HTTP status"),
)
_RUNNING = gauge(
    "memserve_requests_running",
    "requests",
    "Requests that generate and are not over, those that wait for room included.",
)
_BROKEN = counter(
    "memserve_streams_broken_total",
    "requests",
    "Streams that had begun and ended with an error, because no instance could go on with them.",
)
_HANG_UPS = counter(
    "memserve_client_hang_ups_total",
    "requests",
    "Requests whose client closed the connection before the answer's end.",
)
_PROMPT_TOKENS = counter(
    "memserve_prompt_tokens_total", "tokens", "Prompt tokens of requests that were let in."
)
_FAILOVERS = counter(
    "memserve_failovers_total",
    "requests",
    "Times that another instance went on with a stream whose instance was lost.",
)
_FIRST_TOKEN = histogram(
    "memserve_time_to_first_token_seconds",
    "Time from a streamed request's arrival at the gateway to its first token.",
)
_INTER_TOKEN = histogram(
    "memserve_inter_token_seconds",
    "Time between two tokens of a stream as its client gets them; those that come together share "
    "it. Of streams with one choice that are not passed on to vLLM servers as they are.",
)
_PER_TOKEN = histogram(
    "memserve_time_per_output_token_seconds",
    "Mean time between the tokens of such a stream, from its first to its last (TPOT), once it has "
    "ended.",
)
_SECONDS = histogram(
    "memserve_request_seconds",
    "Time from a request's arrival at the gateway to the last byte of its answer, be it a refusal.",
)
_ANSWER = histogram(
    "memserve_answer_seconds",
    "Time from a request's arrival at the gateway to the last byte of an answer with status 200 "
    "that came to its end (JCT): without refusals, broken streams and clients that left.",
)
_PAUSE = histogram(
    "memserve_failover_pause_seconds",
    "Time that a client got nothing, from the lost instance's last bytes to the next one's first.",
)
_INFO = gauge(
    "memserve_instance_info",
    "1",
    "Always 1; the labels tell what the instance is.",
    INSTANCE,
    Label("role", tuple(Role)),
    Label("kind", tuple(MemberKind)),
)
_UNMET = gauge(
    "memserve_members_unmet",
    "instances",
    "Addresses that were configured or have joined, and where no instance has answered yet.",
)
AT_ONCE = 8  # instances whose figures are written without a pause: about 1.5 ms


class GatewayMetrics:
    """Counts requests, in plain numbers that one event loop owns, and writes the pages."""

    metrics: tuple[MetricSpec, ...] = (
        *(_GATEWAY, _REQUESTS, _RUNNING, _BROKEN, _HANG_UPS, _PROMPT_TOKENS, _FAILOVERS),
        *(_FIRST_TOKEN, _INTER_TOKEN, _PER_TOKEN, _SECONDS, _ANSWER, _PAUSE),
    )

    def __init__(self, membership: Membership, policy: str, model: str = "") -> None:
        """`policy`: of scheduling, its name. `model`: the served name, for vLLM's metrics."""
        self.policy = policy
        self.life = new_epoch()  # of this worker
        self.requests: Counter[tuple[str, int]] = Counter()  # by endpoint and status
        self.running = 0
        self.streams_broken = 0
        self.client_hang_ups = 0
        self.prompt_tokens = 0
        self.failovers = 0
        self.time_to_first_token_seconds = Histogram()
        self.inter_token_seconds = Histogram()
        self.time_per_output_token_seconds = Histogram()
        self.request_seconds = Histogram()
        self.answer_seconds = Histogram()
        self.failover_pause_seconds = Histogram()
        self._sources: list[MetricSource] = [self]
        self._instances = InstancesMetrics(membership, model)

    def register(self, source: MetricSource) -> None:
        """Add a source's metrics to `own`."""
        self._sources.append(source)

    async def own(self) -> bytes:
        """Return this gateway's own metrics, in Prometheus' text format."""
        return await page_of(self._sources)

    async def instances(self) -> bytes:
        """Return the instances' states and last polled statistics: 2 MB for 64 instances."""
        return await page_of([self._instances])

    async def report(self, page: Page) -> None:
        page.add(_GATEWAY, 1, self.policy)
        for (endpoint, status), count in self.requests.items():
            page.add(_REQUESTS, count, endpoint, str(status))
        page.add(_RUNNING, self.running)
        page.add(_BROKEN, self.streams_broken)
        page.add(_HANG_UPS, self.client_hang_ups)
        page.add(_PROMPT_TOKENS, self.prompt_tokens)
        page.add(_FAILOVERS, self.failovers)
        page.observe(_FIRST_TOKEN, self.time_to_first_token_seconds)
        page.observe(_INTER_TOKEN, self.inter_token_seconds)
        page.observe(_PER_TOKEN, self.time_per_output_token_seconds)
        page.observe(_SECONDS, self.request_seconds)
        page.observe(_ANSWER, self.answer_seconds)
        page.observe(_PAUSE, self.failover_pause_seconds)


class InstancesMetrics:
    """The states and last polled statistics of a gateway's members."""

    metrics: tuple[MetricSpec, ...] = (
        *(BUILD, _UNMET, _INFO, STATE),
        *INSTANCE_METRICS,
        *VLLM_METRICS,
    )

    def __init__(self, membership: Membership, model: str) -> None:
        self._membership = membership
        self._model = model

    async def report(self, page: Page) -> None:
        page.add(BUILD, 1, memserve.__version__)
        known = self._membership.members
        members = [member for member in known if member.epoch is not None]
        page.add(_UNMET, len(known) - len(members))
        for first in range(0, len(members), AT_ONCE):
            if first:
                await asyncio.sleep(0)
            for member in members[first : first + AT_ONCE]:
                self._report_member(page, member)

    def _report_member(self, page: Page, member: Member) -> None:
        report_state(page, member.id, member.state)
        page.add(_INFO, 1, member.id, member.role, member.kind)
        if member.stats is not None:
            report_instance(page, member.id, member.stats)
            report_vllm(page, self._model, member.id, member.stats, member.limits)


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


WORKER = "worker"
_FAMILY = b"# HELP "


def merged(pages: Mapping[int, bytes]) -> bytes:
    """Merge pages that `memserve.api.metric` has written, by worker index, into one text: each
    metric's series stand together, or Prometheus would refuse all of it."""
    families: dict[bytes, list[bytes]] = {}
    for index, page in pages.items():
        label = b'%b="%d"' % (WORKER.encode(), index)
        lines: list[bytes] = []
        for line in page.split(b"\n"):
            if line.startswith(_FAMILY):
                lines = families.setdefault(line, [])
            elif line.startswith(b"#"):
                if line not in lines:
                    lines.append(line)
            elif line:
                lines.append(_with(label, line))
    return b"".join(b"%b\n" % line for head, lines in families.items() for line in (head, *lines))


def _with(label: bytes, line: bytes) -> bytes:
    """Return a series' line with one label more, behind its own."""
    name, _, value = line.rpartition(b" ")
    if name.endswith(b"}"):
        return b"%b,%b} %b" % (name[:-1], label, value)
    return b"%b{%b} %b" % (name, label, value)
