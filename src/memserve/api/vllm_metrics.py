"""Instances' statistics under the names that vLLM's own servers use, for dashboards and endpoint
pickers that know those. Nothing is counted for them: they are read from the same `InstanceStats`.

Names, kinds, labels and label values: vLLM 0.32, `vllm/v1/metrics/loggers.py`; buckets are ours. On
an instance's page `engine` is "0", on a gateway's the instance's id.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from memserve.api.histogram import Histogram, TokenHistogram
from memserve.api.metric import Label, MetricKind, MetricSpec, Page
from memserve.api.status import InstanceStats, Limits

_Value = Callable[[InstanceStats], float]

ENGINE = "0"  # of an instance, on its own page
_MODEL = Label("model_name", text="the served model name")
_ENGINE = Label("engine", text='the instance\'s id; "0" on its own page')


def _spec(name: str, kind: MetricKind, unit: str, text: str, *labels: Label) -> MetricSpec:
    return MetricSpec(f"vllm:{name}", kind, unit, text, (_MODEL, _ENGINE, *labels))


def _used(stats: InstanceStats) -> float:
    """The share of HBM that a new sequence cannot have. It can have cached blocks that nobody
    reads."""
    hbm = stats.pool.hbm
    return (hbm.active + hbm.pinned + hbm.detached) / hbm.total if hbm.total else 0.0


def _prompt_tokens(stats: InstanceStats) -> int:
    engine = stats.engine
    return (
        engine.computed_prompt_tokens + engine.cached_prompt_tokens + engine.received_prompt_tokens
    )


_PLAIN: tuple[tuple[MetricSpec, _Value], ...] = (
    (
        _spec("num_requests_running", MetricKind.GAUGE, "sequences", "Sequences in the batch now."),
        lambda s: s.engine.running,
    ),
    (
        _spec("num_requests_waiting", MetricKind.GAUGE, "sequences", "Sequences in the queue now."),
        lambda s: s.engine.waiting,
    ),
    (
        _spec(
            "kv_cache_usage_perc",
            MetricKind.GAUGE,
            "ratio",
            "Share of HBM blocks that running sequences and transfers hold, 0 to 1. Cached blocks "
            "that can be evicted count as free.",
        ),
        _used,
    ),
    (
        _spec(
            "prefix_cache_queries_total",
            MetricKind.COUNTER,
            "tokens",
            "Prompt tokens that were looked up in the instance's own cache.",
        ),
        _prompt_tokens,
    ),
    (
        _spec(
            "prefix_cache_hits_total",
            MetricKind.COUNTER,
            "tokens",
            "Prompt tokens that the instance's own cache had.",
        ),
        lambda s: s.engine.cached_prompt_tokens,
    ),
    (
        _spec(
            "external_prefix_cache_queries_total",
            MetricKind.COUNTER,
            "tokens",
            "Prompt tokens that the instance's own cache did not have.",
        ),
        lambda s: s.engine.computed_prompt_tokens + s.engine.received_prompt_tokens,
    ),
    (
        _spec(
            "external_prefix_cache_hits_total",
            MetricKind.COUNTER,
            "tokens",
            "Prompt tokens whose KV came from another instance instead of being computed.",
        ),
        lambda s: s.engine.received_prompt_tokens,
    ),
    (
        _spec(
            "prompt_tokens_total",
            MetricKind.COUNTER,
            "tokens",
            "Prompt tokens of sequences that the engine ran, cached or not.",
        ),
        _prompt_tokens,
    ),
    (
        _spec(
            "prompt_tokens_cached_total",
            MetricKind.COUNTER,
            "tokens",
            "Prompt tokens that were not computed: cached here or received.",
        ),
        lambda s: s.engine.cached_prompt_tokens + s.engine.received_prompt_tokens,
    ),
    (
        _spec(
            "generation_tokens_total",
            MetricKind.COUNTER,
            "tokens",
            "Tokens that the engine generated.",
        ),
        lambda s: s.engine.generated_tokens,
    ),
    (
        _spec(
            "num_preemptions_total",
            MetricKind.COUNTER,
            "sequences",
            "Sequences put back into the queue because no KV blocks were left.",
        ),
        lambda s: s.engine.preemptions,
    ),
)
_WAITING = _spec(
    "num_requests_waiting_by_reason",
    MetricKind.GAUGE,
    "sequences",
    "Sequences in the queue now. All wait for room in the batch or for KV blocks.",
    Label("reason", ("capacity",)),
)
_SOURCES: dict[str, _Value] = {
    "local_compute": lambda s: s.engine.computed_prompt_tokens,
    "local_cache_hit": lambda s: s.engine.cached_prompt_tokens,
    "external_kv_transfer": lambda s: s.engine.received_prompt_tokens,
}
_BY_SOURCE = _spec(
    "prompt_tokens_by_source_total",
    MetricKind.COUNTER,
    "tokens",
    "Prompt tokens by where their KV came from.",
    Label("source", tuple(_SOURCES)),
)
_REASONS: dict[str, _Value] = {
    "stop": lambda s: s.latencies.ended.stop,
    "length": lambda s: s.latencies.ended.length,
    "abort": lambda s: s.latencies.ended.abort,
    "error": lambda s: s.latencies.ended.error,
}
_SUCCESS = _spec(
    "request_success_total",
    MetricKind.COUNTER,
    "sequences",
    "Sequences that ended, by why; as with vLLM, also those that were given up or failed.",
    Label("finished_reason", tuple(_REASONS)),
)
_HISTOGRAMS: tuple[
    tuple[MetricSpec, Callable[[InstanceStats], Histogram | TokenHistogram]], ...
] = tuple(
    (_spec(name, MetricKind.HISTOGRAM, unit, text), value)
    for name, unit, text, value in (
        (
            "time_to_first_token_seconds",
            "seconds",
            "Time from a call's arrival at the instance to a sequence's first token.",
            lambda s: s.latencies.first_token,
        ),
        (
            "inter_token_latency_seconds",
            "seconds",
            "Time between two tokens of a sequence.",
            lambda s: s.latencies.inter_token,
        ),
        (
            "time_per_output_token_seconds",
            "seconds",
            "Time between two tokens of a sequence: an older name of "
            "`vllm:inter_token_latency_seconds`.",
            lambda s: s.latencies.inter_token,
        ),
        (
            "request_time_per_output_token_seconds",
            "seconds",
            "Mean time between the tokens of a sequence, from its first to its last.",
            lambda s: s.latencies.per_token,
        ),
        (
            "e2e_request_latency_seconds",
            "seconds",
            "Time from a call's arrival at the instance to a sequence's last token.",
            lambda s: s.latencies.whole,
        ),
        (
            "request_queue_time_seconds",
            "seconds",
            "Time that sequences waited for their first step.",
            lambda s: s.latencies.queue,
        ),
        (
            "request_prefill_time_seconds",
            "seconds",
            "Time from a sequence's first step to its first token.",
            lambda s: s.latencies.prefill,
        ),
        (
            "request_decode_time_seconds",
            "seconds",
            "Time from a sequence's first token to its last.",
            lambda s: s.latencies.decode,
        ),
        (
            "request_prompt_tokens",
            "tokens",
            "Lengths of finished sequences' prompts.",
            lambda s: s.latencies.ended.prompt_tokens,
        ),
        (
            "request_generation_tokens",
            "tokens",
            "Lengths of finished sequences' answers.",
            lambda s: s.latencies.ended.generated_tokens,
        ),
    )
)
_CACHE = MetricSpec(
    "vllm:cache_config_info",
    MetricKind.GAUGE,
    "1",
    "Always 1; the labels tell the size of the instance's HBM.",
    (
        Label("block_size", text="tokens of a block"),
        Label("num_gpu_blocks", text="blocks of HBM"),
        _ENGINE,
    ),
)
_LORA = MetricSpec(
    "vllm:lora_requests_info",
    MetricKind.GAUGE,
    "seconds",
    "The time of the scrape, since 1970; the labels say that no LoRA adapters are served.",
    (
        Label("max_lora", ("0",)),
        Label("waiting_lora_adapters", ("",)),
        Label("running_lora_adapters", ("",)),
    ),
)

VLLM_METRICS: tuple[MetricSpec, ...] = (
    *(spec for spec, _ in _PLAIN),
    _WAITING,
    _BY_SOURCE,
    _SUCCESS,
    _CACHE,
    *(spec for spec, _ in _HISTOGRAMS),
)
# Of an instance's own page alone.
VLLM_INSTANCE_METRICS = (*VLLM_METRICS, _LORA)


def report_vllm(
    page: Page, model: str, engine: str, stats: InstanceStats, limits: Limits | None
) -> None:
    """Write one instance's statistics. `model`: the served name."""
    for spec, value in _PLAIN:
        page.add(spec, value(stats), model, engine)
    page.add(_WAITING, stats.engine.waiting, model, engine, "capacity")
    for source, value in _SOURCES.items():
        page.add(_BY_SOURCE, value(stats), model, engine, source)
    for reason, value in _REASONS.items():
        page.add(_SUCCESS, value(stats), model, engine, reason)
    for histogram, observed in _HISTOGRAMS:
        page.observe(histogram, observed(stats), model, engine)
    if limits is not None:
        blocks = str(stats.pool.hbm.total)
        page.add(_CACHE, 1, str(limits.block_tokens), blocks, engine)


def report_lora(page: Page) -> None:
    page.add(_LORA, time.time(), "0", "", "")
