"""Instances' statistics as Prometheus metrics: for one (its own) or all (the gateway's)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from memserve.api.histogram import Histogram
from memserve.api.status import InstanceStats, MediumTotals
from memserve.types import InstanceId

Instances = Iterable[tuple[InstanceId, InstanceStats]]

_COUNTERS: tuple[tuple[str, str, Callable[[InstanceStats], float]], ...] = (
    ("steps", "Steps of the engine.", lambda s: s.engine.steps),
    ("busy_seconds", "Time that the engine spent in steps.", lambda s: s.engine.busy_seconds),
    ("generated_tokens", "Tokens generated.", lambda s: s.engine.generated_tokens),
    ("preemptions", "Sequences set back for lack of blocks.", lambda s: s.engine.preemptions),
    ("finished_sequences", "Sequences that came to an end.", lambda s: s.engine.finished),
    ("evicted_blocks", "Historical blocks dropped.", lambda s: s.pool.evictions),
    ("cancelled_sequences", "Sequences cancelled.", lambda s: s.engine.cancelled),
)
_GAUGES: tuple[tuple[str, str, Callable[[InstanceStats], float]], ...] = (
    ("running_sequences", "Sequences in the batch.", lambda s: s.engine.running),
    ("waiting_sequences", "Sequences in the queue.", lambda s: s.engine.waiting),
    ("index_nodes", "Nodes of the index.", lambda s: s.pool.nodes),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[InstanceStats], Histogram]], ...] = (
    ("time_to_first_token_seconds", "From arrival.", lambda s: s.latencies.first_token),
    ("inter_token_seconds", "Between a sequence's tokens.", lambda s: s.latencies.inter_token),
    ("sequence_seconds", "From arrival to the end.", lambda s: s.latencies.whole),
    ("queue_seconds", "Until a sequence's first step.", lambda s: s.latencies.queue),
    ("fetch_seconds", "For prefixes of third instances.", lambda s: s.latencies.fetch),
    ("prefill_seconds", "From the first step to a token.", lambda s: s.latencies.prefill),
    ("transfer_seconds", "For the prompt's KV to arrive.", lambda s: s.latencies.transfer),
    ("decode_seconds", "From the first token to the last.", lambda s: s.latencies.decode),
)
# Label values: where a prompt token's KV came from, which way a block moved, what a block is.
_SOURCES: tuple[tuple[str, Callable[[InstanceStats], float]], ...] = (
    ("computed", lambda s: s.engine.computed_prompt_tokens),
    ("cached", lambda s: s.engine.cached_prompt_tokens),
    ("received", lambda s: s.engine.received_prompt_tokens),
)
_DIRECTIONS: tuple[tuple[str, Callable[[InstanceStats], float]], ...] = (
    ("out", lambda s: s.pool.swapped_out),
    ("in", lambda s: s.pool.swapped_in),
)
_HANDED_OVER: tuple[tuple[str, Callable[[InstanceStats], float]], ...] = (
    ("received", lambda s: s.handoff.blocks_received),
    ("already_present", lambda s: s.handoff.blocks_already_present),
    ("returned", lambda s: s.handoff.blocks_returned),
)
_HANDED_OVER_BYTES: tuple[tuple[str, Callable[[InstanceStats], float]], ...] = (
    ("received", lambda s: s.handoff.blocks_received * s.handoff.block_bytes),
    ("already_present", lambda s: s.handoff.blocks_already_present * s.handoff.block_bytes),
    ("returned", lambda s: s.handoff.blocks_returned * s.handoff.block_bytes),
    ("fetched", lambda s: s.fetch.blocks_received * s.fetch.block_bytes),
    ("pushed", lambda s: s.fetch.blocks_pushed * s.fetch.block_bytes),
)
_HANDED_OVER_TOKENS: tuple[tuple[str, Callable[[InstanceStats], float]], ...] = (
    ("none", lambda s: s.handoff.prompt_tokens - s.handoff.cached_tokens_prefill),
    ("prefill", lambda s: s.handoff.cached_tokens_prefill),
    ("decode", lambda s: s.handoff.cached_tokens_decode),
)
_FETCHES: tuple[tuple[str, Callable[[InstanceStats], float]], ...] = (
    ("done", lambda s: s.fetch.asked - s.fetch.failed),
    ("failed", lambda s: s.fetch.failed),
)
_PUSHES: tuple[tuple[str, Callable[[InstanceStats], float]], ...] = (
    ("done", lambda s: s.fetch.pushes),
    ("failed", lambda s: s.fetch.pushes_failed),
)
_PREFILLS: tuple[tuple[str, Callable[[InstanceStats], float]], ...] = (
    ("done", lambda s: s.handoff.asked - s.handoff.failed),
    ("failed", lambda s: s.handoff.failed),
)
_RETURNS: tuple[tuple[str, Callable[[InstanceStats], float]], ...] = (
    ("done", lambda s: s.handoff.returns),
    ("dropped", lambda s: s.handoff.returns_dropped),
)
_PHASES: tuple[tuple[str, Callable[[InstanceStats], float]], ...] = (
    ("queue", lambda s: s.handoff.queue_seconds),
    ("prefill", lambda s: s.handoff.prefill_seconds - s.handoff.queue_seconds),
    ("transfer", lambda s: s.handoff.transfer_seconds),
)
_MEDIA: tuple[tuple[str, Callable[[InstanceStats], MediumTotals]], ...] = (
    ("hbm", lambda s: s.pool.hbm),
    ("dram", lambda s: s.pool.dram),
)
_BLOCK_STATES: tuple[tuple[str, Callable[[MediumTotals], float]], ...] = (
    ("free", lambda m: m.free),
    ("active", lambda m: m.active),
    ("cached", lambda m: m.cached),
    ("detached", lambda m: m.detached),
)


def instance_metrics(instances: Instances) -> Iterator[Metric]:
    """Yield all metrics, each with one series (or one per label value) for every instance."""
    known = list(instances)
    for name, text, counter in _COUNTERS:
        family = CounterMetricFamily(f"memserve_instance_{name}", text, labels=["instance"])
        for instance, stats in known:
            family.add_metric([instance], counter(stats))
        yield family
    for name, text, gauge in _GAUGES:
        gauges = GaugeMetricFamily(f"memserve_instance_{name}", text, labels=["instance"])
        for instance, stats in known:
            gauges.add_metric([instance], gauge(stats))
        yield gauges
    for name, text, histogram in _HISTOGRAMS:
        buckets = HistogramMetricFamily(f"memserve_instance_{name}", text, labels=["instance"])
        for instance, stats in known:
            values = histogram(stats)
            buckets.add_metric([instance], values.cumulative(), values.sum)
        yield buckets
    yield _labelled("prompt_tokens", "Prompt tokens.", "source", _SOURCES, known)
    yield _labelled("swapped_blocks", "Blocks moved.", "direction", _DIRECTIONS, known)
    yield _labelled("handoff_blocks", "Blocks of prompts, and back.", "kind", _HANDED_OVER, known)
    yield _labelled("handoff_bytes", "Bytes of such blocks.", "kind", _HANDED_OVER_BYTES, known)
    yield _labelled(
        "handoff_prompt_tokens",
        "Of prompts that were handed over: computed, and found at either side.",
        "cached_at",
        _HANDED_OVER_TOKENS,
        known,
    )
    yield _labelled("fetches", "Prefixes asked of others.", "outcome", _FETCHES, known)
    yield _labelled("pushes", "Prefixes given to others.", "outcome", _PUSHES, known)
    yield _labelled("remote_prefills", "Prefills asked elsewhere.", "outcome", _PREFILLS, known)
    yield _labelled("handoff_returns", "Sequences' KV given back.", "outcome", _RETURNS, known)
    yield _labelled("handoff_seconds", "Waited for prefills elsewhere.", "phase", _PHASES, known)
    yield _blocks(known)


def _labelled(
    name: str,
    text: str,
    label: str,
    values: Iterable[tuple[str, Callable[[InstanceStats], float]]],
    known: Instances,
) -> Metric:
    family = CounterMetricFamily(f"memserve_instance_{name}", text, labels=["instance", label])
    for value, counter in values:
        for instance, stats in known:
            family.add_metric([instance, value], counter(stats))
    return family


def _blocks(known: Instances) -> Metric:
    blocks = GaugeMetricFamily(
        "memserve_instance_blocks", "Blocks.", labels=["instance", "medium", "state"]
    )
    for instance, stats in known:
        for medium, of in _MEDIA:
            for state, count in _BLOCK_STATES:
                blocks.add_metric([instance, medium, state], count(of(stats)))
    return blocks
