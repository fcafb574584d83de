"""Random histories of the pool against a naive model of what must be cached.

The bytes of every block are a function of its namespace and of all tokens up to its end, so
that serving another prompt's KV shows as wrong bytes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from memserve import KVLayout, Medium
from memserve.clock import ManualClock
from memserve.errors import (
    DoubleFree,
    NotOwned,
    OutOfBlocks,
    PinnedBlock,
    StaleBlock,
)
from memserve.pool.pool import BlockPool
from memserve.pool.results import Match
from memserve.types import RefArray, ref_medium
from tests.device import DEVICE

BLOCK = 2
Key = tuple[str, tuple[int, ...]]  # namespace, all tokens up to the end of a block

namespaces = st.sampled_from(["", "", "", "tenant"])
# Few different blocks and short prompts: prefixes meet and part all the time.
whole_prompts = st.lists(st.sampled_from([(0, 0), (0, 1), (1, 0)]), max_size=6).map(
    lambda blocks: [token for block in blocks for token in block]
)
prompts = st.builds(lambda head, tail: head + tail, whole_prompts, st.sampled_from([[], [0]]))
media = st.sampled_from(list(Medium))


def keys_of(namespace: str, tokens: list[int]) -> list[Key]:
    ends = range(BLOCK, len(tokens) + 1, BLOCK)
    return [(namespace, tuple(tokens[:end])) for end in ends]


def kv_of(layout: KVLayout, keys: list[Key]) -> torch.Tensor:
    blocks = [
        np.random.default_rng(zlib.crc32(repr(key).encode())).standard_normal(layout.block_shape)
        for key in keys
    ]
    array = np.array(blocks, dtype=np.float32).reshape(len(keys), *layout.block_shape)
    return torch.from_numpy(array)


@dataclass(eq=False)
class Reader:
    match: Match
    keys: list[Key]


class PoolMachine(RuleBasedStateMachine):
    pool: BlockPool

    @initialize(
        hbm=st.integers(3, 16),
        dram=st.integers(0, 10),
        aggregated=st.booleans(),
        eviction=st.sampled_from(["lru", "cost"]),
    )
    def start(self, hbm: int, dram: int, aggregated: bool, eviction: str) -> None:
        self.layout = KVLayout(2, 1, 3, "float32", BLOCK, aggregated)
        self.clock = ManualClock()
        self.pool = BlockPool(
            self.layout,
            hbm,
            dram,
            device=DEVICE,
            eviction="lru" if eviction == "lru" else "cost",
            clock=self.clock,
            dram_segment_blocks=2,
        )
        self.readers: list[Reader] = []
        self.active: list[RefArray] = []
        self.freed: list[int] = []
        self.cached: dict[Key, int] = {}  # what the index held after the last step

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for reader in self.readers:
                reader.match.release()
            for refs in self.active:
                self.pool.free_mem(refs)
            self.pool.delete([])
            self.pool.delete([], "tenant")
            self.pool.check_integrity()
            stats = self.pool.stats()
            assert stats.hbm.free == stats.hbm.total
            assert stats.dram.free == stats.dram.total
            assert stats.nodes == 0
            self.pool.close()

    # --- the model ------------------------------------------------------------------------

    def in_index(self) -> dict[Key, int]:
        """Key and block of everything in the index, read off the tree."""
        found: dict[Key, int] = {}
        for namespace, root in self.pool._index.roots.items():
            prefixes = {root.id: b""}
            for node in root.subtree():
                if node.parent is None:
                    continue
                prefix = prefixes[node.id] = prefixes[node.parent.id] + node.edge
                before = len(prefix) - len(node.edge)
                for at, ref in enumerate(node.refs.tolist()):
                    end = before + (at + 1) * BLOCK * 4
                    tokens = np.frombuffer(prefix[:end], np.int32).tolist()
                    found[namespace, tuple(tokens)] = ref
        return found

    def longest(self, namespace: str, tokens: list[int]) -> list[Key]:
        keys = keys_of(namespace, tokens)
        for at, key in enumerate(keys):
            if key not in self.cached:
                return keys[:at]
        return keys

    def pinned(self) -> set[int]:
        return {ref for reader in self.readers for ref in reader.match.refs.tolist()}

    def held(self) -> set[Key]:
        """Keys that pins at or below keep in the index."""
        pinned = self.pinned()
        held: set[Key] = set()
        for (namespace, tokens), ref in self.cached.items():
            if ref in pinned:
                held.update(keys_of(namespace, list(tokens)))
        return held

    def evictable(self, medium: Medium) -> int:
        held = self.held()
        free = [ref for key, ref in self.cached.items() if key not in held]
        return int(np.count_nonzero(ref_medium(np.array(free, dtype=np.int64)) == medium))

    def free(self, medium: Medium) -> int:
        stats = self.pool.stats()
        return (stats.hbm if medium is Medium.HBM else stats.dram).free

    def expect_only_evictions(self) -> None:
        """The index may have lost what nothing held, from the leaves, and gained nothing."""
        now = self.in_index()
        assert now.keys() <= self.cached.keys()
        assert self.held() <= now.keys()
        for namespace, tokens in now:
            assert all(key in now for key in keys_of(namespace, list(tokens)))
        self.cached = now

    def expect_same_keys(self) -> None:
        now = self.in_index()
        assert now.keys() == self.cached.keys()
        self.cached = now

    # --- memory ---------------------------------------------------------------------------

    def allocate(self, count: int, medium: Medium) -> RefArray | None:
        short = count - self.free(medium)
        evictable = self.evictable(medium)
        assert self.pool.evictable(medium) == evictable
        evictions = self.pool.stats().evictions
        room = self.free(Medium.DRAM)
        if short > evictable:
            with pytest.raises(OutOfBlocks) as caught:
                self.pool.alloc_mem(count, medium)
            assert (caught.value.asked, caught.value.evictable) == (count, evictable)
            assert self.in_index() == self.cached
            return None
        refs = self.pool.alloc_mem(count, medium)
        assert len(refs) == count
        if short <= 0:
            assert self.in_index() == self.cached
        elif medium is Medium.HBM and short <= room:
            assert self.pool.stats().evictions == evictions  # swapped out, nothing dropped
            self.expect_same_keys()
        else:
            self.expect_only_evictions()
        return refs

    @rule(count=st.integers(0, 4), medium=media)
    def alloc(self, count: int, medium: Medium) -> None:
        refs = self.allocate(count, medium)
        if refs is not None:
            self.active.append(refs)

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def free_some(self, data: st.DataObject) -> None:
        refs = self.active.pop(data.draw(st.integers(0, len(self.active) - 1)))
        cut = data.draw(st.integers(0, len(refs)))
        self.pool.free_mem(refs[:cut])
        self.freed.extend(refs[:cut].tolist())
        if cut < len(refs):
            self.active.append(refs[cut:])

    @precondition(lambda self: self.active)
    @rule()
    def free_all(self) -> None:
        while self.active:
            refs = self.active.pop()
            self.pool.free_mem(refs)
            self.freed.extend(refs.tolist())

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def use_after_free(self, data: st.DataObject) -> None:
        ref = np.array([data.draw(st.sampled_from(self.freed))])
        with pytest.raises((DoubleFree, StaleBlock)):
            self.pool.free_mem(ref)
        with pytest.raises(StaleBlock):
            self.pool.read(ref)
        with pytest.raises(StaleBlock):
            self.pool.insert([0] * BLOCK, ref)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def steal(self, data: st.DataObject) -> None:
        """Blocks of the index are nobody's to free, change, or insert elsewhere."""
        key = data.draw(st.sampled_from(sorted(self.cached)))
        ref = np.array([self.cached[key]])
        with pytest.raises(PinnedBlock if self.cached[key] in self.pinned() else NotOwned):
            self.pool.free_mem(ref)
        with pytest.raises(NotOwned):
            self.pool.write(ref, kv_of(self.layout, [key]))
        with pytest.raises(NotOwned):
            self.pool.insert([7] * BLOCK, ref)

    # --- index ----------------------------------------------------------------------------

    @rule(tokens=whole_prompts, namespace=namespaces, medium=media, pin=st.booleans())
    def insert_all(self, tokens: list[int], namespace: str, medium: Medium, pin: bool) -> None:
        """All blocks are the caller's own, even where the index has them."""
        keys = keys_of(namespace, tokens)
        refs = self.allocate(len(keys), medium)
        if refs is None:
            return
        self.pool.write(refs, kv_of(self.layout, keys))
        self.insert(tokens, namespace, refs, pin)

    @rule(tokens=whole_prompts, namespace=namespaces, pin=st.booleans(), in_hbm=st.booleans())
    def insert_rest(self, tokens: list[int], namespace: str, pin: bool, in_hbm: bool) -> None:
        """As an engine does: match, compute the rest, insert all."""
        keys = keys_of(namespace, tokens)
        reader = self.read(tokens, namespace, in_hbm)
        rest = self.allocate(len(keys) - len(reader.keys), Medium.HBM)
        if rest is not None:
            self.pool.write(rest, kv_of(self.layout, keys[len(reader.keys) :]))
            self.insert(tokens, namespace, np.concatenate((reader.match.refs, rest)), pin)
        self.release(reader)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), tail=whole_prompts, pin=st.booleans())
    def insert_longer(self, data: st.DataObject, tail: list[int], pin: bool) -> None:
        """A reader, perhaps of blocks that were moved since, inserts a continuation."""
        reader = data.draw(st.sampled_from(self.readers))
        if not reader.keys:
            return
        namespace, head = reader.keys[-1]
        tokens = [*head, *tail]
        keys = keys_of(namespace, tokens)
        rest = self.allocate(len(keys) - len(reader.keys), Medium.HBM)
        if rest is not None:
            self.pool.write(rest, kv_of(self.layout, keys[len(reader.keys) :]))
            self.insert(tokens, namespace, np.concatenate((reader.match.refs, rest)), pin)

    def insert(self, tokens: list[int], namespace: str, refs: RefArray, pin: bool) -> None:
        self.clock.advance(1)
        keys = keys_of(namespace, tokens)
        pinned = self.pinned()
        new, duplicate = [], []
        for key, ref, medium in zip(keys, refs.tolist(), ref_medium(refs).tolist(), strict=True):
            present = self.cached.get(key)
            if present is None:
                new.append(ref)
            elif ref not in pinned and present != ref:
                better = medium < ref_medium(np.array([present]))[0]
                (new if pin and better else duplicate).append(ref)
        result = self.pool.insert(tokens, refs, namespace, pin=pin)
        assert result.new.tolist() == new
        assert result.duplicate.tolist() == duplicate
        assert (result.match is not None) == pin
        now = self.in_index()
        assert now.keys() == self.cached.keys() | set(keys)
        self.cached = now
        if result.match is not None:
            assert result.match.tokens == len(tokens)
            assert result.match.refs.tolist() == [now[key] for key in keys]
            self.readers.append(Reader(result.match, keys))
        if len(result.duplicate):
            self.active.append(result.duplicate)

    def read(self, tokens: list[int], namespace: str, in_hbm: bool) -> Reader:
        self.clock.advance(1)
        expected = self.longest(namespace, tokens)
        match = self.pool.match(tokens, namespace, in_hbm=in_hbm)
        assert match.tokens == len(match.refs) * BLOCK
        reader = Reader(match, expected[: len(match.refs)])
        if in_hbm:
            assert (ref_medium(match.refs) == Medium.HBM).all()
            # Shortened only for lack of room.
            assert len(match.refs) == len(expected) or self.free(Medium.HBM) == 0
            self.readers.append(reader)
            self.expect_only_evictions()
        else:
            assert match.refs.tolist() == [self.cached[key] for key in expected]
            self.readers.append(reader)
        return reader

    def release(self, reader: Reader) -> None:
        self.readers.remove(reader)
        reader.match.release()
        reader.match.release()

    @rule(tokens=prompts, namespace=namespaces, in_hbm=st.booleans())
    def match(self, tokens: list[int], namespace: str, in_hbm: bool) -> None:
        self.read(tokens, namespace, in_hbm)

    @precondition(lambda self: self.cached)
    @rule(data=st.data(), in_hbm=st.booleans(), tail=whole_prompts)
    def match_cached(self, data: st.DataObject, in_hbm: bool, tail: list[int]) -> None:
        namespace, tokens = data.draw(st.sampled_from(sorted(self.cached)))
        self.read([*tokens, *tail], namespace, in_hbm)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def release_one(self, data: st.DataObject) -> None:
        self.release(data.draw(st.sampled_from(self.readers)))

    @precondition(lambda self: self.readers)
    @rule()
    def release_all(self) -> None:
        while self.readers:
            self.release(self.readers[-1])

    @rule(tokens=prompts, namespace=namespaces)
    def delete(self, tokens: list[int], namespace: str) -> None:
        count = self.pool.delete(tokens, namespace)
        whole = keys_of(namespace, tokens)
        held = self.held()
        left = dict(self.cached)
        if whole or not tokens:
            end = len(whole[-1][1]) if whole else 0
            start = tuple(tokens[:end])
            for key in list(left):
                if key[0] == namespace and key[1][:end] == start and key not in held:
                    del left[key]
        for key in reversed(whole):
            children = [k for k in left if k[0] == namespace and k[1][: len(key[1])] == key[1]]
            if key in left and children == [key] and key not in held:
                del left[key]
        assert count == len(self.cached) - len(left)
        assert self.in_index() == left
        self.cached = left

    # --- tiers ----------------------------------------------------------------------------

    @rule(count=st.integers(0, 6))
    def swap_out(self, count: int) -> None:
        room = self.free(Medium.DRAM)
        evictable = self.evictable(Medium.HBM)
        moved = self.pool.swap_out(count)
        assert moved <= count
        if count <= room:
            assert moved >= min(count, evictable)
            self.expect_same_keys()
        else:
            self.expect_only_evictions()

    @precondition(lambda self: self.readers or self.active)
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        active = [refs for refs in self.active if len(refs)]
        in_place = set(self.cached.values())
        read = [
            np.array([ref for ref in reader.match.refs.tolist() if ref in in_place], np.int64)
            for reader in self.readers
        ]
        choices = active + [refs for refs in read if len(refs)]
        if not choices:
            return
        refs = choices[data.draw(st.integers(0, len(choices) - 1))]
        start = data.draw(st.integers(0, len(refs)))
        refs = refs[start : data.draw(st.integers(start, len(refs)))]
        before = self.pool.read(refs)
        self.check_swapped(refs, before)

    def check_swapped(self, refs: RefArray, before: torch.Tensor) -> None:
        cached = self.in_index()
        try:
            moved = self.pool.swap_in(refs)
        except OutOfBlocks:
            assert self.in_index() == cached
            return
        assert (ref_medium(moved) == Medium.HBM).all()
        assert torch.equal(self.pool.read(moved).cpu(), before.cpu())
        in_hbm = ref_medium(refs) == Medium.HBM
        assert (moved[in_hbm] == refs[in_hbm]).all()
        new = dict(zip(refs.tolist(), moved.tolist(), strict=True))
        self.active = [np.array([new.get(r, r) for r in a.tolist()], np.int64) for a in self.active]
        self.expect_only_evictions()

    @rule(blocks=st.integers(0, 5))
    def grow(self, blocks: int) -> None:
        if self.pool.stats().dram.total < 16:
            before = self.free(Medium.DRAM)
            self.pool.grow_dram(blocks)
            assert self.free(Medium.DRAM) == before + blocks

    @rule(blocks=st.integers(0, 6))
    def shrink(self, blocks: int) -> None:
        before = self.pool.stats().dram.total
        gone = self.pool.shrink_dram(blocks)
        assert gone <= blocks
        assert self.pool.stats().dram.total == before - gone
        self.expect_only_evictions()

    # --- always ---------------------------------------------------------------------------

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        assert self.in_index() == self.cached
        stats = self.pool.stats()
        owned = sum(len(refs) for refs in self.active)
        assert stats.hbm.active + stats.dram.active == owned
        assert stats.matches == len(self.readers)

    @invariant()
    def true_to_the_bytes(self) -> None:
        if not hasattr(self, "pool"):
            return
        keys = list(self.cached)
        refs = np.array(list(self.cached.values()), dtype=np.int64)
        assert torch.equal(self.pool.read(refs).cpu(), kv_of(self.layout, keys))
        for reader in self.readers:
            kv = self.pool.read(reader.match.refs).cpu()
            assert torch.equal(kv, kv_of(self.layout, reader.keys))


PoolMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestPool = PoolMachine.TestCase
