"""vLLM's scheduler and its model, as far as a connector sees them: blocks, steps, aborts,
preemption, loads that fail, and outputs that are looked at a step late.

What a block holds depends on what the block before it holds and on its tokens, so whatever is
computed from a wrong block is wrong, too, to the end.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import numpy as np
import torch

from memserve.pool.layout import KVLayout
from memserve.transfer.mempool import MemPool
from memserve.types import Medium, ref_index
from memserve.vllm.connector.copies import Pages, Pending, StreamCopies
from memserve.vllm.connector.events import Removed, TierEvents
from memserve.vllm.connector.metadata import CopiesDone, Copy
from memserve.vllm.connector.scheduler import BlockIds, PoolScheduler
from memserve.vllm.connector.sequence import Spaces
from memserve.vllm.connector.worker import Worker

BLOCK, RANKS, LAYERS = 4, 2, ("a", "b")
LAYOUT = KVLayout(layers=2, kv_heads=RANKS, head_dim=4, dtype="float32", block_tokens=BLOCK)
PAGE = LAYOUT.block_bytes // RANKS // len(LAYERS)


def page_after(before: bytes, tokens: list[int]) -> bytes:
    """What a layer of a rank has for these tokens behind that page."""
    seed = hashlib.sha256(before + repr(tokens).encode()).digest()
    return (seed * (PAGE // len(seed) + 1))[:PAGE]


def right_page(namespace: str, tokens: list[int], rank: int, layer: str, block: int) -> bytes:
    """What it must hold: computed from the beginning."""
    page = f"{namespace} {rank} {layer}".encode()
    for at in range(block + 1):
        page = page_after(page, tokens[at * BLOCK : (at + 1) * BLOCK])
    return page


def token_after(tokens: list[int]) -> int:
    return int.from_bytes(hashlib.sha256(repr(tokens).encode()).digest()[:1], "little")


def name_of(parent: bytes | int | None, tokens: list[int], salt: str) -> bytes:
    """vLLM's name of a block."""
    return hashlib.sha256(f"{salt if parent is None else parent!r} {tokens}".encode()).digest()


def names_of(namespace: str, tokens: list[int]) -> list[bytes]:
    """vLLM's names of a prompt's whole blocks."""
    names: list[bytes] = []
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        above = names[-1] if names else None
        names.append(name_of(above, tokens[end - BLOCK : end], namespace))
    return names


@dataclass
class FakeRequest:
    request_id: str
    tokens: list[int]  # as the worker knows them
    length: int  # that it ends at
    cache_salt: str | None
    skip_reading_prefix_cache: bool = False
    all_token_ids: list[int] = field(default_factory=list)  # as the scheduler knows them
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    begun: bool = False  # it was scheduled before
    resumed: bool = True  # its blocks are new to the connector
    told: int = 0  # blocks that the connector knows
    load_failed: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


@dataclass
class New:
    req_id: str
    block_ids: BlockIds
    num_computed_tokens: int


@dataclass
class Cached:
    req_ids: list[str] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)
    new_block_ids: list[BlockIds | None] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)


@dataclass
class Step:
    scheduled_new_reqs: list[New] = field(default_factory=list)
    scheduled_cached_reqs: Cached = field(default_factory=Cached)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Output:
    """Of a step, until the scheduler looks at it."""

    sampled: list[tuple[FakeRequest, int]]
    loaded: set[str]
    failed: set[str]
    invalid: set[int]  # blocks
    done: CopiesDone | None


class StumblingWorker(Worker):
    """Some of its loads fail half-way, and leave garbage."""

    failing: set[str]
    stream: LateStream | None = None

    def copy_late(self, stream: LateStream) -> None:
        self.stream, self._copies = stream, StreamCopies(stream)

    def _begin(self, copy: Copy, one: Callable[[Pages, Pending], None], done: str) -> Pending:
        pending = super()._begin(copy, one, done)
        if done == "loaded" and copy.request in self.failing:
            pending.failed = True
            if self.stream is None:
                self._spoil(copy)
            else:
                self.stream.launch(lambda: self._spoil(copy), behind_compute=True)
                self._copies.close(pending)
        return pending

    def _spoil(self, copy: Copy) -> None:
        for layers, own in zip(self._layers, copy.own, strict=True):
            for pages in layers:
                pages[torch.from_numpy(own)] = 0xEE


class LateStream:
    """A stream of copies that run when chance says so, long after they were launched."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._queue: deque[Callable[[], None]] = deque()
        self.launched = self.ran = 0

    def launch(self, work: Callable[[], None], *, behind_compute: bool) -> None:
        self._queue.append(work)
        self.launched += 1

    def mark(self) -> LateMark:
        return LateMark(self, self.launched)

    def run_some(self) -> None:
        for _ in range(self._rng.randint(0, len(self._queue))):
            self._queue.popleft()()
            self.ran += 1


class LateMark(NamedTuple):
    stream: LateStream
    at: int

    def query(self) -> bool:
        return self.stream.ran >= self.at


class FakeVllm:
    """One engine with two tensor-parallel workers."""

    def __init__(
        self,
        rng: Random,
        *,
        blocks: int,
        dram_blocks: int,
        late: int,
        budget: int = 24,
        by_block: bool = False,
        streams: bool = False,
    ) -> None:
        """`late`: steps until an output is looked at. `budget`: tokens of a step. `by_block`: loads
        that fail are told by their blocks, as before 0.30. `streams`: copies are a GPU's."""
        self._rng = rng
        self._late = late
        self._budget = budget
        self._by_block = by_block
        self.pool = MemPool(LAYOUT, hbm_blocks=0, dram_blocks=dram_blocks, instance="vllm")
        spaces = self.spaces = Spaces()
        self.events = TierEvents(BLOCK, name_of, spaces)
        self.connector = PoolScheduler(self.pool, RANKS, spaces, self.events)
        self.told: dict[bytes | int, int] = {}  # blocks that events tell of; their depth
        self.kv = [
            {name: torch.zeros(blocks, PAGE, dtype=torch.uint8) for name in LAYERS}
            for _ in range(RANKS)
        ]
        self.workers = []
        for rank in range(RANKS):
            worker = StumblingWorker([LAYERS], rank, RANKS, blocks)
            worker.register(self.kv[rank])
            worker.failing = set()
            if streams:
                worker.copy_late(LateStream(rng))
            self.workers.append(worker)
        self._ranks_left: dict[str, int] = {}  # that have not loaded a request
        self._told_failed: set[str] = set()
        self._free = list(range(1, blocks))  # 0 is the null block
        self.waiting: list[FakeRequest] = []
        self.loading: dict[str, FakeRequest] = {}
        self.running: list[FakeRequest] = []
        self._aborted_loading: dict[str, FakeRequest] = {}
        self._outputs: deque[Output] = deque()
        self.finished = self.loaded_tokens = 0

    @property
    def active(self) -> bool:
        outputs = any(output.sampled or output.loaded or output.done for output in self._outputs)
        return bool(self.waiting or self.loading or self.running or outputs)

    def submit(self, request: FakeRequest) -> None:
        request.all_token_ids = list(request.tokens)
        self.connector.arrived(request, cacheable=True)
        self.waiting.append(request)

    def abort(self, request: FakeRequest) -> None:
        self.connector.finished(request.request_id)
        if request.request_id in self.loading:  # its blocks are still written to
            self._aborted_loading[request.request_id] = self.loading.pop(request.request_id)
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self._release(request)

    def preempt(self, request: FakeRequest) -> None:
        self.running.remove(request)
        self._release(request)
        request.computed, request.resumed = 0, True
        self.waiting.insert(0, request)

    def fail_next_load(self, request: FakeRequest) -> None:
        self._rng.choice(self.workers).failing.add(request.request_id)

    def step(self) -> None:
        self._admit()
        step = self._schedule()
        copies = self.connector.step(step)
        for worker in self.workers:
            worker.load(copies)
        sampled = self._compute(step)
        for worker in self.workers:
            worker.save(copies)
        self._outputs.append(self._output(sampled))
        if len(self._outputs) > self._late:
            self._look_at(self._outputs.popleft())

    def drain(self) -> None:
        for _ in range(10_000):
            if not (self.active or self.connector.busy or self._aborted_loading):
                return
            self.step()
        left = *self.waiting, *self.running, *self.loading.values(), self._outputs
        raise AssertionError(f"it never ends: {left}, {self.connector._jobs}")

    # --- the scheduler

    def _admit(self) -> None:
        for request in list(self.waiting):
            if len(self.running) + len(self.loading) >= 4:
                return
            found = None
            local = 0
            if not request.computed:
                most = (request.num_tokens - 1) // BLOCK
                local = self._rng.choice((0, 0, self._rng.randint(0, most))) * BLOCK
                found = self.connector.offer(request, local)
                assert found % BLOCK == 0
                assert not (found and request.load_failed), "a load that failed is offered again"
                assert local + found < request.num_tokens
            needed = -(-request.num_tokens // BLOCK) - len(request.blocks)
            if needed > len(self._free):
                return
            request.blocks += [self._take() for _ in range(needed)]
            if not request.computed:
                self._fill(request, local // BLOCK)
                request.computed = local + (found or 0)
            self.connector.allocated(request.request_id, [request.blocks], found or 0)
            self.waiting.remove(request)
            if found:
                self.loading[request.request_id] = request
            else:
                self.running.append(request)

    def _schedule(self) -> Step:
        step, budget = Step(), self._budget
        for request in list(self.running):
            count = min(budget, len(request.tokens) - request.computed)
            if count <= 0:
                continue
            needed = -(-(request.computed + count) // BLOCK) - len(request.blocks)
            if needed > len(self._free):
                continue
            request.blocks += [self._take() for _ in range(needed)]
            budget -= count
            step.num_scheduled_tokens[request.request_id] = count
            if not request.begun:
                step.scheduled_new_reqs.append(
                    New(request.request_id, [list(request.blocks)], request.computed)
                )
            else:
                cached = step.scheduled_cached_reqs
                cached.req_ids.append(request.request_id)
                fresh = request.blocks if request.resumed else request.blocks[request.told :]
                if request.resumed:
                    cached.resumed_req_ids.add(request.request_id)
                cached.new_block_ids.append([list(fresh)] if fresh else None)
                cached.num_computed_tokens.append(request.computed)
            request.begun, request.resumed, request.told = True, False, len(request.blocks)
        return step

    def _look_at(self, output: Output) -> None:
        for request, token in output.sampled:
            if request not in (*self.running, *self.waiting, *self.loading.values()):
                continue  # aborted
            request.all_token_ids.append(token)
            if request.num_tokens == request.length:
                self.finished += 1
                if request in self.running:  # and was not preempted when that was on its way
                    self._check(request)
                self.abort(request)
        failed, invalid = output.failed, output.invalid
        told = (set(), invalid) if self._by_block else (failed, set())
        self.connector.update(output.loaded, *told, output.done)
        self._hear()
        for request_id in output.loaded:
            gone = self._aborted_loading.pop(request_id, None)
            if gone is not None:
                self._release(gone)
                continue
            request = self.loading.pop(request_id)
            if request_id in output.failed:
                request.computed, request.load_failed = 0, True
                self._release(request)
            else:
                self.loaded_tokens += request.computed
            self.waiting.insert(0, request)

    def _hear(self) -> None:
        for event in self.connector.take_events():
            if isinstance(event, Removed):
                for name in event.names:
                    del self.told[name]
                continue
            assert len(event.tokens) == BLOCK * len(event.names)
            depth = 0 if event.parent is None else self.told[event.parent] + 1
            for at, name in enumerate(event.names):
                assert name not in self.told
                self.told[name] = depth + at

    # --- the model

    def _compute(self, step: Step) -> list[tuple[FakeRequest, int]]:
        sampled = []
        for request in self.running:
            count = step.num_scheduled_tokens.get(request.request_id, 0)
            before, request.computed = request.computed, request.computed + count
            for block in range(before // BLOCK, request.computed // BLOCK):
                self._write(request, block)
            if count and request.computed == len(request.tokens) < request.length:
                token = token_after(request.tokens)
                request.tokens.append(token)
                sampled.append((request, token))
        return sampled

    def _write(self, request: FakeRequest, block: int) -> None:
        tokens = request.tokens[block * BLOCK : (block + 1) * BLOCK]
        for rank, layers in enumerate(self.kv):
            for name, pages in layers.items():
                before = f"{request.cache_salt or ''} {rank} {name}".encode()
                if block:
                    before = pages[request.blocks[block - 1]].numpy().tobytes()
                page = np.frombuffer(page_after(before, tokens), dtype=np.uint8)
                pages[request.blocks[block]] = torch.from_numpy(page.copy())

    def _output(self, sampled: list[tuple[FakeRequest, int]]) -> Output:
        """As vLLM's `KVOutputAggregator` makes it: loads are told when all ranks have ended."""
        loaded: set[str] = set()
        whole: CopiesDone | None = None
        for worker in self.workers:
            if worker.stream is not None:
                worker.stream.run_some()
            ended, failed = worker.take_loaded()
            self._told_failed |= failed
            for request in ended:
                left = self._ranks_left.pop(request, RANKS) - 1
                if left:
                    self._ranks_left[request] = left
                else:
                    loaded.add(request)
            if (done := worker.take_saved()) is not None:
                whole = done if whole is None else whole.aggregate(done)
        failed = self._told_failed & loaded
        self._told_failed -= failed
        invalid = set().union(*(worker.take_invalid() for worker in self.workers))
        return Output(sampled, loaded, failed, invalid, whole)

    # --- blocks

    def _take(self) -> int:
        return self._free.pop(self._rng.randrange(len(self._free)))

    def _release(self, request: FakeRequest) -> None:
        for block in request.blocks:
            for layers in self.kv:
                for pages in layers.values():
                    pages[block] = 0xDD  # whoever gets it next
        self._free += request.blocks
        request.blocks, request.told = [], 0

    def _fill(self, request: FakeRequest, blocks: int) -> None:
        """What vLLM has in its own prefix cache."""
        for block in range(blocks):
            self._write(request, block)

    def _check(self, request: FakeRequest) -> None:
        for block in range(request.computed // BLOCK):
            for rank, layers in enumerate(self.kv):
                for name, pages in layers.items():
                    got = pages[request.blocks[block]].numpy().tobytes()
                    wanted = right_page(request.cache_salt or "", request.tokens, rank, name, block)
                    assert got == wanted, f"{request.request_id}: block {block} is wrong"

    def check_pool(self) -> int:
        """Every block of the index holds what it must; how many there are."""
        self.pool.check_integrity()
        stats = self.pool.stats()
        assert (stats.dram.active, stats.dram.pinned, stats.dram.detached) == (0, 0, 0)
        assert stats.matches == 0
        (extent,) = self.pool.extents(Medium.DRAM)
        memory = extent.memory.numpy().reshape(extent.blocks, len(LAYERS), RANKS, PAGE)
        self._hear()
        paths: dict[int, tuple[str, list[int]]] = {}
        names = set()
        seen = 0
        for run in self.pool.indexed(lambda: None):
            tokens = np.frombuffer(run.data, dtype=np.int32).tolist()
            salt = self.spaces.salt(run.namespace)
            if salt is None:  # was pinned when they were changed
                continue
            before = [] if run.parent is None else paths[int(run.parent)][1]
            for at, ref in enumerate(run.refs):
                so_far = before + tokens[: (at + 1) * BLOCK]
                paths[int(ref)] = salt, so_far
                index = int(ref_index(np.array([ref]))[0]) - extent.start
                for layer, name in enumerate(LAYERS):
                    for rank in range(RANKS):
                        wanted = right_page(salt, so_far, rank, name, len(so_far) // BLOCK - 1)
                        assert memory[index, layer, rank].tobytes() == wanted
                names.add(names_of(salt, so_far)[-1])
                seen += 1
        assert names == set(self.told) == self.events.held
        return seen
