"""Random events of several instances against a naive model of who holds which prefix."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.radix import block_digests
from memserve.scheduler.prompt_tree import PromptTree
from memserve.types import GENERATION_BITS, INDEX_BITS, InstanceId, Namespace, Role

BLOCK = 2
INSTANCES = [InstanceId(f"i{n}") for n in range(4)]
HOST = 1 << (GENERATION_BITS + INDEX_BITS)  # of a packed reference: a block of host memory
MEDIA = ("GPU", "CPU")
Key = tuple[str, tuple[int, ...]]  # namespace, all tokens up to the end of a block

instances = st.sampled_from(INSTANCES)
namespaces = st.sampled_from([Namespace(""), Namespace(""), Namespace("salt:x")])
prompts = st.lists(st.sampled_from([(0, 0), (0, 1), (1, 0)]), max_size=6).map(
    lambda blocks: tuple(token for block in blocks for token in block)
)


def array(tokens: tuple[int, ...]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def ends(tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tokens[:end] for end in range(BLOCK, len(tokens) + 1, BLOCK)]


class PromptTreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tree = PromptTree(expect_seconds=10.0)
        self.now = 0.0
        self.held: dict[InstanceId, dict[Key, int]] = {}
        self.expected: dict[InstanceId, dict[Key, float]] = {}
        self.roles: dict[InstanceId, Role] = {}
        self.references: dict[InstanceId, bool] = {}
        self.media: dict[tuple[InstanceId, int], set[str]] = {}  # by holder and name
        self.names = itertools.count(1)

    def name(self) -> int:
        return next(self.names) << 24  # as packed references: index, generation 0

    @rule(instance=instances, references=st.booleans(), role=st.sampled_from(Role))
    def join(self, instance: InstanceId, references: bool, role: Role) -> None:
        self.tree.join(instance, BLOCK, role, references=references)
        self.held[instance], self.expected[instance] = {}, {}
        self.roles[instance] = role
        self.references[instance] = references
        self.forget(instance)

    def forget(self, instance: InstanceId) -> None:
        self.media = {key: media for key, media in self.media.items() if key[0] != instance}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        instance = data.draw(st.sampled_from(sorted(self.held)))
        self.tree.leave(instance)
        del self.held[instance], self.expected[instance], self.roles[instance]

    @precondition(lambda self: self.held)
    @rule(data=st.data(), role=st.sampled_from(Role))
    def change_role(self, data: st.DataObject, role: Role) -> None:
        instance = data.draw(st.sampled_from(sorted(self.held)))
        self.tree.set_role(instance, role)
        self.roles[instance] = role

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        namespace=namespaces,
        tokens=prompts,
        rename=st.booleans(),
        medium=st.sampled_from(MEDIA),
    )
    def store(
        self,
        data: st.DataObject,
        namespace: Namespace,
        tokens: tuple[int, ...],
        rename: bool,
        medium: str,
    ) -> None:
        instance = data.draw(st.sampled_from(sorted(self.held)))
        held = self.held[instance]
        keys = [(namespace, end) for end in ends(tokens)]
        first = data.draw(st.integers(0, len(keys)))
        parent = keys[first - 1] if first else None
        own = HOST if medium == "CPU" else 0
        hashes = [
            self.name() | own if rename or key not in held else held[key] for key in keys[first:]
        ]
        named = parent is None or parent in held or not hashes
        ok = self.tree.stored(
            instance,
            namespace if parent is None else Namespace("ignored"),
            None if parent is None else held.get(parent, 1),
            hashes,
            array(tokens[first * BLOCK :]),
            medium,
        )
        assert ok == named
        if named:
            for key, name in zip(keys[first:], hashes, strict=True):
                held[key] = name
                self.expected[instance].pop(key, None)
                media = self.media.setdefault((instance, name), set())
                media.add(medium)
                if self.references[instance]:  # the name says it
                    self.media[instance, name] = {"CPU" if name & HOST else "GPU"}

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def steal(self, data: st.DataObject) -> None:
        """A block's name turns up elsewhere: its removal was lost."""
        instance = data.draw(st.sampled_from(sorted(i for i in self.held if self.held[i])))
        held = self.held[instance]
        key = data.draw(st.sampled_from(sorted(held)))
        name = held.pop(key)
        tokens = data.draw(prompts.filter(bool))[:BLOCK]
        medium = sorted(self.media[instance, name])[0]
        assert self.tree.stored(instance, Namespace(""), None, [name], array(tokens), medium)
        if key != ("", tokens):
            self.expected[instance].pop(key, None)
        held["", tokens] = name
        self.expected[instance].pop(("", tokens), None)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), unknown=st.booleans())
    def remove(self, data: st.DataObject, unknown: bool) -> None:
        instance = data.draw(st.sampled_from(sorted(i for i in self.held if self.held[i])))
        held = self.held[instance]
        gone = data.draw(st.lists(st.sampled_from(sorted(held)), unique=True))
        hashes = [held[key] for key in gone] + [self.name()] * unknown
        assert sum(self.tree.removed(instance, hashes, each) for each in MEDIA) == len(gone)
        for key in gone:
            del held[key]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        instance = data.draw(st.sampled_from(sorted(self.held)))
        self.tree.cleared(instance)
        self.forget(instance)
        self.held[instance], self.expected[instance] = {}, {}

    @rule(instance=instances, namespace=namespaces, tokens=prompts, tail=st.integers(0, 1))
    def expect(
        self, instance: InstanceId, namespace: Namespace, tokens: tuple[int, ...], tail: int
    ) -> None:
        self.tree.expect(instance, namespace, array(tokens + (7,) * tail), self.now)
        if instance in self.held:
            for end in ends(tokens):
                if (namespace, end) not in self.held[instance]:
                    self.expected[instance][namespace, end] = self.now + 10.0

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.tree.expire(self.now)
        for keys in self.expected.values():
            for key in [key for key, until in keys.items() if until <= self.now]:
                del keys[key]

    @rule(namespace=namespaces, tokens=prompts, tail=st.integers(0, 1))
    def match(self, namespace: Namespace, tokens: tuple[int, ...], tail: int) -> None:
        expected = {}
        for instance, held in self.held.items():
            length = 0
            for end in ends(tokens):
                key = (namespace, end)
                if key not in held and key not in self.expected[instance]:
                    break
                length = len(end)
            if length:
                expected[instance] = length
        given = array(tokens + (7,) * tail)
        assert self.tree.match(namespace, given) == expected
        in_host = {
            instance: BLOCK * count
            for instance, length in expected.items()
            if (count := sum(self.in_host(instance, namespace, tokens[:length])))
        }
        assert self.tree.in_host(namespace, given, expected) == in_host
        for role in Role:
            mine = {i: n for i, n in expected.items() if self.roles[i] is role}
            assert self.tree.match(namespace, given, role) == mine

    def in_host(
        self, instance: InstanceId, namespace: Namespace, tokens: tuple[int, ...]
    ) -> list[bool]:
        """By block of a matched prefix, whether its KV is in host memory alone."""
        names = (self.held[instance].get((namespace, end)) for end in ends(tokens))
        return [name is not None and "GPU" not in self.media[instance, name] for name in names]

    @invariant()
    def exact(self) -> None:
        for instance, held in self.held.items():
            digests = {
                (key[0], block_digests(array(key[1]).tobytes(), 4 * BLOCK)[-1]) for key in held
            }
            assert self.tree.held(instance) == digests
            assert self.tree.held_blocks(instance) == len(held)

    @invariant()
    def canonical(self) -> None:
        self.tree.check_integrity()
        expected = [set(keys) for keys in self.expected.values()]
        needed = {
            (key[0], end)
            for keys in [*map(set, self.held.values()), *expected]
            for key in keys
            for end in ends(key[1])
        }
        stats = self.tree.stats()
        assert stats.tree_blocks == len(needed)
        with patch("memserve.scheduler.prompt_tree.NODES_AT_ONCE", 1):
            pieces = list(self.tree.reading_stats())
            assert len(pieces) == max(0, stats.nodes - 1)
            assert self.tree.stats() == stats


PromptTreeMachine.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestPromptTree = PromptTreeMachine.TestCase
