"""`Timelines`: the time lines of the last requests of an instance."""

from __future__ import annotations

from collections import OrderedDict

from memserve.api.timeline import MAX_CHUNKS, MAX_PAUSES, Forwarded, Timeline
from memserve.instance.forwarded_run import ForwardedRun
from memserve.instance.generation import Generation
from memserve.instance.sequence_stats import SequenceStats
from memserve.types import RequestId

KEPT_TIMELINES = 1000  # some 0.5 KB each, and 3 KB at most
_REFUSED = 400  # statuses from here on are errors


class Timelines:
    """The last KEPT_TIMELINES time lines, by request."""

    def __init__(self, kept: int = KEPT_TIMELINES) -> None:
        self._kept = kept
        self._known: OrderedDict[RequestId, Timeline] = OrderedDict()

    def add(self, told: Timeline | None) -> None:
        """Add the time line of an ended call, complete or not; None: the call had no sequence."""
        if told is None:
            return
        self._known[told.request] = told
        self._known.move_to_end(told.request)
        if len(self._known) > self._kept:
            self._known.popitem(last=False)

    def find(self, request: str) -> Timeline | None:
        return self._known.get(RequestId(request))


def timeline_of(generation: Generation) -> Timeline | None:
    """Return the time line of the sequence that ended last; None if there was none."""
    if not generation.stats:
        return None
    stats = max(generation.stats.values(), key=lambda each: each.ended or 0.0)
    return Timeline(
        request=generation.id,
        ended=generation.finished and generation.failure is None,
        handed_over=stats.handed_over,
        prompt_tokens=generation.prompt_tokens,
        cached_tokens=stats.cached_tokens_prefill,
        output_tokens=generation.generated_tokens,
        preemptions=stats.preemptions,
        fetch=stats.fetch_seconds,
        queue=max(stats.queue_seconds - stats.queued_here, 0.0),
        prefill=stats.prefill_seconds,
        transfer=stats.transfer_seconds,
        queue_here=stats.queued_here,
        decode=stats.decode_seconds,
        chunks=tuple(stats.chunks[:MAX_CHUNKS]),
        pauses=tuple(stats.pauses[:MAX_PAUSES]),
    )


def forwarded_timeline(run: ForwardedRun) -> Timeline:
    """Return the time line of a forwarded call that has ended."""
    brought = run.brought or SequenceStats(run.arrived)
    handed_over = brought.handed_over
    return Timeline(
        request=run.id,
        ended=run.error is None and run.status is not None and run.status < _REFUSED,
        handed_over=handed_over,
        prompt_tokens=run.prompt_tokens if handed_over else None,
        cached_tokens=brought.cached_tokens_prefill if handed_over else None,
        output_tokens=None,
        preemptions=None,
        fetch=brought.fetch_seconds,
        queue=brought.queue_seconds,
        prefill=brought.prefill_seconds,
        transfer=brought.transfer_seconds,
        queue_here=0.0,
        decode=0.0,
        chunks=tuple(brought.chunks[:MAX_CHUNKS]),
        pauses=tuple(run.pauses),
        forwarded=Forwarded(
            path=run.path,
            stream=run.stream,
            sent=run.since_arrival(run.sent),
            first=run.since_arrival(run.first),
            end=run.end - run.arrived,
            status=run.status,
            bytes=run.size,
            error=run.error,
        ),
    )
