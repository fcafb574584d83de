"""Eviction order: the policies, and the queues of nodes whose blocks may be evicted.

A node is a candidate of a medium if its edge has blocks of that medium and no node below has any.
Its blocks are evicted from the end of the edge. Candidates are in heaps whose order is repaired
lazily: an access to a prefix costs one store per node, an eviction O(log n), without a scan.
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

BlockKey = tuple[Medium, int]  # medium and block index, without generation

# The heap is rebuilt when it is longer than _STALE_RATIO * live entries + _STALE_SLACK.
_STALE_RATIO = 2
_STALE_SLACK = 64


class Eviction(Protocol):
    """An eviction policy: gives cached blocks priorities; the lowest is evicted first."""

    def stamp(self) -> float:
        """Return the stamp of an access now; stamps never decrease."""

    def priority(self, stamp: float, depth: int) -> float:
        """Return the priority of a block that was last used at `stamp` and ends at token
        `depth`; it must not decrease with `stamp`."""

    def evicted(self, priority: float) -> None:
        """Called when a block of this priority was chosen for eviction or for a swap out."""


class LeastRecentlyUsed:
    """LRU: the priority is the time of the last access."""

    def __init__(self, clock: Clock) -> None:
        self._now = clock.now

    def stamp(self) -> float:
        return self._now()

    def priority(self, stamp: float, depth: int) -> float:
        return stamp

    def evicted(self, priority: float) -> None:
        pass


def linear_cost(depth: int) -> float:
    """Return the relative time to recompute a block that ends at token `depth`.

    The projections cost 1 per block; attention grows with `depth` and costs 1 at 4096 tokens.
    """
    return 1.0 + depth / 4096


class CostAware:
    """GreedyDual (Young, 1994): the cheapest block to recompute is evicted first, with ageing.

    Blocks have one size, so cost per byte is cost. A block's priority is the highest evicted
    priority at its last access plus its cost, so that unused blocks are evicted in the end.
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
    """Return the policy with this name, or `policy` itself. Raises ValueError."""
    if policy == "lru":
        return LeastRecentlyUsed(clock)
    if policy == "cost":
        return CostAware()
    if isinstance(policy, str):
        raise ValueError(f"eviction policy {policy!r}; known: 'lru', 'cost'")
    return policy


class Kind(IntEnum):
    """The kind of blocks that a queue offers."""

    HBM = 0  # HBM blocks: swapped out, or dropped together with the DRAM blocks behind them
    DRAM_LEAF = 1  # DRAM blocks without blocks behind them
    DRAM_COVERED = 2  # DRAM blocks with HBM blocks behind them; both are dropped together


class EvictionQueue:
    """A priority queue of the candidate nodes of one kind."""

    def __init__(self, kind: Kind, policy: Eviction, block_tokens: int) -> None:
        self.kind = kind
        self.medium = Medium.HBM if kind is Kind.HBM else Medium.DRAM
        # Plain ints for hot paths: access to an enumeration's member is slow.
        self._slot, self._medium = int(kind), int(self.medium)
        self._leaves = None if kind is Kind.HBM else kind is Kind.DRAM_LEAF
        self._policy = policy
        self._block_tokens = block_tokens
        self._heap: list[tuple[float, int, Node]] = []
        self._serials = itertools.count(1)
        self._compact_at = _STALE_SLACK
        # Pinned block -> the node that waits for its last unpin, and the node's serial.
        self._parked: dict[BlockKey, tuple[Node, int]] = {}

    def is_candidate(self, node: Node) -> bool:
        if not node.own[self._medium] or node.below[self._medium]:
            return False
        return self._leaves is None or node.is_dram_leaf() == self._leaves

    def offer(self, node: Node) -> None:
        """Queue the node if it is a candidate and neither queued nor parked."""
        if not node.queued[self._slot] and self.is_candidate(node):
            self._push(node)

    def peek(self) -> Node | None:
        """Return the candidate of lowest priority, or None; it stays queued."""
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
        """Remove the node that `peek` returned from the heap until `released(pinned)`."""
        heapq.heappop(self._heap)
        serial = next(self._serials)  # in no heap entry: marks the node as parked
        node.queued[self._slot] = serial
        self._parked[pinned] = (node, serial)

    def released(self, block: BlockKey) -> None:
        """Queue the node that waits for this block, which has no pins any more."""
        node, serial = self._parked.pop(block, (None, 0))
        if node is not None and node.queued[self._slot] == serial:
            node.queued[self._slot] = 0
            self.offer(node)

    def charge(self, node: Node) -> None:
        """Report to the policy that blocks of this node were chosen."""
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
