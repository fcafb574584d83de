"""Radix trees against a set of prefixes, whatever order edges are cut and joined in."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.radix import RadixNode, RadixNodes, RadixTree, common_bytes

BLOCK = 2
Prefix = tuple[int, ...]  # whole blocks from the root
BLOCKS = st.sampled_from([(0, 0), (0, 1), (1, 0)])  # some share their first token

tokens = st.lists(st.integers(0, 1), max_size=16).map(tuple)
prompts = st.lists(BLOCKS, max_size=6).map(lambda blocks: sum(blocks, ()))


def as_bytes(prompt: Prefix) -> bytes:
    return np.array(prompt, dtype=np.int32).tobytes()


def as_tokens(data: bytes) -> Prefix:
    return tuple(np.frombuffer(data, dtype=np.int32).tolist())


class Node(RadixNode):
    """Stores with each block the prefix that it ends."""

    __slots__ = ("prefixes",)

    def __init__(self, id: int, parent: Node | None, start: int, edge: bytes) -> None:
        super().__init__(id, parent, start, edge)
        self.prefixes: list[Prefix] = []


class Tree(RadixTree[Node]):
    def __init__(self, nodes: RadixNodes[Node]) -> None:
        super().__init__(nodes, BLOCK)
        self.root = self._new(None, 0, b"")

    def _new(self, parent: Node | None, start: int, edge: bytes) -> Node:
        return Node(next(self._ids), parent, start, edge)

    def split(self, node: Node, at: int) -> Node:
        upper = super().split(node, at)
        upper.prefixes, node.prefixes = node.prefixes[:at], node.prefixes[at:]
        return upper

    def merge(self, node: Node) -> Node:
        child = super().merge(node)
        child.prefixes = node.prefixes + child.prefixes
        return child

    def inner(self) -> list[Node]:
        """All nodes but the root, in an order that does not depend on dictionaries."""
        found = [node for node in self.root.subtree() if node is not self.root]
        return sorted(found, key=lambda node: node.id)


class RadixTreeMachine(RuleBasedStateMachine):
    """Two trees with one table of nodes; the model of each is the set of its prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: RadixNodes[Node] = RadixNodes()
        self.trees = [Tree(self.shared), Tree(self.shared)]
        self.models: list[set[Prefix]] = [set(), set()]

    def pick(self, data: st.DataObject, number: int) -> Node | None:
        nodes = self.trees[number].inner()
        return data.draw(st.sampled_from(nodes)) if nodes else None

    @rule(number=st.integers(0, 1), prompt=prompts)
    def store(self, number: int, prompt: Prefix) -> None:
        tree, data = self.trees[number], as_bytes(prompt)
        nodes, length = tree.follow(tree.root, data)
        node = nodes[-1] if nodes else tree.root
        matched = length // tree.block_bytes - node.start
        if matched < len(node.prefixes):
            if length == len(data):
                return
            node = tree.split(node, matched)
        if length < len(data):
            child = tree.add(node, data[length:])
            ends = range(length // 4 + BLOCK, len(prompt) + 1, BLOCK)
            child.prefixes = [prompt[:end] for end in ends]
            self.models[number].update(child.prefixes)

    @precondition(lambda self: any(self.models))
    @rule(number=st.integers(0, 1), data=st.data())
    def split(self, number: int, data: st.DataObject) -> None:
        node = self.pick(data, number)
        if node is not None and len(node.prefixes) > 1:
            upper = self.trees[number].split(
                node, data.draw(st.integers(1, len(node.prefixes) - 1))
            )
            assert node.parent is upper

    @precondition(lambda self: any(self.models))
    @rule(number=st.integers(0, 1), data=st.data())
    def merge(self, number: int, data: st.DataObject) -> None:
        node = self.pick(data, number)
        if node is not None and len(node.children) == 1:
            (child,) = node.children.values()
            assert self.trees[number].merge(node) is child
            assert node.parent is None
            assert not node.edge
            assert not node.children

    @precondition(lambda self: any(self.models))
    @rule(number=st.integers(0, 1), data=st.data())
    def remove(self, number: int, data: st.DataObject) -> None:
        node = self.pick(data, number)
        if node is not None and not node.children:
            above = node.parent
            assert self.trees[number].remove(node) is above
            self.models[number].difference_update(node.prefixes)

    @rule(number=st.integers(0, 1), prompt=tokens)
    def follow(self, number: int, prompt: Prefix) -> None:
        tree, model = self.trees[number], self.models[number]
        nodes, length = tree.follow(tree.root, as_bytes(prompt))
        most = [end for end in range(BLOCK, len(prompt) + 1, BLOCK) if prompt[:end] in model]
        assert length == 4 * max(most, default=0)
        found = [prefix for node in nodes for prefix in node.prefixes]
        assert found[: len(most)] == [prompt[:end] for end in most]
        # The last node has a block in common, too.
        assert not nodes or nodes[-1].start * tree.block_bytes < length

    @invariant()
    def every_edge_has_its_own_prefixes(self) -> None:
        everywhere = {}
        for tree, model in zip(self.trees, self.models, strict=True):
            stored: list[Prefix] = []
            before: dict[int, Prefix] = {tree.root.id: ()}
            for node in tree.root.subtree():
                for key, child in node.children.items():
                    assert child.parent is node
                    assert child.edge[: tree.block_bytes] == key
                if node is tree.root:
                    continue
                assert node.parent is not None
                prompt = before[node.parent.id]  # parents come first
                assert node.start == len(prompt) // BLOCK
                assert node.edge
                before[node.id] = prompt + as_tokens(node.edge)
                ends = range(len(prompt) + BLOCK, len(before[node.id]) + 1, BLOCK)
                assert node.prefixes == [before[node.id][:end] for end in ends]
                stored += node.prefixes
                everywhere[node.id] = node
            assert len(stored) == len(model)
            assert set(stored) == model
        assert everywhere == self.shared.by_id


RadixTreeMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
TestRadixTree = RadixTreeMachine.TestCase


@given(edge=tokens, data=tokens, offset=st.integers(0, 3), at=st.integers(0, 3))
def test_common_bytes_are_whole_blocks_of_equal_tokens(
    edge: Prefix, data: Prefix, offset: int, at: int
) -> None:
    offset, at = min(offset, len(edge)), min(at, len(data))
    common = 0
    for ours, theirs in zip(edge[offset:], data[at:], strict=False):
        if ours != theirs:
            break
        common += 1
    found = common_bytes(as_bytes(edge), 4 * offset, as_bytes(data), 4 * at, 4 * BLOCK)
    assert found == 4 * (common - common % BLOCK)
