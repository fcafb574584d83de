"""Instances' statistics as metrics: for one (its own page) or all (the gateway's)."""

from __future__ import annotations

from collections.abc import Callable

from memserve.api.histogram import Histogram
from memserve.api.metric import INSTANCE, Label, MetricSpec, Page, counter, gauge, histogram
from memserve.api.status import InstanceState, InstanceStats, MediumTotals
from memserve.types import InstanceId

_Value = Callable[[InstanceStats], float]
_PREFIX = "memserve_instance_"

BUILD = gauge(
    "memserve_build_info",
    "1",
    "Always 1; the label tells the version that runs.",
    Label("version", text="of memserve"),
)
STATE = gauge(
    _PREFIX + "state",
    "1 or 0",
    "1 for the state that the instance is in, 0 for the others. Only a `ready` one takes requests; "
    "a `dead` one missed three polls, refuses connections, or says that its engine has stopped.",
    INSTANCE,
    Label("state", tuple(InstanceState)),
)


def _count(name: str, unit: str, text: str, value: _Value) -> tuple[MetricSpec, _Value]:
    return counter(_PREFIX + name, unit, text, INSTANCE), value


def _level(name: str, unit: str, text: str, value: _Value) -> tuple[MetricSpec, _Value]:
    return gauge(_PREFIX + name, unit, text, INSTANCE), value


_PLAIN: tuple[tuple[MetricSpec, _Value], ...] = (
    _count(
        "steps_total",
        "steps",
        "Steps of the engine: one forward pass over a batch of sequences each.",
        lambda s: s.engine.steps,
    ),
    _count(
        "busy_seconds_total",
        "seconds",
        "Time that the engine spent in steps. Its rate is the engine's utilisation, 0 to 1.",
        lambda s: s.engine.busy_seconds,
    ),
    _count(
        "generated_tokens_total",
        "tokens",
        "Tokens that the engine generated.",
        lambda s: s.engine.generated_tokens,
    ),
    _count(
        "preemptions_total",
        "sequences",
        "Running sequences that were put back into the queue because no KV blocks were left; each "
        "is computed again from what is still cached.",
        lambda s: s.engine.preemptions,
    ),
    _count(
        "finished_sequences_total",
        "sequences",
        "Sequences that the engine ran to their end: an end token or the token limit.",
        lambda s: s.engine.finished,
    ),
    _count(
        "cancelled_sequences_total",
        "sequences",
        "Sequences that were stopped before the engine ended them: the client left, or a stop "
        "string was found.",
        lambda s: s.engine.cancelled,
    ),
    _count(
        "evicted_blocks_total",
        "blocks",
        "Cached KV blocks that were dropped to make room; KV that moved from HBM to DRAM does not "
        "count.",
        lambda s: s.pool.evictions,
    ),
    _level(
        "running_sequences",
        "sequences",
        "Sequences in the engine's batch now.",
        lambda s: s.engine.running,
    ),
    _level(
        "waiting_sequences",
        "sequences",
        "Sequences in the engine's queue now.",
        lambda s: s.engine.waiting,
    ),
    _level(
        "index_nodes",
        "nodes",
        "Nodes of the radix tree that indexes the instance's cached KV.",
        lambda s: s.pool.nodes,
    ),
    _level(
        "quarantined_blocks",
        "blocks",
        "KV blocks that nobody may use, because a peer that was lost may still write to them.",
        lambda s: s.pool.quarantined,
    ),
)


def _by(
    name: str, unit: str, text: str, label: str, series: dict[str, _Value]
) -> tuple[MetricSpec, dict[str, _Value]]:
    spec = counter(_PREFIX + name, unit, text, INSTANCE, Label(label, tuple(series)))
    return spec, series


_BY_LABEL: tuple[tuple[MetricSpec, dict[str, _Value]], ...] = (
    _by(
        "prompt_tokens_total",
        "tokens",
        "Prompt tokens of sequences that the engine ran, by where their KV came from: computed "
        "here, cached here, or received from another instance's pool for this sequence.",
        "source",
        {
            "computed": lambda s: s.engine.computed_prompt_tokens,
            "cached": lambda s: s.engine.cached_prompt_tokens,
            "received": lambda s: s.engine.received_prompt_tokens,
        },
    ),
    _by(
        "swapped_blocks_total",
        "blocks",
        "KV blocks that were copied between the instance's own tiers: `out` from HBM to DRAM, `in` "
        "back to HBM.",
        "direction",
        {"out": lambda s: s.pool.swapped_out, "in": lambda s: s.pool.swapped_in},
    ),
    _by(
        "handoff_blocks_total",
        "blocks",
        "KV blocks of prompts that a prefill instance computed for this decode instance: received, "
        "not sent because they were here already, and given back after the answer.",
        "kind",
        {
            "received": lambda s: s.handoff.blocks_received,
            "already_present": lambda s: s.handoff.blocks_already_present,
            "returned": lambda s: s.handoff.blocks_returned,
        },
    ),
    _by(
        "handoff_bytes_total",
        "bytes",
        "Bytes of KV of prompts that a prefill instance computed for this decode instance, as in "
        "`handoff_blocks`, of prefixes fetched from a third instance, and of those pushed to an "
        "instance that fetches. `already_present` has not moved.",
        "kind",
        {
            "received": lambda s: s.handoff.blocks_received * s.handoff.block_bytes,
            "already_present": lambda s: s.handoff.blocks_already_present * s.handoff.block_bytes,
            "returned": lambda s: s.handoff.blocks_returned * s.handoff.block_bytes,
            "fetched": lambda s: s.fetch.blocks_received * s.fetch.block_bytes,
            "pushed": lambda s: s.fetch.blocks_pushed * s.fetch.block_bytes,
        },
    ),
    _by(
        "handoff_prompt_tokens_total",
        "tokens",
        "Prompt tokens that prefill instances answered for, by where their KV was cached: "
        "`none` and `prefill` add up to all of them; `decode` were also here.",
        "cached_at",
        {
            "none": lambda s: s.handoff.prompt_tokens - s.handoff.cached_tokens_prefill,
            "prefill": lambda s: s.handoff.cached_tokens_prefill,
            "decode": lambda s: s.handoff.cached_tokens_decode,
        },
    ),
    _by(
        "fetches_total",
        "requests",
        "Prefixes asked of a third instance. After a failure the prompt is computed here.",
        "outcome",
        {"done": lambda s: s.fetch.asked - s.fetch.failed, "failed": lambda s: s.fetch.failed},
    ),
    _by(
        "pushes_total",
        "requests",
        "Prefixes that other instances asked for, and that were pushed to them.",
        "outcome",
        {"done": lambda s: s.fetch.pushes, "failed": lambda s: s.fetch.pushes_failed},
    ),
    _by(
        "remote_prefills_total",
        "requests",
        "Prefills that this decode instance asked prefill instances for. After a failure another "
        "one is asked, or the prompt is computed here.",
        "outcome",
        {
            "done": lambda s: s.handoff.asked - s.handoff.failed,
            "failed": lambda s: s.handoff.failed,
        },
    ),
    _by(
        "handoff_returns_total",
        "sequences",
        "Sequences whose new KV was given back to the prefill instance, or was not, because "
        "sequences waited here or the transfer failed.",
        "outcome",
        {"done": lambda s: s.handoff.returns, "dropped": lambda s: s.handoff.returns_dropped},
    ),
    _by(
        "handoff_seconds_total",
        "seconds",
        "Time that sequences of this decode instance waited for prefill instances: in their queue, "
        "for the computation, and for the KV to arrive.",
        "phase",
        {
            "queue": lambda s: s.handoff.queue_seconds,
            "prefill": lambda s: s.handoff.prefill_seconds - s.handoff.queue_seconds,
            "transfer": lambda s: s.handoff.transfer_seconds,
        },
    ),
)

_HISTOGRAMS: tuple[tuple[MetricSpec, Callable[[InstanceStats], Histogram]], ...] = (
    (
        histogram(
            _PREFIX + "time_to_first_token_seconds",
            "Time from a call's arrival at the instance to a sequence's first token.",
            INSTANCE,
        ),
        lambda s: s.latencies.first_token,
    ),
    (
        histogram(
            _PREFIX + "inter_token_seconds",
            "Time between two tokens of a sequence. Tokens that come together share it.",
            INSTANCE,
        ),
        lambda s: s.latencies.inter_token,
    ),
    (
        histogram(
            _PREFIX + "time_per_output_token_seconds",
            "Mean time between a finished sequence's tokens, from its first to its last (TPOT).",
            INSTANCE,
        ),
        lambda s: s.latencies.per_token,
    ),
    (
        histogram(
            _PREFIX + "sequence_seconds",
            "Time from a call's arrival at the instance to a finished sequence's last token.",
            INSTANCE,
        ),
        lambda s: s.latencies.whole,
    ),
    (
        histogram(
            _PREFIX + "queue_seconds",
            "Time that finished sequences waited for their first step, also at the prefill "
            "instance that computed their prompt.",
            INSTANCE,
        ),
        lambda s: s.latencies.queue,
    ),
    (
        histogram(
            _PREFIX + "fetch_seconds",
            "Time that finished sequences waited for a prefix of a third instance; only of those "
            "that did.",
            INSTANCE,
        ),
        lambda s: s.latencies.fetch,
    ),
    (
        histogram(
            _PREFIX + "prefill_seconds",
            "Time from a finished sequence's first step to its first token, wherever its prompt "
            "was computed.",
            INSTANCE,
        ),
        lambda s: s.latencies.prefill,
    ),
    (
        histogram(
            _PREFIX + "transfer_seconds",
            "Time that finished sequences waited for their prompt's KV after a prefill instance "
            "had computed it; only of those that did.",
            INSTANCE,
        ),
        lambda s: s.latencies.transfer,
    ),
    (
        histogram(
            _PREFIX + "decode_seconds",
            "Time from a finished sequence's first token to its last.",
            INSTANCE,
        ),
        lambda s: s.latencies.decode,
    ),
)

_MEDIA: dict[str, Callable[[InstanceStats], MediumTotals]] = {
    "hbm": lambda s: s.pool.hbm,
    "dram": lambda s: s.pool.dram,
}
_BLOCK_STATES: dict[str, Callable[[MediumTotals], int]] = {
    "free": lambda m: m.free,
    "active": lambda m: m.active,
    "cached": lambda m: m.cached,
    "detached": lambda m: m.detached,
}
_BLOCKS = gauge(
    _PREFIX + "blocks",
    "blocks",
    "KV blocks of the instance's pool now, each in one state: `free`, `active` (a running sequence "
    "or a transfer has it), `cached` (kept for later prompts, and evictable unless it is read) or "
    "`detached` (dropped, while somebody still reads it).",
    INSTANCE,
    Label("medium", tuple(_MEDIA)),
    Label("state", tuple(_BLOCK_STATES)),
)

INSTANCE_METRICS: tuple[MetricSpec, ...] = (
    *(spec for spec, _ in _PLAIN),
    *(spec for spec, _ in _BY_LABEL),
    _BLOCKS,
    *(spec for spec, _ in _HISTOGRAMS),
)


def report_instance(page: Page, instance: InstanceId, stats: InstanceStats) -> None:
    """Write one instance's statistics."""
    for spec, value in _PLAIN:
        page.add(spec, value(stats), instance)
    for spec, series in _BY_LABEL:
        for label, value in series.items():
            page.add(spec, value(stats), instance, label)
    for medium, of in _MEDIA.items():
        blocks = of(stats)
        for state, count in _BLOCK_STATES.items():
            page.add(_BLOCKS, count(blocks), instance, medium, state)
    for spec, observed in _HISTOGRAMS:
        page.observe(spec, observed(stats), instance)


def report_state(page: Page, instance: InstanceId, state: InstanceState) -> None:
    """Write which state an instance is in."""
    for each in InstanceState:
        page.add(STATE, each is state, instance, each)
