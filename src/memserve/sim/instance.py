"""`SimInstance`: continuous batching with chunked prefill, timed by the cost model.

Time passes in phases: a number of equal steps of one batch, after which the next phase is planned.
Arrivals during a phase wait for the end of a step, as in the engine. Prompts are prefilled in
chunks, and a step also decodes all running sequences (unless `mixed_steps` is off). A share of a
step's chunk goes to the prompt with the least left, the rest to the prompts in order of arrival.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from memserve.scheduler.contract import Costs
from memserve.sim.cache import SimCache
from memserve.sim.prompt import BlockKey, SimRequest
from memserve.sim.timeline import Timeline
from memserve.types import InstanceId, Role


@dataclass(frozen=True, slots=True)
class InstanceShape:
    """Parameters of a simulated instance."""

    id: InstanceId
    role: Role
    costs: Costs
    block_tokens: int
    hbm_blocks: int
    dram_blocks: int = 0
    max_running: int = 256
    chunk_tokens: int = 2048  # prefilled per step
    short_share: float = 0.5  # share of a chunk for the shortest prompt; 0: FCFS, as vLLM
    caches: bool = True  # keeps KV for later requests
    swap_bytes_per_second: float = 25e9  # DRAM to HBM
    step_overhead: float = 0.0  # seconds per step of host work, while devices are idle
    mixed_steps: bool = True  # False: a step that computes prompts decodes nothing


@dataclass(slots=True, eq=False)
class Job:
    """A sequence on one instance."""

    request: SimRequest
    prefill_only: bool
    prefilled: Callable[[Job], None]  # called when the prompt is computed here
    ended: Callable[[Job], None]  # called after the last token; never for `prefill_only`
    pinned: list[BlockKey]
    private: int = 0  # number of blocks without a key
    admitted: bool = False  # the prompt has memory here
    number: int = 0  # in order of arrival
    follows: Job | None = None  # its prefill computes a prefix of this prompt: wait for it
    uncached: int = 0  # prompt tokens still to compute
    token_seconds: float = 0.0  # per token of `uncached`
    left: int = 0  # tokens to decode
    context: int = 0  # tokens with KV


@dataclass(frozen=True, slots=True)
class _Phase:
    begun: float
    step_seconds: float
    steps: int
    chunks: Sequence[tuple[Job, int]]  # prompts, and tokens of each per step
    decodes: bool  # each step decodes one token of every decoding sequence


class SimInstance:
    """A simulated engine with its cache. `stored` is called with the instance, block keys, their
    request, and the positions of the keys that were not present."""

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
        self._jobs = 0
        self._queue: list[Job] = []  # prompts without memory, in order of arrival
        self._arrived: deque[Job] = deque()  # sequences to decode, prefilled elsewhere
        self._prefilling: list[Job] = []  # prompts with memory, in order of arrival
        self._decoding: list[Job] = []
        self._phase: _Phase | None = None
        self._phase_number = 0

    # --- arrivals -------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a prompt to compute, and to decode unless it is `prefill_only`."""
        job.number = self._jobs
        self._jobs += 1
        found = self._reusable(job)
        job.uncached = job.request.prompt_tokens - found * self.shape.block_tokens
        job.follows = self._leader(job, found)
        self._queue.append(job)
        self._disturb()

    def decode(self, job: Job) -> None:
        """Queue a sequence to decode; its KV has arrived."""
        self._arrived.append(job)
        self._disturb()

    def store(self, keys: Sequence[BlockKey], request: SimRequest) -> None:
        """Cache blocks that another instance sent, if this one caches."""
        if not self.shape.caches:
            return
        new = self.cache.put(keys)
        self._stored(self.shape.id, keys, request, new)

    @property
    def waiting(self) -> int:
        return len(self._queue) + len(self._arrived)

    @property
    def running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    # --- phases ---------------------------------------------------------------------------

    def _disturb(self) -> None:
        """After an arrival: end the present phase with its present step, or begin one."""
        phase = self._phase
        if phase is None:
            self._begin()
        else:
            done = math.ceil((self._timeline.now() - phase.begun) / phase.step_seconds)
            self._plan_end(replace(phase, steps=min(phase.steps, max(done, 1))))

    def _begin(self) -> None:
        self._take_arrived()
        chunks = self._next_chunks()
        batch = self._decoding if self.shape.mixed_steps or not chunks else []
        if not chunks and not batch:
            self._phase = None
            return
        steps = min((job.left for job in batch), default=1 << 30)
        seconds = self.shape.step_overhead
        for job, tokens in chunks:
            steps = min(steps, job.uncached // tokens)
            seconds += tokens * job.token_seconds
        if batch:
            context = sum(job.context for job in batch) + len(batch) * (steps // 2)
            seconds += float(self.shape.costs.decode_step_seconds(len(batch), context))
        self._plan_end(_Phase(self._timeline.now(), max(seconds, 1e-9), steps, chunks, bool(batch)))

    def _plan_end(self, phase: _Phase) -> None:
        self._phase = phase
        self._phase_number += 1
        number = self._phase_number
        end = max(self._timeline.now(), phase.begun + phase.step_seconds * phase.steps)
        self._timeline.at(end, lambda: self._end_phase(number))

    def _end_phase(self, number: int) -> None:
        phase = self._phase
        if number != self._phase_number or phase is None:
            return  # replaced by a later `_plan_end`
        steps = phase.steps
        self.busy_seconds += steps * phase.step_seconds
        self._phase = None
        finished = []
        for job in self._decoding if phase.decodes else ():
            job.left -= steps
            job.context += steps
            if not job.left:
                finished.append(job)
        for job in finished:
            self._decoding.remove(job)
            self._finish(job)
        for job, tokens in phase.chunks:
            job.uncached -= steps * tokens
            if not job.uncached:
                self._prefilling.remove(job)
                self._prefilled(job)
        if self._phase is None:  # a callback may have begun a phase
            self._begin()

    # --- prompts --------------------------------------------------------------------------

    def _next_chunks(self) -> list[tuple[Job, int]]:
        """Prompts of the next step, and tokens of each. Admits them first."""
        ready = [job for job in self._queue if job.follows is None or not job.follows.uncached]
        budget = self.shape.chunk_tokens
        chunks: dict[int, tuple[Job, int]] = {}
        short = int(budget * self.shape.short_share)
        # A prompt without room blocks later ones, or small prompts would starve it.
        passing = ready if short and ready and self._admit(ready[0]) else ()
        shortest = min({*self._prefilling, *passing}, key=_remaining, default=None)
        if short and shortest is not None and self._admit(shortest):
            tokens = min(short, shortest.uncached)
            chunks[shortest.number] = shortest, tokens
            budget -= tokens
        for job in sorted({*self._prefilling, *ready}, key=_arrival):
            if not budget or not self._admit(job):
                break
            _, given = chunks.get(job.number, (job, 0))
            tokens = min(budget, job.uncached - given)
            if tokens:
                chunks[job.number] = job, given + tokens
                budget -= tokens
        return list(chunks.values())

    def _leader(self, job: Job, found: int) -> Job | None:
        """First other prompt in prefill or queue whose next block after the `found` cached ones is
        the same: it computes a block that `job` can reuse."""
        keys = job.request.keys[found : found + 1]
        if not keys or not self.shape.caches:
            return None
        for other in (*self._prefilling, *self._queue):
            if other.request.keys[found : found + 1] == keys:
                return other
        return None

    def _reusable(self, job: Job) -> int:
        """Number of leading blocks of a job's prompt that are cached here and reusable."""
        request, shape = job.request, self.shape
        # The last token is always computed, for its logits.
        most = (request.prompt_tokens - 1) // shape.block_tokens
        return self.cache.found(request.keys[:most]) if shape.caches else 0

    def _admit(self, job: Job) -> bool:
        """Allocate memory for a prompt, unless it has it. Returns False if there is no room."""
        if job.admitted:
            return True
        if self.running >= self.shape.max_running:
            return False
        request, shape = job.request, self.shape
        found = self._reusable(job)
        total = request.prompt_tokens + (0 if job.prefill_only else request.output_tokens)
        private = -(-total // shape.block_tokens) - found
        keys = request.keys[:found]
        swapped = self.cache.acquire(keys, private)
        if swapped is None:  # HBM is full until a running sequence ends
            return False
        self._queue.remove(job)
        bisect.insort(self._prefilling, job, key=_arrival)
        cached = found * shape.block_tokens
        job.admitted = True
        job.pinned, job.private = list(keys), private
        request.cached_tokens = cached
        request.computed_at = shape.id
        job.uncached = request.prompt_tokens - cached
        self.computed_tokens += job.uncached
        seconds = float(shape.costs.prefill_seconds(request.prompt_tokens, cached))
        moved = swapped * shape.block_tokens * shape.costs.kv_bytes_per_token
        seconds += moved / shape.swap_bytes_per_second
        job.token_seconds = seconds / job.uncached
        return True

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
        """Make a job's full blocks reusable by other requests; `keys`: of its leading blocks."""
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


def _remaining(job: Job) -> tuple[int, int]:
    return job.uncached, job.number


def _arrival(job: Job) -> int:
    return job.number
