"""Random lives of real pools, seen through event streams that lose, repeat and reorder.

Whatever happened: once an instance's stream has recovered, the trees have just what its index
has; and at no time does a match name an instance that has left.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import msgspec
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memserve import Medium
from memserve.api.kv_events import EventBatch, KVSnapshot, decode_batch
from memserve.clock import ManualClock
from memserve.errors import OutOfBlocks
from memserve.instance.kv_events import stored_blocks, wire_events
from memserve.pool.listener import StoredRun
from memserve.pool.pool import BlockPool
from memserve.scheduler.event_stream import EventCounts, EventStream
from memserve.scheduler.prompt_tree import PromptTree
from memserve.types import Epoch, InstanceId, RefArray
from tests.kv_events_harness import prefixes_of
from tests.pool_harness import BLOCK, LAYOUT, prompt, store

INSTANCES = ["a", "b"]
_epochs = itertools.count(1)
_encode = msgspec.msgpack.Encoder().encode

instances = st.sampled_from(INSTANCES)
blocks = st.lists(st.integers(0, 2), min_size=1, max_size=5)
fates = st.sampled_from(["arrives", "arrives", "again", "lost"])
namespaces = st.sampled_from(["", "", "salt:x"])


class Published:
    """One life of one instance: a pool, and the batches that it has published."""

    def __init__(self, name: str, hbm: int, dram: int, batched: int) -> None:
        self.epoch = Epoch(next(_epochs))
        self.pool = BlockPool(
            LAYOUT, hbm, dram, instance=name, epoch=self.epoch, clock=ManualClock()
        )
        self.pool.listen(self)
        self.batches: list[bytes] = []
        self._pending: list[StoredRun | RefArray] = []
        self._batched = batched

    def stored(self, run: StoredRun) -> None:
        self._note(run)

    def removed(self, namespace: str, refs: RefArray) -> None:
        self._note(refs)

    def moved(self, run: StoredRun, old: RefArray) -> None:
        self._note(run)
        self._note(old)

    def _note(self, change: StoredRun | RefArray) -> None:
        self._pending.append(change)
        if len(self._pending) >= self._batched:
            self.flush()

    def flush(self) -> None:
        events = [event for each in self._pending for event in wire_events(each, BLOCK)]
        if events:
            self.batches.append(_encode(EventBatch(0.0, events, 0)))
        self._pending = []

    def beat(self) -> None:
        """What an idle publisher sends."""
        self.flush()
        self.batches.append(_encode(EventBatch(0.0, [], 0)))

    def snapshot(self) -> KVSnapshot:
        runs = self.pool.indexed(self.flush)
        return KVSnapshot(
            InstanceId(self.pool.owner.instance),
            self.epoch,
            len(self.batches) - 1,
            BLOCK,
            [stored_blocks(run) for run in runs],
        )


class Followed:
    """What a gateway has of one life: the batches on their way, a snapshot under way."""

    def __init__(self, life: Published, tree: PromptTree) -> None:
        self.life = life
        name = InstanceId(life.pool.owner.instance)
        tree.join(name, BLOCK, references=True)
        self.stream = EventStream(tree, name, BLOCK, EventCounts())
        self.on_their_way: list[tuple[int, bytes]] = []
        self.sent = len(life.batches)  # a late joiner has missed what was before
        self.restoring: Iterator[None] | None = None

    def pick_up(self) -> None:
        self.life.flush()
        new = self.life.batches[self.sent :]
        self.on_their_way += enumerate(new, self.sent)
        self.sent += len(new)

    def deliver(self, at: int) -> None:
        sequence, payload = self.on_their_way[at]
        self.stream.offer(sequence, decode_batch(payload))

    def step(self) -> None:
        """Go on with the snapshot under way."""
        if self.restoring is not None and next(self.restoring, self) is self:
            self.restoring = None

    def recover(self) -> None:
        """As a subscription does: what is on its way arrives, and a beat, and what is missing
        then is closed by a snapshot."""
        self.life.beat()
        self.pick_up()
        while self.on_their_way:
            self.deliver(0)
            del self.on_their_way[0]
        while self.restoring is not None:
            self.step()
        if self.stream.gap:
            self.restoring = self.stream.restore(self.life.snapshot())
        while self.restoring is not None:
            self.step()


class EventStreamMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tree = PromptTree()
        self.lives: dict[str, Published] = {}
        self.followed: dict[str, Followed] = {}

    def teardown(self) -> None:
        for followed in self.followed.values():
            followed.recover()
        self.compare()
        for life in self.lives.values():
            life.pool.close()
        for name in list(self.followed):
            self.forget(name)
        assert self.tree.stats().nodes == 0

    def compare(self) -> None:
        for name, followed in self.followed.items():
            assert not followed.stream.gap
            assert self.tree.held(InstanceId(name)) == prefixes_of(followed.life.pool)

    # --- instances ------------------------------------------------------------------------

    @rule(
        name=instances,
        hbm=st.integers(4, 10),
        dram=st.integers(0, 6),
        batched=st.sampled_from([1, 1, 3]),
    )
    def start(self, name: str, hbm: int, dram: int, batched: int) -> None:
        """Also again: the former life ends without a word."""
        if name in self.lives:
            self.lives[name].pool.close()
        self.lives[name] = Published(name, hbm, dram, batched)

    @initialize()
    def begin(self) -> None:
        for name in INSTANCES:
            self.start(name, 6, 4, 1)
            self.followed[name] = Followed(self.lives[name], self.tree)
            self.followed[name].recover()

    @rule(data=st.data(), numbers=blocks, namespace=namespaces, medium=st.sampled_from(Medium))
    def insert(
        self, data: st.DataObject, numbers: list[int], namespace: str, medium: Medium
    ) -> None:
        life = self.lives[data.draw(st.sampled_from(sorted(self.lives)))]
        with contextlib.suppress(OutOfBlocks):
            store(life.pool, prompt(*numbers), namespace, medium)

    @rule(data=st.data(), numbers=blocks, namespace=namespaces)
    def read(self, data: st.DataObject, numbers: list[int], namespace: str) -> None:
        life = self.lives[data.draw(st.sampled_from(sorted(self.lives)))]
        with life.pool.match(prompt(*numbers), namespace, in_hbm=True):
            pass

    @rule(data=st.data(), numbers=st.lists(st.integers(0, 2), max_size=3), namespace=namespaces)
    def delete(self, data: st.DataObject, numbers: list[int], namespace: str) -> None:
        life = self.lives[data.draw(st.sampled_from(sorted(self.lives)))]
        life.pool.delete(prompt(*numbers), namespace)

    @rule(data=st.data(), count=st.integers(1, 6))
    def swap_out(self, data: st.DataObject, count: int) -> None:
        self.lives[data.draw(st.sampled_from(sorted(self.lives)))].pool.swap_out(count)

    # --- the gateway ----------------------------------------------------------------------

    @rule(data=st.data(), early=st.booleans())
    def follow(self, data: st.DataObject, early: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.lives)))
        self.forget(name)
        self.followed[name] = Followed(self.lives[name], self.tree)
        if early:
            self.followed[name].recover()

    @rule(name=instances)
    def forget(self, name: str) -> None:
        followed = self.followed.pop(name, None)
        if followed is not None:
            followed.stream.close()
            self.tree.leave(InstanceId(name))
            followed.pick_up()
            for at in range(len(followed.on_their_way)):  # what comes too late
                followed.deliver(at)
            followed.step()

    @precondition(lambda self: self.followed)
    @rule(data=st.data(), fates=st.lists(st.tuples(fates, st.integers(0, 3)), max_size=6))
    def carry(self, data: st.DataObject, fates: list[tuple[str, int]]) -> None:
        """Some of what is on its way arrives, in any order; some twice, some never."""
        followed = self.followed[data.draw(st.sampled_from(sorted(self.followed)))]
        followed.pick_up()
        for fate, at in fates:
            if at < len(followed.on_their_way):
                if fate != "lost":
                    followed.deliver(at)
                if fate != "again":
                    del followed.on_their_way[at]

    @precondition(lambda self: self.followed)
    @rule(data=st.data(), steps=st.integers(0, 3))
    def begin_snapshot(self, data: st.DataObject, steps: int) -> None:
        """A snapshot that is applied while events go on arriving."""
        followed = self.followed[data.draw(st.sampled_from(sorted(self.followed)))]
        if followed.restoring is None and followed.stream.gap:
            followed.restoring = followed.stream.restore(followed.life.snapshot())
        for _ in range(steps):
            followed.step()

    @precondition(lambda self: self.followed)
    @rule(data=st.data())
    def recover(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.followed)))
        followed = self.followed[name]
        followed.recover()
        assert not followed.stream.gap
        assert self.tree.held(InstanceId(name)) == prefixes_of(followed.life.pool)

    @rule(numbers=blocks, namespace=namespaces, name=instances)
    def route(self, numbers: list[int], namespace: str, name: str) -> None:
        array = np.array(prompt(*numbers), dtype=np.int32)
        self.tree.expect(InstanceId(name), namespace, array, 0.0)
        found = self.tree.match(namespace, array)
        assert set(found) <= set(self.followed)
        if name in self.followed:
            assert found[InstanceId(name)] == len(array)

    @invariant()
    def sound(self) -> None:
        self.tree.check_integrity()
        assert set(self.tree.instances) == set(self.followed)


EventStreamMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestEventStream = EventStreamMachine.TestCase
