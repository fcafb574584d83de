"""Statistics of a call's sequences: cached tokens, blocks moved, seconds of each phase."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from memserve.api.request_stats import RequestStats
from memserve.api.status import Latencies
from memserve.api.timeline import MAX_PAUSES, Chunk, Pause
from memserve.engine.request import Usage

PAUSE_SECONDS = 0.5  # least seconds between two outputs of a sequence that count as a pause


@dataclass(slots=True)
class SequenceStats:
    """Statistics of one sequence. `RemotePrefill` fills in the figures of a hand-over or fetch,
    `Generation` the others. Times are seconds of the instance's clock.
    """

    submitted: float  # when the sequence went to the engine here
    handed_over: bool = False  # another instance computed the prompt
    cached_tokens_prefill: int = 0
    cached_tokens_decode: int = 0
    blocks_fetched: int = 0
    blocks_received: int = 0
    blocks_already_present: int = 0
    queue_seconds: float = 0.0
    fetch_seconds: float = 0.0
    prefill_seconds: float = 0.0
    transfer_seconds: float = 0.0
    decode_seconds: float = 0.0
    preemptions: int = 0
    queued_here: float = 0.0  # the part of `queue_seconds` after a hand-over
    ended: float | None = None  # time of the end
    chunks: Sequence[Chunk] = ()  # computed chunks of the prompt
    pauses: list[Pause] = field(default_factory=list)
    _last: float = 0.0  # time of the last output
    tokens_behind_first: int = 0  # generated here after the first token
    _first_token: float | None = None
    _queued_here: bool = False
    _cached_known: bool = False

    @property
    def first_token(self) -> float | None:
        """The time of the first token, or, after a hand-over, of the start of decoding."""
        return self._first_token

    def take(self, usage: Usage, now: float, tokens: int) -> None:
        """Count an output of `tokens` tokens that came at `now`."""
        self.preemptions = usage.preemptions
        # The wait in this engine's queue after a hand-over is not a pause.
        decodes = self._first_token is not None and self._queued_here is self.handed_over
        if decodes and now - self._last >= PAUSE_SECONDS and len(self.pauses) < MAX_PAUSES:
            self.pauses.append(Pause(self._last - self.submitted, now - self._last))
        self._last = now
        self.tokens_behind_first += max(0, tokens - (self._first_token is None))
        if usage.chunks and not self.handed_over:
            self.chunks = usage.chunks
        if self._first_token is None:
            self._first_token = now
            if not self.handed_over:
                self.queue_seconds = usage.queue_seconds
                self.prefill_seconds = max(0.0, now - self.submitted - usage.queue_seconds)
        elif self.handed_over and not self._queued_here:
            # The first output of the engine here: the sequence waited in a second queue before.
            self._queued_here = True
            self.queue_seconds += usage.queue_seconds
            self.queued_here = usage.queue_seconds
            self._first_token = min(now, self._first_token + usage.queue_seconds)
        if not (self.handed_over or self._cached_known) and usage.cached_tokens is not None:
            # Later numbers may include KV that was computed for this answer.
            self._cached_known = True
            self.cached_tokens_prefill = self.cached_tokens_decode = usage.cached_tokens

    def end(self, latencies: Latencies, now: float) -> None:
        """Count the end of the sequence, and add its times to `latencies`."""
        self.ended = now
        if self._first_token is not None:
            self.decode_seconds = now - self._first_token
        latencies.queue.observe(self.queue_seconds)
        latencies.prefill.observe(self.prefill_seconds)
        latencies.decode.observe(self.decode_seconds)
        if self.tokens_behind_first > 0:
            latencies.per_token.observe(self.decode_seconds / self.tokens_behind_first)
        if self.fetch_seconds:
            latencies.fetch.observe(self.fetch_seconds)
        if self.handed_over:
            latencies.transfer.observe(self.transfer_seconds)


def combined(
    sequences: Collection[SequenceStats], first: Collection[SequenceStats], block_bytes: int
) -> RequestStats:
    """Return a request's statistics: sums of tokens, blocks and preemptions, maxima of seconds.

    Cached tokens count only in `first`, the first sample of each prompt: later samples share its
    prefill, which is no saving of the cache.
    """
    received = sum(s.blocks_received for s in sequences)
    return RequestStats(
        cached_tokens_prefill=sum(s.cached_tokens_prefill for s in first),
        cached_tokens_decode=sum(s.cached_tokens_decode for s in first),
        blocks_fetched=sum(s.blocks_fetched for s in sequences),
        blocks_received=received,
        bytes_received=received * block_bytes,
        bytes_avoided=sum(s.blocks_already_present for s in sequences) * block_bytes,
        queue_seconds=max((s.queue_seconds for s in sequences), default=0.0),
        fetch_seconds=max((s.fetch_seconds for s in sequences), default=0.0),
        prefill_seconds=max((s.prefill_seconds for s in sequences), default=0.0),
        transfer_seconds=max((s.transfer_seconds for s in sequences), default=0.0),
        decode_seconds=max((s.decode_seconds for s in sequences), default=0.0),
        preemptions=sum(s.preemptions for s in sequences),
    )
