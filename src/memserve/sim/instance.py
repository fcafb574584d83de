"""A simulated instance: continuous batching with chunked prefill, by the cost model.

Time passes in phases in which the batch does not change: so many equal steps, then the next
phase is planned. What arrives in between waits for the end of a step, as in the engine. Prompts
are prefilled in chunks, and every step also serves all decoding sequences. A part of a step's
chunk goes to the prompt of which the least is left, the rest to the others in their order.
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
    """What a simulated instance is made of."""

    id: InstanceId
    role: Role
    costs: Costs
    block_tokens: int
    hbm_blocks: int
    dram_blocks: int = 0
    max_running: int = 256
    chunk_tokens: int = 2048  # prefilled per step
    short_share: float = 0.5  # of it, for the shortest prompt; 0: all in order, as vLLM
    caches: bool = True  # keeps KV for later requests
    swap_bytes_per_second: float = 25e9  # DRAM to HBM
    step_overhead: float = 0.0  # seconds of the host's work in each step, its devices idle
    mixed_steps: bool = True  # False: no answer is decoded in a step that computes prompts


@dataclass(slots=True, eq=False)
class Job:
    """A sequence on one instance."""

    request: SimRequest
    prefill_only: bool
    prefilled: Callable[[Job], None]  # its prompt is computed here: there is a first token
    ended: Callable[[Job], None]  # its last token is there; never for `prefill_only`
    pinned: list[BlockKey]
    private: int = 0  # blocks without a key
    admitted: bool = False  # its prompt has memory here
    number: int = 0  # in the order of arrival
    follows: Job | None = None  # computes what this one will find
    uncached: int = 0  # tokens of its prompt that are not computed
    token_seconds: float = 0.0  # of computing each
    left: int = 0  # tokens to decode
    context: int = 0  # tokens with KV


@dataclass(frozen=True, slots=True)
class _Phase:
    begun: float
    step_seconds: float
    steps: int
    chunks: Sequence[tuple[Job, int]]  # prompts, and tokens of each in a step
    decodes: bool  # every decoding sequence gets a token in each step


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
        self._jobs = 0
        self._queue: list[Job] = []  # prompts that hold no memory yet, in order
        self._arrived: deque[Job] = deque()  # prompts computed elsewhere, to decode
        self._prefilling: list[Job] = []  # those that do, in order
        self._decoding: list[Job] = []
        self._phase: _Phase | None = None
        self._phase_number = 0

    # --- what arrives ---------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Compute a prompt, and decode unless it is `prefill_only`."""
        job.number = self._jobs
        self._jobs += 1
        found = self._reusable(job)
        job.uncached = job.request.prompt_tokens - found * self.shape.block_tokens
        job.follows = self._leader(job, found)
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
        return len(self._decoding) + len(self._prefilling)

    # --- phases ---------------------------------------------------------------------------

    def _disturb(self) -> None:
        """Something new is there: let the present phase end with its present step."""
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
            return  # planned anew since
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
        if self._phase is None:  # a callback may have begun one
            self._begin()

    # --- prompts --------------------------------------------------------------------------

    def _next_chunks(self) -> list[tuple[Job, int]]:
        """What the next step computes of which prompts; those that get any hold memory."""
        ready = [job for job in self._queue if job.follows is None or not job.follows.uncached]
        budget = self.shape.chunk_tokens
        chunks: dict[int, tuple[Job, int]] = {}
        short = int(budget * self.shape.short_share)
        # What does not fit stops those behind it, or small ones would starve it.
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
        """Whose prompt goes on from the blocks that are here as this one does."""
        keys = job.request.keys[found : found + 1]
        if not keys or not self.shape.caches:
            return None
        for other in (*self._prefilling, *self._queue):
            if other.request.keys[found : found + 1] == keys:
                return other
        return None

    def _reusable(self, job: Job) -> int:
        """How many leading blocks of its prompt are here."""
        request, shape = job.request, self.shape
        # The last token is computed in any case: its logits are wanted.
        most = (request.prompt_tokens - 1) // shape.block_tokens
        return self.cache.found(request.keys[:most]) if shape.caches else 0

    def _admit(self, job: Job) -> bool:
        """Give a prompt memory, unless it has some; False if there is none for it."""
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
        if swapped is None:  # until something that runs here has ended
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


def _remaining(job: Job) -> tuple[int, int]:
    return job.uncached, job.number


def _arrival(job: Job) -> int:
    return job.number
