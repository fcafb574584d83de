"""Prometheus metrics of the global scheduler: decisions, prompt trees and KV event feeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from memserve.api.histogram import Histogram
from memserve.cluster.kv_feed import KvFeed
from memserve.gateway.admission_queue import AdmissionQueue
from memserve.scheduler.contract import Plan
from memserve.scheduler.prompt_tree import PromptTree

_PREFIX = "memserve_scheduler_"


class RoutingMetrics(Collector):
    """Counts decisions and first tokens, in plain numbers that one event loop owns."""

    def __init__(self, policy: str, tree: PromptTree, feed: KvFeed, queue: AdmissionQueue) -> None:
        self._policy = policy
        self._tree = tree
        self._feed = feed
        self._queue = queue
        self._plans: Counter[str] = Counter()
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._fetched_tokens = 0
        self._took = 0.0
        self._predicted = Histogram()
        self._first_token = Histogram()

    def planned(self, plan: Plan, took: float) -> None:
        """Count a decision that took `took` seconds."""
        kind = "alone" if plan.prefill is None else "handed over"
        self._plans[kind if plan.fetch is None else f"{kind}, fetched"] += 1
        self._prompt_tokens += plan.prompt_tokens
        self._cached_tokens += plan.cached_tokens
        self._fetched_tokens += plan.fetched_tokens
        self._took += took
        self._predicted.observe(plan.terms.first_token)

    def first_token(self, seconds: float) -> None:
        """Count the seconds from a plan to its stream's first token."""
        self._first_token.observe(seconds)

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics. Called by Prometheus."""
        plans = CounterMetricFamily(
            _PREFIX + "plans", "Decisions, by what was planned.", labels=["policy", "plan"]
        )
        for kind, count in self._plans.items():
            plans.add_metric([self._policy, kind], count)
        yield plans
        for name, text, total in (
            ("seconds", "Spent deciding.", self._took),
            ("prompt_tokens", "Of the prompts planned.", self._prompt_tokens),
            (
                "cached_tokens",
                "Of these, known where computed.",
                self._cached_tokens,
            ),
            ("fetched_tokens", "Of these, pulled from third instances.", self._fetched_tokens),
        ):
            yield CounterMetricFamily(_PREFIX + name, text, total)
        for name, text, histogram in (
            ("predicted_first_token_seconds", "As planned.", self._predicted),
            ("first_token_seconds", "From the plan; streams only.", self._first_token),
        ):
            family = HistogramMetricFamily(_PREFIX + name, text)
            family.add_metric([], histogram.cumulative(), histogram.sum)
            yield family
        yield GaugeMetricFamily(
            _PREFIX + "waiting", "Requests that wait for room.", self._queue.waiting
        )
        yield from self._trees()
        yield from self._feeds()

    def _trees(self) -> Iterable[Metric]:
        for name, value in msgspec.structs.asdict(self._tree.stats()).items():
            yield GaugeMetricFamily(f"memserve_prompt_tree_{name}", "Of the prompt trees.", value)

    def _feeds(self) -> Iterable[Metric]:
        events = CounterMetricFamily(
            "memserve_kv_feed_events", "Of an instance's KV events.", labels=["instance", "what"]
        )
        state = GaugeMetricFamily(
            "memserve_kv_feed", "How its events come in.", labels=["instance", "what"]
        )
        for member in self._feed.members():
            for what, count in msgspec.structs.asdict(member.counts).items():
                events.add_metric([member.instance, what], count)
            for what, value in (
                ("synchronised", float(member.synchronised)),
                ("lag", float(member.lag)),
                ("silent_seconds", member.silent_seconds),
                ("blocks", float(member.blocks)),
            ):
                state.add_metric([member.instance, what], value)
        yield events
        yield state
