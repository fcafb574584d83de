"""A simulated instance: continuous batching with chunked prefill, by the cost model.

Time passes in phases in which the batch does not change: so many equal steps, then the next
phase is planned. What arrives in between waits for the end of a step, as in the engine. One
prompt is prefilled at a time, in chunks, and every step also serves all decoding sequences.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memserve.scheduler.contract import Costs
from memserve.sim.cache import SimCache
from memserve.sim.prompt import BlockKey, SimRequest
from memserve.sim.timeline import Timeline
from memserve.types import InstanceId, Role


@dataclass(frozen=True, slots=True)
class InstanceShape:
    """What a simulated instance is made of."""

    id: InstanceId
    role: Role
    costs: Costs
    block_tokens: int
    hbm_blocks: int
    dram_blocks: int = 0
    max_running: int = 256
    chunk_tokens: int = 2048  # prefilled per step
    caches: bool = True  # keeps KV for later requests
    swap_bytes_per_second: float = 25e9  # DRAM to HBM


@dataclass(slots=True)
class Job:
    """A sequence on one instance."""

    request: SimRequest
    prefill_only: bool
    prefilled: Callable[[Job], None]  # its prompt is computed here: there is a first token
    ended: Callable[[Job], None]  # its last token is there; never for `prefill_only`
    pinned: list[BlockKey]
    private: int = 0  # blocks without a key
    chunks: int = 0  # of its prefill, left
    chunk_seconds: float = 0.0
    left: int = 0  # tokens to decode
    context: int = 0  # tokens with KV


@dataclass(frozen=True, slots=True)
class _Phase:
    begun: float
    step_seconds: float
    steps: int


class SimInstance:
    """`stored` is called with a request and the positions of its blocks that are new here."""

    def __init__(
        self,
        shape: InstanceShape,
        cache: SimCache,
        timeline: Timeline,
        stored: Callable[[InstanceId, Sequence[BlockKey], SimRequest, Sequence[int]], None],
    ) -> None:
        self.shape = shape
        self.cache = cache
        self.busy_seconds = 0.0
        self.computed_tokens = 0
        self._timeline = timeline
        self._stored = stored
        self._queue: deque[Job] = deque()  # prompts to compute
        self._arrived: deque[Job] = deque()  # prompts computed elsewhere, to decode
        self._prefilling: Job | None = None
        self._decoding: list[Job] = []
        self._phase: _Phase | None = None
        self._phase_number = 0

    # --- what arrives ---------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Compute a prompt, and decode unless it is `prefill_only`."""
        self._queue.append(job)
        self._disturb()

    def decode(self, job: Job) -> None:
        """Go on with a sequence whose KV has arrived."""
        self._arrived.append(job)
        self._disturb()

    def store(self, keys: Sequence[BlockKey], request: SimRequest) -> None:
        """Keep KV that another instance sent."""
        if not self.shape.caches:
            return
        new = self.cache.put(keys)
        self._stored(self.shape.id, keys, request, new)

    @property
    def waiting(self) -> int:
        return len(self._queue) + len(self._arrived)

    @property
    def running(self) -> int:
        return len(self._decoding) + (self._prefilling is not None)

    # --- phases ---------------------------------------------------------------------------

    def _disturb(self) -> None:
        """Something new is there: let the present phase end with its present step."""
        phase = self._phase
        if phase is None:
            self._begin()
        elif self._prefilling is None:
            done = math.ceil((self._timeline.now() - phase.begun) / phase.step_seconds)
            self._plan_end(phase.begun, phase.step_seconds, min(phase.steps, max(done, 1)))

    def _begin(self) -> None:
        self._take_arrived()
        if self._prefilling is None:
            self._prefilling = self._next_prompt()
        batch = self._decoding
        if self._prefilling is None and not batch:
            self._phase = None
            return
        steps = min((job.left for job in batch), default=1 << 30)
        seconds = 0.0
        if self._prefilling is not None:
            steps = min(steps, self._prefilling.chunks)
            seconds += self._prefilling.chunk_seconds
        if batch:
            context = sum(job.context for job in batch) + len(batch) * (steps // 2)
            seconds += float(self.shape.costs.decode_step_seconds(len(batch), context))
        self._plan_end(self._timeline.now(), max(seconds, 1e-9), steps)

    def _plan_end(self, begun: float, step_seconds: float, steps: int) -> None:
        self._phase = _Phase(begun, step_seconds, steps)
        self._phase_number += 1
        number = self._phase_number
        end = max(self._timeline.now(), begun + step_seconds * steps)
        self._timeline.at(end, lambda: self._end_phase(number))

    def _end_phase(self, number: int) -> None:
        if number != self._phase_number or self._phase is None:
            return  # planned anew since
        steps = self._phase.steps
        self.busy_seconds += steps * self._phase.step_seconds
        self._phase = None
        finished = []
        for job in self._decoding:
            job.left -= steps
            job.context += steps
            if not job.left:
                finished.append(job)
        for job in finished:
            self._decoding.remove(job)
            self._finish(job)
        job_or_none = self._prefilling
        if job_or_none is not None:
            job_or_none.chunks -= steps
            if not job_or_none.chunks:
                self._prefilling = None
                self._prefilled(job_or_none)
        if self._phase is None:  # a callback may have begun one
            self._begin()

    # --- prompts --------------------------------------------------------------------------

    def _next_prompt(self) -> Job | None:
        if not self._queue or len(self._decoding) >= self.shape.max_running:
            return None
        job = self._queue[0]
        request, shape = job.request, self.shape
        # The last token is computed in any case: its logits are wanted.
        reusable = request.keys[: (request.prompt_tokens - 1) // shape.block_tokens]
        found = self.cache.found(reusable) if shape.caches else 0
        total = request.prompt_tokens + (0 if job.prefill_only else request.output_tokens)
        private = -(-total // shape.block_tokens) - found
        swapped = self.cache.acquire(reusable[:found], private)
        if swapped is None:  # until something that runs here has ended
            return None
        self._queue.popleft()
        cached = found * shape.block_tokens
        job.pinned, job.private = list(reusable[:found]), private
        request.cached_tokens = cached
        request.computed_at = shape.id
        new = request.prompt_tokens - cached
        self.computed_tokens += new
        seconds = float(shape.costs.prefill_seconds(request.prompt_tokens, cached))
        moved = swapped * shape.block_tokens * shape.costs.kv_bytes_per_token
        seconds += moved / shape.swap_bytes_per_second
        job.chunks = -(-new // shape.chunk_tokens)
        job.chunk_seconds = seconds / job.chunks
        return job

    def _prefilled(self, job: Job) -> None:
        request = job.request
        self._publish(job, request.keys)
        job.context = request.prompt_tokens
        job.left = request.output_tokens - 1
        if job.prefill_only:
            self.cache.release(job.pinned, job.private)
            job.prefilled(job)
            return
        if job.left:
            self._decoding.append(job)
        job.prefilled(job)
        if not job.left:
            self._finish(job)

    def _take_arrived(self) -> None:
        shape = self.shape
        while self._arrived and len(self._decoding) < shape.max_running:
            job = self._arrived[0]
            request = job.request
            found = self.cache.found(request.keys) if shape.caches else 0
            total = request.prompt_tokens + request.output_tokens
            private = -(-total // shape.block_tokens) - found
            if self.cache.acquire(request.keys[:found], private) is None:
                return
            self._arrived.popleft()
            job.pinned, job.private = list(request.keys[:found]), private
            self._publish(job, request.keys)
            job.context = request.prompt_tokens
            job.left = request.output_tokens - 1
            if job.left:
                self._decoding.append(job)
            else:
                self._finish(job)

    def _publish(self, job: Job, keys: Sequence[BlockKey]) -> None:
        """The job's blocks up to `keys` are whole: others may use them."""
        at = len(job.pinned)
        if not self.shape.caches or len(keys) <= at:
            return
        new = [at + position for position in self.cache.publish(keys[at:])]
        job.private -= len(keys) - at
        job.pinned += keys[at:]
        self._stored(self.shape.id, keys, job.request, new)

    def _finish(self, job: Job) -> None:
        self._publish(job, job.request.final_keys[: len(job.pinned) + job.private])
        self.cache.release(job.pinned, job.private)
        job.ended(job)
