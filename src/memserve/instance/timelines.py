"""The time lines of the requests that ended last at an instance."""

from __future__ import annotations

from collections import OrderedDict

from memserve.api.timeline import MAX_CHUNKS, MAX_PAUSES, Timeline
from memserve.instance.generation import Generation
from memserve.types import RequestId

KEPT_TIMELINES = 1000  # some 0.5 KB each, and 3 KB at most


class Timelines:
    """Keeps KEPT_TIMELINES of them, by request."""

    def __init__(self, kept: int = KEPT_TIMELINES) -> None:
        self._kept = kept
        self._known: OrderedDict[RequestId, Timeline] = OrderedDict()

    def add(self, generation: Generation) -> None:
        """Add a call that has ended, however it went, unless it had no sequence here."""
        found = timeline_of(generation)
        if found is None:
            return
        self._known[found.request] = found
        self._known.move_to_end(found.request)
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
