"""Spans of calls at an instance: opened around a call, and made from its statistics at the end.

`generate` has the parts `ask prefill` or `fetch`, and of each sequence `queue`, `compute` and
`decode`; of a forwarded call, `vllm`. `prefill` has `fetch`, `queue`, `compute` and `transfer`. The
figures come from the call's statistics; a trace adds the times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from memserve.api.errors import ApiError
from memserve.api.generate import CallKind, GenerateCall
from memserve.api.handoff import PrefillCall, PrefillResult, PushCall, PushResult
from memserve.api.http_message import Request
from memserve.api.timeline import Chunk
from memserve.instance.forwarded_run import ForwardedRun
from memserve.instance.generation import Generation
from memserve.instance.sequence_stats import SequenceStats
from memserve.tracing.span import Attribute, Span, Tracer, error_type
from memserve.transfer.kv_link import Pushed

MAX_SEQUENCES = 8  # sequences of a call that have spans


@contextmanager
def served(tracer: Tracer | None, name: str, request: Request) -> Iterator[Span | None]:
    """Context with the span of a request from another process; None unless the request is traced.
    An exception becomes the span's error, and is raised again."""
    span = None if tracer is None else tracer.join(name, request.headers)
    if span is None:
        yield None
        return
    try:
        yield span
    except ApiError as error:
        span.attributes["http.response.status_code"] = int(error.status)
        span.finish(error=error.reason)
        raise
    except BaseException as error:
        span.finish(error=error_type(error))
        raise
    span.finish()


def describe(span: Span, call: GenerateCall) -> None:
    """Add a call's parameters to its span."""
    operation = "chat" if call.kind is CallKind.CHAT else "text_completion"
    span.attributes |= {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "memserve",
        "gen_ai.request.model": call.model,
        "gen_ai.response.id": call.id,
        "gen_ai.usage.input_tokens": sum(map(len, call.prompts)),
    }
    if call.resumed:
        span.attributes["memserve.resumed_tokens"] = sum(map(len, call.resumed))


def ended(span: Span, generation: Generation) -> None:
    """Add a call's outcome to its span, and the spans of its first MAX_SEQUENCES sequences."""
    totals = generation.totals()
    span.attributes |= {
        "gen_ai.usage.output_tokens": generation.generated_tokens,
        "memserve.sequences": len(generation.stats),
        "memserve.cached_tokens.prefill": totals.cached_tokens_prefill,
        "memserve.cached_tokens.decode": totals.cached_tokens_decode,
        "memserve.blocks.fetched": totals.blocks_fetched,
        "memserve.blocks.received": totals.blocks_received,
        "memserve.bytes.received": totals.bytes_received,
        "memserve.bytes.avoided": totals.bytes_avoided,
        "memserve.preemptions": totals.preemptions,
    }
    if generation.failure is not None:
        span.error = generation.failure.detail.code or "failed"
    elif not generation.finished:
        span.error = "cancelled"  # the client has left, or the call continues at another instance
    for number, stats in enumerate(generation.stats.values()):
        if number == MAX_SEQUENCES:
            break
        of_several: dict[str, Attribute] = {}
        if len(generation.stats) > 1:
            of_several["memserve.sequence"] = number
        _sequence(span, stats, of_several)


def forwarded(run: ForwardedRun) -> None:
    """Add a forwarded call's outcome to its span, and end the span at the server, if any."""
    if run.parent is not None and run.error is not None:
        run.parent.error = run.error
    span = run.span
    if span is None:
        return
    span.attributes["http.response.body.size"] = run.size
    if run.status is not None:
        span.attributes["http.response.status_code"] = run.status
    if run.first is not None:
        span.event("first_token" if run.stream else "first_byte", run.first)
    span.finish(run.end, run.error)


def _sequence(span: Span, stats: SequenceStats, attributes: dict[str, Attribute]) -> None:
    now, first = span.now(), stats.first_token
    if first is None:  # the sequence was queued or computed until the call ended
        span.child("queue", start=stats.submitted, attributes=attributes).finish(now, "cancelled")
        return
    if stats.handed_over:
        if stats.queued_here:
            queued = span.child("queue", start=first - stats.queued_here, attributes=attributes)
            queued.finish(first)
    else:
        begun = stats.submitted + stats.queue_seconds
        span.child("queue", start=stats.submitted, attributes=attributes).finish(begun)
        computed = attributes | {"memserve.cached_tokens": stats.cached_tokens_prefill}
        compute = span.child("compute", start=begun, attributes=computed)
        _computed(compute, stats.submitted, stats.chunks)
        compute.finish(first)
    span.event("first_token", first, attributes)
    whole = stats.ended is not None
    decode = span.child("decode", start=first, attributes=attributes)
    decode.finish(stats.ended if whole else now, None if whole else "cancelled")


def _computed(span: Span, submitted: float, chunks: Iterable[Chunk]) -> None:
    """Add an event for each chunk of a prompt that was computed."""
    for chunk in chunks:
        span.event("chunk", submitted + chunk.end, {"memserve.tokens": chunk.tokens})


def prefilled(
    span: Span,
    call: PrefillCall,
    result: PrefillResult,
    started: float,
    sent: Pushed,
    block_bytes: int,
) -> None:
    """Add the parts of a prefill for another instance. `started`: time of submission."""
    begun = started + result.queue_seconds
    computed = started + result.prefill_seconds
    span.attributes |= {
        "gen_ai.usage.input_tokens": len(call.prompt),
        "memserve.cached_tokens": result.cached_tokens,
        "memserve.target": call.target.id,
    }
    span.child("queue", start=started).finish(begun)
    compute = span.child("compute", start=begun)
    _computed(compute, started, result.chunks)
    compute.finish(computed)
    # KV is sent while it is computed: this span is the rest, after the first token.
    transfer = span.child("transfer", start=computed)
    transfer.attributes |= moved(sent, block_bytes)
    transfer.finish(computed + result.transfer_seconds)


def moved(pushed: Pushed, block_bytes: int) -> dict[str, Attribute]:
    """Return the attributes of a transfer: blocks, bytes and transport."""
    attributes: dict[str, Attribute] = {
        "memserve.blocks.sent": pushed.sent,
        "memserve.blocks.already_present": pushed.already_present,
        "memserve.bytes.sent": pushed.sent * block_bytes,
    }
    if pushed.transport:
        attributes["memserve.transport"] = pushed.transport
    return attributes


def pushed(span: Span, call: PushCall, result: PushResult) -> None:
    """Add the result of a push of cached KV to its span."""
    span.attributes |= {
        "memserve.target": call.target.id,
        "memserve.tokens": len(call.tokens),
        "memserve.blocks.sent": result.blocks_sent,
        "memserve.blocks.already_present": result.blocks_already_present,
    }
