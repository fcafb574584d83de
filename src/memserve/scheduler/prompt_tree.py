"""`PromptTree`, the global prompt trees: which instance holds the KV of which prefixes.

Logically one tree per role; in memory one radix tree per namespace and block size, whose edges
carry one bit per holder, and one bit mask per role. So one lookup serves all instances, and a
change of role moves nothing. Sources: the instances' KV events, and expectations, which bridge
the time from a decision to its events.

No I/O and no clock. Owned by one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple, cast

import msgspec
import numpy as np

from memserve.radix import block_digests
from memserve.scheduler.block_table import (
    BlockHash,
    BlockTable,
    Hashes,
    Numbers,
    References,
    distinct,
)
from memserve.scheduler.holder_tree import HolderTree, Node, SharedNodes
from memserve.types import InstanceId, Namespace, Role, TokenArray

# Seconds for which a routed prompt counts as held without KV events of it. Longer than a prompt
# waits and computes: between expiry and its events, no instance seems to hold the prefix.
EXPECT_SECONDS = 60.0
# Maximum of node reads of one `in_host` call: about 0.2 ms. The longest prefixes are read first;
# those that are not read count as in the device's memory, which changes predictions little.
_HOST_READS = 64
NODES_AT_ONCE = 500  # counted without a pause: 0.25 to 0.5 ms

Prefix = tuple[Namespace, bytes]  # bytes: digest of a block and all blocks before it


class _Holder:
    """An instance in the trees: its slot (bit position), role and block table."""

    def __init__(
        self, instance: InstanceId, slot: int, block_tokens: int, role: Role, references: bool
    ) -> None:
        self.instance = instance
        self.slot = slot
        self.bit = 1 << slot
        self.block_tokens = block_tokens
        self.role = role
        self.references = references
        self.table: References | Hashes = References() if references else Hashes()


class _Expectation(NamedTuple):
    deadline: float
    slot: int
    tree: HolderTree
    data: bytes


class PromptTreeStats(msgspec.Struct, frozen=True):
    """Sizes of the trees at one moment."""

    instances: int
    namespaces: int
    nodes: int
    held_blocks: int  # a block with n holders counts n times
    tree_blocks: int  # a block with n holders counts once
    expectations: int
    num_bytes: int  # of tokens, tables and block numbers, without Python's object overhead


class PromptTree:
    """Finds the longest known prefix of a prompt on each instance."""

    def __init__(self, expect_seconds: float = EXPECT_SECONDS) -> None:
        self._expect_seconds = expect_seconds
        self._shared = SharedNodes()
        self._trees: dict[Namespace, dict[int, HolderTree]] = {}  # by block_tokens
        self._holders: dict[InstanceId, _Holder] = {}
        self._by_slot: list[_Holder | None] = []
        self._roles = dict.fromkeys(Role, 0)  # masks of holders' bits
        self._expected: deque[_Expectation] = deque()  # ascending deadlines
        self._expected_bytes = 0  # of their tokens

    # --- members --------------------------------------------------------------------------

    def join(
        self,
        instance: InstanceId,
        block_tokens: int,
        role: Role = Role.COLOCATED,
        *,
        references: bool = False,
    ) -> None:
        """Add an instance; it begins empty, even if it was known.

        `references`: its events name blocks by packed references without owner (memserve);
        otherwise by hashes of any kind (vLLM). Raises ValueError for `block_tokens` < 1.
        """
        if block_tokens < 1:
            raise ValueError(f"blocks of {block_tokens} tokens")
        self.leave(instance)
        slot = next((s for s, h in enumerate(self._by_slot) if h is None), len(self._by_slot))
        holder = _Holder(instance, slot, block_tokens, role, references)
        if slot == len(self._by_slot):
            self._by_slot.append(holder)
        else:
            self._by_slot[slot] = holder
        self._holders[instance] = holder
        self._shared.tables[slot] = holder.table
        self._roles[role] |= holder.bit

    def leave(self, instance: InstanceId) -> None:
        """Remove an instance; later matches do not name it. Unknown ids are ignored."""
        holder = self._holders.pop(instance, None)
        if holder is None:
            return
        self._empty(holder)
        self._roles[holder.role] &= ~holder.bit
        self._by_slot[holder.slot] = None
        del self._shared.tables[holder.slot]

    def set_role(self, instance: InstanceId, role: Role) -> None:
        """Change an instance's role; its blocks stay. Raises KeyError for an unknown instance."""
        holder = self._holders[instance]
        self._roles[holder.role] &= ~holder.bit
        self._roles[role] |= holder.bit
        holder.role = role

    def __contains__(self, instance: InstanceId) -> bool:
        return instance in self._holders

    @property
    def instances(self) -> list[InstanceId]:
        return list(self._holders)

    # --- events ---------------------------------------------------------------------------

    def stored(
        self,
        instance: InstanceId,
        namespace: Namespace,
        parent: BlockHash | None,
        hashes: Sequence[BlockHash],
        tokens: TokenArray,
        medium: str | None = None,
    ) -> bool:
        """Record that an instance holds blocks `hashes` [n] for `tokens` [n * block_tokens].

        The blocks follow the instance's block `parent`; with None they begin a prompt of
        `namespace`, which is only read in that case. Returns False if the instance does not hold
        the parent as far as known: an event was missed. Raises KeyError for an unknown instance,
        ValueError for lengths that do not match, repeated hashes, or invalid references.
        """
        holder = self._holders[instance]
        if len(tokens) != len(hashes) * holder.block_tokens or len(set(hashes)) != len(hashes):
            raise ValueError(
                f"{instance}: {len(set(hashes))} different blocks of {holder.block_tokens} "
                f"tokens for {len(hashes)} hashes and {len(tokens)} tokens"
            )
        if not hashes:
            return True
        place = self._behind(holder, parent, namespace)
        if place is None:
            return False
        try:
            numbers, data = holder.table.number(hashes, medium), tokens.tobytes()
        except ValueError:
            self._drop_if_empty(place[0].tree)
            raise
        if holder.table.node[numbers].any():
            astray = place[0].tree.differing(*place, data, holder.slot, numbers)
            if len(astray):  # stored elsewhere: their removal was missed, or comes later
                self._drop(holder, astray)
                # `Hashes` freed the numbers of the dropped blocks: number the hashes again.
                numbers = holder.table.number(hashes, medium)
                place = self._behind(holder, parent, namespace)
                if place is None:
                    return False
        place[0].tree.store(*place, data, holder.slot, numbers)
        return True

    def removed(
        self, instance: InstanceId, hashes: Sequence[BlockHash], medium: str | None = None
    ) -> int:
        """Record that an instance no longer holds blocks `hashes` in `medium`. Returns the number
        of them that it now holds in no medium. Raises KeyError for an unknown instance."""
        holder = self._holders[instance]
        numbers = holder.table.forget(hashes, medium)
        self._drop(holder, distinct(numbers))
        return len(numbers)

    def cleared(self, instance: InstanceId) -> None:
        """Record that an instance holds nothing, and give up its expectations. Raises KeyError
        for an unknown instance."""
        holder = self._holders[instance]
        self._empty(holder)
        holder.table = References() if holder.references else Hashes()
        self._shared.tables[holder.slot] = holder.table

    # --- lookups --------------------------------------------------------------------------

    def match(
        self, namespace: Namespace, tokens: TokenArray, role: Role | None = None
    ) -> dict[InstanceId, int]:
        """Return the length in tokens of the longest known prefix, by instance, in whole blocks.
        Instances without a match are absent. `role`: only instances of that role."""
        found: dict[InstanceId, int] = {}
        trees = self._trees.get(namespace)
        if trees is None:
            return found
        data = tokens.tobytes()
        alive = (1 << len(self._by_slot)) - 1 if role is None else self._roles[role]
        for tree in trees.values():
            for ended, at in tree.walk(data, alive):
                length = at >> 2
                while ended:
                    low = ended & -ended
                    holder = self._by_slot[low.bit_length() - 1]
                    assert holder is not None
                    found[holder.instance] = length
                    ended ^= low
        return found

    def in_host(
        self, namespace: Namespace, tokens: TokenArray, matches: Mapping[InstanceId, int]
    ) -> dict[InstanceId, int]:
        """Return the tokens of matched prefixes without a copy in the device's memory, by instance;
        instances without such tokens are absent. `matches`: from `match` for the same prompt."""
        found: dict[InstanceId, int] = {}
        holders = [
            (length, holder)
            for instance, length in matches.items()
            if (holder := self._holders.get(instance)) is not None and holder.table.uses_host
        ]
        if not holders:
            return found
        data, reads = tokens.tobytes(), _HOST_READS
        paths: dict[int, list[Node]] = {}  # by block size
        for length, holder in sorted(holders, key=lambda each: -each[0]):
            size = holder.block_tokens
            if size not in paths:
                tree = self._tree(namespace, size)
                paths[size] = tree.follow(tree.root, data)[0]
            count = 0
            for node in paths[size]:
                numbers = node.blocks.get(holder.slot)
                left = length // size - node.start
                if numbers is not None and left > 0:
                    count += holder.table.in_host(numbers[:left])
                    reads -= 1
            if count:
                found[holder.instance] = count * size
            if reads <= 0:
                break
        return found

    def expect(
        self, instance: InstanceId, namespace: Namespace, tokens: TokenArray, now: float
    ) -> None:
        """Count the whole blocks of a prompt as held by `instance` until KV events confirm them,
        the instance's cache is cleared, or `expect_seconds` pass. Ignores unknown instances."""
        holder = self._holders.get(instance)
        if holder is None:
            return
        rest = len(tokens) % holder.block_tokens
        if rest == len(tokens):
            return
        data = (tokens[:-rest] if rest else tokens).tobytes()
        tree = self._tree(namespace, holder.block_tokens)
        deadline = now + self._expect_seconds
        if tree.expect(data, holder.slot, now, deadline):
            self._expected.append(_Expectation(deadline, holder.slot, tree, data))
            self._expected_bytes += len(data)

    def expire(self, now: float) -> int:
        """Give up the expectations whose deadline has passed; returns their number. Call it
        regularly, with the clock of `expect`."""
        count = 0
        while self._expected and self._expected[0].deadline <= now:
            _, slot, tree, data = self._expected.popleft()
            self._expected_bytes -= len(data)
            tree.give_up(data, slot, now)
            self._drop_if_empty(tree)
            count += 1
        return count

    # --- for tests, operators and metrics -------------------------------------------------

    def held(self, instance: InstanceId) -> set[Prefix]:
        """Return the prefixes that an instance holds according to its events, without
        expectations. Reads every node."""
        holder = self._holders[instance]
        found: set[Prefix] = set()
        for by_size in self._trees.values():
            tree = by_size.get(holder.block_tokens)
            if tree is None:
                continue
            digests: dict[int, bytes] = {}  # at the end of each node
            for node in tree.subtree():
                assert node.parent is not None
                chain = block_digests(node.edge, tree.block_bytes, digests.get(node.parent.id, b""))
                digests[node.id] = chain[-1]
                if holder.slot in node.blocks:
                    found.update((tree.namespace, digest) for digest in chain)
        return found

    def held_blocks(self, instance: InstanceId) -> int:
        return self._holders[instance].table.stored

    def stats(self) -> PromptTreeStats:
        """Return the sizes of the trees. Reads every node."""
        reading = self.reading_stats()
        while True:
            try:
                next(reading)
            except StopIteration as end:
                return cast(PromptTreeStats, end.value)

    def nodes(self) -> list[Node]:
        """Return all nodes, unordered. A node that is removed later has no `parent` any more."""
        return list(self._shared.by_id.values())

    def table(self, slot: int) -> tuple[InstanceId, References | Hashes]:
        """Return the holder of a slot, and the table of its blocks."""
        holder = self._by_slot[slot]
        assert holder is not None
        return holder.instance, holder.table

    def reading_stats(self) -> Generator[None, None, PromptTreeStats]:
        """Return the sizes of the trees; a step reads NODES_AT_ONCE nodes. Changes between the
        steps may be included or not."""
        nodes = self.nodes()
        tree_blocks = num_bytes = 0
        for first in range(0, len(nodes), NODES_AT_ONCE):
            if first:
                yield
            for node in nodes[first : first + NODES_AT_ONCE]:
                tree_blocks += len(node)
                num_bytes += len(node.edge) + sum(each.nbytes for each in node.blocks.values())
        tables: list[BlockTable] = [holder.table for holder in self._holders.values()]
        return PromptTreeStats(
            instances=len(self._holders),
            namespaces=len(self._trees),
            nodes=len(nodes),
            held_blocks=sum(table.stored for table in tables),
            tree_blocks=tree_blocks,
            expectations=len(self._expected),
            num_bytes=num_bytes + sum(table.num_bytes for table in tables) + self._expected_bytes,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if nodes, tables and trees disagree. Reads every node."""
        nodes: dict[int, Node] = {}
        for by_size in self._trees.values():
            for tree in by_size.values():
                assert tree, f"an empty tree of {tree.namespace!r}"
                for node in tree.subtree():
                    node.check()
                    nodes[node.id] = node
        assert nodes == self._shared.by_id
        assert self._expected_bytes == sum(len(each.data) for each in self._expected)
        for holder in self._holders.values():
            mine = [node for node in nodes.values() if holder.slot in node.blocks]
            assert holder.table.stored == sum(map(len, mine))
            assert sorted(node.id for node in mine) == holder.table.homes()
            for node in mine:
                numbers = node.blocks[holder.slot]
                assert (holder.table.node[numbers] == node.id).all()
                depths = np.arange(node.start, node.start + len(node))
                assert (holder.table.depth(numbers) == depths).all()

    # --- internal -------------------------------------------------------------------------

    def _behind(
        self, holder: _Holder, parent: BlockHash | None, namespace: Namespace
    ) -> tuple[Node, int] | None:
        """Return the node of block `parent` and the depth after it; None if the holder does not
        have the block."""
        if parent is None:
            return self._tree(namespace, holder.block_tokens).root, 0
        number = holder.table.known(parent)
        if number is None or not (home := int(holder.table.node[number])):
            return None
        one = np.array([number], dtype=np.int32)
        return self._shared.by_id[home], int(holder.table.depth(one)[0]) + 1

    def _drop(self, holder: _Holder, numbers: Numbers) -> None:
        """Remove stored blocks from their nodes; `numbers` are distinct."""
        homes, depths = holder.table.node[numbers], holder.table.depth(numbers)
        for home in distinct(homes).tolist():
            # An earlier `drop` of this loop may have merged this node into its child, which keeps
            # its own id: look the blocks up again.
            node = self._shared.by_id.get(home)
            mine = homes == home
            if node is None or node.blocks.get(holder.slot) is None:
                self._drop(holder, numbers[mine])
                continue
            tree = node.tree
            tree.drop(node, holder.slot, np.sort(depths[mine]) - node.start)
            self._drop_if_empty(tree)

    def _empty(self, holder: _Holder) -> None:
        for each in [each for each in self._expected if each.slot == holder.slot]:
            each.tree.give_up(each.data, holder.slot, np.inf)
            self._expected_bytes -= len(each.data)
            self._drop_if_empty(each.tree)
        self._expected = deque(each for each in self._expected if each.slot != holder.slot)
        for home in holder.table.homes():
            node = self._shared.by_id.get(home)  # None: merged into a node that comes later
            if node is not None and holder.slot in node.blocks:
                tree = node.tree
                tree.drop(node, holder.slot, np.arange(len(node)))
                self._drop_if_empty(tree)

    def _tree(self, namespace: Namespace, block_tokens: int) -> HolderTree:
        by_size = self._trees.setdefault(namespace, {})
        tree = by_size.get(block_tokens)
        if tree is None:
            tree = by_size[block_tokens] = HolderTree(self._shared, namespace, block_tokens)
        return tree

    def _drop_if_empty(self, tree: HolderTree) -> None:
        by_size = self._trees.get(tree.namespace, {})
        block_tokens = tree.block_tokens
        if not tree and by_size.get(block_tokens) is tree:
            del by_size[block_tokens]
            if not by_size:
                del self._trees[tree.namespace]
