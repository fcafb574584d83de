"""The scheduler's side: looks prompts up in the pool, orders copies, and publishes saved blocks.

All of it runs on vLLM's scheduling thread, between two steps. Loads are asynchronous: vLLM
schedules a request after its KV has been loaded, so no step computes from blocks that are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from collections.abc import Sequence as SequenceOf
from collections.abc import Set as AbstractSet
from typing import Protocol

import numpy as np

from memserve.errors import OutOfBlocks
from memserve.pool.results import Match
from memserve.transfer.mempool import MemPool
from memserve.types import Medium, TokenArray, ref_index
from memserve.vllm.connector.events import Removed, Stored, TierEvents
from memserve.vllm.connector.metadata import CopiesDone, Copy, PoolMemory, StepCopies
from memserve.vllm.connector.pool_server import Ready, tell_nobody
from memserve.vllm.connector.sequence import Save, Sequence, Spaces

BlockIds = SequenceOf[SequenceOf[int]]  # for each KV cache group


class Request(Protocol):
    """The part of vLLM's `Request` that is used here."""

    request_id: str
    num_tokens: int
    cache_salt: str | None
    skip_reading_prefix_cache: bool

    @property
    def all_token_ids(self) -> SequenceOf[int]: ...


class Scheduled(Protocol):
    """The part of vLLM's `NewRequestData` that is used here."""

    req_id: str
    block_ids: BlockIds
    num_computed_tokens: int


class GoingOn(Protocol):
    """The part of vLLM's `CachedRequestData` that is used here: requests scheduled before."""

    req_ids: SequenceOf[str]
    resumed_req_ids: Collection[str]  # after a preemption: `new_block_ids` has all of their blocks
    new_block_ids: SequenceOf[BlockIds | None]
    num_computed_tokens: SequenceOf[int]


class Step(Protocol):
    """The part of vLLM's `SchedulerOutput` that is used here."""

    scheduled_new_reqs: SequenceOf[Scheduled]
    scheduled_cached_reqs: GoingOn
    num_scheduled_tokens: dict[str, int]
    scheduled_spec_decode_tokens: dict[str, list[int]]


class _Known:
    """A request, from its arrival until it has ended and none of its copies is in flight."""

    __slots__ = ("loading_into", "match", "offered_from", "order", "request", "sequence")

    def __init__(self, request: Request, sequence: Sequence, order: int) -> None:
        self.request = request
        self.sequence = sequence
        self.order = order  # number of an instance's order; 0: none
        self.loading_into: list[list[int]] = []  # vLLM's block ids, by KV cache group
        self.match: Match | None = None  # pins the blocks that were offered, or are being loaded
        self.offered_from = 0  # number of leading blocks that vLLM has itself

    def unpin(self) -> None:
        if self.match is not None:
            self.match.release()
            self.match = None


class PoolScheduler:
    """The connector's state in vLLM's scheduler, whose thread makes all calls. Owns the pool."""

    def __init__(
        self,
        pool: MemPool,
        workers: int,
        spaces: Spaces,
        events: TierEvents | None = None,
        ready: Ready = tell_nobody,
    ) -> None:
        """`workers`: number of ranks, each of which copies its part of a block. `spaces`: the
        pool's namespaces. `events`: the pool's listener. `ready`: called with the tokens of a
        request with an order that the index has."""
        self._pool = pool
        self._spaces = spaces
        self._events = events
        self._ready = ready
        pool.listen(events)
        self._workers = workers
        self._block = pool.layout.block_tokens
        self._known: dict[str, _Known] = {}
        self._jobs: dict[int, tuple[_Known, int]] = {}  # saves: request, workers yet to report
        self._numbers = itertools.count(1)  # of jobs
        self._loads: list[Copy] = []  # for the next step
        self._told = -1  # the version of the pool's memory that workers know
        # Requests since the start.
        self.unsaved = 0  # saving ended early: no free block, a window, or an evicted prefix
        self.failed_loads = 0

    @property
    def busy(self) -> bool:
        """Whether loads are ordered for the next step, or saves are in flight."""
        return bool(self._loads or self._jobs)

    # --- admission ------------------------------------------------------------------------

    def arrived(self, request: Request, cacheable: bool, order: int = 0) -> None:
        """Add a new request. `cacheable`: its KV depends on its token ids and nothing else.
        `order`: number of an instance's order to push its KV to a peer; 0: none."""
        sequence = Sequence(request.cache_salt or "", cacheable, sent=bool(order))
        self._known[request.request_id] = _Known(request, sequence, order)

    def offer(self, request: Request, local: int) -> int:
        """Return the number of tokens behind the first `local` ones that the pool has. Their blocks
        stay pinned until the next offer, or the end of the load."""
        known = self._known.get(request.request_id)
        if known is None or not known.sequence.may_load or request.skip_reading_prefix_cache:
            return 0
        known.unpin()
        tokens = _array(request.all_token_ids, request.num_tokens - 1)  # one is left to compute
        match = self._pool.match(tokens, self._spaces.of(known.sequence.salt))
        if match.tokens <= local:
            match.release()
            return 0
        known.match, known.offered_from = match, local // self._block
        return match.tokens - local

    def allocated(self, request_id: str, block_ids: BlockIds, external: int) -> None:
        """Order the load of `external` offered tokens into vLLM's blocks `block_ids`, by group; 0:
        vLLM declines the offer."""
        known = self._known.get(request_id)
        if known is None or known.sequence.loading:
            return
        match = known.match
        if match is None or not external:
            known.unpin()
            return
        first = known.offered_from
        last = min(first + external // self._block, len(match.refs))
        own = [np.array(ids[first:last], dtype=np.int64) for ids in block_ids]
        self._loads.append(Copy(request_id, 0, own, ref_index(match.refs[first:last])))
        known.loading_into = [ids.tolist() for ids in own]
        known.sequence.load_began()

    # --- each step ------------------------------------------------------------------------

    def step(self, step: Step) -> StepCopies:
        """Return the copies that workers make in this step."""
        copies, self._loads = StepCopies(self._loads), []
        if self._pool.memory_version != self._told:
            self._told = self._pool.memory_version
            copies.memory = self._memory()
        for new in step.scheduled_new_reqs:
            self._admit(new.req_id, new.block_ids)
            self._save(copies, step, new.req_id, new.num_computed_tokens)
        going_on = step.scheduled_cached_reqs
        for at, request_id in enumerate(going_on.req_ids):
            fresh = going_on.new_block_ids[at]
            if request_id in going_on.resumed_req_ids:
                self._admit(request_id, fresh or ())
            elif fresh and (known := self._known.get(request_id)) is not None:
                known.sequence.grown([list(ids) for ids in fresh])
            self._save(copies, step, request_id, going_on.num_computed_tokens[at])
        return copies

    def _admit(self, request_id: str, block_ids: BlockIds) -> None:
        known = self._known.get(request_id)
        if known is None:
            return
        have = 0
        if known.sequence.saves:
            tokens = _array(known.request.all_token_ids)
            space = self._spaces.of(known.sequence.salt)
            with self._pool.match(tokens, space) as match:
                have = len(match.refs)
            if known.order and have:
                self._ready(known.order, tokens[: match.tokens], space)
        known.sequence.admitted([list(ids) for ids in block_ids], have)

    def _save(self, copies: StepCopies, step: Step, request_id: str, computed: int) -> None:
        known = self._known.get(request_id)
        if known is None:
            return
        sequence = known.sequence
        drafts = len(step.scheduled_spec_decode_tokens.get(request_id, ()))  # may be rejected
        after = computed + step.num_scheduled_tokens[request_id] - drafts
        due = sequence.due(after // self._block)
        if not due:
            return
        own = [np.array(ids[due.start : due.stop], dtype=np.int64) for ids in sequence.block_ids]
        # A group with fewer or null blocks has a sliding window, and has freed the blocks before
        # it.
        if any(len(ids) != len(due) or not ids.all() for ids in own):
            sequence.give_up()
            self.unsaved += 1
            return
        try:
            refs = self._pool.alloc_mem(len(due), Medium.DRAM)
        except OutOfBlocks:
            sequence.give_up()
            self.unsaved += 1
            return
        job = next(self._numbers)
        self._jobs[job] = known, self._workers
        sequence.ordered(job, Save(due.start, due.stop, refs))
        copies.saves.append(Copy(request_id, job, own, ref_index(refs)))

    # --- reports of workers ---------------------------------------------------------------

    def update(
        self,
        loaded: Iterable[str],
        failed: Collection[str],
        invalid: AbstractSet[int],
        done: CopiesDone | None,
    ) -> None:
        """Take the workers' reports: requests whose loads have ended, those of them that failed,
        vLLM's ids of blocks with invalid KV, and saves that have ended. Voids requests first, so
        that a save of invalid blocks in the same report is not published."""
        for request_id in failed:
            self._void(request_id)
        if invalid:
            for request_id, known in self._known.items():
                ids = *known.sequence.block_ids, *known.loading_into
                if any(not invalid.isdisjoint(each) for each in ids):
                    self._void(request_id)
        if done is not None:
            for job, workers in done.saves.items():
                self._reported(job, workers, job in done.failed)
        for request_id in loaded:
            ended = self._known.get(request_id)
            if ended is not None and ended.sequence.loading:
                ended.unpin()
                ended.loading_into = []
                ended.sequence.load_ended()
                self._leave(ended)

    def _void(self, request_id: str) -> None:
        known = self._known.get(request_id)
        if known is not None:
            self.failed_loads += 1
            known.sequence.fail()

    def _reported(self, job: int, workers: int, failed: bool) -> None:
        known, left = self._jobs[job]
        if failed:
            known.sequence.void()
            known.sequence.give_up()
        if left > workers:
            self._jobs[job] = known, left - workers
            return
        del self._jobs[job]
        save, good = known.sequence.saved(job)
        if not (good and self._publish(known, save)):
            self._pool.free_mem(save.refs)
        self._leave(known)

    def _publish(self, known: _Known, save: Save) -> bool:
        """Insert a save into the index. Return False if that is impossible; the blocks then stay
        the caller's."""
        sequence = known.sequence
        # The step's inputs, so all are known when it is over, unless vLLM has dropped some.
        tokens = _array(known.request.all_token_ids, save.last * self._block)
        if len(tokens) < save.last * self._block:
            sequence.give_up()
            return False
        before, space = tokens[: save.first * self._block], self._spaces.of(sequence.salt)
        with self._pool.match(before, space) as match:
            if len(match.refs) < save.first:  # the prefix was evicted meanwhile
                sequence.give_up()
                self.unsaved += 1
                return False
            refs = np.concatenate((match.refs, save.refs))
            result = self._pool.insert(tokens, refs, space)
        if len(result.duplicate):
            self._pool.free_mem(result.duplicate)
        if known.order:
            self._ready(known.order, tokens, space)
        return True

    # --- ends -----------------------------------------------------------------------------

    def finished(self, request_id: str) -> None:
        """Record that vLLM has ended a request. Its copies may still be in flight."""
        known = self._known.get(request_id)
        if known is None:
            return
        known.sequence.ended = True
        if not known.sequence.loading:
            known.unpin()
        self._leave(known)

    def take_events(self) -> list[Stored | Removed]:
        """Return the blocks stored in and removed from the pool since the last call."""
        return [] if self._events is None else self._events.take()

    def reset(self) -> None:
        """Drop all cached KV and void the saves in flight, because weights may have changed.
        Lookups do not find pinned blocks, or KV that a peer is sending, afterwards either."""
        for known in self._known.values():
            known.sequence.void()
            known.sequence.give_up()
            if not known.sequence.loading:
                known.unpin()
        self._spaces.renew()
        if self._events is not None:
            self._events.renewed()
        for namespace in {run.namespace for run in self._pool.indexed(lambda: None)}:
            self._pool.delete(np.empty(0, dtype=np.int32), namespace)

    def close(self) -> None:
        for known in self._known.values():
            known.unpin()
        self._pool.close()

    def _leave(self, known: _Known) -> None:
        name = known.request.request_id
        if known.sequence.over and self._known.get(name) is known:
            del self._known[name]

    def _memory(self) -> tuple[PoolMemory, ...]:
        return tuple(
            PoolMemory(extent.start, extent.blocks, extent.segment.name, extent.segment.size)
            for extent in self._pool.extents(Medium.DRAM)
            if extent.segment is not None
        )


def _array(tokens: SequenceOf[int], count: int | None = None) -> TokenArray:
    """Return the first `count` tokens, or all of them, as int32."""
    return np.array(tokens[: len(tokens) if count is None else count], dtype=np.int32)
