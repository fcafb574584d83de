"""What goes first: policies, and the queue of blocks that may go.

A node is a candidate of a medium while its edge has blocks there and nothing below it does;
its blocks go from the end of the edge. Candidates stay in heaps whose order is repaired
lazily, so that using a prefix costs one store and evicting O(log n), without a scan.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from enum import IntEnum
from typing import Literal, Protocol

from memserve.clock import Clock
from memserve.pool.index import Node
from memserve.types import Medium

BlockKey = tuple[Medium, int]  # a block, whatever its generation

# Stale heap entries that are tolerated before the heap is rebuilt: twice the live ones, and
# a few for small heaps.
_STALE_RATIO = 2
_STALE_SLACK = 64


class Eviction(Protocol):
    """A priority for what is cached: the lowest goes first."""

    def stamp(self) -> float:
        """The mark of an access now. Never less than one given before."""

    def priority(self, stamp: float, depth: int) -> float:
        """Of a block last used at `stamp` whose last token is at `depth`; not less for a
        later stamp."""

    def evicted(self, priority: float) -> None:
        """A block of this priority was chosen."""


class LeastRecentlyUsed:
    """The longest unused goes first."""

    def __init__(self, clock: Clock) -> None:
        self._now = clock.now

    def stamp(self) -> float:
        return self._now()

    def priority(self, stamp: float, depth: int) -> float:
        return stamp

    def evicted(self, priority: float) -> None:
        pass


def linear_cost(depth: int) -> float:
    """Relative time to recompute a block that ends at token `depth`: the projections cost the
    same everywhere, attention grows with what comes before. Equal parts at 4096 tokens."""
    return 1.0 + depth / 4096


class CostAware:
    """What is cheapest to recompute goes first, aged by GreedyDual (Young, 1994).

    Blocks have one size, so cost per byte is cost. The priority of an access is the priority
    of the last eviction plus the cost: unused blocks are overtaken sooner or later.
    """

    def __init__(self, cost: Callable[[int], float] = linear_cost) -> None:
        """`cost(depth)`: time to recompute a block that ends at token `depth`, any unit."""
        self._cost = cost
        self._age = 0.0

    def stamp(self) -> float:
        return self._age

    def priority(self, stamp: float, depth: int) -> float:
        return stamp + self._cost(depth)

    def evicted(self, priority: float) -> None:
        self._age = max(self._age, priority)


def make_eviction(policy: Literal["lru", "cost"] | Eviction, clock: Clock) -> Eviction:
    """The policy of a name."""
    if policy == "lru":
        return LeastRecentlyUsed(clock)
    if policy == "cost":
        return CostAware()
    if isinstance(policy, str):
        raise ValueError(f"eviction policy {policy!r}; known: 'lru', 'cost'")
    return policy


class Kind(IntEnum):
    """What a queue offers."""

    HBM = 0  # HBM blocks, to be swapped out, or dropped with what is below them in DRAM
    DRAM_LEAF = 1  # DRAM blocks at the end of all: nothing else goes with them
    DRAM_COVERED = 2  # DRAM blocks with HBM ones behind, which would go with them


class EvictionQueue:
    """The candidates of one kind."""

    def __init__(self, kind: Kind, policy: Eviction, block_tokens: int) -> None:
        self.kind = kind
        self.medium = Medium.HBM if kind is Kind.HBM else Medium.DRAM
        # For every insertion, and enumerations are slow.
        self._slot, self._medium = int(kind), int(self.medium)
        self._leaves = None if kind is Kind.HBM else kind is Kind.DRAM_LEAF
        self._policy = policy
        self._block_tokens = block_tokens
        self._heap: list[tuple[float, int, Node]] = []
        self._serials = itertools.count(1)
        self._compact_at = _STALE_SLACK
        # By the pinned block that each waits for: the node, and the serial that marks it.
        self._parked: dict[BlockKey, tuple[Node, int]] = {}

    def is_candidate(self, node: Node) -> bool:
        if not node.own[self._medium] or node.below[self._medium]:
            return False
        return self._leaves is None or node.is_dram_leaf() == self._leaves

    def offer(self, node: Node) -> None:
        """Queue a node unless it is queued, parked or no candidate."""
        if not node.queued[self._slot] and self.is_candidate(node):
            self._push(node)

    def peek(self) -> Node | None:
        """The candidate of least priority; it stays queued."""
        heap = self._heap
        while heap:
            priority, serial, node = heap[0]
            if serial != node.queued[self._slot]:
                heapq.heappop(heap)
            elif not self.is_candidate(node):
                heapq.heappop(heap)
                node.queued[self._slot] = 0
            elif self._priority(node) > priority:
                heapq.heapreplace(heap, (self._priority(node), serial, node))
            else:
                return node
        return None

    def park(self, node: Node, pinned: BlockKey) -> None:
        """Set aside the node that `peek` gave until this block is released."""
        heapq.heappop(self._heap)
        serial = next(self._serials)  # no entry has it
        node.queued[self._slot] = serial
        self._parked[pinned] = (node, serial)

    def released(self, block: BlockKey) -> None:
        """Nobody reads this block any more: what waited for it may go again."""
        node, serial = self._parked.pop(block, (None, 0))
        if node is not None and node.queued[self._slot] == serial:
            node.queued[self._slot] = 0
            self.offer(node)

    def charge(self, node: Node) -> None:
        """Tell the policy that blocks of this node were chosen."""
        self._policy.evicted(self._priority(node))

    def _priority(self, node: Node) -> float:
        end = node.start + len(node.refs)
        return self._policy.priority(node.stamp, end * self._block_tokens)

    def _push(self, node: Node) -> None:
        serial = next(self._serials)
        node.queued[self._slot] = serial
        heapq.heappush(self._heap, (self._priority(node), serial, node))
        if len(self._heap) > self._compact_at:
            self._compact()

    def _compact(self) -> None:
        slot = self._slot
        self._heap = [entry for entry in self._heap if entry[1] == entry[2].queued[slot]]
        heapq.heapify(self._heap)
        self._compact_at = _STALE_RATIO * len(self._heap) + _STALE_SLACK
