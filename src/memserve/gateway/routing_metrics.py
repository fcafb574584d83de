"""Metrics of the global scheduler: decisions, prompt trees and KV event feeds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from memserve.api.histogram import Histogram
from memserve.api.metric import INSTANCE, Label, MetricSpec, Page, counter, gauge, histogram
from memserve.cluster.kv_feed import KvFeed
from memserve.gateway.admission_queue import AdmissionQueue
from memserve.scheduler.contract import Plan
from memserve.scheduler.event_stream import EventCounts
from memserve.scheduler.prompt_tree import PromptTree, PromptTreeStats

_PLANS = counter(
    "memserve_scheduler_plans_total",
    "plans",
    "Decisions where a request runs: `alone` on one instance, or `handed_over` from a prefill to a "
    "decode instance; `fetched`: with a longer prefix pulled from a third one. A request whose "
    "instance refuses or is lost is decided again.",
    Label("policy", text="the routing policy"),
    Label("plan", ("alone", "alone_fetched", "handed_over", "handed_over_fetched")),
)
_DECIDING = counter(
    "memserve_scheduler_decision_seconds_total",
    "seconds",
    "Time spent on deciding where requests run.",
)
_PROMPT_TOKENS = counter(
    "memserve_scheduler_prompt_tokens_total",
    "tokens",
    "Prompt tokens of the requests for which a place was decided.",
)
_CACHED_TOKENS = counter(
    "memserve_scheduler_cached_tokens_total",
    "tokens",
    "Prompt tokens that, as far as the gateway knew, the chosen instance had cached.",
)
_FETCHED_TOKENS = counter(
    "memserve_scheduler_fetched_tokens_total",
    "tokens",
    "Prompt tokens whose KV was to be pulled from third instances.",
)
_PREDICTED = histogram(
    "memserve_scheduler_predicted_first_token_seconds",
    "Predicted time from a decision to the request's first token.",
)
_FIRST_TOKEN = histogram(
    "memserve_scheduler_first_token_seconds",
    "Measured time from a decision to the first token; of streams alone.",
)
_WAITING = gauge(
    "memserve_requests_waiting",
    "requests",
    "Requests in the gateway's own queue now, until an instance has room for them.",
)
_TREE: tuple[tuple[MetricSpec, Callable[[PromptTreeStats], int]], ...] = (
    (
        gauge(
            "memserve_prompt_tree_instances",
            "instances",
            "Instances whose cached prefixes the gateway follows.",
        ),
        lambda tree: tree.instances,
    ),
    (
        gauge(
            "memserve_prompt_tree_namespaces",
            "namespaces",
            "Namespaces (tenants' cache salts) of which some instance has a prefix.",
        ),
        lambda tree: tree.namespaces,
    ),
    (
        gauge("memserve_prompt_tree_nodes", "nodes", "Nodes of the prompt trees."),
        lambda tree: tree.nodes,
    ),
    (
        gauge(
            "memserve_prompt_tree_held_blocks",
            "blocks",
            "KV blocks that instances hold; one that n instances hold counts n times.",
        ),
        lambda tree: tree.held_blocks,
    ),
    (
        gauge(
            "memserve_prompt_tree_tree_blocks",
            "blocks",
            "Different KV blocks that instances hold: what `held_blocks` has more is duplicates.",
        ),
        lambda tree: tree.tree_blocks,
    ),
    (
        gauge(
            "memserve_prompt_tree_expectations",
            "prompts",
            "Prompts that were sent somewhere and count as cached there, until events confirm it.",
        ),
        lambda tree: tree.expectations,
    ),
    (
        gauge(
            "memserve_prompt_tree_bytes",
            "bytes",
            "Memory of the trees' tokens and tables, without Python's own overhead.",
        ),
        lambda tree: tree.num_bytes,
    ),
)
_SUBSCRIBED = gauge(
    "memserve_kv_feed_subscribed",
    "1 or 0",
    "1 if the gateway receives the instance's KV events; 0 if it publishes none, or has not said "
    "where.",
    INSTANCE,
)
_SYNCHRONISED = gauge(
    "memserve_kv_feed_synchronised",
    "1 or 0",
    "1 while the gateway has applied all KV events of the instance that it knows of. Routing by "
    "prefix works with what was known before if not.",
    INSTANCE,
)
_LAG = gauge(
    "memserve_kv_feed_lag_batches",
    "batches",
    "Batches of KV events that the gateway knows of and has not applied.",
    INSTANCE,
)
_SILENT = gauge(
    "memserve_kv_feed_silent_seconds",
    "seconds",
    "Time since the instance's last batch. An instance that does nothing sends one every second.",
    INSTANCE,
)
_HELD = gauge(
    "memserve_kv_feed_held_blocks",
    "blocks",
    "KV blocks that the instance holds, by its events.",
    INSTANCE,
)
_BATCHES = counter(
    "memserve_kv_feed_batches_total", "batches", "Batches of KV events applied.", INSTANCE
)
_EVENTS = counter("memserve_kv_feed_events_total", "events", "KV events applied.", INSTANCE)
_FAULTS_OF: dict[str, Callable[[EventCounts], int]] = {
    "gap": lambda counts: counts.gaps,
    "duplicate": lambda counts: counts.duplicates,
    "unplaced": lambda counts: counts.unplaced,
    "malformed": lambda counts: counts.malformed,
    "foreign": lambda counts: counts.foreign,
}
_FAULTS = counter(
    "memserve_kv_feed_faults_total",
    "faults",
    "What was wrong with an instance's events: batches missing (`gap`) or come twice, blocks whose "
    "parent is not known, messages that cannot be read, or that name another instance.",
    INSTANCE,
    Label("kind", tuple(_FAULTS_OF)),
)
_RECOVERIES_OF: dict[str, Callable[[EventCounts], int]] = {
    "replay": lambda counts: counts.replays,
    "snapshot": lambda counts: counts.snapshots,
    "reset": lambda counts: counts.resets,
}
_RECOVERIES = counter(
    "memserve_kv_feed_recoveries_total",
    "recoveries",
    "How the gateway got back into step: missed batches asked for again, the instance's whole "
    "index read, or all that was known of it forgotten. A snapshot is also how it begins.",
    INSTANCE,
    Label("how", tuple(_RECOVERIES_OF)),
)


class RoutingMetrics:
    """Counts decisions and first tokens, in plain numbers that one event loop owns."""

    metrics: tuple[MetricSpec, ...] = (
        *(_PLANS, _DECIDING, _PROMPT_TOKENS, _CACHED_TOKENS, _FETCHED_TOKENS),
        *(_PREDICTED, _FIRST_TOKEN, _WAITING),
        *(spec for spec, _ in _TREE),
        *(_SUBSCRIBED, _SYNCHRONISED, _LAG, _SILENT, _HELD),
        *(_BATCHES, _EVENTS, _FAULTS, _RECOVERIES),
    )

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
        kind = "alone" if plan.prefill is None else "handed_over"
        self._plans[kind if plan.fetch is None else f"{kind}_fetched"] += 1
        self._prompt_tokens += plan.prompt_tokens
        self._cached_tokens += plan.cached_tokens
        self._fetched_tokens += plan.fetched_tokens
        self._took += took
        self._predicted.observe(plan.terms.first_token)

    def first_token(self, seconds: float) -> None:
        """Count the seconds from a plan to its stream's first token."""
        self._first_token.observe(seconds)

    async def report(self, page: Page) -> None:
        for kind, count in self._plans.items():
            page.add(_PLANS, count, self._policy, kind)
        page.add(_DECIDING, self._took)
        page.add(_PROMPT_TOKENS, self._prompt_tokens)
        page.add(_CACHED_TOKENS, self._cached_tokens)
        page.add(_FETCHED_TOKENS, self._fetched_tokens)
        page.observe(_PREDICTED, self._predicted)
        page.observe(_FIRST_TOKEN, self._first_token)
        page.add(_WAITING, self._queue.waiting)
        await self._report_tree(page)
        self._report_feeds(page)

    async def _report_tree(self, page: Page) -> None:
        reading = self._tree.reading_stats()
        while True:
            try:
                next(reading)
            except StopIteration as end:
                for spec, value in _TREE:
                    page.add(spec, value(end.value))
                return
            await asyncio.sleep(0)

    def _report_feeds(self, page: Page) -> None:
        for member in self._feed.members():
            name, counts = member.instance, member.counts
            page.add(_SUBSCRIBED, member.subscribed, name)
            page.add(_SYNCHRONISED, member.synchronised, name)
            page.add(_LAG, member.lag, name)
            page.add(_SILENT, member.silent_seconds, name)
            page.add(_HELD, member.blocks, name)
            page.add(_BATCHES, counts.batches, name)
            page.add(_EVENTS, counts.events, name)
            for kind, count in _FAULTS_OF.items():
                page.add(_FAULTS, count(counts), name, kind)
            for how, count in _RECOVERIES_OF.items():
                page.add(_RECOVERIES, count(counts), name, how)
